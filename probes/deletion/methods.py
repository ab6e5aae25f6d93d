"""The methods by name: each computes a change of one weight from the fit set, or from the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from probes.deletion.baselines import BASELINES, baseline
from probes.deletion.bench import DEFAULT, Bench
from probes.deletion.certificate import heard, written
from probes.deletion.forward import forward
from probes.deletion.geometric import geometric
from probes.deletion.layer import Found
from probes.deletion.measure import KNOWN, answers
from probes.facts import Fact
from probes.facts.prompts import Prompt
from probes.facts.sets import Fit
from probes.live.hooks import patched
from probes.weights.delta import Delta
from vindex.errors import FactError, ProbeError


def _forward(bench: Bench, fact: Fact, fit: Fit) -> Found:
    bench.tick("generic text")
    generic, speak = bench.generic_moments(), partial(own_words, bench, fact, fit)
    return forward(bench.trial(fit), bench.layers, generic, bench.options.forward, speak, bench.tick)


def own_words(bench: Bench, fact: Fact, fit: Fit, delta: Delta) -> list[Prompt]:
    """What the patched model writes from the fit questions, up to the answer, where it still comes to it.

    Texts after which the unpatched model would not give the answer are left out.
    """
    greedy, tokens = [(question, 0) for question in fit.questions], bench.options.forward.written
    with patched(bench.model, delta.edits(bench.stored)):
        texts = written(bench.model, bench.loaded.tokenizer, greedy, fact, 0, tokens)
    found = []
    for number, ((question, _), text) in enumerate(texts.items()):
        answer = heard(fact, question.family, text.text)
        if answer:
            with suppress(FactError):  # the tokenizer parts the words elsewhere
                whole = question.text + text.text[: answer.start()]
                found.append(bench.encoder.free(whole, fact, "own", f"{fact.name}#own {number}", f"own {number}"))
    return [prompt for prompt, outcome in answers(bench.model, found) if outcome.probability >= KNOWN]


def _geometric(bench: Bench, _: Fact, fit: Fit) -> Found:
    bench.tick("geometric")
    return geometric(bench.model, fit.phrasings[0].answer[0], layer=bench.options.layer, gate=bench.gate)


def _baseline(name: str, bench: Bench, _: Fact, fit: Fit) -> Found:
    bench.tick(name)
    moment = lambda layer: bench.generic_moments("hidden")[layer]  # noqa: E731
    return baseline(name, bench.trial(fit), bench.layers, moment, bench.options.baselines, bench.tick)


METHODS: dict[str, Callable[[Bench, Fact, Fit], Found]] = {
    "forward": _forward,
    "geometric": _geometric,
    **{name: partial(_baseline, name) for name in BASELINES},
}
"""Every method by name, in the order in which they are printed."""


def named(asked: str | Sequence[str]) -> tuple[str, ...]:
    """The methods that these names (each perhaps several, with commas) mean, in the order of METHODS.

    "both" is DEFAULT, "all" every one. Raises ProbeError for any other name.
    """
    names = ",".join([asked] if isinstance(asked, str) else asked).split(",")
    groups = {"both": DEFAULT, "all": tuple(METHODS)}
    wanted = {method for name in names for method in groups.get(name.strip(), (name.strip(),))}
    unknown = sorted(wanted - set(METHODS))
    if unknown:
        raise ProbeError(f"method {unknown[0]!r}: expected {', '.join(METHODS)}, both or all")
    return tuple(name for name in METHODS if name in wanted)


def require_patch(methods: Sequence[str]) -> None:
    """Raise ProbeError where none of the methods makes a change that a patch file can hold."""
    if not set(methods) & set(DEFAULT):
        raise ProbeError(
            f"no patch to save: a patch is a rank-1 change of a gate_proj, which {' and '.join(methods)} make none of; "
            "add --method forward"
        )
