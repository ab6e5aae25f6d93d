"""Per-layer statistics against the definitions written out, whatever the batch, dtype or attention."""

import gc
import itertools
import math

import pytest
import torch
from torch.nn.functional import silu

from probes.live.hooks import capture, edited
from probes.live.load import load
from probes.live.sites import sites
from probes.suite.activity import moments, shuffled_variance, sink_tokens, sparsity, temperature
from probes.suite.definition import RELATIVE_THRESHOLDS, SPARSITY_THRESHOLDS, TOKENS
from probes.suite.readings import read, top_mass
from probes.suite.run import read_texts
from probes.texts import encoded as texts_of
from vindex.errors import ProbeError

IDS = torch.randint(0, 256, (3, 64), generator=torch.Generator().manual_seed(0))


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def figures(reading) -> torch.Tensor:
    """Everything a reading says, as one vector."""
    numbers = []
    for layer in reading.layers:
        for part in (layer.sparsity, layer.sparsity_no_sink):
            numbers += [part.rms, *part.below, *part.below_relative]
        numbers += layer.temperature
    for matrix in reading.similarity[:3]:  # without the permuted
        numbers += matrix.flatten().tolist()
    return torch.tensor([*numbers, *reading.top_mass])


def test_every_figure_is_what_the_definitions_say(tiny):
    with capture(tiny.model, sites(tiny.model, "gate", "up", "hidden")) as seen:
        logits = tiny.model(IDS[:1]).logits[0]
    (reading,) = read(tiny.model, IDS[:1])
    assert reading.top_mass == pytest.approx(logits.softmax(-1).sort(-1).values[:, -8:].sum(-1).tolist(), rel=1e-5)
    for number, layer in enumerate(reading.layers):
        h, gate, up = (seen[role, number][0] for role in ("hidden", "gate", "up"))
        assert layer.sinks == (0,)
        for part, kept in ((layer.sparsity, h), (layer.sparsity_no_sink, h[1:])):
            rms = float(kept.square().mean().sqrt())
            assert part.rms == pytest.approx(rms, rel=1e-5)
            assert part.below == pytest.approx([float((kept.abs() < t).float().mean()) for t in SPARSITY_THRESHOLDS])
            relative = [float((kept.abs() < t * rms).float().mean()) for t in RELATIVE_THRESHOLDS]
            assert part.below_relative == pytest.approx(relative, abs=2e-3)
        found = layer.temperature
        assert found.all_tokens == pytest.approx(float(h.var(0).mean()), rel=1e-5)
        assert found.no_sink == pytest.approx(float(h[1:].var(0).mean()), rel=1e-5)
        assert found.median == pytest.approx(float(h.var(0).quantile(0.5)), rel=1e-5)
        assert found.linear == pytest.approx(float((gate * up).var(0).mean()), rel=1e-5)


def test_the_shuffled_variance_is_the_mean_over_all_permutations():
    one, other = draw(1, 5, 3), draw(2, 5, 3)
    orders = [list(order) for order in itertools.permutations(range(5))]
    expected = torch.stack([(one * other[order]).var(0) for order in orders]).mean(0)
    first, second = (moments(values, torch.ones(5), torch.empty(5, 3)) for values in (one, other))
    torch.testing.assert_close(shuffled_variance(first, second, 5), expected)


def test_a_massive_token_is_a_sink_and_does_not_touch_the_no_sink_figures():
    residual, hidden, gate, up = draw(3, 20, 8), draw(4, 20, 6), draw(5, 20, 6), draw(6, 20, 6)
    residual[7] *= 1e4
    sink = sink_tokens(residual, 0)
    assert sink.nonzero().flatten().tolist() == [0, 7]
    scratch = torch.empty(2, 20, 6)
    before = sparsity(hidden, sink, 0, scratch)[1], temperature(gate, silu(gate), up, hidden, sink, scratch).no_sink
    hidden[7] *= 1e6
    after = sparsity(hidden, sink, 0, scratch)[1], temperature(gate, silu(gate), up, hidden, sink, scratch).no_sink
    assert before == after
    assert temperature(gate, silu(gate), up, hidden, sink, scratch).all_tokens > 1e9


def test_top_mass_of_known_distributions():
    assert top_mass(torch.zeros(3, 100)) == pytest.approx([0.08] * 3)
    assert top_mass(torch.zeros(2, 4)) == pytest.approx([1.0] * 2)  # fewer tokens than eight
    logits = torch.full((1, 1000), -math.inf)
    logits[0, :10] = 0
    assert top_mass(logits) == pytest.approx([0.8])


def test_bfloat16_and_float32_and_both_attentions_agree(tiny_checkpoint):
    found = {}
    for dtype, attn in itertools.product(("float32", "bfloat16"), ("eager", "sdpa")):
        model = load(tiny_checkpoint, dtype=dtype, device="cpu", attn=attn).model
        found[dtype, attn] = figures(read(model, IDS[:1])[0])
    reference = found["float32", "eager"]
    torch.testing.assert_close(found["float32", "sdpa"], reference, rtol=1e-3, atol=1e-3)
    for attn in ("eager", "sdpa"):
        torch.testing.assert_close(found["bfloat16", attn], reference, rtol=0.1, atol=0.03)


@pytest.mark.parametrize("role", ["hidden", "residual"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_name_their_layer_and_leave_no_hook(tiny, role, value):
    def spoil(activation):
        activation = activation.clone()
        activation[:, 5, 3] = value
        return activation

    with (
        pytest.raises(ProbeError, match=r"layers\.1: activations are NaN or infinite at token 5") as error,
        edited(tiny.model, {(role, 1): spoil}),
    ):
        read(tiny.model, IDS)
    assert "\n" not in str(error.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(ProbeError, match=r"logits: NaN or infinite in torch\.float32"):
        top_mass(torch.tensor([[0.0, math.nan]]))


def test_memory_does_not_grow_with_the_number_of_texts(tiny):
    held: list[int] = []

    steps = itertools.count(1)

    def weigh(_layers: int, _note: str) -> None:
        if next(steps) % 3:  # at the last layer of each text
            return
        gc.collect()
        held.append(sum(item.nbytes for item in gc.get_objects() if type(item) is torch.Tensor))

    encoded = texts_of(tiny, ["factual", "science", "story", "code"], TOKENS)
    read_texts(tiny, encoded, progress=lambda _stage, _total: weigh)
    activations = 256 * 48 * 4  # one layer's h of one text
    assert len(held) == 4
    assert held[-1] - held[0] < activations / 10
