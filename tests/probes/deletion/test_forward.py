"""The forward method: where it reads, what it writes, and what it learns from what the patched model says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from probes.atlas import panel as atlas
from probes.deletion.bench import Bench
from probes.deletion.delete import run
from probes.deletion.forward import forward, prepared, thinned
from probes.deletion.keys import observe, own_text, read_direction
from probes.deletion.layer import Trial
from probes.deletion.options import ForwardOptions, Options
from probes.deletion.tail import Tail, begin
from probes.deletion.value import fisher_rows, shift, suppression
from probes.facts import bundled
from probes.facts.passes import kl_between, kl_rows
from probes.facts.prompts import Prompt
from probes.facts.sets import split
from probes.live.load import load
from vindex.demo import CHECKPOINT
from vindex.errors import NumericError

BRIEF = ForwardOptions(steps=9, trial_steps=3)


def test_the_read_direction_fires_evenly_on_its_keys_and_least_elsewhere(loaded, sets):
    energy = observe(loaded.model, sets.fit.others, [1])[1].moment
    keys = observe(loaded.model, sets.fit.phrasings, [1])[1].keys
    mean = keys.mean(0)
    naive = mean / (mean @ mean)
    firm, loose = read_direction(keys, energy, 1e4, 0.3), read_direction(keys, energy, 1.0, 0.3)
    assert (keys @ firm - 1).abs().max() < 0.05 < (keys @ loose - 1).abs().max()
    assert firm @ energy @ firm < 0.5 * (naive @ energy @ naive)
    assert loose @ energy @ loose < firm @ energy @ firm


def test_a_moment_with_nothing_in_it_is_refused():
    with pytest.raises(NumericError, match="singular"):
        read_direction(torch.ones(1, 4), torch.zeros(4, 4), 1.0, 0.3)


def place(bench, sets, layer, **wanted):
    """The layer, ready for fits with these options."""
    options = dataclasses.replace(BRIEF, **wanted)
    return prepared(bench, sets.fit, [layer], options)[layer]


def test_the_patch_is_the_same_when_fitted_twice_and_smaller_when_size_weighs_more(bench, sets):
    one, again = place(bench, sets, 1).fitted(), place(bench, sets, 1).fitted()
    assert torch.equal(one.gate_write, again.gate_write)
    small = place(bench, sets, 1, size=100.0)
    assert small.value().norm() < place(bench, sets, 1).value().norm()


def test_fisher_rows_foretell_what_a_small_gate_change_does_to_the_distribution(tiny_checkpoint):
    """To second order, and as an estimate: the tokens are drawn."""
    model = load(tiny_checkpoint, dtype="float32", device="cpu").model
    prompts = _random_prompts(model)
    begun = begin(model, [1], prompts)[1]
    rows = torch.stack([fisher_rows(model, 1, begun, 0, seed) for seed in range(20)])
    tail = Tail.of(model, 1, prompts)
    for _ in range(3):
        write = torch.randn(tail.gate.shape[-1])
        foretold = 1e-3
        write *= (foretold / (rows @ write).square().mean()).sqrt()
        change = torch.zeros_like(tail.gate)
        change[tail.reads.any(0)] = write
        with torch.no_grad():
            assert float(kl_rows(tail.log_probs(), tail.log_probs(change)).mean()) == pytest.approx(foretold, rel=0.2)


def test_crossed_rows_foretell_harm_that_the_drawn_gradients_alone_do_not_see(tiny_checkpoint):
    """A change made to avoid a sample of gradients avoids that sample, not what it is a sample of."""
    model = load(tiny_checkpoint, dtype="float32", device="cpu").model
    prompts = _random_prompts(model)
    begun = begin(model, [1], prompts)[1]
    drawn, crossed = (fisher_rows(model, 1, begun, mixed) for mixed in (0, 12))
    unseen = torch.cat([fisher_rows(model, 1, begun, 0, seed) for seed in range(1, 12)])
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
    tail = Tail.of(bench.model, 0, [prompt._replace(answer=()) for prompt in sets.held_out.other_subjects])

    def harm(**options):
        at = place(bench, sets, 0, steps=60, **options)
        d = at.fitted().gate_write
        assert suppression(Tail(bench.model, 0, at.asked), at.read, d).median() >= 0.9
        with torch.no_grad():
            before, after = (tail.last_hidden(tail.down_in(change)) for change in (0.0, shift(tail, at.read, d)))
            return float(kl_between(bench.model, before, after).mean())

    assert harm(others=40000.0) < 0.8 * harm(others=0.0)


def answers_elsewhere(bench, sets, layer):
    """Responses of u at neutral sentences and the subject's other facts, relative to paraphrases: for w′ 0 and w′."""
    sites = (sets.fit.about, sets.held_out.same_subject, sets.held_out.paraphrases)
    keys = [observe(bench.model, prompts, [layer])[layer].keys for prompts in sites]
    shares = []
    for about_weight in (0.0, ForwardOptions().about_weight):
        read = place(bench, sets, layer, about_weight=about_weight).read
        about, facts, asked = (float((at @ read).mean()) for at in keys)
        shares.append((about / asked, facts / asked))
    return shares


