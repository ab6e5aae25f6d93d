"""Experts, shared experts and dense layers become directions by expert, however the checkpoint stores them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import vindex
from extract import vocab, vocab_stage
from extract.checkpoint import open_checkpoint
from extract.engines import in_process
from extract.layouts import find_layout
from extract.rederive import evenly, rederive, sample_blocks
from tests.checkpoints import nest, write_checkpoint, write_mixture
from tests.conftest import build_quietly
from tests.extract.test_build import contents
from vindex.checks import verify
from vindex.differences import principal_angles
from vindex.errors import CheckpointError, NumericError, QueryError

EXPERTS, NEURONS, FEATURES = 3, 12, 4


def exact(weight: torch.Tensor):
    """(directions (F, H), σ (F,)) of a matrix with a row for each neuron, by LAPACK in float64."""
    _, sigma, directions = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return directions[:FEATURES], sigma[:FEATURES]


def test_every_expert_has_the_directions_of_its_own_weight(mixture, built_mixture):
    v, source = vindex.open(built_mixture), open_checkpoint(str(mixture))
    for layer, names in ((0, [""]), (2, ["experts.0.", "experts.1.", "experts.2.", "shared_expert."])):
        frames = v.layer(layer)
        assert frames.gate.shape == frames.down.shape == (len(names), FEATURES, 16)
        for at, name in enumerate(names):
            gate = source.tensor(f"model.layers.{layer}.mlp.{name}gate_proj.weight")
            down = source.tensor(f"model.layers.{layer}.mlp.{name}down_proj.weight").T
            for weight, rows, sigma in (
                (gate, frames.gate[at], frames.gate_sigma[at]),
                (down, frames.down[at], frames.down_sigma[at]),
            ):
                directions, expected = exact(weight)
                assert principal_angles(rows, directions).max() < 2e-3
                np.testing.assert_allclose(sigma, expected, rtol=1e-5)


@pytest.mark.parametrize("names", ["fused", "swapped", "stacked"])
@pytest.mark.parametrize("neurons", [12, 8, 16], ids=["plain", "2I = H", "I = H"])
def test_every_kind_of_name_gives_the_same_bytes(tmp_path, names, neurons):
    """Square slices included, where one tensor's shape does not tell how it is oriented."""
    separate = write_mixture(tmp_path / "separate", expert_neurons=neurons)
    other = write_mixture(tmp_path / names, expert_neurons=neurons, names=names)
    for source in (separate, other):
        build_quietly(source, tmp_path / f"{source.name}.vindex", features=FEATURES)
    assert contents(tmp_path / "separate.vindex") == contents(tmp_path / f"{names}.vindex")


def test_an_expert_is_read_by_itself(tmp_path):
    source = open_checkpoint(str(write_mixture(tmp_path / "m", names="fused")))
    name = "model.layers.1.mlp.experts.down_proj"
    whole = source.tensor(name)
    for index in range(EXPERTS):
        assert source.expert(name, index).equal(whole[index])


def test_routers_and_shared_gates_are_kept(mixture, built_mixture):
    v, source = vindex.open(built_mixture), open_checkpoint(str(mixture))
    raw = np.fromfile(built_mixture / "router_weights.bin", "<f2").reshape(2, EXPERTS * 17)
    for at, layer in enumerate((1, 2)):
        expected = source.tensor(f"model.layers.{layer}.mlp.gate.weight").half().numpy()
        np.testing.assert_array_equal(v.router(layer), expected)
        np.testing.assert_array_equal(raw[at, : EXPERTS * 16].reshape(EXPERTS, 16), expected)
        assert not raw[at, EXPERTS * 16 :].any()  # where LARQL's loader expects a bias
        gate = source.tensor(f"model.layers.{layer}.mlp.shared_expert_gate.weight").half().numpy()
        np.testing.assert_array_equal(v.shared_expert_gate(layer), gate[0])


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_norms_hold_the_scale_and_the_lens_uses_it(tmp_path, family):
    """Qwen3-Next stores its norms zero-centred: the scale is 1 + weight."""
    source = write_mixture(tmp_path / "m", model_type=family)
    build_quietly(source, tmp_path / "out.vindex", features=FEATURES)
    v, opened = vindex.open(tmp_path / "out.vindex"), open_checkpoint(str(source))
    scale = opened.tensor("model.norm.weight").numpy() + (family == "qwen3_next")
    np.testing.assert_allclose(v.norms["norm"], scale, rtol=5e-4)
    embeddings = opened.tensor("model.embed_tokens.weight").numpy()[:36]
    for expert in (0, 3):
        down = v.layer(1).down[expert, 2].astype(np.float32)
        lens = embeddings @ (scale * down)
        found = v.feature(1, 2, expert=expert)
        assert [t.token_id for t in found.writes] == np.argsort(-lens)[:10].tolist()
        np.testing.assert_allclose([t.score for t in found.writes], np.sort(lens)[::-1][:10], rtol=1e-4)
        gate = v.layer(1).gate[expert, 2].astype(np.float32)
        cosines = embeddings @ gate / np.linalg.norm(embeddings, axis=1) / np.linalg.norm(gate)
        assert [t.token_id for t in found.reads] == np.argsort(-cosines)[:10].tolist()


