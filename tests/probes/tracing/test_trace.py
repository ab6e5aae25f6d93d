"""A trace adds up, says what the model does, and leaves the model as it was."""

import shutil
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

import probes
from probes import texts
from probes.live.hooks import edited, same_bits
from probes.live.tokens import encode
from probes.tracing import stream
from probes.tracing.directions import TOKENS
from probes.weights import patches
from tests.probes.deletion.test_hybrids import OTHERS
from tests.probes.deletion.test_hybrids import make as make_other
from tests.probes.mixtures import make as make_mixture
from tests.probes.tracing.conftest import OTHER, PROMPT, F, ids_of, logits_of, seen_at
from tests.responses import add_made_up
from vindex.errors import PatchError, ProbeError, QueryError
from vindex.reader import open_vindex


def test_what_goes_with_a_read_is_its_response_as_it_reaches_the_logit(loaded, v, t, tmp_path):
    """Responses planted along the down directions, 2 for each unit read: what those add is known from the writes."""
    copy = open_vindex(shutil.copytree(v.path, tmp_path / "v.vindex"))
    found = probes.trace(loaded, PROMPT, vindex=add_made_up(copy, directions=copy.down.reshape(-1, 128)))
    for layer in range(4):
        writes = {row["feature"]: row["adds"] / row["coefficient"] for row in found.writes(layer, F)[:F]}  # u · d
        for row in found.reads(layer, F):
            excess = found.directions.along.excess[layer, row["feature"]]
            if (layer, row["feature"]) == (0, 0):  # which has none
                assert np.isnan(row["response"]) and row["r2"] == 0
            else:
                assert row["response"] == pytest.approx(2 * excess * writes[row["feature"]], rel=2e-3, abs=1e-4)
                assert row["r2"] == 0.5
    assert {row["response"] for row in t.reads()} == {row["r2"] for row in t.reads()} == {None}
    record = found.record()["reads"]
    assert record[0][0].keys() >= {"response", "r2"} and None in [row["response"] for row in record[0]]


def test_the_last_row_is_the_models_own_logits_bit_for_bit(loaded, t):
    own = logits_of(loaded)
    for position in (-1, 3):
        run = stream.run(loaded.model, ids_of(loaded)[0].tolist(), position)
        assert same_bits(run.logits[-1], own[position])
    last = t.rows()[-1]
    assert (last["layer"], last["after"], last["rank"], last["top"]) == (3, "FFN", 1, " Paris")
    assert last["log_prob"] == pytest.approx(float(own[-1].log_softmax(0)[t.target]), abs=1e-4)


def test_the_lens_is_the_models_head_on_its_hidden_states(loaded, t):
    with torch.no_grad():
        states = loaded.model(ids_of(loaded), output_hidden_states=True).hidden_states
        for layer in range(3):
            wanted = loaded.model.lm_head(loaded.model.model.norm(states[layer + 1][0, -1])).log_softmax(0)
            row = t.rows()[2 + 2 * layer]
            assert (row["layer"], row["after"]) == (layer, "FFN")
            assert row["log_prob"] == pytest.approx(float(wanted[t.target]), abs=1e-3)
            assert row["rank"] == 1 + int((wanted > wanted[t.target]).sum())


def test_what_the_stages_add_is_the_targets_logit(loaded, t):
    own = float(logits_of(loaded)[-1, t.target])
    assert sum(row["adds"] for row in t.rows()) == pytest.approx(own, abs=1e-4)
    assert set(t.sums) == {"logit", "stages", "writes"} and max(t.sums.values()) < 1e-4


def test_writes_and_what_lies_outside_add_up_to_what_each_ffn_added(t):
    stages = t.rows()
    for layer in range(4):
        rows = t.writes(layer, 3)
        assert [row["what"] for row in rows[3:]] == [f"other {F - 3} directions", f"outside the {F} directions"]
        assert sum(row["adds"] for row in rows) == pytest.approx(stages[2 + 2 * layer]["adds"], abs=1e-5)
        assert abs(rows[-1]["adds"]) > 1e-3  # 16 of 128 dimensions leave something outside
    whole = sum(row["adds"] for row in stages if row["after"] == "FFN")
    assert sum(row["adds"] for row in t.writes()) == pytest.approx(whole, abs=1e-5)
    assert all(0 < row["read_share"] < 1 and 0 < row["write_share"] < 1 for row in t.layers())
    assert t.chance == F / 128


