"""The four terms of the training loss, from logits (N, V) at the places that a term wants, in the order of the batch.

    forget  softplus(β − CE_entity)         CE_entity: mean over the entity tokens of one example, mean over examples
    retain  T² · KL(base‖gated)             both at temperature T, mean over the predicted tokens of the retain batch
    nke     KL(base‖gated)                  at temperature 1, mean over the forget text's predicted non-entity tokens
    context KL(base‖gated)                  at temperature 1, mean over answers that stand in the text before

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
    """(B,) mean cross-entropy in nats of each example's entity tokens, from the logits where those are predicted."""
    wanted = batch.entities
    losses = F.cross_entropy(logits.float(), batch.ids[:, 1:][wanted], reduction="none")
    sums = torch.zeros(len(batch.ids), device=logits.device).index_add(0, wanted.nonzero()[:, 0], losses)
    return sums / wanted.sum(1)


def forget_sum(logits: Tensor, batch: Batch, beta: float) -> Tensor:
    """Sum over examples of softplus(β − CE_entity)."""
    return F.softplus(beta - entity_cross_entropy(logits, batch)).sum()


def kl_sum(base: Tensor, gated: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum of KL(base‖gated) in nats over N places, both distributions at `temperature`."""
    log_base, log_gated = (F.log_softmax(logits.float() / temperature, -1) for logits in (base, gated))
    return F.kl_div(log_gated, log_base, reduction="sum", log_target=True)


def context_sum(base: Tensor, gated: Tensor, batch: Batch) -> Tensor:
    """Sum of KL(base‖gated) over the entity tokens that the base model says right: what it does read, it goes on to."""
    read = base.argmax(-1) == batch.ids[:, 1:][batch.entities]
    return kl_sum(base[read], gated[read])
