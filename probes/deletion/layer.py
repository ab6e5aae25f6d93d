"""In which layer a method changes the model: one trial, the same for every method.

1. `candidates`: three layers, evenly from the first sixth of the depth to its half. Before it a subject's token is
   read rather than the subject, and every change is felt everywhere; after it the subject has mostly been read.
2. `Trial` divides the fit set in two: what a method sees (half of the other subjects, half of the neutral sentences,
   three quarters of the templates) and what it is judged on (the rest).
3. `Trial.choose` has the method compute a change in every candidate layer from the first part. Forward passes of the
   changed model on the second measure the harm: KL on the other subjects (five-fold) and on the neutral sentences, and
   how far the suppression of the withheld phrasings stays below 0.95. The least harm wins, and of layers that do at
   most twice as much the shallowest; a change that hardly suppresses is no candidate. What the unchanged model says is
   computed once, for all layers and methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.deletion.measure import KNOWN, answers
from probes.deletion.options import ForwardOptions
from probes.deletion.verdict import SUBJECTS_SHARE, WANTED
from probes.facts.passes import batches, device_of, kl_between, last_hidden, unembed
from probes.facts.prompts import Prompt
from probes.facts.sets import Fit
from probes.live.hooks import patched
from probes.live.sites import layers, null_layers
from probes.weights.delta import Delta, Wide
from vindex.errors import ProbeError


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


def candidates(model: nn.Module, wanted: int) -> tuple[int, ...]:
    """So many layers, evenly from the first sixth of the depth to its half; fewer in smaller models, but at least two.

    Layers that write nothing are passed over, for the next ones. Raises ProbeError where no layer is left.
    """
    count, nothing = len(layers(model)), null_layers(model)
    first = count // 6
    found = tuple(layer for layer in range(first, count) if layer not in nothing)[: max(2, count // 2 - first)]
    if not found:
        raise ProbeError(f"no layer from {first} on writes anything, a projection of each is zero; no patch can either")
    wanted = min(wanted, len(found))
    return tuple(found[round(n * (len(found) - 1) / max(1, wanted - 1))] for n in range(wanted))


class Trial:
    """One fact's fit set in two parts, and what the unchanged model says to the second."""

    def __init__(self, model: nn.Module, fit: Fit, options: ForwardOptions):
        """`fit` without the phrasings that the model does not answer; the headline stays in any case."""
        self.model, self.given, self.options = model, fit, options
        said = {prompt: outcome.probability for prompt, outcome in answers(model, asked(fit))}
        self.fit = fit._replace(
            phrasings=tuple(p for p in fit.phrasings if p is fit.phrasings[0] or said[p] >= KNOWN),
            families={name: tuple(p for p in some if said[p] >= KNOWN) for name, some in fit.families.items()},
        )
        self.seen, withheld = divide(self.fit)
        others, about = once_each(withheld.others)[: options.withheld], list(withheld.about[: options.withheld])
        self._phrasings = asked(withheld)
        self._groups = list(batches([*others, *about, *self._phrasings], device_of(model)))
        places = [group.prompts[row] for group in self._groups for row in group.rows.tolist()]
        self._parts = [torch.tensor([place in part for place in places]) for part in (set(others), set(about))]
        self._before = self._run()

    def judge(self, change: Delta | Wide, layer: int) -> Tried:
        """Measure a change, which was computed in `layer` from `seen`, on what was withheld."""
        hidden, said = self._before
        with patched(self.model, change.edits()):
            new_hidden, new_said = self._run()
        others, about = (float(kl_between(self.model, hidden[part], new_hidden[part]).mean()) for part in self._parts)
        gone = [1 - math.exp(new_said[prompt] - said[prompt]) for prompt in self._phrasings]
        return Tried(layer, others, about, sum(gone) / len(gone))

    def choose(
        self,
        chosen: Sequence[int],
        make: Callable[[Fit, int], Delta | Wide],
        tick: Callable[[str], object] = lambda _: None,
    ) -> tuple[int, tuple[Tried, ...]]:
        """The layer among `chosen` in which `make(fit, layer)` does the least harm, and what it did in each."""
        scan = []
        for layer in chosen:
            tick(f"trial in layer {layer}")
            scan.append(self.judge(make(self.seen, layer), layer))
        return least_harmful(scan, self.options.close).layer, tuple(scan)

    @torch.no_grad()
    def _run(self) -> tuple[Tensor, dict[Prompt, float]]:
        """(N, H) the last layer's residual stream at the answers, or from the subject on; log P of each answer."""
        hidden = [last_hidden(self.model, group.ids)[group.rows, group.columns] for group in self._groups]
        said: dict[Prompt, float] = {}
        for group, rows in zip(self._groups, hidden, strict=True):
            said |= zip(group.prompts, group.answers(unembed(self.model, rows)).tolist(), strict=True)
        return torch.cat(hidden), said


def asked(fit: Fit) -> tuple[Prompt, ...]:
    """Every prompt that asks for the fact, the headline first."""
    return fit.phrasings + tuple(chain(*fit.families.values()))


def once_each(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each subject; the subjects that come last stand first."""
    return list({prompt.fact: prompt for prompt in reversed(prompts)}.values())


def least_harmful(scan: Sequence[Tried], close: float) -> Tried:
    """The one that did the least harm, or the first of those that did at most `close` times as much.

    Those that do not suppress half of what they should are left out, unless all are: to do nothing is no harm.
    """
    able = [tried for tried in scan if not tried.suppressed < WANTED / 2] or scan
    least = min(tried.harm for tried in able)
    # not `<=`: where a trial came out as NaN, the fit that follows says so
    return next(tried for tried in able if not tried.harm > close * least)


def divide(fit: Fit) -> tuple[Fit, Fit]:
    """What a method sees in a trial, and what is withheld from it: never empty, at worst what it has seen."""
    subjects = list(dict.fromkeys(prompt.fact for prompt in fit.others))
    ours = set(subjects[::2])
    theirs = tuple(prompt for prompt in fit.others if prompt.fact not in ours)
    parts = {name: by_template(some) for name, some in fit.families.items()}
    families = [{name: halves[side] for name, halves in parts.items()} for side in (0, 1)]
    phrasings = by_template(fit.phrasings)
    seen = fit._replace(
        phrasings=phrasings[0],
        families=families[0],
        others=tuple(prompt for prompt in fit.others if prompt.fact in ours),
        about=fit.about[::2],
    )
    about = fit.about[1::2] or fit.about
    return seen, fit._replace(phrasings=phrasings[1], families=families[1], others=theirs, about=about)


def by_template(phrasings: Sequence[Prompt]) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """The phrasings of three quarters of the templates, the first among them, and those of the others."""
    templates = list(dict.fromkeys(prompt.template for prompt in phrasings))
    withheld = set(templates[2::4] or templates[1:])
    unseen = tuple(prompt for prompt in phrasings if prompt.template in withheld)
    return tuple(prompt for prompt in phrasings if prompt.template not in withheld), unseen or tuple(phrasings)
