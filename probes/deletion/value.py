"""What to add to the gate so that the answer goes and the rest of the distribution stays.

With u fixed, ΔW = d uᵀ adds d·(u·x) to the gate pre-activations. d = z·‖Wk‖/√I is found by Adam on

    (softplus(β·(ρ − fall of the answer's log-odds))/β)²/ρ         the answer goes, by ρ everywhere
    + μ·KL(base without the answer ‖ patched without the answer)   and the rest of the distribution stays
    + κ·KL(base ‖ patched) on neutral sentences about the subject  what else is known of the subject stays
    + ω·Σ (r·d)², about KL(base ‖ patched) on other subjects       so does what is known of them (`fisher_rows`)
    + ν·‖z‖²/I                                                     and the change is no larger than that takes

The square pulls hardest on the phrasings that resist most, and ρ is what the firmest answer needs to come down to
τ = 1 − WANTED of its P: a phrasing never seen may be as firm. The KL on neutral sentences is a mean over every position
from the subject on. Afterwards d is scaled to the least strength that is `enough`, as what is known of the subject goes
with it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from probes.deletion.keys import Seen, read_direction
from probes.deletion.options import ForwardOptions
from probes.deletion.tail import Begun, Tail
from probes.deletion.verdict import WANTED
from probes.facts.passes import kl_rows, unembed
from probes.weights.delta import Delta
from vindex.errors import NumericError

FINENESS = 32
"""Strengths tried between the least and the most, evenly in their logarithm."""
CHUNK = 24
"""Prompts in one backward pass of `fisher_rows`; bounds the memory that activations take."""


@dataclass
class Place:
    """One layer, ready for a value to be fitted there: what the fit prompts are like up to it."""

    model: nn.Module
    layer: int
    asked: list[Begun]
    neutral: list[Begun]
    others: list[Begun]
    """Once each, without answers."""
    halves: tuple[Seen, Seen]
    """What is read of each half of the other subjects, in all their prompts."""
    generic: Tensor
    options: ForwardOptions

    @cached_property
    def read(self) -> Tensor:
        """u, (H,)."""
        return self.direction(*self.halves)

    @cached_property
    def guard(self) -> Tensor:
        """(N, I) Fisher rows of other subjects, as strong as u answers at such as it has not seen."""
        rows = fisher_rows(self.model, self.layer, self.others, self.options.mixed)
        return self.unseen_answer() * rows / len(rows) ** 0.5

    def direction(self, *seen: Seen) -> Tensor:
        """u for A of generic text, the subject's keys in neutral sentences, and all that is read of the subjects seen.

        A neutral sentence that begins like a phrasing is not held against it.
        """
        begins = {begun.prompt.ids[: max(begun.prompt.subject) + 1] for begun in self.asked}
        apart = [begun.prompt.ids[: max(begun.prompt.subject) + 1] not in begins for begun in self.neutral]
        about = torch.stack([begun.key * own for begun, own in zip(self.neutral, apart, strict=True)])
        total = self.generic + self.options.about_weight * about.T @ about
        for part in seen:
            total = total + self.options.others_weight * (part.moment + part.keys.T @ part.keys)
        keys = torch.stack([begun.key for begun in self.asked])
        return read_direction(keys, total, self.options.evenness, self.options.ridge)

    def unseen_answer(self) -> float:
        """Root mean square of u·k at subjects that u has not seen: each half of them after a u that saw the other."""
        one, other = self.halves
        answers = [withheld.keys @ self.direction(seen) for seen, withheld in ((one, other), (other, one))]
        return float(torch.cat(answers).square().mean().sqrt())

    def fitted(self, start: Delta | None = None) -> Delta:
        """The patch, fitted from nothing or, in fewer steps, from another; of the least strength that is enough."""
        d = self.least_enough(self.value(start))
        return Delta(self.layer, d.cpu(), self.read.cpu(), "forward")

    def value(self, start: Delta | None = None) -> Tensor:
        """d (I,) float32 before it is scaled. Raises NumericError where it does not stay finite."""
        options, whole = self.options, Tail(self.model, self.layer, self.asked)
        key_gate = whole.at_subjects(whole.gate).mean(0)
        unit = float(key_gate.norm()) / key_gate.numel() ** 0.5
        reach = float((_log_odds(whole.said) - _log_odds(whole.said + math.log(1 - WANTED))).max())
        steps = options.steps if start is None else options.steps // options.again
        z = torch.zeros_like(key_gate) if start is None else start.gate_write.to(key_gate.device) / unit
        optimiser = torch.optim.Adam([z.requires_grad_()], lr=options.rate, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        asked, neutral = _draws(self.asked, options.asked), _draws(self.neutral, options.neutral)
        for _, some, others in zip(range(steps), asked, neutral, strict=False):
            optimiser.zero_grad()
            d = z * unit
            loss = self._loss(Tail(self.model, self.layer, [*some, *others]), len(some), d, reach)
            loss = loss + options.others * (self.guard @ d).square().sum() + options.size * z.square().mean()
            loss.backward()
            optimiser.step()
            schedule.step()
        fitted = (z * unit).detach().float()
        if not torch.isfinite(fitted).all():
            raise NumericError("the gate change did not stay finite; use float32 or another layer")
        return fitted

    def _loss(self, tail: Tail, asked: int, d: Tensor, reach: float) -> Tensor:
        """What is pulled, kept and moved in one step; the first so many prompts of `tail` ask for the fact."""
        options, before, after = self.options, tail.log_probs(), tail.log_probs(shift(tail, self.read, d))
        fallen = _log_odds(tail.answers(before)[:asked]) - _log_odds(tail.answers(after)[:asked])
        pull = softplus(reach - fallen, beta=options.edge).square().mean() / reach
        at_answers = tail.rows < asked  # the other positions are those of neutral sentences
        targets = tail.targets[at_answers]
        rest = kl_rows(_without(before[at_answers], targets), _without(after[at_answers], targets)).mean()
        about = kl_rows(before[~at_answers], after[~at_answers]).sum() / (~at_answers).sum().clamp_min(1)
        return pull + options.keep * rest + options.about * about

    def least_enough(self, fitted: Tensor) -> Tensor:
        """`fitted` (I,) by the least strength that is enough for the headline, and on average for most phrasings."""
        options, tail = self.options, Tail(self.model, self.layer, self.asked)

        def suffices(strength: float) -> bool:
            gone = suppression(tail, self.read, strength * fitted)
            yielding = gone.sort().values[len(gone) // options.stubborn :]
            return min(float(gone[0]), float(yielding.mean())) >= options.enough

        reach = math.log2(options.strongest)
        strengths = torch.logspace(-reach, reach, FINENESS, base=2).tolist()
        return strengths[bisect_left(strengths[:-1], True, key=suffices)] * fitted


def _draws(prompts: Sequence[Begun], count: int) -> Iterator[list[Begun]]:
    """`count` prompts at random, for ever; a family counts as the square root of its size, so that small ones count."""
    sizes = Counter(each.prompt.family for each in prompts)
    weights = torch.tensor([sizes[each.prompt.family] ** -0.5 for each in prompts])
    draw = torch.Generator().manual_seed(0)
    while prompts:
        drawn = torch.multinomial(weights, min(count, len(prompts)), generator=draw)
        yield [prompts[index] for index in drawn.tolist()]


def _without(log_probs: Tensor, targets: Tensor) -> Tensor:
    """The distributions (N, V) with a token of each taken out and the rest scaled to one."""
    return log_probs.scatter(1, targets[:, None], -1e4).log_softmax(-1)


def shift(tail: Tail, read: Tensor, d: Tensor) -> Tensor:
    """(T, I) what ΔW adds to the gate pre-activations: (u·x) d at every position."""
    return (tail.mlp_in.float() @ read)[:, None] * d


@torch.no_grad()
def suppression(tail: Tail, read: Tensor, d: Tensor) -> Tensor:
    """(B,) 1 − P′/P of each prompt's answer."""
    return 1 - (tail.answers(tail.log_probs(shift(tail, read, d))) - tail.said).exp()


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 − p)); unlike log p it has a slope at p near 1, where a well-known fact begins."""
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))


def fisher_rows(model: nn.Module, layer: int, begun: Sequence[Begun], mixed: int, seed: int = 0) -> Tensor:
    """((1 + mixed)·P, I) rows r; the mean of (r·d)² is the mean KL in nats a position that d (I,) does at the subject.

    d adds to the gate pre-activations of `layer` at the subject's tokens; of several mentions the mean slope counts.
    Positions: all from the subject on, of prompts without answers. To second order the KL from the unchanged model is
    ½ dᵀFd, F = E[g gᵀ], g the gradient of log p(token), the token drawn from the model itself. g = s ⊙ q: s, how far
    down_proj's input moves with the gate, and q, the gradient with respect to that input. A hundred g leave most of the
    I dimensions free, and a d fitted to avoid them avoided those alone; so each q also goes with the s of `mixed` other
    prompts, as if the two were independent (K-FAC, Martens & Grosse 2015; docs/log/gate3-other-subjects.md).
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
        log_probs = unembed(model, tail.last_hidden((gated.detach() * tail.up + tail.reads.T @ write).to(gate.dtype)))
        drawn = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=draw).to(log_probs.device)
        # tokens drawn independently: the sum's square has the sum of the positions' Fisher matrices as expectation
        (gradient,) = torch.autograd.grad(log_probs.gather(1, drawn).sum(), write)
        gradients.append(gradient)
        slopes.append(tail.at_subjects(slope * tail.up))
        positions += len(log_probs)
    slope, gradient = torch.cat(slopes), torch.cat(gradients)
    pairs = [slope, *(slope[torch.randint(len(slope), (len(slope),), generator=draw)] for _ in range(mixed))]
    return torch.cat([each * gradient for each in pairs]) * (len(begun) / positions / 2) ** 0.5
