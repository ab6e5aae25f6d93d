"""Gate 3, one fact from beginning to end.

1. Split the fact's prompts into what the methods see and what they do not (`probes.facts.sets`).
2. Run everything once unpatched. A fact with P < 0.1 ends here: there is nothing to delete.
3. Every method asked for (`methods`) computes a change of one weight.
4. Each is applied (and afterwards the saved weight restored and compared bit for bit) and measured on the same prompts.
5. Controls of the same norm, the certificate (attacks on what was deleted), and the verdicts.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from probes.deletion import verdict
from probes.deletion.bench import Bench
from probes.deletion.certificate import Certificate, Exam
from probes.deletion.controls import DRAWS, Control, controls, random_suppression
from probes.deletion.measure import KNOWN, Effect, Outcome, measure
from probes.deletion.methods import METHODS, Found
from probes.deletion.verdict import Verdict
from probes.facts import Fact
from probes.facts.sets import Sets, split
from probes.live.hooks import patched
from probes.weights.delta import Delta, Wide, relative_norm


class MethodResult(NamedTuple):
    """One method's patch and everything measured about it."""

    delta: Delta | Wide
    found: Found
    relative_norm: float
    effect: Effect
    controls: tuple[Control, ...]
    published: Verdict
    strict: Verdict
    robust: Verdict | None
    """None without a certificate."""
    certificate: Certificate | None
    seconds: float

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Those that were reached, by standard."""
        found = (self.published, self.strict, self.robust)
        return {verdict.standard: verdict for verdict in found if verdict is not None}


class Given(NamedTuple):
    """A change that is there already, found by no method."""

    delta: Delta
    scan: tuple[Any, ...] = ()


class FactResult(NamedTuple):
    """One fact's outcome. `methods` is empty when the model does not know it."""

    sets: Sets
    before: Outcome
    methods: dict[str, MethodResult]
    seconds: float

    @property
    def known(self) -> bool:
        """Whether there was anything to delete."""
        return self.before.probability >= KNOWN

    @property
    def main(self) -> str | None:
        """The method that is spoken of where one is: forward, where it ran; None of a fact that is not known."""
        return min(self.methods, default=None)

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Of the main method, by standard."""
        if self.main is None:
            return {name: verdict.not_applicable(name, *self.before[:2]) for name in verdict.STANDARDS}
        return self.methods[self.main].verdicts


def run(bench: Bench, fact: Fact, given: Delta | None = None) -> FactResult:
    """Delete one fact by every method asked for, or by the change that is given, and measure it.

    The model is as before when this returns.
    """
    began = time.perf_counter()
    bench.tick("unpatched answers")
    sets = split(bench.panel, fact, bench.encoder, bench.options.seed)
    before = bench.baseline.of([sets.headline])[0]
    results: dict[str, MethodResult] = {}
    if before.probability >= KNOWN:
        bench.baseline.prepare(sets)
        exam = _exam(bench, sets) if bench.options.certificate else None
        for method in bench.options.methods if given is None else (given.method,):
            results[method] = _method(bench, sets, exam, method, given)
    return FactResult(sets, before, results, time.perf_counter() - began)


def _exam(bench: Bench, sets: Sets) -> Exam:
    bench.tick("attacks on the unpatched model")
    return Exam(bench.baseline, bench.encoder, bench.panel, sets, bench.options.attacks)


def _method(bench: Bench, sets: Sets, exam: Exam | None, method: str, given: Delta | None) -> MethodResult:
    began = time.perf_counter()
    found = METHODS[method](bench, sets.fact, sets.fit) if given is None else Given(given)
    bench.tick(f"measuring {method}")
    delta = found.delta
    with patched(bench.model, delta.edits(bench.stored)):
        effect = measure(bench.baseline, sets)
        if exam:
            bench.tick(f"attacks on {method}")
        certificate = exam.certify() if exam else None
    bench.tick(f"controls for {method}")
    tested = controls(bench.baseline, sets, delta, bench.stored)
    figures = verdict.figures(effect, random_suppression(tested), DRAWS)
    return MethodResult(
        delta=delta,
        found=found,
        relative_norm=relative_norm(bench.model, delta),
        effect=effect,
        controls=tested,
        published=verdict.judge("published", figures),
        strict=verdict.judge("strict", figures),
        robust=verdict.judge("robust", figures | certificate.figures) if certificate else None,
        certificate=certificate,
        seconds=time.perf_counter() - began,
    )
