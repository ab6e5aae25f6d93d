"""Mixtures of experts: what fires is what a plain loop over experts says, and C1 and C4 what their definitions say."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from probes.live import match
from probes.live.experts import fire, gate_weights, outputs, recombine
from probes.live.hooks import capture, same_bits
from probes.live.load import load
from probes.live.sites import EXPERT_ROLES, Layer, Mixture, ffns, layers, locate, sites
from probes.suite import chance, constants
from probes.suite.geometry import geometry as geometry_of
from probes.suite.mixture import read_mixture
from probes.suite.readings import MIXTURE, own_activations, read
from tests.commands import too_wide
from tests.probes.mixtures import CONFIGS, make, save
from vindex.__main__ import main
from vindex.errors import ProbeError

IDS = torch.randint(0, 2048, (2, 48), generator=torch.Generator().manual_seed(0))
WAYS = ("eager", "grouped_mm", "batched_mm")


def seen_in(model):
    """(mixture, what MIXTURE's roles saw) for each mixture layer, of a pass over both rows."""
    mixtures = [ffn for ffn in ffns(model) if isinstance(ffn, Mixture)]
    with capture(model, sites(model, *MIXTURE, only=[each.number for each in mixtures])) as seen:
        model(IDS)
    return [(each, *(seen[role, each.number] for role in MIXTURE)) for each in mixtures]


def plain_loop(mixture, x):
    """{(token, expert): (w, gate, up, h)} and the FFN's output, written out from the weights, the router's included."""
    logits = x @ mixture.mlp.gate.weight.T
    best = logits.float().softmax(-1).topk(mixture.mlp.gate.top_k)
    found, output = {}, torch.zeros_like(x, dtype=torch.float32)
    for token in range(len(x)):
        total = best.values[token].sum() if mixture.mlp.gate.norm_topk_prob else 1.0
        for probability, expert in zip(best.values[token], best.indices[token].tolist(), strict=True):
            gate_up, down = mixture.experts.gate_up_proj[expert], mixture.experts.down_proj[expert]
            neurons = len(gate_up) // 2
            gate, up = gate_up[:neurons] @ x[token], gate_up[neurons:] @ x[token]
            found[token, expert] = (probability / total, gate, up, silu(gate) * up)
            output[token] += probability / total * (down @ (silu(gate) * up)).float()
        if mixture.shared is not None:
            output[token] += (mixture.mlp.shared_expert_gate(x[token]).sigmoid() * mixture.shared(x[token])).float()
    return found, output


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_fires_is_what_a_plain_loop_over_experts_says(kind, way):
    model = make(kind, way, norm_topk_prob=kind != "qwen2_moe")
    found = seen_in(model)
    assert len(found) == (2 if kind == "mixed" else 3)
    for mixture, x, chosen, weight, output in found:
        fired = fire(mixture, x, chosen, weight)
        expected, loop_output = plain_loop(mixture, x)
        assert len(fired[0].token) == len(expected) == x.shape[0] * 3
        for pair, (token, expert) in enumerate(zip(fired[0].token.tolist(), fired[0].expert.tolist(), strict=True)):
            mine = fired[0].weight[pair], fired[0].gate[pair], fired[0].up[pair], fired[0].hidden[pair]
            for one, other in zip(mine, expected[token, expert], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert len(fired) == (1 if mixture.shared is None else 2)
        if mixture.shared is not None:
            torch.testing.assert_close(fired[1].hidden, silu(mixture.shared.gate_proj(x)) * mixture.shared.up_proj(x))
        module = output.reshape(-1, 32)
        torch.testing.assert_close(recombine(list(outputs(mixture, fired)), len(x)), module, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loop_output, module, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_in_bfloat16_the_recombined_output_is_the_modules_to_rounding(way):
    for mixture, x, chosen, weight, output in seen_in(make("qwen2_moe", way).bfloat16()):
        fired = fire(mixture, x, chosen, weight)
        assert fired[0].hidden.dtype == torch.bfloat16
        module = output.reshape(-1, 32).float()
        assert (recombine(list(outputs(mixture, fired)), len(x)) - module).norm() < 0.015 * module.norm()


def test_looking_changes_nothing():
    for kind in ("mixed", "qwen2_moe"):
        model = make(kind, "grouped_mm")
        bare = model(IDS).logits
        mixtures = [ffn.number for ffn in ffns(model) if isinstance(ffn, Mixture)]
        with capture(model, sites(model, *EXPERT_ROLES, "mlp_in", "mlp_out", "residual", only=mixtures)):
            assert same_bits(bare, model(IDS).logits)
        read(model, IDS)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["mixed", "qwen2_moe"])
def test_every_figure_is_what_the_definitions_say(kind):
    """Against the layer as dense tensors (tokens, experts, neurons), NaN where an expert does not fire."""
    model = make(kind)
    readings = read(model, IDS)
    for mixture, x, chosen, weight, _ in seen_in(model):
        parts = fire(mixture, x[:48], chosen[:48], weight[:48])
        tables = []  # per part (experts, neurons, tokens, 4): h, gate·up, w·h, silu(gate) beside up
        for part in parts:
            offset = 0 if part is parts[0] else 8
            table = torch.full((4, 48, 8 if part is parts[0] else 1, part.hidden.shape[1]), torch.nan)
            values = (part.hidden, part.gate * part.up, part.hidden * part.weight[:, None], part.up)
            for place, each in enumerate(values):
                table[place, part.token, part.expert - offset] = each
            tables.append(table.flatten(2))
        h, linear_h, weighted, _ = torch.cat(tables, dim=2)
        found = readings[0].layers[mixture.number]
        fires = ~h.isnan()
        assert found.mixture.active == pytest.approx(float(fires.float().mean()))
        assert found.mixture.load == tuple(chosen[:48].flatten().bincount(minlength=8).tolist())
        for part, kept in ((found.sparsity, h), (found.sparsity_no_sink, h[1:])):
            values = kept[~kept.isnan()]
            assert part.rms == pytest.approx(float(values.square().mean().sqrt()), rel=1e-5)
            assert part.below[3] == pytest.approx(float((values.abs() < 0.01).float().mean()), rel=1e-5)
            assert part.below_relative[1] == pytest.approx(
                float((values.abs() < 0.05 * part.rms).float().mean()), rel=1e-2
            )
        assert found.mixture.below == pytest.approx(float((weighted[fires].abs() < 0.01).float().mean()), rel=1e-5)

        def pooled(table):
            squares = (table - table.nanmean(0)).square().nansum()
            return float(squares / ((~table.isnan()).sum(0) - 1).clamp_min(0).sum())

        assert found.temperature.all_tokens == pytest.approx(pooled(h), rel=1e-4)
        assert found.temperature.no_sink == pytest.approx(pooled(h[1:]), rel=1e-4)
        assert found.temperature.linear == pytest.approx(pooled(linear_h), rel=1e-4)
        assert found.mixture.weighted == pytest.approx(pooled(weighted), rel=1e-4)
        assert found.mixture.wide == pytest.approx(float(weighted.nan_to_num(0.0).var(0).mean()), rel=1e-4)
        columns = [column[~column.isnan()] for column in h.T]
        variances = torch.stack([column.var() for column in columns if len(column) > 1])
        assert found.temperature.median == pytest.approx(float(variances.quantile(0.5)), rel=1e-4)


def test_one_expert_that_always_fires_has_the_figures_of_a_dense_layer():
    model = make("qwen3_moe", num_experts=1, num_experts_per_tok=1)
    (reading,) = read(model, IDS[:1])
    for mixture, x, chosen, weight, _ in seen_in(model):
        (part,) = fire(mixture, x[:48], chosen[:48], weight[:48])
        h, gate, up = part.hidden, part.gate, part.up
        found = reading.layers[mixture.number]
        assert found.temperature.all_tokens == pytest.approx(float(h.var(0).mean()), rel=1e-4)
        orders = [torch.randperm(48, generator=torch.Generator().manual_seed(seed)) for seed in range(400)]
        shuffled = torch.stack([(silu(gate) * up[order]).var(0).mean() for order in orders])
        assert found.temperature.shuffled == pytest.approx(float(shuffled.mean()), rel=0.05)
        assert found.mixture.active == 1
        assert (
            found.mixture.wide == pytest.approx(found.mixture.weighted) == pytest.approx(found.temperature.all_tokens)
        )
        assert found.mixture.below == pytest.approx(found.sparsity.below[3])


def test_c3_of_a_mixture_is_that_of_its_experts_rows_together():
    model = make("qwen2_moe")
    geometry = geometry_of(ffns(model))
    for layer, ffn in enumerate(ffns(model)):
        stacked = torch.cat(list(gate_weights(ffn))).double()
        assert stacked.shape == (8 * 16 + 24, 32) == geometry.gate[layer].shape
        values, right = torch.linalg.svd(stacked)[1:]
        np.testing.assert_allclose(geometry.gate[layer].singular_values, values, rtol=1e-8)
        assert abs(geometry.directions[layer][0] @ right[0].numpy()) == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(geometry.mean_rows[layer], stacked.mean(0), atol=1e-12)
        assert geometry.down[layer].shape == (32, 8 * 16 + 24)
        for expert, read_ in enumerate(geometry.experts[layer]):
            first = torch.linalg.svd(ffn.experts.gate_up_proj[expert, :16].double())[2][0]
            assert abs(read_ @ first.numpy()) == pytest.approx(1, abs=1e-6)
    one, other = geometry.experts[0], geometry.experts[1]
    c3 = constants.gate_coherence(geometry.directions, geometry.mean_rows, geometry.experts)
    nearest = c3.variants["nearest expert"].samples[0]
    assert nearest == pytest.approx(np.abs(one @ other.T).max(1).mean())
    assert c3.variants["experts of adjacent layers"].n == 2
    assert c3.variants["experts of one layer"].n == 3


def test_single_experts_at_random_have_their_nulls():
    random = np.random.default_rng(0).standard_normal((60, 16, 48))
    frames = list(random / np.linalg.norm(random, axis=2, keepdims=True))
    c3 = constants.gate_coherence([frame[:4] for frame in frames], random.mean(1), frames)
    for name in ("experts of one layer", "experts of adjacent layers", "nearest expert"):
        found = c3.variants[name]
        assert found.value == pytest.approx(found.null, rel=0.02)
    assert chance.nearest_cosine(48, 1) == pytest.approx(chance.mean_abs_cosine(48), rel=1e-4)
    same = constants.gate_coherence([frames[0][:4]] * 3, random[:3].mean(1), [frames[0]] * 3)
    assert same.variants["nearest expert"].value == pytest.approx(1)


def test_a_mixture_of_another_kind_is_refused_and_not_measured_wrongly():
    model = make("qwen3_moe")
    mixture, x, chosen, weight, output = seen_in(model)[1]
    own, none = own_activations(model, mixture), torch.zeros(len(x), dtype=torch.bool)
    assert read_mixture(mixture, own, x, chosen, weight, output.reshape(-1, 32), none).mixture.mismatch < 1e-5
    with pytest.raises(ProbeError, match=r"layers\.1\.mlp: .* the probes do not know this mixture") as error:
        read_mixture(mixture, own, x, chosen, weight * 1.01, output.reshape(-1, 32), none)
    assert "\n" not in str(error.value)


def test_experts_that_are_not_finite_name_their_layer():
    model = make("qwen3_moe")
    model.model.layers[2].mlp.experts.gate_up_proj[:, 3, :] = torch.inf
    with pytest.raises(ProbeError, match=r"layers\.2: activations are NaN or infinite at token 0"):
        read(model, IDS)


def test_other_shapes_of_experts_are_refused():
    model = make("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.mT.contiguous())
    with pytest.raises(ProbeError, match=r"layers\.1\.mlp\.experts: gate_up_proj \(8, 32, 32\) and down_proj \(8, 16"):
        ffns(model)
    del experts.down_proj
    with pytest.raises(ProbeError, match=r"Qwen3MoeExperts has no fused gate_up_proj and down_proj"):
        ffns(model)


def test_sites_of_a_mixture_and_of_a_dense_layer_beside_it():
    model = make("mixed")
    assert [type(ffn) for ffn in ffns(model)] == [Mixture, Layer, Mixture]
    assert locate(model, ("chosen", 0)) == (model.model.layers[0].mlp.experts, "input")
    assert locate(model, ("mlp_out", 0)) == (model.model.layers[0].mlp, "output")
    assert locate(model, ("gate", 1)) == (model.model.layers[1].mlp.gate_proj, "output")
    with pytest.raises(ProbeError, match="site 'chosen': layers.1 is dense"):
        locate(model, ("chosen", 1))
    for ask in (lambda: locate(model, ("hidden", 2)), lambda: layers(model)):
        with pytest.raises(ProbeError, match="is a mixture of experts, whose fused experts a hook cannot see"):
            ask()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixtures")
    return {kind: save(kind, root / kind) for kind in ("mixed", "qwen2_moe")}


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["vindex", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code or 0


@pytest.mark.parametrize("kind", ["mixed", "qwen2_moe"])
def test_the_command_on_a_checkpoint(checkpoints, kind, tmp_path, monkeypatch, capsys):
    target, page = tmp_path / "p.json", tmp_path / "p.html"
    common = ("probe", checkpoints[kind], "--text", "factual", "--text", "code", "--dtype", "float32")
    status = run(monkeypatch, *common, "--all", "-o", target, "--plot", page)
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert not too_wide(shown.out, 100)
    for words in ("8 experts, top 3", "share of experts that fired", "|w·h| < 0.01", "nearest", "as one wide layer"):
        assert words in shown.out or (words == "nearest" and kind == "mixed")
    record = json.loads(target.read_text())
    model = record["model"]
    assert (model["num_experts"], model["top_k"], model["intermediate_size"]) == (8, 3, 16)
    assert model["mixture_layers"] == ([0, 2] if kind == "mixed" else [0, 1, 2])
    assert model["shared_intermediate_size"] == (None if kind == "mixed" else 24)
    for text in record["layers"]:
        for layer, found in enumerate(text["experts"]):
            if layer not in model["mixture_layers"]:
                assert found is None
                continue
            assert sum(found["load"]) == 256 * 3
            assert found["fired"] == pytest.approx(sum(load > 0 for load in found["load"]) / 8)
            assert found["mismatch"] < 1e-5
            assert 1 <= found["effective"] <= 8
    wide = [8 * 16, 32] if kind == "mixed" else [8 * 16 + 24, 32]
    if kind == "mixed":
        assert record["spectra"]["gate_proj"]["shapes"] == [wide, [48, 32], wide]
        assert "128×32" in shown.out and "48×32" in shown.out
    else:
        assert record["spectra"]["gate_proj"]["shape"] == wide
    c4 = np.mean([np.mean(text["temperature"]["all_tokens"]) for text in record["layers"]])
    assert record["constants"]["C4"]["mean"] == pytest.approx(c4, rel=1e-4)
    assert "experts that fire" in record["constants"]["C1"]["definition"]


def test_the_experts_directions_come_from_the_vindex(checkpoints, tmp_path, monkeypatch, capsys):
    target, record = tmp_path / "mixed.vindex", tmp_path / "p.json"
    assert run(monkeypatch, "build", checkpoints["qwen2_moe"], "-o", target, "--features", "4") == 0
    assert run(monkeypatch, "probe", checkpoints["qwen2_moe"], "--text", "factual", "-o", tmp_path / "w.json") == 0
    options = ("--text", "factual", "--vindex", target, "-o", record)
    assert run(monkeypatch, "probe", checkpoints["qwen2_moe"], *options) == 0, capsys.readouterr().err
    one, other = (json.loads(path.read_text()) for path in (record, tmp_path / "w.json"))
    assert "expert's leading direction from vindex" in one["spectra"]["source"]
    for name, variant in other["constants"]["C3"]["variants"].items():
        assert one["constants"]["C3"]["variants"][name]["value"] == pytest.approx(variant["value"], abs=2e-3)
    loaded = load(checkpoints["mixed"], device="cpu")
    from vindex.reader import open_vindex

    with pytest.raises(ProbeError, match="give the model it was built from"):
        match.require_match(loaded, open_vindex(target), {})


@pytest.mark.parametrize("command", [("gate3",), ("gates", "train")])
def test_gate_3_and_gates_refuse_a_mixture_in_one_line(checkpoints, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(checkpoints["qwen2_moe"], tmp_path / "moe")
    more = ("-o", tmp_path / "gates") if command[0] == "gates" else ()
    assert run(monkeypatch, *command, copy, *more) == 1
    shown = capsys.readouterr()
    *_bars, last = shown.err.splitlines()
    assert last.startswith("vindex: layers.0.mlp: ") and "is a mixture of experts" in last
    assert shown.err.count("vindex: ") == 1 and "Traceback" not in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
