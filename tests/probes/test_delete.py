"""The claims of the method, on the atlas checkpoint: what a patch is predicted to change is what changes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy.stats import binomtest

from probes.delete import Delta, verdict
from probes.delete.controls import random_suppression
from probes.delete.experiment import Bench, Options, run
from probes.delete.forward import _leaks, _read, _read_direction, by_template, forward
from probes.delete.generic import own_text
from probes.delete.geometric import gate_directions, geometric
from probes.delete.keys import observe, read_direction
from probes.delete.measure import Baseline, Change, Effect, Outcome, SetChange, answers, measure
from probes.delete.passes import Tail, batch, last_hidden, unembed
from probes.delete.record import wilson
from probes.delete.value import ValueOptions, fit_value
from probes.facts import atlas, bundled
from probes.facts.prompts import Encoder
from probes.facts.sets import split
from probes.hooks import capture, patched, same_bits
from probes.model import Site, layers, load, weight
from vindex.demo import CHECKPOINT
from vindex.errors import NumericError, ProbeError


@pytest.fixture(scope="module")
def loaded():
    return load(CHECKPOINT, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def sets(loaded):
    panel = atlas.panel()
    return split(panel, panel.find("France/capital"), Encoder(loaded.tokenizer))


@pytest.fixture(scope="module")
def bench(loaded):
    return Bench(loaded, atlas.panel(), Options(samples=512))


@pytest.fixture(scope="module")
def result(bench):
    return run(bench, bench.panel.find("France/capital"))


@pytest.fixture
def delta(loaded):
    """A patch of the size of a real one, in the middle of the model."""
    torch.manual_seed(0)
    gate = weight(loaded.model, "gate_proj", 1)
    write, read = torch.randn(gate.shape[0]), torch.randn(gate.shape[1])
    return Delta(1, write, read, "test").scaled_to(0.05 * float(gate.norm()))


def test_the_predicted_change_of_the_gate_is_the_measured_one(loaded, sets, delta):
    """W x becomes W x + (u·x) d in the patched layer, and nothing changes before it."""
    model = loaded.model
    ids = torch.tensor([sets.headline.ids])
    places = [Site("gate", 0), Site("gate", 1), Site("mlp_in", 1)]
    with torch.no_grad(), capture(model, places) as before:
        model(ids)
    with torch.no_grad(), patched(model, delta.edits()), capture(model, places) as after:
        model(ids)
    predicted = (before[places[2]] @ delta.gate_read)[..., None] * delta.gate_write
    measured = after[places[1]] - before[places[1]]
    assert predicted.abs().max() > 0.01
    torch.testing.assert_close(measured, predicted, atol=1e-5, rtol=1e-4)
    assert same_bits(before[places[0]], after[places[0]])


def test_a_zero_patch_changes_nothing_bit_for_bit(loaded, sets, delta):
    ids = torch.tensor([sets.headline.ids])
    zero = dataclasses.replace(delta, gate_write=torch.zeros_like(delta.gate_write))
    with torch.no_grad():
        before = loaded.model(ids).logits
        with patched(loaded.model, zero.edits()):
            zeroed = loaded.model(ids).logits
        with patched(loaded.model, delta.edits()):
            changed = loaded.model(ids).logits
    assert same_bits(before, zeroed)
    assert not same_bits(before, changed)


def test_the_weight_is_restored_bit_for_bit_even_after_an_exception(loaded, delta):
    saved = weight(loaded.model, "gate_proj", 1).clone()
    with pytest.raises(RuntimeError, match="on purpose"), patched(loaded.model, delta.edits()):
        assert not same_bits(weight(loaded.model, "gate_proj", 1), saved)
        raise RuntimeError("on purpose")
    assert same_bits(weight(loaded.model, "gate_proj", 1), saved)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_batch_and_single_evaluation_agree(sets, dtype, tolerance):
    model = load(CHECKPOINT, dtype=dtype, device="cpu").model
    prompts = [*sets.held_out.paraphrases, *sets.held_out.other_subjects[:20]]
    together = {prompt.name: outcome for prompt, outcome in answers(model, prompts)}
    for prompt in prompts:
        [(_, alone)] = answers(model, [prompt])
        assert alone.probability == pytest.approx(together[prompt.name].probability, abs=tolerance)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_tail_gives_what_the_whole_model_gives(loaded, chat, layer):
    panel = atlas.panel()
    prompts = split(panel, panel.find("France/capital"), Encoder(loaded.tokenizer, chat)).fit.phrasings
    group = batch(prompts, torch.device("cpu"))
    tail = Tail(loaded.model, layer, prompts)
    with torch.no_grad():
        whole = unembed(loaded.model, last_hidden(loaded.model, group.ids)[group.rows, group.columns])
        torch.testing.assert_close(tail.log_probs(), whole, atol=1e-4, rtol=1e-4)
        direct = loaded.model(torch.tensor([prompts[0].ids])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(tail.log_probs()[0], direct, atol=1e-4, rtol=1e-4)


def test_a_patched_tail_gives_what_the_patched_model_gives(loaded, sets):
    """For a read direction that is silent before the subject, where a tail takes it to be."""
    tail = Tail(loaded.model, 1, [sets.headline])
    at = sets.headline.subject[0]
    with torch.no_grad(), capture(loaded.model, [Site("mlp_in", 1)]) as seen:
        loaded.model(torch.tensor([sets.headline.ids]))
    inputs = seen[Site("mlp_in", 1)][0]
    read = inputs[at] - inputs[:at].T @ torch.linalg.lstsq(inputs[:at].T, inputs[at]).solution
    torch.manual_seed(0)
    delta = Delta(1, torch.randn(tail.gate.shape[-1]), read / (read @ inputs[at]), "test")
    with torch.no_grad(), patched(loaded.model, delta.edits()):
        whole = loaded.model(torch.tensor([sets.headline.ids])).logits[0, -1].log_softmax(-1)
    change = (tail.mlp_in @ delta.gate_read)[..., None] * delta.gate_write
    with torch.no_grad():
        torch.testing.assert_close(tail.log_probs(change)[0], whole, atol=1e-3, rtol=1e-3)
        assert (tail.log_probs(change)[0] - tail.log_probs()[0]).abs().max() > 0.1


def test_running_a_model_in_parts_that_has_more_to_it_is_refused(loaded, sets, monkeypatch):
    whole = loaded.model.forward

    def scaled(*args, **kwargs):
        out = whole(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    monkeypatch.setattr(loaded.model, "forward", scaled)
    with pytest.raises(ProbeError, match="run in parts it gives other probabilities"):
        Tail(loaded.model, 1, [sets.headline])


def test_a_tail_of_prompts_without_answers_is_checked_too(loaded, sets):
    tail = Tail(loaded.model, 1, sets.fit.about)
    assert len(tail.log_probs()) == sum(len(prompt.ids) - prompt.subject[0] for prompt in sets.fit.about)


def test_the_read_direction_fires_evenly_on_its_keys_and_least_elsewhere(loaded, sets):
    energy = observe(loaded.model, sets.fit.others, [1])[1].moment.total
    keys = observe(loaded.model, sets.fit.phrasings, [1])[1].keys
    mean = keys.mean(0)
    naive = mean / (mean @ mean)
    firm, loose = read_direction(keys, energy, 1e4), read_direction(keys, energy, 1.0)
    assert (keys @ firm - 1).abs().max() < 0.05 < (keys @ loose - 1).abs().max()
    assert firm @ energy @ firm < 0.5 * (naive @ energy @ naive)
    assert loose @ energy @ loose < firm @ energy @ firm


def test_a_moment_with_nothing_in_it_is_refused():
    with pytest.raises(NumericError, match="singular"):
        read_direction(torch.ones(1, 4), torch.zeros(4, 4), 1.0)


def test_a_prompt_without_an_answer_is_looked_at_from_the_subject_on(sets):
    about, asked = sets.fit.about[0], sets.headline
    group = batch([about, asked], torch.device("cpu"))
    wanted = list(range(about.subject[0], len(about.ids)))
    assert group.columns[group.rows == 0].tolist() == wanted
    assert group.columns[group.rows == 1].tolist() == [len(asked.ids) - 1]


def test_a_leak_is_measured_with_a_direction_that_has_not_seen_its_subject(bench, sets):
    model, layer, options = bench.model, 1, bench.options.forward
    found = _read(model, sets.fit.phrasings, sets.fit, [layer])[layer]
    leaks = _leaks(sets.fit, found, bench.generic_moments()[layer], options)
    final = _read_direction(found, bench.generic_moments()[layer], options, found.one, found.other)
    assert len({leak.prompt.fact for leak in leaks}) == options.leaks
    keys = observe(model, [leak.prompt for leak in leaks], [layer])[layer].keys
    unseen = torch.stack([leak.read for leak in leaks]) / options.leak_margin
    assert (keys * unseen).sum(1).abs().mean() > 1.3 * (keys @ final).abs().mean()


def test_the_value_is_the_same_when_fitted_twice_and_smaller_when_size_weighs_more(bench, sets):
    found = _read(bench.model, sets.fit.phrasings, sets.fit, [1])[1]
    read = _read_direction(found, bench.generic_moments()[1], bench.options.forward, found.one)

    def fit(**options):
        wanted = ValueOptions(rounds=3, **options)
        return fit_value(bench.model, 1, sets.fit.phrasings, sets.fit.about, [], read, wanted).gate_write

    assert torch.equal(fit(), fit())
    assert fit(size=100.0).norm() < fit().norm()


def _answers_elsewhere(bench, sets, layer):
    """Responses of u at neutral sentences and the subject's other facts, relative to paraphrases: for w′ 0 and w′."""
    found = _read(bench.model, sets.fit.phrasings, sets.fit, [layer])[layer]
    sites = (sets.fit.about, sets.held_out.same_subject, sets.held_out.paraphrases)
    keys = [observe(bench.model, prompts, [layer])[layer].keys for prompts in sites]
    shares = []
    for about_weight in (0.0, bench.options.forward.about_weight):
        options = dataclasses.replace(bench.options.forward, about_weight=about_weight)
        read = _read_direction(found, bench.generic_moments()[layer], options, found.one, found.other)
        about, facts, asked = (float((at @ read).mean()) for at in keys)
        shares.append((about / asked, facts / asked))
    return shares


