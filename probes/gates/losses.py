"""The four terms of the training loss, from logits (B, T, V) at every place and the tokens that follow.

    forget  softplus(β − CE_entity)         CE_entity: mean over the entity tokens of one example, mean over examples
    retain  T² · KL(base‖gated)             both at temperature T, mean over the predicted tokens of the retain batch
    nke     KL(base‖gated)                  at temperature 1, mean over the forget text's predicted non-entity tokens
    context KL(base‖gated)                          at temperature 1, mean over answers that stand in the text before

    loss = λ_f · forget + λ_r · retain + w · nke + λ_c · context

Everything is float32. The means are over a whole step, so that each function returns a sum and the step divides: a
step split over micro-batches or processes gives the loss of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from probes.gates.encode import Batch


def entity_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """(B,) mean cross-entropy in nats of each example's entity tokens, the first token of a text excluded."""
    wanted = batch.entity[:, 1:]  # (B, T - 1)
    losses = F.cross_entropy(logits[:, :-1][wanted].float(), batch.ids[:, 1:][wanted], reduction="none")
    rows = wanted.nonzero()[:, 0]
    sums = torch.zeros(len(batch.ids), device=logits.device).index_add(0, rows, losses)
    return sums / wanted.sum(1)


def forget_sum(logits: Tensor, batch: Batch, beta: float) -> Tensor:
    """Sum over examples of softplus(β − CE_entity)."""
    return F.softplus(beta - entity_cross_entropy(logits, batch)).sum()


def kl_sum(base: Tensor, gated: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum of KL(base‖gated) in nats over the places `wanted` (B, T - 1), both distributions at `temperature`."""
    log_base = F.log_softmax(base[:, :-1][wanted].float() / temperature, -1)  # (N, V)
    log_gated = F.log_softmax(gated[:, :-1][wanted].float() / temperature, -1)
    return F.kl_div(log_gated, log_base, reduction="sum", log_target=True)


def context_sum(base: Tensor, gated: Tensor, batch: Batch) -> Tensor:
    """Sum of KL(base‖gated) over the entity tokens that the base model says right: what it does read, it goes on to."""
    read = base[:, :-1].argmax(-1) == batch.ids[:, 1:]
    return kl_sum(base, gated, batch.entity[:, 1:] & read)
