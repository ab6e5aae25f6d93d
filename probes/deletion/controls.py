"""What a change of the same size does when it is not the right one.

Three kinds, all with ‖ΔW‖, the layer and the projection of the patch: `random` (rank 1, both factors drawn from
N(0, 1)) and, for a `Delta`, `random_read` (the patch's write, a random read) and `shuffled_write` (the patch's read,
its write permuted). Only the first decides a verdict; the others tell which factor carries the effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from probes.deletion.measure import Baseline, measure_few
from probes.facts.sets import Sets
from probes.live.hooks import patched
from probes.weights.delta import Delta, Wide

DRAWS = 5


class Control(NamedTuple):
    """One changed weight and what it did."""

    kind: str
    suppression: float
    reference_loss: float | None
    """None when the model does not know the reference."""


def controls(baseline: Baseline, sets: Sets, patch: Delta | Wide, stored: torch.dtype | None) -> tuple[Control, ...]:
    """Measure every control on the headline prompt and the reference."""
    found = []
    for change in drawn(patch, sets.seed):
        with patched(baseline.model, change.edits(stored)):
            headline, reference = measure_few(baseline, (sets.headline, *sets.held_out.reference))
        found.append(Control(change.method, headline.loss, reference.loss if reference.known else None))
    return tuple(found)


def random_suppression(found: tuple[Control, ...]) -> float:
    """Mean |suppression| over the `random` draws, so that gains and losses do not cancel."""
    draws = [abs(one.suppression) for one in found if one.kind == "random"]
    return sum(draws) / len(draws)


def drawn(patch: Delta | Wide, seed: int) -> Iterator[Delta | Wide]:
    """The changes of equal size."""
    draw, (rows, columns) = torch.Generator().manual_seed(seed), patch.shape
    for _ in range(DRAWS):
        write = torch.randn(rows, generator=draw)
        yield patch.like(write, torch.randn(columns, generator=draw), "random")
    if isinstance(patch, Delta):
        yield patch.like(patch.gate_write, torch.randn(columns, generator=draw), "random_read")
        yield patch.like(patch.gate_write[torch.randperm(rows, generator=draw)], patch.gate_read, "shuffled_write")
