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
from dataclasses import dataclass, replace
from functools import cached_property

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
        places = prepared(trial.model, thinned(trial.seen, options.trial_prompts), chosen, generic, brief)
        layer, scan = trial.choose(chosen, lambda _, layer: places.pop(layer).fitted(), tick)
    tick(f"value in layer {layer}")
    place = prepared(trial.model, fit, [layer], generic, options)[layer]
    delta = place.fitted()
    tick("what it says by itself")
    own = tuple(speak(delta))
    if own:
        place.asked += begin(trial.model, [layer], own)[layer]
        delta = place.fitted(delta)
    return Found(delta, scan, own)


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


def prepared(
    model: nn.Module, fit: Fit, chosen: Sequence[int], generic: Mapping[int, Tensor], options: ForwardOptions
) -> dict[int, Place]:
    """The `chosen` layers, after one pass over the fit prompts for all of them."""
    subjects = list(dict.fromkeys(prompt.fact for prompt in fit.others))[::2]
    one, other = (
        observe(model, [prompt for prompt in fit.others if (prompt.fact in subjects) is first], chosen)
        for first in (True, False)
    )
    spoken = [prompt._replace(answer=()) for prompt in once_each(fit.others)]
    own, about, others = (begin(model, chosen, prompts) for prompts in (asked(fit), fit.about, spoken))
    return {
        at: Place(model, at, own[at], about[at], others[at], (one[at], other[at]), generic[at], options)
        for at in chosen
    }
