"""The forward method: key and value from forward and backward passes, on the fit prompts alone.

Its steps are those of docs/gate3-method.md: layer (`layer`), key (`keys`), guard and value (`value`), and what the
patched model says by itself. The model is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from probes.deletion.bench import Bench
from probes.deletion.keys import observe
from probes.deletion.layer import Found, Trial, Tried, halved, once_each
from probes.deletion.measure import KNOWN, answers
from probes.deletion.options import ForwardOptions
from probes.deletion.tail import begin
from probes.deletion.value import Place
from probes.facts.prompts import Prompt
from probes.facts.sets import Fit
from probes.facts.writing import find_answer, write_on
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
    with patched(bench.model, delta.edits(bench.stored(delta.layer))):
        texts = write_on(bench.model, bench.loaded.tokenizer, greedy, fact, 0, bench.options.forward.written)
    found = []
    for number, ((question, _), text) in enumerate(texts.items()):
        answer = find_answer(fact, question.family, text.text)
        if answer:
            with suppress(FactError):  # the tokenizer parts the words elsewhere
                whole = question.text + text.text[: answer.start()]
                found.append(bench.encoder.free(whole, fact, "own", f"{fact.name}#own {number}", f"own {number}"))
    return tuple(prompt for prompt, outcome in answers(bench.model, found) if outcome.probability >= KNOWN)


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
