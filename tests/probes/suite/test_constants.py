"""C1–C5 on models and frames made so that the answer is known beforehand."""

import numpy as np
import pytest
import torch

from probes.live.hooks import edited
from probes.live.load import load
from probes.live.sites import layers
from probes.suite import chance, constants
from probes.suite.geometry import geometry as geometry_of
from probes.suite.readings import read

A, B = 64, 65  # two token ids
HALVES = torch.tensor([[A, B] * 128])
GATE = 20.0  # silu(20) is 20 in float32


@pytest.fixture
def planted(tiny_checkpoint):
    """A model in which token A gives every layer the same h = `silent, small or 1`, and token B another.

    Attention and FFN write nothing, so the residual stream is the embedding: 100·e0 and 100·e1, which the norms turn
    into √H·e0 and √H·e1. Of 48 neurons, 12 are silent, 12 are at 0.005, and 24 are at 1 for token A, 5 for token B.
    """
    model = load(tiny_checkpoint, device="cpu").model
    width = 32
    with torch.no_grad():
        embedding = torch.zeros(258, width)
        embedding[A, 0] = embedding[B, 1] = 100.0
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(258, width))
        model.lm_head.weight[:8, :2] = np.log(10) / width**0.5  # eight tokens at logit log 10, the rest at 0
        model.model.embed_tokens.weight.copy_(embedding)
        for layer in layers(model):
            layer.block.self_attn.o_proj.weight.zero_()
            layer.down_proj.weight.zero_()
            layer.gate_proj.weight.zero_()[:, :2] = GATE / width**0.5
            up = torch.zeros(48, 2)
            up[12:24] = 0.005
            up[24:] = torch.tensor([1.0, 5.0])
            layer.up_proj.weight.zero_()[:, :2] = up / GATE / width**0.5
    return model


def test_c1_c2_and_c4_of_a_model_set_by_hand(planted):
    readings = read(planted, HALVES)
    c1 = constants.ffn_sparsity(readings)
    assert c1.headline.value == pytest.approx(0.5)  # the silent and the small
    assert c1.variants["|h| < 0.002"].value == pytest.approx(0.25)  # only the silent
    assert c1.variants["|h| < 0.01 no_sink"].value == pytest.approx(0.5)
    assert c1.per_layer == pytest.approx((0.5, 0.5, 0.5))
    c2 = constants.top_mass(readings, 258)
    assert c2.headline.value == pytest.approx(80 / (80 + 250), rel=1e-5)
    assert c2.variants["last position"].value == pytest.approx(80 / 330, rel=1e-5)
    assert c2.headline.null == pytest.approx(8 / 258)
    c4 = constants.layer_temperature(readings)
    both = (5 - 1) ** 2 / 4 * 256 / 255  # variance of half ones, half fives
    assert c4.headline.value == pytest.approx(both / 2, rel=1e-5)  # half of the neurons
    one_less = 127 * 128 * (5 - 1) ** 2 / (255 * 254)  # without token 0, an A
    assert c4.variants["no_sink"].value == pytest.approx(one_less / 2, rel=1e-5)
    assert c4.variants["median over neurons"].value == pytest.approx(both / 2, rel=1e-5)  # 24 at 0, 24 at `both`
    assert c4.variants["without the SiLU"].value == pytest.approx(both / 2, rel=1e-5)
    assert c4.headline.null == pytest.approx(both / 2, rel=1e-5)  # a constant gate: shuffling it changes nothing
    c5 = constants.circuit_stages(readings)
    assert c5.headline.value == 1  # no layer writes
    assert c5.per_layer == pytest.approx((1, 1), abs=1e-5)
    assert c5.headline.null == 3  # tokens permuted: every pair is a transition


