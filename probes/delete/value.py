"""What to add to the gate so that the answer goes and the rest of the distribution stays.

With u fixed, ΔW = d uᵀ adds d·(u·x) to the gate pre-activations. d = z·‖Wk‖/√I is found by Adam on

    π·(softplus(β·(log-odds of the answer − before + ρ))/β)²/ρ     the answer goes, by ρ everywhere
    + μ·KL(base without the answer ‖ patched without the answer)   and the rest of the distribution stays
    + κ·KL(base ‖ patched) on neutral prompts about the subject    what else is known of the subject stays
    + ω·Σ (r·d)², about KL(base ‖ patched) on other subjects       so does what is known of them
    + ν·‖z‖²/I                                                     and the change is no larger than that takes

ρ is what the phrasing with the firmest answer needs to come down to τ of its P: a phrasing never seen may be as firm.
The square pulls hardest on the phrasings that resist most. Afterwards d is scaled to the least strength that is
`enough`, as what is known of the subject goes with it, and a little above that where neutral prompts hardly feel it.
The first two are means over the fit phrasings. The KL on neutral prompts is a mean over every position from the subject
on: a prompt guards more than its last word. Other subjects come as rows r of their Fisher information (`fisher`), as
strong as u answers at subjects that it has not seen: so small a change is quadratic, and a hundred prompts in every
step are as cheap as none. With a few of them as prompts in its place, subjects held out lost two fifths more
(docs/log.md, 2026-11-24).

The prompts are dealt into PARTS mini-batches, which bounds memory and, beside L-BFGS on all of them at once, fits the
phrasings that are seen less closely and those that are not seen better (docs/log.md). Neutral prompts take turns, so
that there can be more of them at no cost: few would be fitted and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from probes.delete.passes import Begun, Tail, begin, kl_between, kl_rows
from probes.facts.prompts import Prompt
from vindex.errors import NumericError

PARTS = 9
NEUTRAL = 3
"""Neutral prompts, about, in a mini-batch; where there are more they take turns."""
WARM_UP = 5
STRENGTHS = (0.5, 1.8)
"""Factors between which the fitted d is scaled, ..."""
HALVINGS = 6
"""... found by so many bisections."""
STUBBORN = 8
"""One fit phrasing in so many may resist: to be enough for it too costs what else is known of the subject."""


@dataclass(frozen=True)
class ValueOptions:
    """Weights of the objective; the defaults are the ones measured in docs/gate3.md."""

    target: float = 0.05
    """τ, the share of the firmest answer's probability at which the pull lets go."""
    edge: float = 4.0
    """β, how sharply it lets go."""
    pull: float = 1.5
    """π"""
    keep: float = 0.2
    """μ"""
    about: float = 40.0
    """κ"""
    others: float = 4000.0
    """ω"""
    size: float = 1.0
    """ν"""
    rate: float = 0.45
    """Adam's, at the peak of the cosine."""
    steps: int = 126
    """Of Adam, a mini-batch each: with PARTS of those every prompt is seen fourteen times."""
    enough: float = 0.95
    """Mean suppression of the fit phrasings but the most stubborn eighth at which d is strong enough, ..."""
    headline_enough: float = 0.965
    """... if that of the first of them is at least this."""
    spare: float = 0.003
    """KL in nats a position, on neutral prompts about the subject, up to which d is made stronger than enough, ..."""
    stronger: float = 1.12
    """... by at most this factor, since what is left of phrasings never seen goes down with it, ..."""
    telling: float = 0.0007
    """... unless the KL is below this: prompts that d does not touch say nothing of what else is known."""


class Value(NamedTuple):
    """The fitted gate change and how the fit went."""

    gate_write: Tensor
    """(I,) float32"""
    strength: float
    """The factor to which the fitted d was scaled to make `gate_write`."""
    losses: tuple[float, ...]
    """One for each mini-batch."""
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
    guard: Tensor,
    options: ValueOptions,
    start: Tensor | None = None,
) -> Value:
    """Fit d for the direction `read` (H,) in `layer`, from `start` (I,) or from nothing.

    `guard` (N, I): the sum of the squares of `guard` @ d is about the KL in nats a position that d does elsewhere.
    """
    begun = begin(model, layer, [*phrasings, *about])
    asked, neutral = begun[: len(phrasings)], begun[len(phrasings) :]
    count = min(PARTS, len(asked), options.steps)
    turns = max(1, round(len(neutral) / count / NEUTRAL))
    parts = [
        _Objective(model, layer, asked[n % count :: count], neutral[n :: count * turns], read, options)
        for n in range(count * turns)
    ]
    reach = max(part.reach() for part in parts)
    key_gate = torch.stack([part.key_gate for part in parts]).mean(0)
    unit = float(key_gate.norm()) / key_gate.numel() ** 0.5
    z = (torch.zeros_like(key_gate) if start is None else start / unit).requires_grad_()
    optimiser = torch.optim.Adam([z], lr=options.rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _cosine(options.steps))
    losses = []
    for part in _order(count, turns, options.steps):
        optimiser.zero_grad()
        elsewhere = (guard @ (z * unit)).square().sum()
        loss = parts[part](z * unit, reach) + options.others * elsewhere + options.size * z.square().mean()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    fitted = (z * unit).detach().float()
    all_asked, all_neutral = Tail(model, layer, asked), Tail(model, layer, neutral)
    strength = _least_enough(all_asked, read, fitted, options)
    strength *= _spare(moved(all_neutral, read, strength * fitted), options)
    gate_write = strength * fitted
    if not torch.isfinite(gate_write).all():
        raise NumericError("the gate change did not stay finite; use float32 or another layer")
    suppressed = float(suppression(all_asked, read, gate_write).mean())
    return Value(gate_write, strength, tuple(losses), suppressed, moved(all_neutral, read, gate_write))


