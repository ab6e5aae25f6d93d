"""The one rule by which every method gets its layer."""

from __future__ import annotations

import pytest
import torch

from probes.atlas import panel as atlas
from probes.deletion.bench import Bench, candidates
from probes.deletion.layer import Trial, Tried, by_template, divide, least_harmful
from probes.deletion.measure import KNOWN, answers
from probes.deletion.options import ForwardOptions, Options
from probes.live.sites import layers
from probes.weights.delta import Delta

RULE = ForwardOptions()


@pytest.fixture(scope="module")
def trial(loaded, sets):
    return Trial(Bench(loaded, atlas.panel(), Options()), sets.fact, sets.fit)


@pytest.mark.parametrize(("depth", "chosen"), [(30, (5, 9, 14)), (24, (4, 8, 11)), (12, (2, 4, 5)), (4, (0, 1))])
def test_candidates_are_spread_from_the_first_sixth_to_the_half(depth, chosen, monkeypatch):
    monkeypatch.setattr("probes.deletion.bench.layers", lambda model: range(depth))
    monkeypatch.setattr("probes.deletion.bench.null_layers", lambda model: {})
    assert candidates(torch.nn.Module(), RULE.layers) == chosen


def test_a_trial_keeps_what_is_withheld_from_what_is_seen(sets):
    seen, withheld = divide(sets.fit)
    for field in ("phrasings", "others", "about"):
        assert set(getattr(seen, field)).isdisjoint(getattr(withheld, field))
    for family, some in sets.fit.families.items():
        parts = [set(side.families[family]) for side in (seen, withheld)]
        assert parts[0].isdisjoint(parts[1]) or len({prompt.template for prompt in some}) == 1
    assert set(seen.others) | set(withheld.others) == set(sets.fit.others)
    assert {prompt.fact for prompt in seen.others}.isdisjoint(prompt.fact for prompt in withheld.others)
    assert seen.phrasings[0] is sets.fit.phrasings[0]
    one = (sets.fit.phrasings[0],)
    assert by_template(one) == (one, one)


def test_phrasings_that_the_model_does_not_answer_are_left_out(loaded, sets, trial):
    known = {prompt for prompt, outcome in answers(loaded.model, sets.fit.phrasings) if outcome.probability >= KNOWN}
    assert set(trial.fit.phrasings) == known | {sets.headline}


def random_change(model, layer, times):
    """A random ΔW, so many times as large as the weight."""
    gate = layers(model)[layer].gate_proj.weight
    draw = torch.Generator().manual_seed(0)
    write, read = torch.randn(gate.shape[0], generator=draw), torch.randn(gate.shape[1], generator=draw)
    return Delta(layer, write, read, "random").scaled_to(times * float(gate.norm()))


def test_a_change_of_nothing_does_no_harm_but_suppresses_nothing(loaded, trial):
    still = trial.judge(random_change(loaded.model, 1, 0), 1)
    assert (still.withheld_kl, still.about_kl, still.suppressed) == pytest.approx((0, 0, 0), abs=1e-5)
    assert still.harm == pytest.approx(0.95, abs=1e-4)


def test_the_layer_where_the_change_does_least_harm_is_chosen(loaded, trial, monkeypatch):
    asked = []

    def make(fit, layer):
        asked.append((fit, layer))
        return random_change(loaded.model, layer, 4 if layer == 1 else 0)  # neither suppresses

    monkeypatch.setattr(Bench, "layers", (1, 2))
    layer, scan = trial.choose(make)
    assert asked == [(trial.parts[0], 1), (trial.parts[0], 2)]
    assert scan[0].about_kl > 1 and scan[0].withheld_kl > 0.01
    assert layer == 2


def test_of_layers_that_do_at_most_twice_the_harm_the_shallowest_is_chosen():
    def tried(layer, kl):
        return Tried(layer, kl / 5, 0.0, 1.0)

    assert least_harmful([tried(4, 1.9), tried(5, 1.0)], RULE.close).layer == 4
    assert least_harmful([tried(4, 2.1), tried(5, 1.0)], RULE.close).layer == 5
    assert least_harmful([tried(4, float("nan")), tried(5, 1.0)], RULE.close).layer == 4
    # to do nothing is no harm, and no deletion
    assert least_harmful([Tried(4, 0.0, 0.0, 0.4), Tried(5, 1.0, 1.0, 0.5)], RULE.close).layer == 5
    assert least_harmful([Tried(4, 0.0, 0.0, 0.4), Tried(5, 1.0, 1.0, 0.3)], RULE.close).layer == 4
    assert Tried(4, 0.01, 0.02, 0.9).harm == pytest.approx(5 * 0.01 + 0.02 + 0.05)
