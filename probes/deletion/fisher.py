"""How much a gate change at a subject moves what the model says next: Fisher information, sampled and crossed.

A gate change d at a subject's tokens moves the distribution at every later position; to second order the KL divergence
from the unchanged model is ½ dᵀFd, F = E[g gᵀ], g the gradient of log p(token), the token drawn from the model itself.
A rank-1 patch d uᵀ does that to another subject with strength u·k, so that its harm there is (u·k)² · ½ dᵀFd: the read
direction makes the first factor small, the value the second (the two factors of K-FAC, Martens & Grosse 2015).

1. g = s ⊙ q: s, how far down_proj's input moves with the gate (act′(gate) ⊙ up), and q, the gradient with respect to
   that input. One backward pass gives both for every prompt of a batch.
2. A hundred g leave most of the I dimensions free: a d fitted to avoid them avoided those alone, at a five-hundredth of
   the harm that other draws of the same prompts showed. So each q also goes with the s of other prompts drawn at
   random, as if the two were independent: F is then about E[s sᵀ] ⊙ E[q qᵀ], which has far more directions
   (docs/log/gate3-other-subjects.md, 2026-11-25).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probes.deletion.tail import Begun, Tail
from probes.facts.passes import unembed

CHUNK = 24
"""Prompts in one backward pass; bounds the memory that activations take."""


def fisher_rows(model: nn.Module, layer: int, begun: Sequence[Begun], mixed: int, seed: int = 0) -> Tensor:
    """((1 + mixed)·P, I) rows r; the mean of (r·d)² is the mean KL in nats a position that d (I,) does at the subject.

    d adds to the gate pre-activations of `layer` at the subject's tokens; of several mentions the mean slope counts.
    Positions: all from the subject on, of prompts without answers.
    """
    draw = torch.Generator().manual_seed(seed)
    slopes, gradients, positions = [], [], 0
    for first in range(0, len(begun), CHUNK):
        tail = Tail(model, layer, begun[first : first + CHUNK])
        activation: Any = tail.at.mlp.act_fn
        gate = tail.gate.detach().requires_grad_()
        gated = activation(gate)
        (slope,) = torch.autograd.grad(gated.sum(), gate)
        write = torch.zeros(len(tail.prompts), gate.shape[-1], device=gate.device, requires_grad=True)
        log_probs = unembed(
            model, tail.last_hidden_of((gated.detach() * tail.up + tail.reads.T @ write).to(gate.dtype))
        )
        drawn = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=draw).to(log_probs.device)
        # tokens drawn independently: the sum's square has the sum of the positions' Fisher matrices as expectation
        (gradient,) = torch.autograd.grad(log_probs.gather(1, drawn).sum(), write)
        gradients.append(gradient)
        slopes.append(tail.at_subjects(slope * tail.up))
        positions += len(log_probs)
    slope, gradient = torch.cat(slopes), torch.cat(gradients)
    pairs = [slope, *(slope[torch.randint(len(slope), (len(slope),), generator=draw)] for _ in range(mixed))]
    return torch.cat([each * gradient for each in pairs]) * (len(begun) / positions / 2) ** 0.5