def test_the_read_direction_answers_less_in_neutral_sentences_about_the_subject(bench, sets):
    without, with_them = _answers_elsewhere(bench, sets, 1)
    assert with_them[0] < without[0]


@pytest.mark.real
def test_the_read_direction_answers_less_where_other_facts_of_the_subject_are_asked(real_model):
    """Which it has not seen; the atlas knows no neutral sentence that it could learn this from."""
    panel = bundled()
    bench = Bench(load(real_model, dtype="float32", device="cpu"), panel, Options(layer=5))
    without, with_them = _answers_elsewhere(bench, split(panel, panel.find("India/capital"), bench.encoder), 5)
    assert with_them[1] < 0.9 * without[1]


def test_a_neutral_sentence_that_begins_like_a_phrasing_is_not_held_against_it(bench, sets):
    prompt = sets.fit.phrasings[0]
    same = prompt._replace(ids=(*prompt.ids[: prompt.subject[-1] + 1], 0))
    other = prompt._replace(ids=(prompt.ids[0] + 1, *prompt.ids[1:]))
    found = _read(bench.model, [prompt], sets.fit._replace(about=(same, other)), [1])[1]
    assert found.about[0].abs().max() == 0
    assert found.about[1].abs().max() > 0


def test_the_value_is_scaled_to_what_is_enough_and_no_further(bench, sets):
    found = _read(bench.model, sets.fit.phrasings, sets.fit, [0])[0]
    read = _read_direction(found, bench.generic_moments()[0], bench.options.forward, found.one, found.other)

    def fit(enough):
        wanted = ValueOptions(enough=enough, headline_enough=enough)
        return fit_value(bench.model, 0, sets.fit.phrasings, sets.fit.about, [], read, wanted)

    little, much = fit(0.98), fit(0.999)
    assert 0.98 <= little.suppressed < much.suppressed
    assert little.strength < much.strength
    torch.testing.assert_close(little.gate_write / little.strength, much.gate_write / much.strength)


