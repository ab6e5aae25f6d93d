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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from probes.deletion.options import ForwardOptions
from probes.deletion.tail import Begun, Tail
from probes.deletion.verdict import WANTED
from probes.facts.passes import kl_rows, unembed
from vindex.errors import NumericError

FINENESS = 32
"""Strengths tried between the least and the most, evenly in their logarithm."""
CHUNK = 24
"""Prompts in one backward pass of `fisher_rows`; bounds the memory that activations take."""


def fit_value(
    model: nn.Module,
    layer: int,
    asked: Sequence[Begun],
    neutral: Sequence[Begun],
    read: Tensor,
    guard: Tensor,
    options: ForwardOptions,
    start: Tensor | None = None,
) -> Tensor:
    """d (I,) float32 for the direction `read` (H,) in `layer`, fitted from `start` (I,) or from nothing; not scaled.

    `guard` (N, I): the sum of the squares of `guard` @ d is about the KL in nats a position that d does elsewhere.
    Raises NumericError where it does not stay finite.
    """
    whole = Tail(model, layer, asked)
    key_gate = whole.at_subjects(whole.gate).mean(0)
    unit = float(key_gate.norm()) / key_gate.numel() ** 0.5
    reach = _reach(whole, 1 - WANTED)
    z = (torch.zeros_like(key_gate) if start is None else start / unit).requires_grad_()
    optimiser = torch.optim.Adam([z], lr=options.rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    turns = zip(range(options.steps), _draws(asked, options.asked), _draws(neutral, options.neutral), strict=False)
    for _, some, others in turns:
        optimiser.zero_grad()
        d = z * unit
        loss = _loss(Tail(model, layer, [*some, *others]), len(some), read, d, reach, options)
        loss = loss + options.others * (guard @ d).square().sum() + options.size * z.square().mean()
        loss.backward()
        optimiser.step()
        schedule.step()
    fitted = (z * unit).detach().float()
    if not torch.isfinite(fitted).all():
        raise NumericError("the gate change did not stay finite; use float32 or another layer")
    return fitted


def least_enough(tail: Tail, read: Tensor, fitted: Tensor, options: ForwardOptions) -> Tensor:
    """`fitted` (I,) by the least strength that is enough for the first prompt of `tail`, and on average for most."""

    with torch.no_grad():
        before = tail.answers(tail.log_probs())

    def suffices(strength: float) -> bool:
        gone = suppression(tail, read, strength * fitted, before)
        yielding = gone.sort().values[len(gone) // options.stubborn :]
        return min(float(gone[0]), float(yielding.mean())) >= options.enough

    reach = math.log2(options.strongest)
    strengths = torch.logspace(-reach, reach, FINENESS, base=2).tolist()
    return strengths[bisect_left(strengths[:-1], True, key=suffices)] * fitted


def _loss(tail: Tail, asked: int, read: Tensor, d: Tensor, reach: float, options: ForwardOptions) -> Tensor:
    """What is pulled, kept and moved in one step; the first so many prompts of `tail` ask for the fact."""
    with torch.no_grad():
        before = tail.log_probs()
    after = tail.log_probs(shift(tail, read, d))
    fallen = _log_odds(tail.answers(before)[:asked]) - _log_odds(tail.answers(after)[:asked])
    pull = softplus(reach - fallen, beta=options.edge).square().mean() / reach
    at_answers = tail.rows < asked  # the other positions are those of neutral sentences
    targets = tail.targets[at_answers]
    rest = kl_rows(_without(before[at_answers], targets), _without(after[at_answers], targets)).mean()
    about = kl_rows(before[~at_answers], after[~at_answers]).sum() / (~at_answers).sum().clamp_min(1)
    return pull + options.keep * rest + options.about * about


def _draws(prompts: Sequence[Begun], count: int) -> Iterator[list[Begun]]:
    """`count` prompts at random, for ever; a family counts as the square root of its size, so that small ones count."""
    sizes = Counter(each.prompt.family for each in prompts)
    weights = torch.tensor([sizes[each.prompt.family] ** -0.5 for each in prompts])
    draw = torch.Generator().manual_seed(0)
    while prompts:
        drawn = torch.multinomial(weights, min(count, len(prompts)), generator=draw)
        yield [prompts[index] for index in drawn.tolist()]


def _reach(tail: Tail, target: float) -> float:
    """Fall of the log-odds that brings the firmest answer down to that share of its probability."""
    with torch.no_grad():
        before = tail.answers(tail.log_probs())
    return float((_log_odds(before) - _log_odds(before + math.log(target))).max())


def _without(log_probs: Tensor, targets: Tensor) -> Tensor:
    """The distributions (N, V) with a token of each taken out and the rest scaled to one."""
    return log_probs.scatter(1, targets[:, None], -1e4).log_softmax(-1)


def shift(tail: Tail, read: Tensor, d: Tensor) -> Tensor:
    """(T, I) what ΔW adds to the gate pre-activations: (u·x) d at every position."""
    return (tail.mlp_in.float() @ read)[:, None] * d


def suppression(tail: Tail, read: Tensor, d: Tensor, before: Tensor) -> Tensor:
    """(B,) 1 − P′/P of each prompt's answer, whose log P (B,) was `before`."""
    with torch.no_grad():
        after = tail.answers(tail.log_probs(shift(tail, read, d)))
    return 1 - (after - before).exp()


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
