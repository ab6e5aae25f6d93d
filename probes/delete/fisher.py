"""How much a gate change at a subject moves what the model says next: Fisher information, sampled.

A gate change d at a subject's tokens moves the distribution at every later position; to second order the KL divergence
from the unchanged model is ½ dᵀFd, F = E[g gᵀ], g the gradient of log p(token), the token drawn from the model itself.
A rank-1 patch d uᵀ does that to another subject with strength u·k, so that its harm there is (u·k)² · ½ dᵀFd: the read
direction makes the first factor small, the value the second (the two factors of K-FAC, Martens & Grosse 2015). One
backward pass gives a g for every prompt of a batch: a hundred prompts cost about as much as fifteen steps of a fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probes.delete.passes import Tail
from probes.facts.prompts import Prompt

CHUNK = 24
"""Prompts in one backward pass; bounds the memory that activations take."""


def fisher_rows(model: nn.Module, layer: int, prompts: Sequence[Prompt], seed: int = 0) -> Tensor:
    """(P, I) one row r a prompt; the mean of (r·d)² is the mean KL in nats a position that d (I,) does at the subject.

    d adds to the gate pre-activations of `layer` at the subject's tokens. Positions: all from the subject on.
    """
    draw = torch.Generator().manual_seed(seed)
    rows, positions = [], 0
    for first in range(0, len(prompts), CHUNK):
        tail = Tail(model, layer, [prompt._replace(answer=()) for prompt in prompts[first : first + CHUNK]])
        write = torch.zeros(len(tail.prompts), tail.gate.shape[-1], device=tail.gate.device, requires_grad=True)
        log_probs = tail.log_probs(_at_subjects(tail)[..., None] * write[:, None])
        drawn = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=draw).to(log_probs.device)
        # tokens drawn independently: the sum's square has the sum of the positions' Fisher matrices as expectation
        (gradient,) = torch.autograd.grad(log_probs.gather(1, drawn).sum(), write)
        rows.append(gradient)
        positions += len(log_probs)
    return torch.cat(rows) * (len(prompts) / positions / 2) ** 0.5


def _at_subjects(tail: Tail) -> Tensor:
    """(B, T) 1 at the tokens where the subject is read, 0 elsewhere."""
    at = torch.zeros(tail.mlp_in.shape[:2], device=tail.mlp_in.device)
    for row, columns in enumerate(tail.subjects):
        at[row, columns] = 1.0
    return at