def test_reads_are_z_against_generic_text(loaded, v, t):
    """The mean and spread of one layer, by hooks of our own, token 0 and sinks left out."""
    layer, block = 2, loaded.model.model.layers[2]
    gate, kept = torch.tensor(v.gate[layer].astype(np.float32)), []
    for name in texts.BUNDLED:
        text = loaded.tokenizer.decode(encode(loaded.tokenizer, texts.read(name)).ids[:TOKENS])
        norms = seen_at(loaded, block, prompt=text).norm(dim=1)
        wanted = (norms <= 10 * norms.median()) & (torch.arange(len(norms)) > 0)
        kept.append(seen_at(loaded, block.mlp, "input", text)[wanted] @ gate.T)
    generic = torch.cat(kept)
    x = seen_at(loaded, block.mlp, "input")[-1]
    z = (gate @ x - generic.mean(0)) / generic.std(0)
    for row in t.reads(layer, 5):
        assert row["z"] == pytest.approx(float(z[row["feature"]]), rel=0.02)
        assert row["read"] == pytest.approx(float(gate[row["feature"]] @ x), rel=1e-4)
    usual = ((generic - generic.mean(0)) / generic.std(0)).abs().amax(1).quantile(0.95)
    assert t.layers()[layer]["usual_z"] == pytest.approx(float(usual), rel=0.02)


def test_generic_texts_are_named_whatever_they_come_in(loaded, v, t):
    one, same = (probes.trace(loaded, PROMPT, vindex=v, text=text) for text in ("story", (name for name in ["story"])))
    assert one.record()["generic"] == same.record()["generic"] == {"texts": ["story"], "tokens": TOKENS}
    assert np.array_equal(one.directions.along.z, same.directions.along.z)
    for text, message in ((["story", "story"], "text story: given twice"), ([], "no text is given; expected files")):
        with pytest.raises(ProbeError, match=message):
            probes.trace(loaded, PROMPT, vindex=v, text=text)


def test_how_many_rows_is_a_whole_number_from_one(t):
    for ask, message in (
        (lambda: t.reads(1, k=-1), "k -1: expected a positive integer"),
        (lambda: t.writes(1, k=0), "k 0: expected a positive integer"),
        (lambda: t.reads(True), "layer True: expected an integer, got bool"),
    ):
        with pytest.raises(QueryError, match=message):
            ask()


def test_a_planted_write_has_the_effect_that_is_known_exactly(loaded, v):
    """The last FFN writes 300 d and nothing else: one row carries it, and taking it out leaves the stream before it."""
    d = torch.tensor(v.down[3, 5].astype(np.float32))
    d = d / d.norm()
    with edited(loaded.model, {("mlp_out", 3): lambda y: (300 * d).expand_as(y)}):
        t = probes.trace(loaded, PROMPT, vindex=v, check=1, target=" Paris")
        (row,) = (row for row in t.writes(3, F) if row["feature"] == 5)
        planted = float(logits_of(loaded)[-1, t.target])
    others = [abs(each["adds"]) for each in t.writes(3, F) if each["feature"] != 5]
    assert row["coefficient"] == pytest.approx(300, rel=1e-3)
    assert row["adds"] == pytest.approx(t.rows()[-1]["adds"], rel=1e-3) and max(others) < 0.01 * abs(row["adds"])
    attended = seen_at(loaded, loaded.model.model.layers[3].post_attention_layernorm, "input")[-1]
    with torch.no_grad():
        without = float(loaded.model.lm_head(loaded.model.model.norm(attended))[t.target])
    (checked,) = (test for test in t.checks() if test["side"] == "writes")
    assert (checked["layer"], checked["feature"]) == (3, 5) and checked["written"] == row["adds"]
    assert checked["causal"] == pytest.approx(planted - without, abs=0.01)


