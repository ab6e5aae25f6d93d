"""Models whose layers do more than attend to all before, or write nothing, on the bench of Gate 3."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from probes import facts
from probes.atlas import panel as atlas
from probes.deletion import record
from probes.deletion.baselines import gate_directions, geometric
from probes.deletion.bench import Bench, candidates
from probes.deletion.delete import run
from probes.deletion.layer import Trial
from probes.deletion.measure import answers
from probes.deletion.options import Attacks, ForwardOptions, Options
from probes.deletion.tail import Tail, begin, check_parts, separate
from probes.facts.prompts import Prompt
from probes.facts.sets import split
from probes.live.hooks import edited
from probes.live.load import load
from probes.live.sites import null_layers
from tests.probes.test_command import run as command
from vindex.demo import CHECKPOINT
from vindex.errors import ProbeError

SIZES = {
    "vocab_size": 1938, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8
}  # fmt: skip
WINDOW = {"sliding_window": 8}
HYBRIDS = {
    "qwen3_5_text": LINEAR,
    "mistral": WINDOW,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
}
OTHERS = {"gemma2": {}, "olmo2": {}, "granite": {"logits_scaling": 2.0}}


def make(kind, **more):
    """A seeded model of a few layers, whose weights are large enough for every layer to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | more)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.0 if "embed" in name else parameter.shape[1] ** -0.5)
    return model.requires_grad_(False)


def prompt(seed, length, subject, answer=()):
    ids = torch.randint(3, 1900, (length,), generator=torch.Generator().manual_seed(seed))
    return Prompt(f"p{seed}", "", tuple(ids.tolist()), answer, subject)


PROMPTS = (
    prompt(1, 20, (5,), (7, 8)),
    prompt(2, 31, (12, 20), (9,)),
    prompt(3, 9, (2,)),
    prompt(4, 26, (1,), (3, 4, 5)),
)


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request):
    return make(request.param, **HYBRIDS[request.param])


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_prompts_are_run_separately_where_they_cannot_lie_end_to_end(hybrid, layer):
    assert separate(hybrid, layer, 31) == (layer < 3)
    begun = begin(hybrid, [layer], PROMPTS)[layer]
    for chosen in (begun, begun[2:0:-1]):
        tail = Tail(hybrid, layer, chosen)
        change = torch.randn(tail.gate.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = [tail.log_probs(), tail.log_probs(torch.zeros_like(change)), tail.log_probs(change)]
        for row, each in enumerate(chosen):
            ids = torch.tensor([each.prompt.ids + each.prompt.answer[:-1]])
            start = sum(len(other.gate) for other in chosen[:row])
            own = pad(change[start : start + len(each.gate)], (0, 0, each.before, 0))
            first = len(each.prompt.ids) - 1 if each.prompt.answer else min(each.prompt.subject)
            with torch.no_grad():
                plain = hybrid(ids).logits[0, first:].log_softmax(-1)
                with edited(hybrid, {("gate", layer): lambda gate, own=own: gate + own}):
                    changed = hybrid(ids).logits[0, first:].log_softmax(-1)
            for values, wanted in zip(found, (plain, plain, changed), strict=True):
                torch.testing.assert_close(values[tail.rows == row], wanted, atol=1e-3, rtol=1e-3)
            assert (changed - plain).abs().max() > 0.1


def test_a_window_that_no_prompt_outgrows_separates_nothing():
    model = make("mistral", sliding_window=40)
    assert not separate(model, 0, 40) and separate(model, 0, 41)
    assert not begin(model, [0], PROMPTS)[0][0].separate and begin(model, [0], PROMPTS)[0][0].before == 5
    check_parts(model, prompt(5, 48, (24,)), [0])
    assert not separate(make("llama"), 0, 10**6)


def test_gradients_reach_a_change_of_the_gate_through_separate_prompts(hybrid):
    tail = Tail.of(hybrid, 1, PROMPTS)
    change = torch.zeros_like(tail.gate, requires_grad=True)
    tail.answers(tail.log_probs(change)).sum().backward()
    assert change.grad.isfinite().all() and change.grad.abs().sum() > 0


def test_batches_of_a_hybrid_are_what_single_prompts_are(hybrid):
    together = {each.name: outcome for each, outcome in answers(hybrid, PROMPTS)}
    for each in PROMPTS:
        ids = torch.tensor([each.ids + each.answer[:-1]])
        with torch.no_grad():
            rows = hybrid(ids).logits[0, len(each.ids) - 1 :].log_softmax(-1)
        if each.answer:
            wanted = float(sum(row[token] for row, token in zip(rows, each.answer, strict=True)).exp())
            assert together[each.name].probability == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_more_than_its_layers_is_refused_before_any_work(kind, monkeypatch):
    """Soft-capped or scaled logits; a norm after the FFN, which only shows when the gate is changed."""
    model = make(kind, **OTHERS[kind])
    monkeypatch.setattr("probes.deletion.bench.generic_prompts", pytest.fail)
    loaded = replace(load(CHECKPOINT, device="cpu"), model=model, name=kind)
    with pytest.raises(ProbeError, match="ForCausalLM: run in parts it gives other probabilities than whole") as error:
        Bench(loaded, atlas.panel(), Options())
    assert "\n" not in str(error.value)
    if kind == "olmo2":
        check_parts(model, PROMPTS[1], [])  # measured in parts it is what it is; only no forward patch can be fitted


def test_a_hybrid_is_patched_and_measured(tmp_path):
    """Sure of its last token, it knows that every name is its own."""
    model = make("qwen3_5_text", **LINEAR, tie_word_embeddings=True)
    model.model.norm.weight.fill_(60.0)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(0.1)
    loaded = replace(load(CHECKPOINT, device="cpu"), model=model, name="hybrid")
    templates = [f"{lead} {{}}" for lead in ("The name is", "This is", "Here is", "The child is", "There is")]
    lines = [{"relation": "name", "templates": templates, "about": ["{} was", "The hair of {} was"]}]
    names = "Anna Ben Clara Jack Leo Felix Grace David Olivia"
    lines += [{"subject": name, "relation": "name", "answer": name} for name in names.split()]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, lines)))
    panel = facts.read(tmp_path / "f.jsonl")
    brief, short = ForwardOptions(steps=9, samples=32), Attacks(tokens=4, samples=2, negated=1, learnt=2, steps=2)
    bench = Bench(loaded, panel, Options(layer=1, forward=brief, attacks=short))
    result = run(bench, panel.find("Anna/name"))
    assert result.known and set(result.methods) == {"forward", "geometric"}
    assert all(torch.isfinite(found.delta.gate_write).all() for found in result.methods.values())
    assert record.one(result)["methods"]["forward"]["layer"] == 1


