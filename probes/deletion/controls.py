"""What a change of the same size does when it is not the right one.

Three kinds, all with ‖ΔW‖, the layer and the projection of the patch: `random` (rank 1, both factors drawn from
N(0, 1)) and, for a `Delta`, `random_read` (the patch's write, a random read) and `shuffled_write` (the patch's read,
its write permuted). Only the first decides a verdict; the others tell which factor carries the effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
    return tuple(control(baseline, sets, delta, stored) for delta in _draw(patch, sets.seed))


def control(baseline: Baseline, sets: Sets, delta: Delta | Wide, stored: torch.dtype | None) -> Control:
    """Measure one change on the headline prompt and the reference."""
    with patched(baseline.model, delta.edits(stored)):
        headline, reference = measure_few(baseline, (sets.headline, *sets.held_out.reference))
    return Control(delta.method, headline.loss, reference.loss if reference.known else None)


def random_suppression(found: tuple[Control, ...]) -> float:
    """Mean |suppression| over the `random` draws, so that gains and losses do not cancel."""
    draws = [abs(one.suppression) for one in found if one.kind == "random"]
    return sum(draws) / len(draws)


def _random(layer: int, shape: torch.Size, draw: torch.Generator) -> Delta:
    rows, columns = shape
    return Delta(layer, torch.randn(rows, generator=draw), torch.randn(columns, generator=draw), "random")


def _draw(patch: Delta | Wide, seed: int) -> Iterator[Delta | Wide]:
    draw = torch.Generator().manual_seed(seed)
    if isinstance(patch, Wide):
        for _ in range(DRAWS):
            one = _random(patch.layer, patch.change.shape, draw)
            change = torch.outer(one.gate_write, one.gate_read)
            yield replace(patch, change=change, method="random").scaled_to(patch.norm)
        return
    write, read = patch.gate_write, patch.gate_read
    for _ in range(DRAWS):
        yield _random(patch.layer, torch.Size((len(write), len(read))), draw).scaled_to(patch.norm)
    aimless = replace(patch, gate_read=torch.randn(read.shape, generator=draw), method="random_read")
    yield aimless.scaled_to(patch.norm)
    yield replace(patch, gate_write=write[torch.randperm(len(write), generator=draw)], method="shuffled_write")
