"""Every loss term against the same figure worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from probes.gates.encode import Batch
from probes.gates.losses import entity_cross_entropy, forget_sum, kl_sum


def logits(probabilities: list[list[list[float]]], wanted: torch.Tensor) -> torch.Tensor:
    return torch.tensor(probabilities).log()[:, :-1][wanted]


# two texts of four tokens over a vocabulary of three; the second is three tokens and padding
P = [
    [[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]],
    [[0.6, 0.2, 0.2], [0.7, 0.2, 0.1], [0.9, 0.05, 0.05], [0.3, 0.3, 0.4]],
]
Q = [
    [[0.25, 0.5, 0.25], [0.2, 0.3, 0.5], [0.3, 0.3, 0.4], [0.4, 0.3, 0.3]],
    [[0.2, 0.2, 0.6], [0.1, 0.2, 0.7], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]],
]
BATCH = Batch(
    ids=torch.tensor([[0, 1, 2, 0], [2, 0, 1, 0]]),
    real=torch.tensor([[True] * 4, [True, True, True, False]]),
    entity=torch.tensor([[False, True, True, False], [True, False, True, False]]),
    shown=torch.zeros(2, 4, dtype=torch.bool),
)


def test_entity_cross_entropy_is_the_mean_over_an_examples_entity_tokens():
    first = -(math.log(0.25) + math.log(0.5)) / 2  # token 1 after place 0, token 2 after place 1
    second = -math.log(0.2)  # its first token is an entity too, but nothing predicts it
    torch.testing.assert_close(entity_cross_entropy(logits(P, BATCH.entities), BATCH), torch.tensor([first, second]))


@pytest.mark.parametrize("beta", [0.0, 4.0])
def test_forget_loss_is_softplus_of_beta_minus_cross_entropy(beta):
    entropies = [-(math.log(0.25) + math.log(0.5)) / 2, -math.log(0.2)]
    expected = sum(math.log(1 + math.exp(beta - ce)) for ce in entropies)
    assert float(forget_sum(logits(P, BATCH.entities), BATCH, beta)) == pytest.approx(expected, rel=1e-6)


def kl(p: list[float], q: list[float], temperature: float = 1.0) -> float:
    p, q = ([x ** (1 / temperature) for x in r] for r in (p, q))
    p, q = ([x / sum(r) for x in r] for r in (p, q))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_goes_from_base_to_gated_over_the_predicted_tokens(temperature):
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]  # the padding is not predicted
    expected = sum(kl(P[row][at], Q[row][at], temperature) for row, at in places)
    p, q = (logits(some, BATCH.predicted) for some in (P, Q))
    measured = float(kl_sum(p, q, temperature))
    assert measured == pytest.approx(expected, rel=1e-5)
    assert measured != pytest.approx(float(kl_sum(q, p, temperature)), rel=1e-4)


def test_nke_leaves_the_entity_tokens_out():
    expected = kl(P[0][2], Q[0][2]) + kl(P[1][0], Q[1][0])
    assert float(kl_sum(logits(P, BATCH.others), logits(Q, BATCH.others))) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_logits_are_compared_in_float32():
    base = logits(P, BATCH.predicted).bfloat16()
    assert kl_sum(base, base).dtype == torch.float32
    assert float(kl_sum(base, base)) == 0
