"""The forward method: where it reads, what it writes, which layer it takes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from probes.delete.controls import random_felt
from probes.delete.experiment import Bench, Options
from probes.delete.fisher import fisher_rows
from probes.delete.forward import (
    Candidate,
    _guard,
    _least_harmful,
    _read,
    _read_direction,
    _suited,
    by_template,
    forward,
)
from probes.delete.generic import own_text
from probes.delete.keys import observe, read_direction
from probes.delete.passes import Tail, kl_rows
from probes.delete.value import Value, ValueOptions, _order, fit_value, moved
from probes.facts import atlas, bundled
from probes.facts.prompts import Encoder, Prompt
from probes.facts.sets import split
from probes.hooks import same_bits
from probes.model import load, weight
from vindex.errors import NumericError


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


def test_the_value_is_the_same_when_fitted_twice_and_smaller_when_size_weighs_more(bench, sets):
    _, fit = _fitting(bench, sets, 1)
    assert torch.equal(fit(steps=12).gate_write, fit(steps=12).gate_write)
    assert fit(steps=12, size=100.0).gate_write.norm() < fit(steps=12).gate_write.norm()


def _fitting(bench, sets, layer):
    """u in `layer`, and the fit of d for it as a function of its options."""
    model, fit, options = bench.model, sets.fit, bench.options.forward
    found, generic = _read(model, fit.phrasings, fit, [layer])[layer], bench.generic_moments()[layer]
    read = _read_direction(found, generic, options, found.one, found.other)
    guard = _guard(model, layer, fit.others, found, generic, options)
    return read, lambda **wanted: fit_value(model, layer, fit.phrasings, fit.about, read, guard, ValueOptions(**wanted))


def test_fisher_rows_foretell_what_a_small_gate_change_does_to_the_distribution(tiny_checkpoint):
    """To second order, and as an estimate: the tokens are drawn."""
    model = load(tiny_checkpoint, dtype="float32", device="cpu").model
    prompts = _random_prompts(model)
    rows = torch.stack([fisher_rows(model, 1, prompts, seed, mixed=0) for seed in range(20)])
    tail = Tail.of(model, 1, prompts)
    for _ in range(3):
        write = torch.randn(tail.gate.shape[-1])
        foretold = 1e-3
        write *= (foretold / (rows @ write).square().mean()).sqrt()
        change = torch.zeros_like(tail.gate)
        change[[at for places in tail.subjects for at in places]] = write
        with torch.no_grad():
            assert float(kl_rows(tail.log_probs(), tail.log_probs(change)).mean()) == pytest.approx(foretold, rel=0.2)


def test_crossed_rows_foretell_harm_that_the_drawn_gradients_alone_do_not_see(tiny_checkpoint):
    """A change made to avoid a sample of gradients avoids that sample, not what it is a sample of."""
    model = load(tiny_checkpoint, dtype="float32", device="cpu").model
    prompts = _random_prompts(model)
    drawn, crossed = (fisher_rows(model, 1, prompts, mixed=mixed) for mixed in (0, 12))
    unseen = torch.cat([fisher_rows(model, 1, prompts, seed, mixed=0) for seed in range(1, 12)])
    torch.manual_seed(0)
    write = torch.randn(drawn.shape[1])
    write -= drawn.T @ torch.linalg.lstsq(drawn.T, write[:, None], driver="gelsd").solution[:, 0]
    foretold, crossed_foretold, really = ((rows @ write).square().mean() for rows in (drawn, crossed, unseen))
    assert foretold < 0.01 * really
    assert crossed_foretold > 0.3 * really


def _random_prompts(model):
    torch.manual_seed(0)
    texts = torch.randint(model.config.vocab_size, (30, 9)).tolist()
    return [Prompt(str(row), "", tuple(text), (), (4,)) for row, text in enumerate(texts)]


def test_the_guard_spares_subjects_that_it_has_not_seen(bench, sets):
    read, fit = _fitting(bench, sets, 0)
    tail = Tail.of(bench.model, 0, [prompt._replace(answer=()) for prompt in sets.held_out.other_subjects])

    def harm(**options):
        value = fit(enough=0.95, headline_enough=0.95, **options)
        assert value.suppressed >= 0.95
        return moved(tail, read, value.gate_write)

    assert harm() < 0.8 * harm(others=0.0)


def test_harm_counts_other_subjects_five_fold_and_what_suppression_lacks():
    trial = Candidate(5, 0.1, 0.1, withheld_kl=0.01, about_kl=0.1, suppressed=0.85)
    assert trial.harm == pytest.approx(5 * 0.01 + 0.1 + 0.1)
    assert trial._replace(suppressed=0.99).harm == pytest.approx(5 * 0.01 + 0.1)
    assert trial._replace(withheld_kl=None).harm == math.inf


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
    assert with_them[1] < 0.95 * without[1]  # .925 and .993


def test_a_neutral_sentence_that_begins_like_a_phrasing_is_not_held_against_it(bench, sets):
    prompt = sets.fit.phrasings[0]
    same = prompt._replace(ids=(*prompt.ids[: prompt.subject[-1] + 1], 0))
    other = prompt._replace(ids=(prompt.ids[0] + 1, *prompt.ids[1:]))
    found = _read(bench.model, [prompt], sets.fit._replace(about=(same, other)), [1])[1]
    assert found.about[0].abs().max() == 0
    assert found.about[1].abs().max() > 0


def test_the_value_is_scaled_to_what_is_enough_and_no_further(bench, sets):
    _, fit = _fitting(bench, sets, 0)
    little, much = (fit(enough=enough, headline_enough=enough) for enough in (0.98, 0.999))
    assert 0.98 <= little.suppressed < much.suppressed
    assert little.strength < much.strength
    torch.testing.assert_close(little.gate_write / little.strength, much.gate_write / much.strength)


def test_the_value_is_made_stronger_than_enough_only_where_neutral_prompts_leave_room(bench, sets):
    _, fit = _fitting(bench, sets, 0)
    enough = fit(spare=0.0)
    kl = enough.about_kl
    spared, most, told_nothing = (
        fit(spare=1.1 * kl, telling=kl / 2),
        fit(spare=2 * kl, telling=kl / 2),
        fit(telling=2 * kl),
    )
    assert spared.strength == pytest.approx(math.sqrt(1.1) * enough.strength)
    assert spared.about_kl == pytest.approx(1.1 * kl, rel=0.05)
    assert most.strength == pytest.approx(1.12 * enough.strength)
    assert told_nothing.strength == enough.strength


@pytest.mark.parametrize(
    ("hurt", "felt", "about_weight", "size"),
    [
        (0.04, math.inf, 40.0, 1.0),
        (0.032, math.inf, 40.0, 1.25**3),
        (0.09, math.inf, 90.0, 1.0),
        (0.01, math.inf, 40.0, 4.0),
        (0.0005, math.inf, 40.0, 1.0),
        (0.09, 1e-9, 40.0, 4.0),
    ],
)
def test_care_and_size_suit_what_the_trial_did_and_what_random_changes_allow(
    bench, sets, hurt, felt, about_weight, size
):
    fit, generic = sets.fit, bench.generic_moments()[1]
    options = dataclasses.replace(bench.options.forward, felt=felt, value=ValueOptions(size=1.0))
    found = _read(bench.model, fit.phrasings, fit, [1])[1]
    trial = Value(torch.ones(bench.model.config.intermediate_size), 1.0, (), 1.0, 0.0)
    tried = Candidate(1, 0.1, 0.1, 0.0, hurt, 1.0)
    suited = _suited(bench.model, fit.phrasings[0], tried, found, generic, options, trial)
    assert suited.about_weight == about_weight
    assert suited.value.size == pytest.approx(size)


def test_random_changes_are_felt_more_the_larger_they_are_and_leave_the_model_as_it_was(bench, sets):
    headline, gate = sets.fit.phrasings[0], weight(bench.model, "gate_proj", 1)
    before = gate.clone()
    none, little, much = (random_felt(bench.model, headline, 1, norm) for norm in (0.0, 1.0, 10.0))
    assert none == 0.0 < little < much
    assert same_bits(gate, before)


def test_a_layer_that_is_asked_for_is_tried_too(bench, sets):
    options = dataclasses.replace(bench.options.forward, value=ValueOptions(steps=1))
    (only,) = forward(bench.model, sets.fit, bench.generic_moments(), options, layer=1).scan
    assert (only.layer, only.tried) == (1, True)


def test_neutral_prompts_take_turns_where_there_are_many():
    rounds = [_order(3, 2, 9)[n : n + 3] for n in (0, 3, 6)]
    assert [sorted(taken) for taken in rounds] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


def test_every_neutral_prompt_counts_though_a_step_sees_few(bench, sets):
    """Those that have their turn in the second round are other ones, and nothing else is."""
    read, _ = _fitting(bench, sets, 0)
    model, guard = bench.model, torch.zeros(1, bench.model.config.intermediate_size)

    def fitted(about):
        asked = sets.fit.phrasings[:1]
        return fit_value(model, 0, asked, about, read, guard, ValueOptions(steps=2, enough=0.0, headline_enough=0.0))

    sentence = sets.fit.about[1]
    fact = sets.fit.phrasings[0]._replace(answer=())
    plain, other = fitted([sentence] * 6), fitted([sentence, fact] * 3)
    assert not torch.equal(plain.gate_write, other.gate_write)


def test_own_text_is_seeded_and_of_the_length_asked(loaded):
    one = own_text(loaded.model, loaded.tokenizer, 128)
    assert one == own_text(loaded.model, loaded.tokenizer, 128)
    assert one != own_text(loaded.model, loaded.tokenizer, 128, seed=1)
    assert sum(map(len, one)) == pytest.approx(128, abs=len(one))


def test_the_layer_scan_is_kept_and_the_patched_layer_was_tried(result):
    scan = result.methods["forward"].found.scan
    assert len(scan) >= 2
    assert result.methods["forward"].delta.layer in [candidate.layer for candidate in scan if candidate.tried]


@pytest.mark.parametrize(("deeper", "chosen"), [(0.1, 5), (0.095, 5), (0.09, 6), (0.2, 5)])
def test_a_deeper_layer_is_patched_only_where_it_is_clearly_less_harmful(deeper, chosen):
    tried = [Candidate(layer, 0.1, 0.1, 0.0, kl, 1.0) for layer, kl in ((5, 0.1), (6, deeper))]
    assert _least_harmful(tried) == chosen


def test_when_two_layers_are_tried_the_less_harmful_is_patched(bench, sets):
    """With a threshold that neither meets, both are tried, whichever wins."""
    options = dataclasses.replace(bench.options.forward, harmless=-1.0, value=ValueOptions(steps=1))
    found = forward(bench.model, sets.fit, bench.generic_moments(), options)
    tried = [candidate for candidate in found.scan if candidate.tried]
    assert len(tried) == 2
    assert found.delta.layer == _least_harmful(tried)


@pytest.mark.parametrize(("harmless", "tried"), [(float("inf"), [0]), (-1.0, [0, 1])])
def test_layers_are_tried_from_the_first_until_one_is_harmless(bench, sets, harmless, tried):
    options = dataclasses.replace(bench.options.forward, harmless=harmless, value=ValueOptions(steps=1))
    scan = forward(bench.model, sets.fit, bench.generic_moments(), options).scan
    assert [candidate.layer for candidate in scan if candidate.tried] == tried


def test_a_trial_withholds_whole_templates_and_never_the_headline(loaded):
    panel = atlas.panel()
    fit = split(panel, panel.find("France/capital"), Encoder(loaded.tokenizer)).fit
    seen, unseen = by_template(fit.phrasings + fit.contexts)
    assert fit.phrasings[0] in seen
    assert unseen
    assert not {prompt.template for prompt in seen} & {prompt.template for prompt in unseen}
    assert len(seen) + len(unseen) == len(fit.phrasings + fit.contexts)
    assert by_template(fit.phrasings[:1]) == ([fit.phrasings[0]], [fit.phrasings[0]])
