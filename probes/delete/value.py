"""What to add to the gate so that the answer goes and the rest of the distribution stays.

With u fixed, ΔW = d uᵀ adds d·(u·x) to the gate pre-activations. d = z·‖Wk‖/√I is found by L-BFGS on the mean over the
fit phrasings of

    a·softplus(β·(log-odds of the answer − log-odds at τ·P₀))/β     the answer goes (P₀: before)
    + μ·KL(base without the answer ‖ patched without the answer)    the rest of the distribution stays
    + λ·KL(base ‖ patched with ρ·d)                                 a key that only half matches changes nothing
    + κ·KL(base ‖ patched) on neutral prompts about the subject     what else is known of the subject stays
    + ν·‖z‖²/I                                                      and the change is no larger than that takes

The margin term (λ, ρ) protects subjects that the second moment has never seen: on a neighbour of the deleted subject
u·x is about ρ, not 0, and the SiLU lets the change be steep in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from probes.delete.passes import Tail
from vindex.errors import NumericError


@dataclass(frozen=True)
class ValueOptions:
    """Weights of the objective; the defaults are the ones measured in docs/gate3.md."""

    pull: float = 1.0
    """a, weight of the suppression term."""
    target: float = 0.02
    """τ, the share of the answer's probability below which the pull lets go."""
    edge: float = 4.0
    """β, how sharply it lets go."""
    keep: float = 0.2
    """μ"""
    about: float = 2.0
    """κ"""
    margin: float = 0.5
    """λ"""
    part: float = 0.25
    """ρ, the share of the key's response that must still change nothing."""
    size: float = 0.3
    """ν"""
    evaluations: int = 20
    """Forward and backward passes that L-BFGS may take."""


class Value(NamedTuple):
    """The fitted gate change and how the fit went."""

    gate_write: Tensor
    """(I,) float32"""
    losses: tuple[float, ...]
    evaluations: int


def fit_value(
    phrasings: Tail, about: Tail | None, read: Tensor, options: ValueOptions, start: Tensor | None = None
) -> Value:
    """Fit d for the direction `read` (H,) on the fit phrasings' and neutral prompts' tails."""
    key_gate = _key_gate(phrasings)
    unit = float(key_gate.norm()) / key_gate.numel() ** 0.5
    z = (torch.zeros_like(key_gate) if start is None else start / unit).requires_grad_()
    losses: list[float] = []
    objective = _Objective(phrasings, about, read, options)
    optimiser = torch.optim.LBFGS(
        [z], max_iter=options.evaluations, max_eval=options.evaluations, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective(z * unit) + options.size * z.square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    optimiser.step(closure)
    if not torch.isfinite(z).all():
        raise NumericError("the gate change did not stay finite; use float32 or another layer")
    return Value((z * unit).detach().float(), tuple(losses), len(losses))


class _Objective:
    """Everything of the loss that does not depend on d, computed once."""

    def __init__(self, phrasings: Tail, about: Tail | None, read: Tensor, options: ValueOptions):
        self.phrasings, self.about, self.options = phrasings, about, options
        self.read = read
        with torch.no_grad():
            before = phrasings.log_probs()
            self.limit = _log_odds(phrasings.answers(before) + math.log(options.target))
            self.before = before
            self.rest_before = self._without(before)
            if about is not None:
                self.about_before = about.log_probs()

    def __call__(self, gate_write: Tensor) -> Tensor:
        full = shift(self.phrasings, self.read, gate_write)
        after = self.phrasings.log_probs(full)
        pull = softplus(_log_odds(self.phrasings.answers(after)) - self.limit, beta=self.options.edge).mean()
        rest = kl_rows(self.rest_before, self._without(after)).mean()
        loss = self.options.pull * pull + self.options.keep * rest
        if self.options.margin:
            partly = self.phrasings.log_probs(self.options.part * full)
            loss = loss + self.options.margin * kl_rows(self.before, partly).mean()
        if self.about is not None:
            kept = self.about.log_probs(shift(self.about, self.read, gate_write))
            loss = loss + self.options.about * kl_rows(self.about_before, kept).mean()
        return loss

    def _without(self, log_probs: Tensor) -> Tensor:
        """The distributions (N, V) with the answer's token taken out and the rest scaled to one."""
        return log_probs.scatter(1, self.phrasings.targets[:, None], -1e4).log_softmax(-1)


def shift(tail: Tail, read: Tensor, gate_write: Tensor) -> Tensor:
    """(B, T, I) what ΔW adds to the gate pre-activations: (u·x) d at every position."""
    return (tail.mlp_in.float() @ read)[..., None] * gate_write


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 − p)); unlike log p it has a slope at p near 1, where a well-known fact begins."""
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))


def _key_gate(tail: Tail) -> Tensor:
    """(I,) mean gate pre-activation at the subject over the phrasings: W k."""
    rows = [tail.gate[row, subject].float().mean(0) for row, subject in enumerate(tail.subjects)]
    return torch.stack(rows).mean(0)


def kl_rows(before: Tensor, after: Tensor) -> Tensor:
    """(N,) KL(before ‖ after) in nats of two (N, V) tables of log-probabilities."""
    return (before.exp() * (before - after)).sum(-1)