def test_the_norm_inside_linear_attention_is_not_zero_centred(tmp_path):
    def add(tensors):
        tensors["model.layers.1.linear_attn.norm.weight"] = torch.full((8,), 0.5)

    layout = find_layout(open_checkpoint(str(write_mixture(tmp_path / "m", edit=add))))
    centred = {norm.name: norm.zero_centred for norm in layout.norms}
    assert not centred["layers.1.linear_attn_norm"] and centred["layers.1.q_norm"] and centred["norm"]


@pytest.mark.parametrize("prefix", ["model.", "language_model.model."])
def test_norms_that_mlx_saved_hold_the_scale_already(tmp_path, prefix):
    """mlx_lm adds the 1 to all norms but linear attention's, and turns (C, 1, K) convolutions into (C, K, 1)."""

    def hybrid(tensors):
        tensors[f"{prefix}layers.1.linear_attn.conv1d.weight"] = torch.ones(6, 1, 4)
        tensors[f"{prefix}layers.1.linear_attn.norm.weight"] = torch.full((8,), 0.5)

    def of_mlx(tensors):
        hybrid(tensors)
        for name, tensor in tensors.items():
            if name.endswith("norm.weight") and "linear_attn" not in name:
                tensors[name] = tensor + 1.0
            elif "conv1d" in name:
                tensors[name] = tensor.movedim(2, 1).contiguous()

    scales, notes = [], []
    for name, edit in (("hf", hybrid), ("mlx", of_mlx)):
        options = {"model_type": "qwen3_5", "prefix": prefix, "edit": edit, "dtype": torch.float32}
        source = open_checkpoint(str(write_checkpoint(tmp_path / name, **options)))
        layout = find_layout(source)
        scales.append({norm.name: norm.scale(source) for norm in layout.norms})
        notes.append(layout.notes)
    assert all(scales[1][name].equal(scale) for name, scale in scales[0].items()) and len(scales[0]) == len(scales[1])
    assert notes == [(), ("saved by MLX: the norms hold 1 + weight, and are read as they are stored",)]


def test_runs_of_layers_change_nothing_and_are_never_redone(mixture, built_mixture, tmp_path, monkeypatch):
    target, computed = tmp_path / "out.vindex", []

    def watched(job, method, blocks, advance):
        def compute(block, *rest):
            if method is vocab_stage.VOCABULARY:
                computed.append(block.name)
                if len(computed) == 3:
                    raise KeyboardInterrupt
            return method.compute(block, *rest)

        in_process(job, method._replace(compute=compute), blocks, advance)

    monkeypatch.setattr(vocab, "RUN", 1)
    with pytest.raises(KeyboardInterrupt):
        build_quietly(mixture, target, features=FEATURES, engine=watched)
    build_quietly(mixture, target, features=FEATURES, engine=watched, resume=True)
    gate, down = ([f"{side} tokens of layers {layer} to {layer}" for layer in range(3)] for side in ("gate", "down"))
    assert computed == [*gate, gate[2], *down]
    assert contents(target) == contents(built_mixture)


