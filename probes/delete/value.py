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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from probes.delete.passes import Tail
from probes.facts.prompts import Prompt
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
    about: float = 1.0
    """κ"""
    margin: float = 0.5
    """λ"""
    partly: int = 2
    """Phrasings, at most, on which the margin is kept."""
    part: float = 0.25
    """ρ, the share of the key's response that must still change nothing."""
    size: float = 1.0
    """ν"""
    evaluations: int = 20
    """Forward and backward passes that L-BFGS may take."""


class Value(NamedTuple):
    """The fitted gate change and how the fit went."""

    gate_write: Tensor
    """(I,) float32"""
    losses: tuple[float, ...]
    suppressed: float
    """1 − P′/P over the fit phrasings, mean."""
    about_kl: float
    """Mean KL in nats on the neutral prompts about the subject."""


def fit_value(
    model: nn.Module,
    layer: int,
    phrasings: Sequence[Prompt],
    about: Sequence[Prompt],
    read: Tensor,
    options: ValueOptions,
    start: Tensor | None = None,
) -> Value:
    """Fit d for the direction `read` (H,) in `layer`, from `start` (I,) or from nothing."""
    objective = _Objective(model, layer, phrasings, about, read, options)
    unit = float(objective.key_gate.norm()) / objective.key_gate.numel() ** 0.5
    z = (torch.zeros_like(objective.key_gate) if start is None else start / unit).requires_grad_()
    losses: list[float] = []
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
    gate_write = (z * unit).detach().float()
    if not torch.isfinite(gate_write).all():
        raise NumericError("the gate change did not stay finite; use float32 or another layer")
    with torch.no_grad():
        objective(gate_write)
    return Value(gate_write, tuple(losses), objective.suppressed, objective.about_kl)


class _Objective:
    """The loss as a function of d; phrasings, partly matched ones and neutral prompts go through in one batch."""

    def __init__(
        self,
        model: nn.Module,
        layer: int,
        phrasings: Sequence[Prompt],
        about: Sequence[Prompt],
        read: Tensor,
        options: ValueOptions,
    ):
        partly = phrasings[: options.partly]
        self.options, self.asked = options, len(phrasings)
        self.tail = Tail(model, layer, [*phrasings, *partly, *about])
        share = torch.ones(len(self.tail.prompts), 1, 1)
        share[self.asked : self.asked + len(partly)] = options.part
        self.fires = (self.tail.mlp_in.float() @ read)[..., None] * share.to(read.device)  # (B, T, 1)
        rows = self.tail.rows
        self.full, self.about = rows < self.asked, rows >= self.asked + len(partly)
        self.partly = ~self.full & ~self.about
        self.key_gate = self._key_gate()  # (I,)
        with torch.no_grad():
            self.before = self.tail.log_probs()
        self.answers_before = self.tail.answers(self.before)[: self.asked]
        self.limit = _log_odds(self.answers_before + math.log(options.target))
        self.rest_before = self._without(self.before)

    def __call__(self, gate_write: Tensor) -> Tensor:
        after = self.tail.log_probs(self.fires * gate_write)
        answers = self.tail.answers(after)[: self.asked]
        pull = softplus(_log_odds(answers) - self.limit, beta=self.options.edge).mean()
        rest = kl_rows(self.rest_before, self._without(after)).mean()
        partly = kl_rows(self.before[self.partly], after[self.partly]).mean()
        about = kl_rows(self.before[self.about], after[self.about]).mean()
        self.suppressed = float(1 - (answers - self.answers_before).exp().mean().detach())
        self.about_kl = float(about.detach())
        weights = self.options
        return weights.pull * pull + weights.keep * rest + weights.margin * partly + weights.about * about

    def _without(self, log_probs: Tensor) -> Tensor:
        """The distributions at the phrasings with the answer's token taken out and the rest scaled to one."""
        return log_probs[self.full].scatter(1, self.tail.targets[self.full, None], -1e4).log_softmax(-1)

    def _key_gate(self) -> Tensor:
        """Mean gate pre-activation at the subject over the phrasings: W k."""
        pairs = zip(range(self.asked), self.tail.subjects, strict=False)
        return torch.stack([self.tail.gate[row, at].float().mean(0) for row, at in pairs]).mean(0)


def shift(tail: Tail, read: Tensor, gate_write: Tensor) -> Tensor:
    """(B, T, I) what ΔW adds to the gate pre-activations: (u·x) d at every position."""
    return (tail.mlp_in.float() @ read)[..., None] * gate_write


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 − p)); unlike log p it has a slope at p near 1, where a well-known fact begins."""
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))


def kl_rows(before: Tensor, after: Tensor) -> Tensor:
    """(N,) KL(before ‖ after) in nats of two (N, V) tables of log-probabilities."""
    return (before.exp() * (before - after)).sum(-1)