def test_a_tail_of_prompts_that_all_begin_with_the_subject_needs_no_cache(loaded, sets):
    model, prompt = loaded.model, sets.headline._replace(subject=(0,))
    with torch.no_grad():
        wanted = unembed(model, last_hidden(model, torch.tensor([prompt.ids])))[0, -1]
        found = Tail(model, 0, [prompt]).log_probs()[0]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_own_text_is_seeded_and_of_the_length_asked(loaded):
    one = own_text(loaded.model, loaded.tokenizer, 128)
    assert one == own_text(loaded.model, loaded.tokenizer, 128)
    assert one != own_text(loaded.model, loaded.tokenizer, 128, seed=1)
    assert sum(map(len, one)) == pytest.approx(128, abs=len(one))


def test_forward_deletes_the_fact_and_little_else_and_random_patches_do_nothing(result):
    found = result.methods["forward"]
    effect = found.effect
    assert found.seed.result == "pass", found.seed.reason
    assert effect.headline.loss >= 0.95
    assert effect.paraphrases.mean >= 0.8
    assert effect.other_subjects.mean_absolute <= 0.1
    assert random_suppression(found.controls) <= 0.05


def test_the_methods_do_not_touch_the_model(bench, sets):
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    forward(bench.model, sets.fit, bench.generic_moments(), bench.options.forward)
    geometric(bench.model, sets.headline.answer[0])
    assert all(same_bits(before[name], value) for name, value in bench.model.state_dict().items())