def test_checks_are_what_a_hand_made_ablation_measures(loaded, v, t):
    own = logits_of(loaded)[-1]
    assert [test["side"] for test in t.checks()] == ["reads"] * 2 + ["writes"] * 2
    for test in t.checks():
        mlp, target = loaded.model.model.layers[test["layer"]].mlp, t.target
        if test["side"] == "writes":
            d, place = torch.tensor(v.down[test["layer"], test["feature"]].astype(np.float32)), mlp
            change = (seen_at(loaded, mlp)[-1] @ d) * d
            assert test["read"] is None
        else:
            along = t.directions.along
            gate, place = torch.tensor(v.gate[test["layer"], test["feature"]].astype(np.float32)), mlp.gate_proj
            change = (mlp.gate_proj.weight @ gate) * float(along.excess[test["layer"], test["feature"]])

        def taken(module, args, output, change=change):
            new = output.clone()
            new[0, -1] -= change
            return new

        handle = place.register_forward_hook(taken)
        without = logits_of(loaded)[-1]
        handle.remove()
        assert test["causal"] == pytest.approx(float(own[target] - without[target]), abs=1e-4)
        change = own.log_softmax(0)[target] - without.log_softmax(0)[target]
        assert test["log_prob"] == pytest.approx(float(change), abs=1e-4)
    assert torch.equal(logits_of(loaded)[-1], own)


def test_what_was_not_tested_is_none_and_never_zero(t):
    reads = [row["causal"] for layer in range(4) for row in t.reads(layer, F)]
    writes = [row["causal"] for layer in range(4) for row in t.writes(layer, F)]
    assert sum(value is not None for value in reads) == 2 == sum(value is not None for value in writes)


def test_against_itself_nothing_is_left(loaded, v):
    t = probes.trace(loaded, PROMPT, vindex=v, against=PROMPT, check=1)
    assert all(row["adds"] == 0 and row["rank"] == row["rank_against"] for row in t.rows())
    assert all(row["z"] == 0 for row in t.reads()) and all(row["adds"] == 0 for row in t.writes())
    assert all(test["causal"] == 0 for test in t.checks())


def test_against_another_prompt_is_the_difference_of_the_two(loaded, v):
    t = probes.trace(loaded, PROMPT, vindex=v, against=OTHER, target=" Paris", check=1)
    mlp = loaded.model.model.layers[3].mlp
    x = seen_at(loaded, mlp, "input")[-1] - seen_at(loaded, mlp, "input", OTHER)[-1]
    for row in t.reads(3, 4):
        gate = v.gate[3, row["feature"]].astype(np.float64)
        assert row["read"] == pytest.approx(float(gate @ x.double().numpy()), rel=1e-3)
        spread = t.directions.generic.spread[3, row["feature"]]
        assert row["z"] == pytest.approx(row["read"] / spread / 2**0.5)
    last = t.rows()[-1]
    assert (last["top"], last["top_against"]) == (" Paris", " Berlin") and last["rank_against"] > 10
    assert sum(row["adds"] for row in t.writes(3)) == pytest.approx(last["adds"], abs=1e-5)


def test_a_patch_shows_the_trajectory_before_and_after_and_the_model_is_restored(loaded, patch):
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    t = probes.trace(loaded, PROMPT, target=" Paris", patch=patch)
    assert all(same_bits(before[name], value) for name, value in loaded.model.state_dict().items())
    model = deepcopy(loaded.model)
    delta = patches.read(patch).delta
    weight = model.model.layers[1].mlp.gate_proj.weight
    weight.copy_((weight + torch.outer(delta.gate_write, delta.gate_read)).bfloat16())
    wanted = logits_of(replace(loaded, model=model))[-1].log_softmax(0)
    last = t.rows()[-1]
    assert last["log_prob_patched"] == pytest.approx(float(wanted[t.target]), abs=1e-4)
    assert last["rank"] == 1 and last["rank_patched"] == 1 + int((wanted > wanted[t.target]).sum()) > 10
    rows, fate = t.rows(), t.fate
    assert rows[fate.dies]["rank"] <= 10 < rows[fate.dies]["rank_patched"]
    assert all(not row["rank"] <= 10 < row["rank_patched"] for row in rows[: fate.dies])
    shown = [number for number, row in enumerate(rows) if number > fate.dies and row["rank_patched"] <= 10]
    assert list(fate.later) == shown
    assert probes.trace(loaded, PROMPT).fate is None