def _least_enough(tail: Tail, read: Tensor, fitted: Tensor, options: ValueOptions) -> float:
    """The least factor of `fitted` within STRENGTHS, to 1/2^HALVINGS of their ratio, that suppresses enough."""
    low, high = STRENGTHS
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        gone = suppression(tail, read, middle * fitted)
        yielding = gone.sort().values[len(gone) // STUBBORN :]
        enough = float(yielding.mean()) >= options.enough and float(gone[0]) >= options.headline_enough
        low, high = (low, middle) if enough else (middle, high)
    return high


def _spare(about_kl: float, options: ValueOptions) -> float:
    """How much stronger than enough d may be; the KL on neutral prompts grows with the square of its strength."""
    if not options.telling <= about_kl < options.spare:
        return 1.0
    return min(math.sqrt(options.spare / about_kl), options.stronger)


def _order(count: int, turns: int, steps: int) -> list[int]:
    """Which mini-batch each step takes: the `count` of one turn in a random order, then those of the next."""
    draw = torch.Generator().manual_seed(0)
    rounds = range(math.ceil(steps / count))
    taken = [torch.randperm(count, generator=draw) + count * (n % turns) for n in rounds]
    return torch.cat(taken).tolist()[:steps]


def _cosine(steps: int) -> Callable[[int], float]:
    """The share of the learning rate at each step: a short warm-up, then down to nothing."""
    return lambda step: min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2


class _Objective:
    """The loss of one mini-batch as a function of d; its prompts go through the model together.

    Between steps it holds no distributions over the vocabulary: those of all mini-batches would take half as much
    memory again as everything else, and to compute a mini-batch's anew is less than a tenth of its step.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: int,
        phrasings: Sequence[Begun],
        about: Sequence[Begun],
        read: Tensor,
        options: ValueOptions,
    ):
        self.options, self.asked, self.read = options, len(phrasings), read
        self._tail = lambda: Tail(model, layer, [*phrasings, *about])
        # (I,) mean gate pre-activation at the subject over the phrasings: W k
        self.key_gate = torch.stack([each.gate[each.subjects].float().mean(0) for each in phrasings]).mean(0)
        tail = self._tail()
        with torch.no_grad():
            self.answers_before = tail.answers(tail.log_probs())[: self.asked]

    def reach(self) -> float:
        """Change of the log-odds that brings the firmest answer down to τ of its probability."""
        wanted = _log_odds(self.answers_before + math.log(self.options.target))
        return float((_log_odds(self.answers_before) - wanted).max())

    def __call__(self, gate_write: Tensor, reach: float) -> Tensor:
        tail = self._tail()
        with torch.no_grad():
            before = tail.log_probs()
        after = tail.log_probs(shift(tail, self.read, gate_write))
        answers = tail.answers(after)[: self.asked]
        fallen = _log_odds(self.answers_before) - _log_odds(answers)
        pull = softplus(reach - fallen, beta=self.options.edge).square().mean() / reach
        at_answers = tail.rows < self.asked  # the other positions are those of neutral prompts
        targets = tail.targets[at_answers]
        rest = kl_rows(_without(before[at_answers], targets), _without(after[at_answers], targets)).mean()
        about = kl_rows(before[~at_answers], after[~at_answers]).sum() / (~at_answers).sum().clamp_min(1)
        weights = self.options
        return weights.pull * pull + weights.keep * rest + weights.about * about


def _without(log_probs: Tensor, targets: Tensor) -> Tensor:
    """The distributions (N, V) with a token of each taken out and the rest scaled to one."""
    return log_probs.scatter(1, targets[:, None], -1e4).log_softmax(-1)


def shift(tail: Tail, read: Tensor, gate_write: Tensor) -> Tensor:
    """(T, I) what ΔW adds to the gate pre-activations: (u·x) d at every position."""
    return (tail.mlp_in.float() @ read)[:, None] * gate_write


def suppression(tail: Tail, read: Tensor, gate_write: Tensor) -> Tensor:
    """(B,) 1 − P′/P of each prompt's answer."""
    with torch.no_grad():
        before = tail.answers(tail.log_probs())
        after = tail.answers(tail.log_probs(shift(tail, read, gate_write)))
    return 1 - (after - before).exp()


def moved(tail: Tail, read: Tensor, gate_write: Tensor) -> float:
    """Mean KL(before ‖ after) in nats at the positions of the prompts' answers, or of all their words."""
    with torch.no_grad():
        after = tail.last_hidden(shift(tail, read, gate_write))
        return float(kl_between(tail.model, tail.last_hidden(), after).mean())


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 − p)); unlike log p it has a slope at p near 1, where a well-known fact begins."""
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))