def test_the_layer_scan_is_kept_and_says_which_layers_were_tried(result):
    scan = result.methods["forward"].found.scan
    tried = [candidate for candidate in scan if candidate.withheld_kl is not None]
    assert len(tried) >= 2
    assert result.methods["forward"].delta.layer in {candidate.layer for candidate in tried}


def test_a_trial_withholds_whole_templates_and_never_the_headline(loaded):
    panel = atlas.panel()
    fit = split(panel, panel.find("France/capital"), Encoder(loaded.tokenizer)).fit
    seen, unseen = by_template(fit.phrasings + fit.contexts)
    assert fit.phrasings[0] in seen
    assert unseen
    assert not {prompt.template for prompt in seen} & {prompt.template for prompt in unseen}
    assert len(seen) + len(unseen) == len(fit.phrasings + fit.contexts)
    assert by_template(fit.phrasings[:1]) == ([fit.phrasings[0]], [fit.phrasings[0]])


def test_geometric_closes_the_direction_most_aligned_with_the_answer(loaded, sets):
    found = geometric(loaded.model, sets.headline.answer[0])
    gate = weight(loaded.model, "gate_proj", found.delta.layer)
    with torch.no_grad():
        closed = gate + torch.outer(found.delta.gate_write, found.delta.gate_read)
    assert float((closed @ found.delta.gate_read).norm()) < 1e-4 * float(gate.norm())
    best = max(abs(alignment.cosine) for alignment in found.scan)
    assert best == max(abs(a.cosine) for a in found.scan if a.layer == found.delta.layer)


def test_geometric_takes_the_same_direction_from_a_vindex(loaded, sets):
    gates = [gate_directions(weight(loaded.model, "gate_proj", n), 128) for n in range(len(layers(loaded.model)))]
    exact = geometric(loaded.model, sets.headline.answer[0])
    stored = geometric(loaded.model, sets.headline.answer[0], gate=torch.stack(gates).half().numpy())
    assert stored.delta.layer == exact.delta.layer
    assert abs(float(stored.delta.gate_read @ exact.delta.gate_read)) > 0.999
    with pytest.raises(ProbeError, match="vindex gate directions have shape"):
        geometric(loaded.model, 5, gate=torch.zeros(2, 4, 8).numpy())


def test_a_fact_the_model_does_not_know_is_not_applicable(bench):
    wrong = dataclasses.replace(bench.panel.find("France/capital"), answer="Berlin")
    unknown = run(bench, wrong)
    assert not unknown.known
    assert not unknown.methods
    assert unknown.before.rank > 1


def test_a_layer_out_of_range_is_refused(loaded):
    with pytest.raises(ProbeError, match="layer 9: the model has layers 0 to 3"):
        Bench(loaded, atlas.panel(), Options(layer=9))


def test_measuring_an_unpatched_model_finds_no_change(bench, sets, result):
    effect = measure(bench.baseline, sets)
    assert effect.headline.loss == pytest.approx(0.0, abs=1e-6)
    assert effect.neutral_kl == pytest.approx(0.0, abs=1e-6)
    assert effect.other_subjects.flips == 0


def test_probabilities_are_the_models_own(loaded, sets):
    [outcome] = Baseline(loaded.model).of([sets.headline])
    logits = loaded.model(torch.tensor([sets.headline.ids])).logits[0, -1].float()
    assert outcome.probability == pytest.approx(float(logits.softmax(-1)[sets.headline.answer[0]]), abs=1e-5)
    assert outcome.top[0][0] == int(logits.argmax())