def test_the_read_direction_answers_less_in_neutral_sentences_about_the_subject(bench, sets):
    without, with_them = answers_elsewhere(bench, sets, 1)
    assert with_them[0] < without[0]


@pytest.mark.real
def test_the_read_direction_answers_less_where_other_facts_of_the_subject_are_asked(real_model):
    """Which it has not seen; the atlas knows no neutral sentence that it could learn this from."""
    panel = bundled()
    bench = Bench(load(real_model, dtype="float32", device="cpu"), panel, Options(layer=5))
    without, with_them = answers_elsewhere(bench, split(panel, panel.find("India/capital"), bench.encoder), 5)
    assert with_them[1] < 0.95 * without[1]


def test_a_neutral_sentence_that_begins_like_a_phrasing_is_not_held_against_it(bench, sets):
    prompt = sets.fit.phrasings[0]
    same = prompt._replace(ids=(*prompt.ids[: prompt.subject[-1] + 1], 0))
    other = prompt._replace(ids=(prompt.ids[0] + 1, *prompt.ids[1:]))
    fit = sets.fit._replace(phrasings=(prompt,), families={})
    reads = []
    for about in ((), (same,), (other,)):
        held = fit._replace(about=(*sets.fit.about, *about))
        reads.append(prepared(bench, held, [1], BRIEF)[1].read)
    assert torch.allclose(reads[0], reads[1], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(reads[0], reads[2], rtol=1e-3, atol=1e-5)


def test_the_value_is_scaled_to_what_is_enough_and_no_further(bench, sets):
    at, scaled = place(bench, sets, 0, steps=60), []
    d = at.value()
    for enough in (0.9, 0.99):
        at.options = ForwardOptions(enough=enough)
        scaled.append(at.least_enough(d))
    little, much = scaled
    assert suppression(Tail(bench.model, 0, at.asked), at.read, little)[0] >= 0.9
    assert little.norm() < much.norm()
    torch.testing.assert_close(little / little.norm(), much / much.norm())


def test_where_nothing_is_enough_the_largest_strength_is_taken(bench, sets):
    at = place(bench, sets, 0, enough=1.1)
    d = at.value()
    torch.testing.assert_close(at.least_enough(d), 2 * d)


def test_a_value_that_does_not_stay_finite_is_refused(bench, sets):
    with pytest.raises(NumericError, match="did not stay finite"):
        place(bench, sets, 0, rate=float("inf")).value()


def test_what_the_patched_model_says_by_itself_is_fitted_too(loaded, sets, monkeypatch):
    """The second fit begins at the first, and sees one phrasing more. A layer that is asked for needs no trial."""
    trial = Trial(Bench(loaded, atlas.panel(), Options(layer=0, forward=BRIEF)), sets.fact, sets.fit)
    found, patches = [], []
    for said in ((), sets.held_out.paraphrases[:1]):
        monkeypatch.setattr(
            "probes.deletion.forward.own_words", lambda _, delta, said=said: patches.append(delta) or said
        )
        found.append(forward(trial))
        assert (found[-1].delta.layer, found[-1].scan, found[-1].own) == (0, (), said)
    silent, fitted = found
    assert torch.equal(patches[1].gate_write, silent.delta.gate_write)
    assert not torch.equal(fitted.delta.gate_write, silent.delta.gate_write)


@pytest.mark.parametrize(("dtype", "chat"), [("bfloat16", False), ("float32", True)])
def test_a_fact_goes_in_bfloat16_and_in_a_chat_too(loaded, dtype, chat):
    model = loaded if dtype == "float32" else load(CHECKPOINT, dtype=dtype, device="cpu")
    fitted = ForwardOptions(steps=20, samples=256)
    options = Options(("forward",), chat=chat, layer=0, forward=fitted, certificate=False)
    bench = Bench(model, atlas.panel(), options)
    effect = run(bench, bench.panel.find("France/capital")).methods["forward"].effect
    assert effect.headline.before.probability > 0.5 and effect.headline.loss > 0.7


def test_a_trial_sees_a_few_of_everything(sets):
    few = thinned(sets.fit, 4)
    assert few.phrasings == sets.fit.phrasings[:4]
    assert len({prompt.fact for prompt in few.others}) == len(few.others) == 8
    assert few.families
    assert all(len(prompts) == 1 for prompts in few.families.values())


def test_own_text_is_seeded_and_of_the_length_asked(loaded):
    one = own_text(loaded.model, loaded.tokenizer, 128)
    assert one == own_text(loaded.model, loaded.tokenizer, 128)
    assert one != own_text(loaded.model, loaded.tokenizer, 128, seed=1)
    assert sum(map(len, one)) == pytest.approx(128, abs=len(one))


def test_the_layer_scan_is_kept_and_the_patched_layer_was_tried(result):
    scan = result.methods["forward"].found.scan
    assert len(scan) >= 2
    assert result.methods["forward"].delta.layer in [tried.layer for tried in scan]
