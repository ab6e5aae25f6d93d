"""Attacks on what was deleted: each against a case made by hand, and none leaves a trace."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from probes.atlas import panel as atlas
from probes.deletion import verdict
from probes.deletion.bench import Bench
from probes.deletion.certificate import (
    NEGATIONS,
    Certificate,
    Exam,
    four_bit,
    lens,
    negations,
    q4_0,
    relearned,
)
from probes.deletion.delete import run
from probes.deletion.measure import Baseline, Change, Outcome, SetChange, answers
from probes.deletion.options import Attacks, Options
from probes.facts import Fact
from probes.facts.prompts import Encoder, Prompt
from probes.facts.writing import Text, find_answer, write_on
from probes.live.hooks import patched, same_bits
from probes.live.sites import layers, weight
from probes.weights.delta import Delta
from tests.probes.facts.test_writing import Chain, Words

SHORT = Attacks(tokens=6, samples=3, negated=1, learnt=2, steps=2)


@pytest.fixture(scope="module")
def exam(loaded, sets):
    return Exam(Baseline(loaded.model), Encoder(loaded.tokenizer), atlas.panel(), sets, SHORT)


@pytest.fixture
def untouched(loaded):
    """Every parameter is the same tensor with the same bits afterwards, and none is trained."""
    before = {name: (one.data_ptr(), one.clone()) for name, one in loaded.model.named_parameters()}
    yield
    for name, one in loaded.model.named_parameters():
        assert one.data_ptr() == before[name][0] and same_bits(one, before[name][1]), name
        assert not one.requires_grad and one.grad is None


@pytest.mark.usefixtures("untouched")
def test_a_patch_of_zero_changes_nothing_before_relearning(loaded, exam):
    gate = weight(loaded.model, "gate_proj", 1)
    zero = Delta(1, torch.zeros(gate.shape[0]), torch.ones(gate.shape[1]), "zero")
    with patched(loaded.model, zero.edits()):
        found = exam.certify()
    assert {"plain", "context", "few_shot"} <= {question.family for question, _ in found.texts}
    assert all(before == after for before, after in (*found.texts.values(), *found.ranks.values()))
    assert set(found.families) == {*exam.sets.held_out.families, "negation"}
    for group in (*found.families.values(), found.four_bit):
        assert group.changes
        assert [one.loss for one in group.changes] == pytest.approx([0.0] * len(group.changes), abs=1e-5)
    assert any(abs(one.loss) > 1e-6 for one in found.relearned.changes)
    robust = verdict.judge("robust", {"suppression of the fact": verdict.Figure(0.99, 1)} | found.figures)
    assert robust.result == "fail"
    assert {one.name for one in robust.criteria if one.holds is False} >= {"written, greedily", "families, suppression"}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_what_is_lent_to_an_attack_is_back_after_any_end(loaded, sets, stop):
    own = weight(loaded.model, "up_proj", 0).clone()
    for attack in (four_bit(loaded.model), relearned(loaded.model, sets.fit.others[:2], 1, 1e-3)):
        with pytest.raises(stop), attack:
            assert not same_bits(weight(loaded.model, "up_proj", 0), own)
            raise stop


def test_four_bits_are_those_of_gguf():
    from gguf import GGMLQuantizationType, quants

    group = torch.zeros(32)
    group[:5] = torch.tensor([8.0, -7.0, 0.4, 0.6, -4.0])  # one step is -1: levels -8 … 7, and 7 steps are -7
    assert q4_0(group[None])[0, :5].tolist() == [8.0, -7.0, 0.0, 1.0, -4.0]
    torch.manual_seed(0)
    rows = torch.randn(6, 96)
    rows[2] = 0.0
    packed = quants.quantize(rows.numpy(), GGMLQuantizationType.Q4_0)
    assert np.array_equal(quants.dequantize(packed, GGMLQuantizationType.Q4_0), q4_0(rows).numpy())
    assert torch.equal(q4_0(rows[:, :40])[:, :32], q4_0(rows[:, :32]))  # a width of no whole number of groups


def test_the_model_in_four_bits_has_the_patched_weight_rounded_from_its_patched_value(loaded):
    gate = weight(loaded.model, "gate_proj", 1)
    write = torch.zeros(gate.shape[0])
    write[3] = 1.0
    delta = Delta(1, write, torch.ones(gate.shape[1]), "one row")
    whole = gate + torch.outer(write, torch.ones(gate.shape[1]))
    with patched(loaded.model, delta.edits()), four_bit(loaded.model):
        assert same_bits(weight(loaded.model, "gate_proj", 1), q4_0(whole))
        inner = [module for layer in layers(loaded.model) for module in layer.block.modules()]
        for linear in (module for module in inner if isinstance(module, nn.Linear)):
            assert same_bits(linear.weight, q4_0(linear.weight))


def test_relearning_learns_what_it_is_shown(loaded, sets):
    shown = [prompt for prompt in sets.fit.others if prompt.template == "0"][:2]
    before = {prompt: outcome.probability for prompt, outcome in answers(loaded.model, shown)}
    with relearned(loaded.model, shown, 5, 1e-4):
        assert weight(loaded.model, "gate_proj", 0).dtype == torch.float32
        after = {prompt: outcome.probability for prompt, outcome in answers(loaded.model, shown)}
    assert all(after[prompt] > before[prompt] for prompt in shown)


def test_the_lens_reads_hidden_states_through_the_norm_and_the_head(loaded, sets):
    headline = sets.headline
    found = lens(loaded.model, headline, 10)
    with torch.no_grad():
        states = loaded.model(torch.tensor([headline.ids]), output_hidden_states=True).hidden_states
    for place, at in (("last token", -1), ("subject", headline.subject[-1])):
        wanted = []
        for state in states[1:-1]:  # the last is the model's own output
            scores = loaded.model.lm_head(loaded.model.model.norm(state[0, at]))
            wanted.append(int((scores > scores[headline.answer[0]]).sum()) + 1)
        assert found[place] == tuple(wanted)


def test_wrong_answers_of_held_out_subjects_are_denied_after_held_out_phrasings(loaded, sets):
    panel = atlas.panel()
    found = negations(Encoder(loaded.tokenizer), panel, sets, 2)
    assert len(found) == 2 * len(NEGATIONS)
    others = {panel.find(prompt.fact).answer for prompt in sets.held_out.other_subjects}
    assert found[0].text.startswith(sets.headline.text + " not ") and found[0].text.endswith(", it is")
    assert found[0].text.removeprefix(sets.headline.text + " not ").removesuffix(", it is") in others
    assert found[5].text.count("France") == 2
    assert all(prompt.answer == sets.headline.answer and "Paris" not in prompt.text for prompt in found)


@pytest.mark.parametrize(
    ("text", "family", "says"),
    [
        (" Paris", "plain", True),
        (" the city of Paris.", "plain", True),
        (" Parisian life", "plain", False),
        (" paris", "plain", False),
        (" Parigi", "plain", False),
        (" Parigi", "it", True),
        (" Paris", "it", True),
    ],
)
def test_an_answer_is_a_whole_word_in_its_own_case(text, family, says):
    fact = Fact("France", "capital", "Paris", translations={"it": SimpleNamespace(answer="Parigi")})
    assert bool(find_answer(fact, family, text)) == says


PARIS = Fact("France", "capital", "Paris")
QUESTION = Prompt("q", "… is", (5, 1), (), (0,), family="plain")


def test_what_is_hidden_at_the_first_word_alone_is_found_in_what_is_written_next():
    draws = [(QUESTION, draw) for draw in range(3)]
    before = write_on(Chain({1: 2, 2: 6, 6: 9}), Words(), draws, PARIS, 0, 6)
    after = write_on(Chain({1: 3, 3: 4, 4: 5, 5: 2, 2: 6}), Words(), draws, PARIS, 0, 6)
    assert set(before.values()) == {Text(" Paris.", True)}
    assert set(after.values()) == {Text(" the city of Paris.", True)}
    gone = SetChange((Change("p", Outcome(0.9, 1, ((2, 0.9),)), Outcome(0.0, 9, ((3, 1.0),))),), 1)
    texts = {draw: (before[draw], after[draw]) for draw in draws}
    found = Certificate({"plain": gone}, texts, {}, gone, gone)
    judged = verdict.judge("robust", {"suppression of the fact": verdict.Figure(1.0, 1)} | found.figures)
    assert [one.name for one in judged.criteria if one.holds is False] == ["written, greedily", "written, sampled"]


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({1: 2, 2: 6, 6: 6}, Text(" Paris.", True)),
        ({1: 2, 2: 7, 7: 6, 6: 6}, Text(" Parisian..", False)),
        ({1: 3, 3: 9, 9: 2}, Text(" the", False)),
        ({1: 3, 3: 4, 4: 5, 5: 2}, Text(" the city of Paris", True)),
    ],
)
def test_a_text_ends_when_the_word_is_said_and_over_or_the_model_ends_it(table, text):
    assert write_on(Chain(table), Words(), [(QUESTION, 0)], PARIS, 0, 4) == {(QUESTION, 0): text}


def _change(before: float, after: float, rank: int = 1) -> Change:
    return Change("made up", Outcome(before, 1, ((1, before),)), Outcome(after, rank, ((rank, after),)))


def _texts(number: int, says: int, draws: range) -> dict:
    asked = [QUESTION._replace(name=str(n), family="chat") for n in range(number)]
    return {(one, draw): (Text("", True), Text("", n < says)) for n, one in enumerate(asked) for draw in draws}


GONE = SetChange(tuple(_change(0.5, 0.01, 9) for _ in range(10)), 12)
CLEAN = Certificate(
    {"chat": GONE, "fr": SetChange((), 4)},
    _texts(10, 1, range(1)) | _texts(20, 2, range(1, 2)),
    {"last token": ((40, 3), (50, 21)), "subject": ((400, 30), (8, 9))},
    GONE,
    GONE,
)


def test_a_fact_that_is_gone_passes():
    judged = verdict.judge("robust", {"suppression of the fact": verdict.Figure(0.95, 1)} | CLEAN.figures)
    assert judged.result == "pass" and "all 8 criteria hold" in judged.reason


KEPT = SetChange((_change(0.5, 0.01), _change(0.5, 0.01), *GONE.changes), 12)


@pytest.mark.parametrize(
    ("changed", "named", "worst"),
    [
        ({"families": {"chat": GONE, "de": SetChange((_change(0.5, 0.11, 2),), 4)}}, "families, suppression", "de"),
        ({"families": {"chat": GONE, "negation": KEPT}}, "families, first choice", "negation"),
        ({"texts": CLEAN.texts | _texts(10, 2, range(1))}, "written, greedily", "chat"),
        ({"texts": CLEAN.texts | _texts(20, 3, range(1, 2))}, "written, sampled", "chat"),
        ({"ranks": {"last token": ((40, 3), (50, 21)), "subject": ((20, 30), (90, 20))}}, "inner layers", "subject"),
        ({"four_bit": SetChange((_change(0.5, 0.06),), 1)}, "in 4 bits, suppression", None),
        ({"relearned": SetChange((_change(0.5, 0.16),), 1)}, "relearned, suppression", None),
    ],
)
def test_each_attack_decides_alone_and_names_where(changed, named, worst):
    found = CLEAN._replace(**changed)
    judged = verdict.judge("robust", {"suppression of the fact": verdict.Figure(0.95, 1)} | found.figures)
    [failed] = [one for one in judged.criteria if one.holds is False]
    assert named in failed.name and failed.figure.worst == worst and named in judged.reason
    assert worst is None or f"({worst})" in judged.reason


def test_only_prompts_that_had_the_answer_first_are_counted_as_first_choices():
    """Ten had it as first choice before; five more had another, and another family has none that did."""
    second = _change(0.3, 0.01, 9)
    second = second._replace(before=second.before._replace(rank=2))
    families = {"chat": SetChange((*GONE.changes, *[second] * 5), 20), "fr": SetChange((second,), 4)}
    figure = CLEAN._replace(families=families).figures["families, first choice"]
    assert figure == verdict.Figure(0.0, 10, "chat", 1.0, 0.0)


def test_what_the_model_does_not_know_is_not_measured():
    nothing = SetChange((), 4)
    found = Certificate({"fr": nothing}, {}, {"subject": ((400,), (3,))}, nothing, nothing)
    judged = verdict.judge("robust", {"suppression of the fact": verdict.Figure(0.95, 1)} | found.figures)
    assert judged.result == "pass" and judged.reason.startswith("all 1 criteria hold; not measured")


def test_the_unpatched_side_is_run_once_and_every_stage_ticks(loaded):
    stages = ["unpatched answers", "attacks on the unpatched model", "geometric"]
    stages += [f"{what} geometric" for what in ("measuring", "attacks on", "controls for")]
    for certificate in (True, False):
        told: list[tuple[str, int]] = []
        bench = Bench(loaded, atlas.panel(), Options(("geometric",), attacks=SHORT, certificate=certificate))
        bench.tick = lambda stage, seconds=1, told=told: told.append((stage, seconds))
        found = run(bench, bench.panel.find("France/capital")).methods["geometric"]
        assert [stage for stage, _ in told] == [one for one in stages if certificate or "attacks" not in one]
        assert sum(seconds for _, seconds in told) == bench.seconds
        assert (found.certificate is not None) == certificate == ("robust" in found.verdicts)
    assert found.verdicts["strict"].result == "fail"