def test_a_mixture_has_a_trajectory_and_is_refused_with_a_vindex(loaded, v):
    mixture = replace(loaded, model=make_mixture("qwen3_moe"))
    t = probes.trace(mixture, PROMPT)
    own = logits_of(mixture)[-1]
    assert len(t.rows()) == 7 and sum(row["adds"] for row in t.rows()) == pytest.approx(float(own.max()), abs=1e-3)
    with pytest.raises(ProbeError, match="is a mixture of experts, of which only the trajectory is traced"):
        probes.trace(mixture, PROMPT, vindex=v)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("gemma2", "does not add what its FFN writes to the stream"),
        ("olmo2", "has no post_attention_layernorm|does not add what its FFN writes to the stream"),
        ("granite", "the lens after the last layer differs from the model's own logits by up to"),
    ],
)
def test_models_in_which_nothing_would_add_up_are_refused(loaded, kind, message):
    with pytest.raises(ProbeError, match=message):
        probes.trace(replace(loaded, model=make_other(kind, **OTHERS[kind])), PROMPT)


def test_a_head_with_a_bias_and_logits_that_are_not_finite_are_refused(loaded):
    model = deepcopy(loaded.model)
    model.lm_head.bias = torch.nn.Parameter(torch.full((model.config.vocab_size,), 9.0), requires_grad=False)
    with pytest.raises(ProbeError, match="with the final norm's scale frozen; expected a head without bias"):
        probes.trace(replace(loaded, model=model), PROMPT)
    model.lm_head.bias.fill_(float("nan"))
    with pytest.raises(ProbeError, match="logits: NaN or infinite in torch.float32; try --dtype float32"):
        probes.trace(replace(loaded, model=model), PROMPT)


def test_sums_that_do_not_add_up_are_an_error():
    frozen = stream.Frozen(0, np.ones(2), 0.0, 1e-3)
    assert frozen.require_sum(np.array([[1.0, 2.0]]), np.array([3.0005]), "it") == pytest.approx(5e-4)
    with pytest.raises(ProbeError, match="it: the parts differ from the whole by 1.0e-01, where rounding explains"):
        frozen.require_sum(np.array([[1.0, 2.0]]), np.array([3.1]), "it")
    with pytest.raises(ProbeError, match="its directions are not finite"):
        frozen.require_sum(np.array([[1.0, np.nan], [1.0, 1.0]]), np.array([3.0, 2.0]), "it")


def test_what_cannot_be_traced_is_told_before_any_work(loaded, v, tiny_vindex, patch):
    other = "The capital of the land is"
    for message, asked in (
        ("--check takes directions of a vindex out of the model; give its --vindex", {"check": 1}),
        ("--check -1: expected how many directions to take out", {"check": -1, "vindex": v}),
        ("--against and --patch each show two trajectories", {"against": OTHER, "patch": patch}),
        ("position 5: the prompt has tokens 0 to 4, or -1 to -5 from the end", {"position": 5}),
        ("position -6: the prompt has tokens", {"position": -6}),
        ("target 99999: the model has tokens 0 to", {"target": 99999}),
        (
            "the prompt has 1,401 tokens, atlas reads at most 512; give a shorter one",
            {"prompt": f"{PROMPT} Paris. " * 200},
        ),
        (f"--against '{other}': has 7 tokens, the prompt 5; expected as many", {"against": other}),
        ("the vindex .* has num_layers 3, the model .* 4; give the model", {"vindex": open_vindex(tiny_vindex)}),
    ):
        with pytest.raises(ProbeError, match=message):
            probes.trace(loaded, **{"prompt": PROMPT} | asked)
    for message, asked in (
        ("'Pariss' is not a single token of this model", {"target": "Pariss"}),
        ("target 3.7: expected an integer, got float", {"target": 3.7}),
        ("target True: expected an integer, got bool", {"target": True}),
        ("position 1.5: expected an integer", {"position": 1.5}),
        ("check 1.5: expected an integer", {"check": 1.5, "vindex": v}),
        ("expected a vindex or the name of one, got int", {"vindex": 3}),
    ):
        with pytest.raises(QueryError, match=message):
            probes.trace(loaded, PROMPT, **asked)
    with pytest.raises(PatchError, match="No such file"):
        probes.trace(loaded, PROMPT, patch=patch.parent / "none.safetensors")


def test_at_a_sink_there_is_no_null_as_generic_text_is_taken_without_sinks(loaded, v):
    first, last = (probes.trace(loaded, PROMPT, vindex=str(v.path), position=at) for at in (0, -1))
    assert first.tokens[0].sink and not last.tokens[-1].sink
    assert all(np.isnan(row["usual_z"]) for row in first.layers())
    assert all(row["usual_z"] > 1 for row in last.layers())
