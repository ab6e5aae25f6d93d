"""The forward method: key and value from forward and backward passes, on the fit prompts alone.

1. Layer (`layer`): a trial of a few steps in every candidate layer.
2. Key (`keys`): u answers with 1 at the subject in every phrasing, whatever its family, and with little to generic
   text, to other subjects and to the subject in neutral sentences.
3. Guard (`fisher`): what a gate change at another subject does there, as strong as u answers at subjects unseen.
4. Value (`value`): d, scaled to the least strength that is enough.
5. What the patched model says by itself: where it still comes to the answer, the text up to there is one more
   phrasing, and d is fitted on.

The result is a `Delta`; the model is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from probes.deletion.fisher import fisher_rows
from probes.deletion.keys import Seen, observe, read_direction
from probes.deletion.layer import Found, Trial, Tried, asked, once_each
from probes.deletion.options import ForwardOptions
from probes.deletion.tail import Begun, Tail, begin
from probes.deletion.value import fit_value, least_enough
from probes.facts.prompts import Prompt
from probes.facts.sets import Fit
from probes.weights.delta import Delta

Speak = Callable[[Delta], Sequence[Prompt]]
"""What the patched model says of the fact when it writes by itself: texts up to the answer."""


class Read(NamedTuple):
    """What one layer's FFN reads in the fit prompts."""

    keys: Tensor
    """(P, H): at the deleted subject, a row for each phrasing."""
    about: Tensor
    """(N, H): at the deleted subject, a row for each neutral sentence; 0 where a phrasing begins like it."""
    halves: tuple[Seen, Seen]
    """Of each half of the other subjects."""


def forward(
    trial: Trial,
    chosen: Sequence[int],
    generic: Mapping[int, Tensor],
    options: ForwardOptions,
    speak: Speak,
    tick: Callable[[str], object] = lambda _: None,
) -> Found:
    """Compute the patch for the fact of `trial`, in one of the `chosen` layers.

    `generic` holds the second moment of generic text in each of them.
    """
    brief, fit = replace(options, steps=options.trial_steps), trial.fit
    layer, scan = chosen[0], tuple[Tried, ...]()
    if len(chosen) > 1:
        tick("keys in every layer")
        few = thinned(trial.seen, options.trial_prompts)
        seen = observe_all(trial.model, few, chosen)
        make = lambda _, layer: Place(trial.model, few, layer, seen[layer], generic[layer], brief).fitted()  # noqa: E731
        layer, scan = trial.choose(chosen, make, tick)
    tick(f"value in layer {layer}")
    read = observe_all(trial.model, fit, [layer])[layer]
    place = Place(trial.model, fit, layer, read, generic[layer], options)
    delta = place.fitted()
    tick("what it says by itself")
    own = tuple(speak(delta))
    if own:
        place.asked += begin(trial.model, layer, own)
        delta = place.fitted(delta)
    return Found(delta, scan, own)


class Place:
    """One layer, ready for a value to be fitted there: the read direction, the guard and the prompts begun."""

    def __init__(self, model: nn.Module, fit: Fit, layer: int, read: Read, generic: Tensor, options: ForwardOptions):
        self.model, self.layer, self.options = model, layer, options
        self.read = direction(read, generic, options, *read.halves)
        rows = fisher_rows(model, layer, once_each(fit.others), options.mixed)
        self.guard = unseen_answer(read, generic, options) * rows / len(rows) ** 0.5
        self.asked: list[Begun] = begin(model, layer, asked(fit))
        self.neutral: list[Begun] = begin(model, layer, fit.about)

    def fitted(self, start: Delta | None = None) -> Delta:
        """The patch, fitted from nothing or, in fewer steps, from another; of the least strength that is enough."""
        options, first = self.options, None
        if start is not None:
            options, first = replace(options, steps=options.steps // options.again), start.gate_write
        d = fit_value(self.model, self.layer, self.asked, self.neutral, self.read, self.guard, options, first)
        d = least_enough(Tail(self.model, self.layer, self.asked), self.read, d, options)
        return Delta(self.layer, d.cpu(), self.read.cpu(), "forward")


def thinned(fit: Fit, count: int) -> Fit:
    """At most so many phrasings, as many of other families together, neutral sentences and, once each, subjects."""
    share = -(-count // max(1, len(fit.families)))
    return fit._replace(
        phrasings=fit.phrasings[:count],
        families={name: prompts[:share] for name, prompts in fit.families.items()},
        others=tuple(once_each(fit.others)[: 2 * count]),
        about=fit.about[:count],
    )


def observe_all(model: nn.Module, fit: Fit, chosen: Sequence[int]) -> dict[int, Read]:
    """What every layer of `chosen` reads in the fit prompts, in one pass over them."""
    subjects = list(dict.fromkeys(prompt.fact for prompt in fit.others))
    parts = [[p for p in fit.others if (p.fact in subjects[::2]) is first] for first in (True, False)]
    phrasings = asked(fit)
    own, about, *both = (observe(model, prompts, chosen) for prompts in (phrasings, fit.about, *parts))
    begun = {prompt.ids[: max(prompt.subject) + 1] for prompt in phrasings}
    apart = torch.tensor([float(prompt.ids[: max(prompt.subject) + 1] not in begun) for prompt in fit.about])
    return {
        layer: Read(
            own[layer].keys,
            apart.to(own[layer].keys)[:, None] * about[layer].keys,
            (both[0][layer], both[1][layer]),
        )
        for layer in chosen
    }


def direction(read: Read, generic: Tensor, options: ForwardOptions, *seen: Seen) -> Tensor:
    """u for A of generic text, the subject's keys in neutral sentences, and all that is read of the subjects seen."""
    total = generic + options.about_weight * read.about.T @ read.about
    for part in seen:
        total = total + options.others_weight * (part.moment + part.keys.T @ part.keys)
    return read_direction(read.keys, total, options.evenness, options.ridge)


def unseen_answer(read: Read, generic: Tensor, options: ForwardOptions) -> float:
    """Root mean square of u·k at subjects that u has not seen: each half of them after a u that saw the other."""
    one, other = read.halves
    ways = ((one, other), (other, one))
    answers = [withheld.keys @ direction(read, generic, options, seen) for seen, withheld in ways]
    return float(torch.cat(answers).square().mean().sqrt())