def test_steps_through_a_layer_find_the_same_tokens(mixture, built_mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(vocab_stage, "STEP", 3)
    build_quietly(mixture, tmp_path / "out.vindex", features=FEATURES)
    whole, stepped = vindex.open(built_mixture), vindex.open(tmp_path / "out.vindex")
    for expert in range(4):
        ours, theirs = (v.feature(2, 1, expert=expert) for v in (whole, stepped))
        for pole in ("reads", "reads_against", "writes", "writes_against"):
            pairs = list(zip(getattr(ours, pole), getattr(theirs, pole), strict=True))
            assert all(a.token_id == b.token_id and a.score == pytest.approx(b.score, rel=1e-5) for a, b in pairs)


def test_features_kept_by_default(tmp_path):
    """32 of each expert in a mixture, 128 in a dense model."""
    sizes = {"hidden": 130, "neurons": 131, "vocabulary": 40}
    build_quietly(
        write_mixture(tmp_path / "moe", expert_neurons=33, shared_neurons=0, **sizes),
        tmp_path / "a.vindex",
        features=None,
    )
    build_quietly(write_checkpoint(tmp_path / "dense", **sizes), tmp_path / "b.vindex", features=None)
    moe, dense = vindex.open(tmp_path / "a.vindex"), vindex.open(tmp_path / "b.vindex")
    assert [entry.num_features for entry in moe.index.layers] == [32, 96, 96] and moe.manifest.options.features == 32
    assert dense.gate.shape == (2, 128, 130) and dense.manifest.options.features == 128
    assert dense.index.num_experts is None and "num_experts" not in (dense.path / "index.json").read_text()


def test_verify_and_rederive_hold_for_every_expert(mixture, built_mixture, tmp_path):
    v, source = vindex.open(built_mixture), open_checkpoint(str(mixture))
    assert all(check.holds for check in verify(v))
    blocks = sample_blocks(v, source, [0, 1, 2], experts=9)
    assert len(blocks) == 2 * (1 + 4 + 4) and all(found.holds for found in rederive(v, source, blocks))
    assert len(sample_blocks(v, source, [1], experts=2)) == 4
    other = open_checkpoint(str(write_mixture(tmp_path / "m", seed=1)))
    assert not any(found.holds for found in rederive(v, other, sample_blocks(v, other, [2], experts=4)))
    fewer = open_checkpoint(str(write_mixture(tmp_path / "s", shared_neurons=0)))
    with pytest.raises(QueryError, match=r"3 layers of 3 × 12×16 and .* 3 layers of 4 × 12×16; give the checkpoint"):
        sample_blocks(v, fewer, [1], experts=2)


def test_samples_are_spread_evenly():
    assert evenly(129, 3) == [0, 64, 128] and evenly(3, 9) == [0, 1, 2] and evenly(5, 1) == [0]
    assert evenly(3, 10**15) == [0, 1, 2]  # at once


def test_a_low_rank_expert_keeps_its_zero_rows(tmp_path):
    def edit(tensors):
        tensors["model.layers.1.mlp.experts.1.gate_proj.weight"][2:] = 0

    build_quietly(write_mixture(tmp_path / "m", edit=edit), tmp_path / "out.vindex", features=FEATURES)
    v = vindex.open(tmp_path / "out.vindex")
    frames = v.layer(1)
    assert not frames.gate[1, 2:].any() and frames.gate[0].any(axis=1).all()
    assert (v.index.layers[1].effective_rank.gate, v.index.layers[1].effective_rank.down) == (2, FEATURES)
    assert all(check.holds for check in verify(v))


def drop(name):
    return lambda tensors: tensors.pop(f"model.layers.1.mlp.{name}")


def rename_experts(tensors):
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name.replace("gate_proj", "w1").replace("down_proj", "w2").replace("up_proj", "w3")] = tensors.pop(name)


def turn_down(tensors):
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name] = tensors[name].mT.contiguous()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"edit": rename_experts},
            "model.layers.1.mlp.experts: found 0.w1.weight, 0.w2.weight, 0.w3.weight; supported are N.gate_proj.weight",
        ),
        (
            {"edit": drop("experts.2.down_proj.weight")},
            "tensor model.layers.1.mlp.experts.2.down_proj.weight is missing",
        ),
        ({"edit": drop("gate.weight")}, "tensor model.layers.1.mlp.gate.weight is missing"),
        ({"edit": drop("shared_expert_gate.weight")}, "tensor model.layers.1.mlp.shared_expert_gate.weight is missing"),
        ({"edit": drop("shared_expert.gate_proj.weight")}, "mlp.shared_expert.gate_proj.weight is missing"),
        (
            {"names": "fused", "edit": turn_down},
            "gate_up_proj (3, 24, 16) and model.layers.1.mlp.experts.down_proj (3, 12, 16) differ in orientation",
        ),
        (
            {"names": "fused", "config": {"num_experts": 4}},
            "experts.gate_up_proj has shape (3, 24, 16), and config.json says (4, 24, 16) or (4, 16, 24)",
        ),
        ({"config": {"num_experts": 4}}, "tensor model.layers.1.mlp.experts.3.gate_proj.weight is missing"),
        ({"config": {"num_experts": "many"}}, "config.json num_experts: expected a positive integer, got 'many'"),
        ({"config": {"moe_intermediate_size": 9}}, "has shape (12, 16), and config.json says (9, 16)"),
        ({"config": {"mlp_only_layers": []}}, "model.layers.0.mlp.experts: found no tensors; supported are"),
        ({"config": {"decoder_sparse_step": 2}}, "tensor model.layers.2.mlp.gate_proj.weight is missing"),
        ({"config": {"mlp_only_layers": 3}}, "config.json mlp_only_layers: expected a list of layers, got 3"),
        ({"config": {"decoder_sparse_step": -1}}, "decoder_sparse_step: expected a positive integer, got -1"),
        ({"config": {"text_config": "none"}}, "config.json text_config: expected an object, got 'none'"),
        ({"model_type": "qwen3"}, "model.layers.1.mlp.gate_proj.weight is missing"),
        ({"model_type": "qwen4_exp"}, "model_type 'qwen4_exp' is not supported; known: qwen3, qwen2"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, options, message):
    directory = write_mixture(tmp_path / "m", **options)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        find_layout(open_checkpoint(str(directory)))
    assert "\n" not in str(caught.value)


