"""What a patch changes, by real forward passes. Knows nothing of how the patch was made.

Every figure is a probability in float32 of the answer after the prompt (of all its tokens in turn, when it has more
than one), before and after. A prompt whose answer had P < 0.1 before is not known to the model: counted, not scored.
suppression = 1 − P′/P; loss = (P − P′)/P, so that gains are negative; flip = another most probable first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from probes.facts.passes import Batch, batches, device_of, kl_between, last_hidden, unembed
from probes.facts.prompts import Prompt
from probes.facts.sets import Sets

KNOWN = 0.1
TOP = 5
GROUPS = ("paraphrases", "reference", "other_subjects", "same_subject", "same_answer")
"""The held-out sets of prompts that `published` and `strict` are about, as `HeldOut` and `Effect` call them."""


class Outcome(NamedTuple):
    """What the model says after one prompt."""

    probability: float
    """Of the whole answer."""
    rank: int
    """Of the answer's first token, 1 = most probable."""
    top: tuple[tuple[int, float], ...]
    """The TOP most probable next tokens."""


class Change(NamedTuple):
    """One prompt before and after."""

    name: str
    before: Outcome
    after: Outcome

    @property
    def loss(self) -> float:
        """(P − P′)/P."""
        return 1.0 - self.after.probability / max(self.before.probability, 1e-30)

    @property
    def known(self) -> bool:
        """Whether the model gave the answer before."""
        return self.before.probability >= KNOWN

    @property
    def flipped(self) -> bool:
        """Whether another token is now the most probable."""
        return self.before.top[0][0] != self.after.top[0][0]


@dataclass(frozen=True)
class SetChange:
    """One set of prompts before and after; only those known before are in `changes`."""

    changes: tuple[Change, ...]
    asked: int

    @property
    def mean(self) -> float | None:
        """Of the losses."""
        return _mean([change.loss for change in self.changes])

    @property
    def before(self) -> float | None:
        """Mean P of the answers in the unpatched model …"""
        return _mean([change.before.probability for change in self.changes])

    @property
    def after(self) -> float | None:
        """… and in the patched one."""
        return _mean([change.after.probability for change in self.changes])

    @property
    def mean_absolute(self) -> float | None:
        return _mean([abs(change.loss) for change in self.changes])

    @property
    def worst(self) -> Change | None:
        """The change with the largest loss."""
        return max(self.changes, key=lambda change: change.loss, default=None)

    @property
    def least(self) -> Change | None:
        """The change with the smallest loss: for paraphrases, the one that escaped most."""
        return min(self.changes, key=lambda change: change.loss, default=None)

    @property
    def flips(self) -> float | None:
        return _mean([change.flipped for change in self.changes])

    @property
    def first(self) -> int:
        """Prompts whose most probable token began the answer …"""
        return sum(change.before.rank == 1 for change in self.changes)

    @property
    def still_first(self) -> float | None:
        """… and the share of them where it still does."""
        return _mean([change.after.rank == 1 for change in self.changes if change.before.rank == 1])

    def known_from(self, least: float) -> SetChange:
        """Those that had more than so much P before."""
        return SetChange(tuple(change for change in self.changes if change.before.probability > least), self.asked)


class Effect(NamedTuple):
    """Everything measured about one patch."""

    groups: dict[str, SetChange]
    """`headline` and each of GROUPS."""
    neutral_kl: float
    """KL(before ‖ after), nats per token of neutral text."""
    neutral_tokens: int

    @property
    def headline(self) -> Change:
        return self.groups["headline"].changes[0]


@dataclass
class Baseline:
    """The unpatched model's answers, kept between facts: a prompt is run once however many patches it judges."""

    model: nn.Module
    outcomes: dict[tuple[tuple[int, ...], tuple[int, ...]], Outcome] = field(default_factory=dict)
    neutral: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """Token ids of a passage → residual stream (T, H) after the last layer."""

    def of(self, prompts: Iterable[Prompt]) -> list[Outcome]:
        """Outcomes in the prompts' order."""
        keyed = [((prompt.ids, prompt.answer), prompt) for prompt in prompts]
        missing = {key: prompt for key, prompt in keyed if key not in self.outcomes}
        for prompt, outcome in answers(self.model, list(missing.values())):
            self.outcomes[prompt.ids, prompt.answer] = outcome
        return [self.outcomes[key] for key, _ in keyed]

    def prepare(self, sets: Sets) -> None:
        """Run everything that `measure` compares with; the weights must be the original ones."""
        self.of(chain(*_groups(sets).values()))
        for passage in sets.held_out.neutral:
            if passage not in self.neutral:
                self.neutral[passage] = _read(self.model, passage)


def answers(model: nn.Module, prompts: Sequence[Prompt]) -> Iterable[tuple[Prompt, Outcome]]:
    """Each prompt with what the model says after it now, in batches (not in order)."""
    for group in batches(prompts, device_of(model)):
        with torch.no_grad():
            log_probs = unembed(model, group.hidden(model))
        yield from zip(group.prompts, _outcomes(group, log_probs), strict=True)


def measure(baseline: Baseline, sets: Sets) -> Effect:
    """Compare the model as it is now (patched) with `baseline`, which `prepare` has filled."""
    groups, passages = compare(baseline, _groups(sets)), sets.held_out.neutral
    kl = 0.0
    for passage in passages:
        after = _read(baseline.model, passage)
        with torch.no_grad():
            kl += float(kl_between(baseline.model, baseline.neutral[passage], after).sum())
    tokens = sum(map(len, passages))
    return Effect(groups, kl / tokens, tokens)


def compare(baseline: Baseline, groups: Mapping[str, Sequence[Prompt]]) -> dict[str, SetChange]:
    """Compare groups of prompts by name; `baseline` has been asked all of them. Only what it knows is run."""
    known = {
        name: [prompt for prompt in prompts if baseline.of([prompt])[0].probability >= KNOWN]
        for name, prompts in groups.items()
    }
    changes = iter(measure_few(baseline, [prompt for prompts in known.values() for prompt in prompts]))
    return {name: SetChange(tuple(islice(changes, len(known[name]))), len(groups[name])) for name in groups}


def measure_few(baseline: Baseline, prompts: Sequence[Prompt]) -> list[Change]:
    """Compare a few prompts, known or not, in order."""
    after = dict(answers(baseline.model, prompts))
    return [Change(prompt.name, was, after[prompt]) for prompt, was in zip(prompts, baseline.of(prompts), strict=True)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _groups(sets: Sets) -> dict[str, tuple[Prompt, ...]]:
    return {"headline": (sets.headline,), **{name: getattr(sets.held_out, name) for name in GROUPS}}


@torch.no_grad()
def _read(model: nn.Module, passage: tuple[int, ...]) -> Tensor:
    """(T, H) residual stream of running text after the last layer."""
    return last_hidden(model, torch.tensor([passage], device=device_of(model)))[0]


def _outcomes(group: Batch, log_probs: Tensor) -> list[Outcome]:
    """One outcome for each prompt of the batch from the log-probabilities (N, V) at its answer positions."""
    at = log_probs.gather(1, group.targets[:, None])[:, 0]
    totals = group.answers(log_probs)
    found = []
    for row in range(len(group.prompts)):
        first = int((group.rows == row).nonzero()[0])
        rank = 1 + int((log_probs[first] > at[first]).sum())
        top = log_probs[first].topk(TOP)
        pairs = zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
        found.append(Outcome(float(totals[row].exp()), rank, tuple(pairs)))
    return found
