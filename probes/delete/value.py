"""What to add to the gate so that the answer goes and the rest of the distribution stays.

With u fixed, ΔW = d uᵀ adds d·(u·x) to the gate pre-activations. d = z·‖Wk‖/√I is found by L-BFGS on the mean over the
fit phrasings of

    a·softplus(log P(answer) − log(τ·P₀(answer)))                  the answer goes (P₀: before)
    + μ·KL(base without the answer ‖ patched without the answer)    the rest of the distribution stays
    + κ·KL(base ‖ patched) on neutral prompts about the subject     what else is known of the subject stays
    + ν·‖z‖²/I                                                      and the change is no larger than that takes
"""

from __future__ import annotations

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

    pull: float = 0.3
    """a, weight of the suppression term."""
    target: float = 0.02
    """τ, the share of the answer's probability below which the pull lets go."""
    keep: float = 0.2
    """μ"""
    about: float = 0.1
    """κ"""
    size: float = 0.3
    """ν"""
    evaluations: int = 25
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
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    if not torch.isfinite(z).all():
        raise NumericError("the gate change did not stay finite; use float32 or another layer")
    return Value((z * unit).detach().float(), tuple(losses), len(losses))


class _Objective:
    """Everything of the loss that does not depend on d, computed once."""

    def __init__(self, phrasings: Tail, about: Tail | None, read: Tensor, options: ValueOptions):
        self.phrasings, self.about, self.options = phrasings, about, options
        self.fires = phrasings.mlp_in.float() @ read  # (B, T): u·x at every position
        self.targets = phrasings.batch.targets[:, None]
        with torch.no_grad():
            before = phrasings.log_probs()
            self.limit = self._answers(before) + torch.log(torch.tensor(options.target))
            self.rest_before = self._without(before)
            if about is not None:
                self.about_fires = about.mlp_in.float() @ read
                self.about_before = about.log_probs()

    def __call__(self, gate_write: Tensor) -> Tensor:
        after = self.phrasings.log_probs(self.fires[..., None] * gate_write)
        pull = softplus(self._answers(after) - self.limit).mean()
        rest = kl_rows(self.rest_before, self._without(after)).mean()
        loss = self.options.pull * pull + self.options.keep * rest
        if self.about is not None:
            kept = self.about.log_probs(self.about_fires[..., None] * gate_write)
            loss = loss + self.options.about * kl_rows(self.about_before, kept).mean()
        return loss

    def _answers(self, log_probs: Tensor) -> Tensor:
        """(B,) log-probability of each prompt's whole answer."""
        at = log_probs.gather(1, self.targets)[:, 0]
        sums = torch.zeros(len(self.phrasings.batch.prompts), device=at.device)
        return sums.index_add(0, self.phrasings.batch.rows, at)

    def _without(self, log_probs: Tensor) -> Tensor:
        """The distributions (N, V) with the answer's token taken out and the rest scaled to one."""
        return log_probs.scatter(1, self.targets, -1e4).log_softmax(-1)


def _key_gate(tail: Tail) -> Tensor:
    """(I,) mean gate pre-activation at the subject over the phrasings: W k."""
    rows = [tail.gate[row, list(prompt.subject)].float().mean(0) for row, prompt in enumerate(tail.batch.prompts)]
    return torch.stack(rows).mean(0)


def kl_rows(before: Tensor, after: Tensor) -> Tensor:
    """(N,) KL(before ‖ after) in nats of two (N, V) tables of log-probabilities."""
    return (before.exp() * (before - after)).sum(-1)