def test_an_answer_of_several_tokens_is_scored_as_a_sequence(loaded, sets):
    first, second = sets.headline.answer[0], sets.held_out.reference[0].answer[0]
    [outcome] = Baseline(loaded.model).of([sets.headline._replace(answer=(first, second))])
    with torch.no_grad():
        one = loaded.model(torch.tensor([sets.headline.ids])).logits[0, -1].softmax(-1)[first]
        two = loaded.model(torch.tensor([[*sets.headline.ids, first]])).logits[0, -1].softmax(-1)[second]
    assert outcome.probability == pytest.approx(float(one * two), rel=1e-3)


# The verdicts, on made-up effects: each criterion decides alone.


def _change(before: float, loss: float, flipped: bool = False) -> Change:
    after = before * (1 - loss)
    return Change("made up", Outcome(before, 1, ((1, before),)), Outcome(after, 1, ((2 if flipped else 1, after),)))


def _effect(**changed) -> Effect:
    good = {
        "headline": _change(0.9, 0.99),
        "paraphrases": SetChange((_change(0.5, 0.95), _change(0.5, 0.9), _change(0.12, 0.1)), 4),
        "reference": SetChange((_change(0.9, 0.01),), 1),
        "other_subjects": SetChange(tuple(_change(0.5, 0.01) for _ in range(20)), 30),
        "same_subject": SetChange((_change(0.5, 0.1),), 2),
        "same_answer": SetChange((_change(0.5, 0.1),), 2),
        "neutral_kl": 1e-3,
        "neutral_tokens": 100,
    }
    return Effect(**(good | changed))


def test_a_clean_deletion_passes_both_verdicts():
    assert verdict.seed(_effect()).result == "pass"
    assert verdict.strict(_effect(), 0.01, 5).result == "pass"


@pytest.mark.parametrize(
    ("changed", "random", "named"),
    [
        ({"headline": _change(0.9, 0.94)}, 0.01, "suppression of the fact"),
        ({"paraphrases": SetChange((_change(0.5, 0.69), *[_change(0.5, 1.0)] * 3), 4)}, 0.01, "each paraphrase"),
        ({"paraphrases": SetChange((_change(0.5, 0.89),), 4)}, 0.01, "paraphrases, mean"),
        ({"reference": SetChange((_change(0.9, 0.06),), 1)}, 0.01, "reference answer"),
        ({"other_subjects": SetChange((_change(0.5, 0.05), _change(0.5, -0.05)), 2)}, 0.01, "mean |loss|"),
        ({"other_subjects": SetChange((_change(0.5, 0.21), *[_change(0.5, 0.0)] * 9), 10)}, 0.01, "worst loss"),
        ({"other_subjects": SetChange((_change(0.5, 0.0, True), *[_change(0.5, 0.0)] * 9), 10)}, 0.01, "flips"),
        ({"same_subject": SetChange((_change(0.5, 0.21),), 2)}, 0.01, "other facts of the subject"),
        ({"same_answer": SetChange((_change(0.5, 0.16),), 2)}, 0.01, "other facts with the answer"),
        ({"neutral_kl": 6e-3}, 0.01, "neutral text"),
        ({}, 0.06, "random rank-1"),
    ],
)
def test_each_strict_criterion_fails_alone_and_is_named(changed, random, named):
    found = verdict.strict(_effect(**changed), random, 5)
    assert found.result == "fail"
    [failed] = [criterion for criterion in found.criteria if criterion.holds is False]
    assert named in failed.name
    assert named in found.reason


@pytest.mark.parametrize(
    "changed", [{"headline": _change(0.9, 0.69)}, {"reference": SetChange((_change(0.9, 0.31),), 1)}]
)
def test_seed_fails_below_seventy_or_above_thirty(changed):
    assert verdict.seed(_effect(**changed)).result == "fail"


def test_a_set_without_known_prompts_is_said_not_to_be_measured():
    found = verdict.strict(_effect(same_answer=SetChange((), 4)), 0.01, 5)
    assert found.result == "pass"
    assert "not measured" in found.reason


@pytest.mark.parametrize(("passed", "of"), [(0, 10), (7, 10), (10, 10), (29, 31)])
def test_the_interval_is_wilsons(passed, of):
    found = wilson(passed, of)
    expected = binomtest(passed, of).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_no_facts_no_rate():
    assert math.isnan(wilson(0, 0).share)
