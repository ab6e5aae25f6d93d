"""One fact on the bench: a method's change applied, measured, attacked and held to the limits, beside its controls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from probes.deletion import verdict
from probes.deletion.baselines import BASELINES, baseline, geometric
from probes.deletion.bench import Bench
from probes.deletion.certificate import Certificate, Exam
from probes.deletion.forward import forward
from probes.deletion.layer import Found, Trial
from probes.deletion.measure import KNOWN, Effect, Outcome, measure, measure_few
from probes.deletion.options import DEFAULT
from probes.deletion.verdict import Verdict
from probes.facts.sets import Sets
from probes.live.hooks import patched
from probes.weights.delta import Delta, Wide, relative_norm
from vindex.errors import ProbeError

METHODS: dict[str, Callable[[Trial], Found]] = {
    "forward": forward,
    "geometric": geometric,
    **{name: partial(baseline, name) for name in BASELINES},
}
"""Every method by name, in the order in which they are printed: each computes a change, and touches no model."""
DRAWS = 5
"""Random changes among the controls."""


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


class Control(NamedTuple):
    """What a change of the same size does when it is not the right one."""

    kind: str
    """`random` decides a verdict; `random_read` and `shuffled_write` tell which factor carries the effect."""
    suppression: float
    reference_loss: float | None
    """None when the model does not know the reference."""


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
        """The method that is spoken of where one is: the first, in the order of METHODS; None of an unknown fact."""
        return next(iter(self.methods), None)

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Those on the main method, by standard."""
        if self.main is None:
            return {name: verdict.not_applicable(name, *self.before[:2]) for name in verdict.STANDARDS}
        return self.methods[self.main].verdicts


def judged(bench: Bench, sets: Sets, exam: Exam | None, found: Found, began: float) -> MethodResult:
    """Measure a change, which a method `began` to look for at that time, attack it and hold it to the limits.

    Its weight is restored, and compared bit for bit.
    """
    delta = found.delta
    bench.tick(f"measuring {delta.method}", 5)
    with patched(bench.model, delta.edits(bench.stored(delta.layer))):
        effect = measure(bench.baseline, sets)
        if exam:
            bench.tick(f"attacks on {delta.method}", 30)
        certificate = exam.certify() if exam else None
    bench.tick(f"controls for {delta.method}", 5)
    tested = []
    for change in controls(delta, sets.seed):
        with patched(bench.model, change.edits(bench.stored(change.layer))):
            headline, reference = measure_few(bench.baseline, (sets.headline, *sets.held_out.reference))
        tested.append(Control(change.method, headline.loss, reference.loss if reference.known else None))
    figures = verdict.figures(effect, random_suppression(tested), DRAWS) | (certificate.figures if certificate else {})
    standards = verdict.STANDARDS if certificate else verdict.STANDARDS[:-1]
    verdicts = {standard: verdict.judge(standard, figures) for standard in standards}
    size = relative_norm(bench.model, delta)
    return MethodResult(found, size, effect, tuple(tested), verdicts, certificate, time.perf_counter() - began)


def controls(patch: Delta | Wide, seed: int) -> Iterator[Delta | Wide]:
    """Changes of the norm, the layer and the projection of the patch: `random` ones, both factors from N(0, 1).

    For a `Delta` also `random_read` (its write, a random read) and `shuffled_write` (its read, its write permuted).
    """
    draw, (rows, columns) = torch.Generator().manual_seed(seed), patch.shape
    for _ in range(DRAWS):
        write = torch.randn(rows, generator=draw)
        yield patch.like(write, torch.randn(columns, generator=draw), "random")
    if isinstance(patch, Delta):
        yield patch.like(patch.gate_write, torch.randn(columns, generator=draw), "random_read")
        yield patch.like(patch.gate_write[torch.randperm(rows, generator=draw)], patch.gate_read, "shuffled_write")


def random_suppression(found: Sequence[Control]) -> float:
    """Mean |suppression| over the `random` draws, so that gains and losses do not cancel."""
    draws = [abs(one.suppression) for one in found if one.kind == "random"]
    return sum(draws) / len(draws)