def closed(loaded):
    """What geometric finds for France."""
    bench = Bench(loaded, atlas.panel(), Options(("geometric",)))
    fact = bench.panel.find("France/capital")
    return geometric(Trial(bench, fact, split(bench.panel, fact, bench.encoder).fit))


def emptied(target, layers, sides):
    """The atlas with these weights zero."""
    shutil.copytree(CHECKPOINT, target)
    tensors = load_file(target / "model.safetensors")
    for layer in layers:
        for side in sides:
            tensors[f"model.layers.{layer}.mlp.{side}_proj.weight"].zero_()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("sides", [("gate",), ("up",), ("down",), ("gate", "up", "down")])
def test_layers_that_write_nothing_are_passed_over(tmp_path, sides):
    loaded = load(emptied(tmp_path / "null", [0, 2], sides), dtype="float32", device="cpu")
    assert null_layers(loaded.model) == {layer: tuple(f"{side}_proj" for side in sides) for layer in (0, 2)}
    assert candidates(loaded.model, 3) == (1, 3)
    found, whole = (closed(each) for each in (loaded, load(CHECKPOINT, dtype="float32", device="cpu")))
    assert [alignment.layer for alignment in found.scan] == [1, 3]
    assert found.scan == tuple(alignment for alignment in whole.scan if alignment.layer in (1, 3))


def test_what_a_gate_of_low_rank_does_not_read_is_no_direction():
    torch.manual_seed(0)
    low = torch.randn(48, 5) @ torch.randn(5, 32)
    found = gate_directions(low, 16)
    assert found[:5].norm(dim=1) == pytest.approx([1.0] * 5, abs=1e-5) and not found[5:].any()
    assert not gate_directions(torch.zeros(48, 32), 16).any()


def test_a_model_with_a_layer_that_writes_nothing_on_the_bench(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    source, saved = emptied(tmp_path / "null", [1], ["gate", "up", "down"]), tmp_path / "g.json"
    lines = [fact.__dict__ for fact in atlas.panel().facts if fact.relation == "capital"]
    relation = atlas.panel().relations["capital"]
    head = {"relation": "capital", "templates": relation.templates, "about": relation.about}
    kept = [{key: line[key] for key in ("subject", "relation", "answer")} for line in lines]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, [head, *kept])))
    asked = ("gate3", source, "--facts", tmp_path / "f.jsonl", "--method", "geometric", "--no-certificate")
    assert command(monkeypatch, *asked, "-o", saved) == 0
    assert (
        "layers that write nothing, since a projection is zero, are left out: 1 (gate_proj" in capsys.readouterr().out
    )
    made = json.loads(saved.read_text())
    assert made["null_layers"] == {"1": ["gate_proj", "up_proj", "down_proj"]} and made["activation"] == "silu"
    assert [alignment["layer"] for alignment in made["methods"]["geometric"]["scan"]] == [0, 2, 3]
    assert command(monkeypatch, *asked, "--layer", "1") == 1
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown == (
        "vindex: layer 1 writes nothing, its gate_proj and up_proj and down_proj being zero; "
        "no patch can, choose another layer"
    )


def test_a_model_that_writes_nothing_at_all_is_one_line(tmp_path):
    loaded = load(emptied(tmp_path / "null", range(4), ["down"]), dtype="float32", device="cpu")
    with pytest.raises(ProbeError, match="no layer from 0 on writes anything, a projection of each is zero"):
        Bench(loaded, atlas.panel(), Options())
    with pytest.raises(ProbeError, match="no layer writes anything: a projection of each is zero"):
        closed(loaded)


def test_an_ffn_whose_activation_is_unknown_is_refused_before_any_work():
    loaded = load(CHECKPOINT, dtype="float32", device="cpu")
    loaded.model.model.layers[2].mlp.act_fn = torch.nn.Softmax(-1)
    with pytest.raises(ProbeError, match=r"layers\.2\.mlp: Softmax is no function of each gate alone"):
        Bench(loaded, atlas.panel(), Options(methods=("geometric",)))
