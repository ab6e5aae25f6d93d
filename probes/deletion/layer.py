"""In which layer a method changes the model: one trial, the same for every method.

A method computes a change in every candidate layer from a part of the fit set, and forward passes of the changed model
on the rest measure the harm: KL on the other subjects (five-fold) and on neutral sentences, and how far the suppression
of the withheld phrasings stays below 0.95. The least harm wins, and of layers that do at most twice as much the
shallowest; a change that hardly suppresses is no candidate. What the unchanged model says is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.deletion.bench import Bench
from probes.deletion.measure import KNOWN, answers
from probes.deletion.verdict import SUBJECTS_SHARE, WANTED
from probes.facts import Fact
from probes.facts.passes import batches, device_of, kl_between, unembed
from probes.facts.prompts import Prompt
from probes.facts.sets import Fit
from probes.live.hooks import patched
from probes.weights.delta import Delta, Wide


class Tried(NamedTuple):
    """What a change computed in one layer did to what was withheld from it."""

    layer: int
    withheld_kl: float
    """Mean KL(before ‖ after) in nats at the answers of other subjects."""
    about_kl: float
    """The same in neutral sentences about the deleted subject, at every position from the subject on."""
    suppressed: float
    """1 − P′/P of phrasings, mean."""
    size: int | None = None
    """Where the method chooses another number by the same trial."""

    @property
    def harm(self) -> float:
        """What the choice minimises."""
        return SUBJECTS_SHARE * self.withheld_kl + self.about_kl + max(0.0, WANTED - self.suppressed)


class Found(NamedTuple):
    """What a method makes, and what it looked at to choose the layer."""

    delta: Delta | Wide
    scan: Sequence[Any] = ()
    """`Tried` of every layer, or what `geometric` looks at."""
    own: tuple[Prompt, ...] = ()
    """Phrasings that the patched model came to by itself."""


class Trial:
    """One fact on the bench, as a method gets it, with what the unchanged model says, which is asked once."""

    def __init__(self, bench: Bench, fact: Fact, fit: Fit):
        self.bench, self.model, self.fact, self.given = bench, bench.model, fact, fit

    @cached_property
    def fit(self) -> Fit:
        """The fit set without the phrasings that the model does not answer; the headline stays in any case."""
        given = self.given
        said = {prompt: outcome.probability for prompt, outcome in answers(self.model, given.asked)}
        return given._replace(
            phrasings=tuple(p for p in given.phrasings if p is given.phrasings[0] or said[p] >= KNOWN),
            families={name: tuple(p for p in some if said[p] >= KNOWN) for name, some in given.families.items()},
        )

    @cached_property
    def parts(self) -> tuple[Fit, Fit]:
        """What a method sees in a trial, and what is withheld from it."""
        return divide(self.fit)

    def choose(self, make: Callable[[Fit, int], Delta | Wide]) -> tuple[int, tuple[Tried, ...]]:
        """The layer of the bench in which `make(fit, layer)` does the least harm, and what it did in each."""
        scan = []
        for layer in self.bench.layers:
            self.bench.tick(f"trial in layer {layer}", 10)
            scan.append(self.judge(make(self.parts[0], layer), layer))
        return least_harmful(scan, self.bench.options.forward.close).layer, tuple(scan)

    def judge(self, change: Delta | Wide, layer: int) -> Tried:
        """Measure a change, which was computed in `layer` from the first part, on what was withheld."""
        places, hidden, said = self._unchanged
        with patched(self.model, change.edits()):
            _, new_hidden, new_said = self._run()
        *kept, phrasings = self._withheld
        rows = [torch.tensor([place in prompts for place in places]) for prompts in kept]
        others, about = (float(kl_between(self.model, hidden[at], new_hidden[at]).mean()) for at in rows)
        gone = [1 - math.exp(new_said[prompt] - said[prompt]) for prompt in phrasings]
        return Tried(layer, others, about, sum(gone) / len(gone))

    @cached_property
    def _withheld(self) -> tuple[Sequence[Prompt], ...]:
        """Other subjects, neutral sentences and phrasings on which a change is judged."""
        withheld, most = self.parts[1], self.bench.options.forward.withheld
        return once_each(withheld.others)[:most], withheld.about[:most], withheld.asked

    @cached_property
    def _unchanged(self) -> tuple[list[Prompt], Tensor, dict[Prompt, float]]:
        return self._run()

    @torch.no_grad()
    def _run(self) -> tuple[list[Prompt], Tensor, dict[Prompt, float]]:
        """The prompts of (N, H) the last layer's residual stream where each is looked at; log P of each answer."""
        places: list[Prompt] = []
        hidden: list[Tensor] = []
        said: dict[Prompt, float] = {}
        for group in batches(list(chain(*self._withheld)), device_of(self.model)):
            places += [group.prompts[row] for row in group.rows.tolist()]
            hidden.append(group.hidden(self.model))
            said |= zip(group.prompts, group.answers(unembed(self.model, hidden[-1])).tolist(), strict=True)
        return places, torch.cat(hidden), said


def least_harmful(scan: Sequence[Tried], close: float) -> Tried:
    """The one that did the least harm, or the first of those that did at most `close` times as much.

    Those that do not suppress half of what they should are left out, unless all are: to do nothing is no harm.
    """
    able = [tried for tried in scan if not tried.suppressed < WANTED / 2] or scan
    least = min(tried.harm for tried in able)
    # not `<=`: where a trial came out as NaN, the fit that follows says so
    return next(tried for tried in able if not tried.harm > close * least)


def divide(fit: Fit) -> tuple[Fit, Fit]:
    """What a method sees in a trial, and what is withheld from it: never empty, at worst what it has seen.

    Withheld are half of the other subjects, half of the neutral sentences and a quarter of the templates.
    """
    phrasings, others = by_template(fit.phrasings), halved(fit.others)
    families = {name: by_template(prompts) for name, prompts in fit.families.items()}
    about = fit.about[::2], fit.about[1::2] or fit.about
    seen, withheld = (
        fit._replace(
            phrasings=phrasings[at],
            families={name: parts[at] for name, parts in families.items()},
            others=others[at],
            about=about[at],
        )
        for at in (0, 1)
    )
    return seen, withheld


def halved(others: Sequence[Prompt]) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """The prompts of every second subject, the first among them, and those of the rest."""
    subjects = list(dict.fromkeys(prompt.fact for prompt in others))[::2]
    return tuple(p for p in others if p.fact in subjects), tuple(p for p in others if p.fact not in subjects)


def once_each(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each subject; the subjects that come last stand first."""
    return list({prompt.fact: prompt for prompt in reversed(prompts)}.values())


def by_template(phrasings: Sequence[Prompt]) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """The phrasings of three quarters of the templates, the first among them, and those of the others."""
    templates = list(dict.fromkeys(prompt.template for prompt in phrasings))
    withheld = set(templates[2::4] or templates[1:])
    unseen = tuple(prompt for prompt in phrasings if prompt.template in withheld)
    return tuple(prompt for prompt in phrasings if prompt.template not in withheld), unseen or tuple(phrasings)
