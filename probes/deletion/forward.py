"""The forward method: key and value from forward and backward passes, on the fit prompts alone.

Its steps are those of docs/gate3-method.md: layer (`layer`), key (`keys`), guard and value (`value`), and what the
patched model says by itself. The model is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from probes.deletion.bench import Bench
from probes.deletion.certificate import heard, written
from probes.deletion.keys import Seen, observe, read_direction
from probes.deletion.layer import Found, Trial, Tried, halved, once_each
from probes.deletion.measure import KNOWN, answers
from probes.deletion.options import ForwardOptions
from probes.deletion.tail import Begun, Tail, begin
from probes.deletion.value import fisher_rows, fit_value, least_enough
from probes.facts.prompts import Prompt
from probes.facts.sets import Fit
from probes.live.hooks import patched
from probes.weights.delta import Delta
from vindex.errors import FactError


def forward(trial: Trial) -> Found:
    """The patch for the fact of `trial`, in one of the layers of its bench."""
    bench, options = trial.bench, trial.bench.options.forward
    bench.tick("generic text", 12)
    bench.generic_moments()
    layer, scan = bench.layers[0], tuple[Tried, ...]()
    if len(bench.layers) > 1:
        bench.tick("keys in every layer", 5)
        brief = replace(options, steps=options.trial_steps)
        places = prepared(bench, thinned(trial.parts[0], options.trial_prompts), bench.layers, brief)
        layer, scan = trial.choose(lambda _, layer: places.pop(layer).fitted())
    bench.tick(f"value in layer {layer}", 40)
    place = prepared(bench, trial.fit, [layer], options)[layer]
    delta = place.fitted()
    bench.tick("what it says by itself", 20)
    own = own_words(trial, delta)
    if own:
        place.asked += begin(bench.model, [layer], own)[layer]
        delta = place.fitted(delta)
    return Found(delta, scan, own)


def own_words(trial: Trial, delta: Delta) -> tuple[Prompt, ...]:
    """What the patched model writes from the fit questions, up to the answer, where it still comes to it.

    Texts after which the unpatched model would not give the answer are left out.
    """
    bench, fact = trial.bench, trial.fact
    greedy = [(question, 0) for question in trial.given.questions]
    with patched(bench.model, delta.edits(bench.stored)):
        texts = written(bench.model, bench.loaded.tokenizer, greedy, fact, 0, bench.options.forward.written)
    found = []
    for number, ((question, _), text) in enumerate(texts.items()):
        answer = heard(fact, question.family, text.text)
        if answer:
            with suppress(FactError):  # the tokenizer parts the words elsewhere
                whole = question.text + text.text[: answer.start()]
                found.append(bench.encoder.free(whole, fact, "own", f"{fact.name}#own {number}", f"own {number}"))
    return tuple(prompt for prompt, outcome in answers(bench.model, found) if outcome.probability >= KNOWN)


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


def prepared(bench: Bench, fit: Fit, chosen: Sequence[int], options: ForwardOptions) -> dict[int, Place]:
    """The `chosen` layers, after one pass over the fit prompts for all of them."""
    one, other = (observe(bench.model, half, chosen) for half in halved(fit.others))
    spoken = [prompt._replace(answer=()) for prompt in once_each(fit.others)]
    own, about, others = (begin(bench.model, chosen, prompts) for prompts in (fit.asked, fit.about, spoken))
    generic = bench.generic_moments()
    return {
        at: Place(bench.model, at, own[at], about[at], others[at], (one[at], other[at]), generic[at], options)
        for at in chosen
    }