def test_more_features_than_the_smallest_expert_has(tmp_path):
    with pytest.raises(NumericError, match=r"shared_expert.gate_proj.weight is 10×16: it has at most 10 directions"):
        build_quietly(write_mixture(tmp_path / "m"), tmp_path / "out.vindex", features=11)


@pytest.mark.parametrize(
    "keys, prefix, head, ignored",
    [
        (["text_config"], "model.language_model.", "lm_head.weight", {"model.visual": 2, "mtp": 1}),
        (["text_config"], "model.", "lm_head.weight", {"model.visual": 0, "visual": 2, "mtp": 1}),
        (["text_config"], "language_model.model.", "language_model.lm_head.weight", {"visual": 2, "mtp": 1}),
        (
            ["thinker_config", "text_config"],
            "thinker.model.",
            "thinker.lm_head.weight",
            {"thinker.visual": 2, "talker": 1},
        ),
        (["text_config"], "language_model.", None, {"visual": 2}),
    ],
)
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_the_text_tower_of_a_larger_model_is_found(tmp_path, kind, keys, prefix, head, ignored):
    """Its vindex is that of the text model by itself; the rest is counted and left alone."""

    def grow(tensors):
        if head and head != "lm_head.weight":
            tensors[head] = tensors.pop("lm_head.weight")
        elif head is None:
            tensors.pop("lm_head.weight")
        for part, count in ignored.items():
            for number in range(count):
                tensors[f"{part}.blocks.{number}.mlp.gate_proj.weight"] = torch.ones(3, 3)

    write = write_mixture if kind == "mixture" else write_checkpoint
    family = "qwen3_vl_moe" if kind == "mixture" else "qwen3_vl"
    plain = {"qwen3_vl_moe": "qwen3_moe", "qwen3_vl": "qwen3"}[family]
    options = {"head": True, "tied": False} if head else {"tied": True}
    alone = write(tmp_path / "alone", model_type=plain, **options)
    whole = write(tmp_path / "whole", model_type=family, prefix=prefix, edit=grow if head else None, **options)
    nest(whole, "a_larger_model", *keys)
    for source in (alone, whole):
        build_quietly(source, tmp_path / f"{source.name}.vindex", features=FEATURES)
    assert contents(tmp_path / "alone.vindex") == contents(tmp_path / "whole.vindex")
    found = find_layout(open_checkpoint(str(whole))).ignored
    assert found == ({part: count for part, count in ignored.items() if count} if head else {})


def test_a_nested_tower_that_is_unknown_is_named(tmp_path):
    source = nest(write_checkpoint(tmp_path / "m", model_type="gemma3"), "gemma3", "text_config")
    with pytest.raises(CheckpointError, match=r"model_type 'gemma3' is not supported; known: qwen3"):
        find_layout(open_checkpoint(str(source)))
    nest(write_checkpoint(tmp_path / "n", model_type="gemma3"), "paligemma", "text_config")
    with pytest.raises(CheckpointError, match=r"model_type 'paligemma' \(text tower 'gemma3'\) is not supported"):
        find_layout(open_checkpoint(str(tmp_path / "n")))


def test_no_embeddings_under_any_prefix(tmp_path):
    source = write_checkpoint(tmp_path / "m", prefix="decoder.")
    with pytest.raises(
        CheckpointError, match=r"no token embeddings; expected one of model.language_model.embed_tokens"
    ):
        find_layout(open_checkpoint(str(source)))