def stream(seed, tokens=256, width=32):
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stages", [(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 2)])
def test_c5_finds_planted_stages(tiny, stages):
    """Layers of one stage hold rotated, scaled copies of one random stream, whatever the model would have written."""
    edits = {}
    for layer, stage in enumerate(stages):
        turn = torch.linalg.qr(stream(100 + layer, 32)[0]).Q
        edits["residual", layer] = lambda _, x=(layer + 1.0) * stream(stage) @ turn: x
    with edited(tiny.model, edits):
        readings = read(tiny.model, HALVES)
    c5 = constants.circuit_stages(readings)
    count = len(set(stages))
    assert c5.headline.value == count
    assert c5.variants["optimal segmentation"].value == count
    assert c5.variants["debiased CKA < 0.8"].value == c5.variants["debiased CKA < 0.99"].value == count
    assert c5.headline.null == 3


def frames(count, directions, width, seed=0):
    generator = np.random.default_rng(seed)
    return [np.linalg.qr(generator.standard_normal((width, directions)))[0].T for _ in range(count)]


def test_c3_is_1_for_identical_layers():
    frame = frames(1, 8, 64)[0]
    c3 = constants.gate_coherence([frame, -frame, frame], np.ones((3, 64)))
    assert c3.headline.value == pytest.approx(1)
    for name in ("same index, all 8", "8-dim subspaces", "mean gate row"):
        assert c3.variants[name].value == pytest.approx(1)


def test_c3_is_a_cosine_whatever_the_rows_lengths():
    """As half precision leaves them, a little off 1."""
    frame = frames(1, 8, 64)[0]
    c3 = constants.gate_coherence([frame * 1.001, frame * 0.999], np.ones((2, 64)))
    assert c3.headline.value == pytest.approx(1, abs=1e-12) == c3.variants["8-dim subspaces"].value


def test_c3_equals_the_random_frame_null_for_independent_layers():
    rows = np.random.default_rng(1).standard_normal((400, 64))
    c3 = constants.gate_coherence(frames(400, 8, 64), rows)
    for found in (c3.headline, *c3.variants.values()):
        error = np.std(found.samples) / len(found.samples) ** 0.5
        assert found.value == pytest.approx(found.null, abs=5 * error)
        assert found.n == 399
        assert found.over == "layer pairs"


def test_c3_of_a_whole_model_from_its_weights(tiny):
    for layer in layers(tiny.model):
        layer.gate_proj.weight.copy_(layers(tiny.model)[0].gate_proj.weight)
    geometry = geometry_of(layers(tiny.model))
    assert constants.gate_coherence(geometry.directions, geometry.mean_rows).headline.value == pytest.approx(1)


def test_rows_past_the_rank_are_no_directions():
    frame = frames(1, 8, 64)[0]
    short = frame.copy()
    short[5:] = 0
    c3 = constants.gate_coherence([frame, short], np.ones((2, 64)))
    assert c3.variants["5-dim subspaces"].value == pytest.approx(1)
    assert c3.variants["same index, all 5"].value == pytest.approx(1)


def test_nulls_in_closed_form():
    generator = np.random.default_rng(2)
    for width in (2, 32, 4096):
        unit = generator.standard_normal((20_000 if width < 100 else 2000, width))
        cosines = abs(unit[:, 0]) / np.linalg.norm(unit, axis=1)
        error = cosines.std() / len(cosines) ** 0.5
        assert chance.mean_abs_cosine(width) == pytest.approx(cosines.mean(), abs=5 * error)
    assert chance.random_frame_cosine(16, 16) == pytest.approx(1)
    assert chance.random_frame_cosine(64, 1) == pytest.approx(chance.mean_abs_cosine(64), abs=0.1)


def test_with_several_texts_the_value_is_the_first_and_the_interval_over_all(tiny):
    taken = read(tiny.model, torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(3)))
    found = constants.layer_temperature(taken).headline
    singles = [constants.layer_temperature([reading]).headline.value for reading in taken]
    assert found.samples == pytest.approx(singles)
    assert found.value == pytest.approx(singles[0])
    assert found.mean == pytest.approx(np.mean(singles))
    assert constants.layer_temperature(taken[:1]).headline.interval is None
