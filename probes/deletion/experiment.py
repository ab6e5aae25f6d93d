"""One fact on the bench: what a method's change does, measured, attacked and judged.

Each change is applied to the model (and afterwards the saved weight restored and compared bit for bit) and measured on
the same held-out prompts; then come controls of the same norm, the certificate and the verdicts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

from probes.deletion import verdict
from probes.deletion.bench import Bench
from probes.deletion.certificate import Certificate, Exam
from probes.deletion.controls import DRAWS, Control, controls, random_suppression
from probes.deletion.layer import Found
from probes.deletion.measure import KNOWN, Effect, Outcome, measure
from probes.deletion.verdict import Verdict
from probes.facts.sets import Sets
from probes.live.hooks import patched
from probes.weights.delta import Delta, Wide, relative_norm


class MethodResult(NamedTuple):
    """One method's change and everything measured about it."""

    found: Found
    relative_norm: float
    effect: Effect
    controls: tuple[Control, ...]
    verdicts: dict[str, Verdict]
    """By standard; without a certificate none on `robust`."""
    certificate: Certificate | None
    seconds: float

    @property
    def delta(self) -> Delta | Wide:
        return self.found.delta


@dataclass(frozen=True, repr=False)
class FactResult:
    """One fact's outcome. `methods` is empty when the model does not know it."""

    bench: Bench
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
        """Those on the main method, by standard."""
        if self.main is None:
            return {name: verdict.not_applicable(name, *self.before[:2]) for name in verdict.STANDARDS}
        return self.methods[self.main].verdicts


def judged(bench: Bench, sets: Sets, exam: Exam | None, found: Found, began: float) -> MethodResult:
    """Measure a change, which a method `began` to look for at that time, attack it and hold it to the limits."""
    delta = found.delta
    bench.tick(f"measuring {delta.method}")
    with patched(bench.model, delta.edits(bench.stored)):
        effect = measure(bench.baseline, sets)
        if exam:
            bench.tick(f"attacks on {delta.method}")
        certificate = exam.certify() if exam else None
    bench.tick(f"controls for {delta.method}")
    tested = controls(bench.baseline, sets, delta, bench.stored)
    figures = verdict.figures(effect, random_suppression(tested), DRAWS) | (certificate.figures if certificate else {})
    standards = verdict.STANDARDS if certificate else verdict.STANDARDS[:-1]
    verdicts = {standard: verdict.judge(standard, figures) for standard in standards}
    size = relative_norm(bench.model, delta)
    return MethodResult(found, size, effect, tested, verdicts, certificate, time.perf_counter() - began)
