"""The baselines: each formula against a case made by hand, and all of them on the atlas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probes.atlas import panel as atlas
from probes.deletion.baselines import BASELINES, baseline, contrast, descend, regression, response
from probes.deletion.bench import Bench
from probes.deletion.experiment import DRAWS, METHODS, controls, named
from probes.deletion.layer import Trial, least_harmful
from probes.deletion.measure import answers
from probes.deletion.options import BaselineOptions, Options
from probes.live.hooks import patched
from probes.live.sites import layers, weight
from probes.weights.delta import Wide, relative_norm
from vindex.errors import ProbeError

OPTIONS = BaselineOptions(trial=(4, 2), whole=(12, 16))
ENOUGH = OPTIONS.enough


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_rome_answers_to_its_key_and_to_little_else():
    """u = C⁻¹k/(kᵀC⁻¹k): 1 at the key, and of all such the least mean square on what C has seen."""
    key, seen = draw(6), draw(40, 6)
    moment = seen.T @ seen
    inverse = np.linalg.inv(moment.double().numpy())
    closed = inverse @ key.numpy() / (key.numpy() @ inverse @ key.numpy())
    assert response(key, moment).numpy() == pytest.approx(closed, rel=1e-4)
    assert response(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([3 / 25, 4 / 25])
    assert float(response(key, moment) @ key) == pytest.approx(1, rel=1e-5)
    assert (seen @ response(key, moment)).norm() < (seen @ response(key)).norm()
    # a ridge far above C leaves the plain one
    assert response(key, moment, ridge=1e7).numpy() == pytest.approx(response(key).numpy(), rel=1e-4)


def test_descent_is_adams_and_stays_in_bounds():
    """On a slope of any size Adam's first steps are of the learning rate, until the bound holds them."""
    slope = torch.tensor([1e-3, -5.0, 0.0])

    def loss(at):
        return (slope * at).sum(), 0.0

    start = torch.zeros(3)
    assert descend(loss, start, 0.1, 2, lambda at: at, ENOUGH).tolist() == pytest.approx([-0.2, 0.2, 0.0], rel=1e-4)
    bounded = descend(loss, start, 0.1, 9, lambda at: at.clamp(-0.25, 0.25), ENOUGH)
    assert bounded.tolist() == pytest.approx([-0.25, 0.25, 0.0])
    assert not start.any()


def test_descent_ends_when_the_answer_is_gone():
    reached = iter([0.0, ENOUGH - 0.01, ENOUGH, 1.0])
    found = descend(lambda at: (at.sum(), next(reached)), torch.zeros(2), 0.1, 25, lambda at: at, ENOUGH)
    assert found.tolist() == pytest.approx([-0.2, -0.2], rel=1e-4)
    assert next(reached) == 1.0


def test_ultraedit_is_a_ridge_regression():
    inputs, values = draw(3, 7), draw(3, 5)
    h, v = inputs.double().numpy(), values.double().numpy()
    closed = np.linalg.inv(h.T @ h + np.eye(7)) @ h.T @ v
    assert regression(inputs, values).numpy() == pytest.approx(closed.T, rel=1e-4, abs=1e-6)
    # of one input along an axis, half of the value: 1/(1 + 1)
    one = regression(torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0, 6.0]]))
    assert one.tolist() == [[2.0, 0.0], [3.0, 0.0]]


def test_neurons_that_fire_more_for_the_subject_stand_out():
    own = torch.tensor([[-4.0, 1.0, 0.5, 3.0], [-2.0, 1.0, 0.5, 3.0]])  # mean |h| 3, 1, .5, 3
    others = torch.tensor([[1.0, 2.0, 0.0, 2.5]])
    assert contrast(own, others, 2).tolist() == [0, 2]
    assert sorted(contrast(own, others, 9).tolist()) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def trial(loaded, sets):
    return Trial(Bench(loaded, atlas.panel(), Options(baselines=OPTIONS)), sets.fact, sets.fit)


@pytest.fixture(scope="module")
def made(trial):
    """Each baseline's change of the atlas."""
    before = [layer.mlp.state_dict() for layer in layers(trial.model)]
    before = [{name: value.clone() for name, value in state.items()} for state in before]
    found = {name: baseline(name, trial) for name in BASELINES}
    for state, layer in zip(before, layers(trial.model), strict=True):
        assert all(torch.equal(value, layer.mlp.state_dict()[name]) for name, value in state.items())
    return found


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_changes_one_projection_of_a_layer_that_was_tried(name, made, bench):
    found = made[name]
    projection = "down_proj" if name.startswith("rome") else "gate_proj"
    assert (found.delta.method, found.delta.projection) == (name, projection)
    assert [tried.layer for tried in found.scan][:2] == list(bench.layers)
    assert found.delta.layer == least_harmful(found.scan[:2], bench.options.forward.close).layer
    assert 0 < relative_norm(bench.model, found.delta) < 1


@pytest.mark.parametrize("name", ["rome", "rome_plain", "gradient"])
def test_the_strength_is_the_least_that_suppresses_what_is_fitted(name, made, bench, trial):
    delta, phrasings = made[name].delta, trial.fit.asked
    before = {prompt: outcome.probability for prompt, outcome in answers(bench.model, phrasings)}

    def suppressed(change: Wide) -> float:
        with patched(bench.model, change.edits()):
            return sum(1 - o.probability / before[p] for p, o in answers(bench.model, phrasings)) / len(phrasings)

    assert suppressed(delta) == pytest.approx(ENOUGH, abs=0.06)
    assert suppressed(delta.scaled_to(0.7 * delta.norm)) < suppressed(delta) - 0.02


def test_the_shapes_of_the_changes_are_those_of_their_formulas(made, bench):
    for name in ("rome", "rome_plain"):
        sizes = torch.linalg.svdvals(made[name].delta.change)
        assert sizes[1] < 1e-4 * sizes[0]
    gradient = made["gradient"].delta.change.abs()
    assert (gradient <= gradient.max()).all() and (gradient > 0.99 * gradient.max()).float().mean() > 0.2
    closed = made["neurons"].delta
    left = weight(bench.model, "gate_proj", closed.layer) + closed.change
    assert int((left == 0).all(1).sum()) == int(closed.change.any(1).sum())
    sizes = {tried.size: tried.harm for tried in made["neurons"].scan if tried.size}
    assert set(sizes) == set(OPTIONS.neurons)
    assert int(closed.change.any(1).sum()) in sizes


def test_controls_of_a_wide_change_are_random_ones_of_its_size_in_its_place(made):
    delta = made["rome"].delta
    tried = list(controls(delta, 0))
    assert [one.method for one in tried] == ["random"] * DRAWS
    assert all((one.layer, one.projection) == (delta.layer, "down_proj") for one in tried)
    assert [one.norm for one in tried] == pytest.approx([delta.norm] * DRAWS, rel=1e-5)


def test_a_wide_change_is_rounded_as_a_checkpoint_stores_it(made, bench):
    delta = made["gradient"].delta
    (place, edit), *none = delta.edits(torch.bfloat16).items()
    new = edit(weight(bench.model, *place).detach().float())
    assert not none and torch.equal(new, new.bfloat16().float())


def test_methods_are_asked_for_by_name():
    assert named(["rome", "forward", "rome"]) == ("forward", "rome")
    assert named(["both", "neurons"]) == ("forward", "geometric", "neurons")
    assert named("all") == tuple(METHODS)
    assert named("rome, forward") == ("forward", "rome")
    message = r"^method 'memit': expected forward, geometric, rome, rome_plain, gradient, ultraedit, neurons, both or"
    with pytest.raises(ProbeError, match=message):
        named(["forward", "memit"])
