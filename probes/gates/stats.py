"""What a directory of gates says about itself, recomputed from the logits and compared with what its files claim.

The published gate_stats.json states `total_gates`, `mean`, `std`, `min`, `max` and `selected_thresholds`, a list of
{"threshold", "off_fraction"}; so do those written here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from probes.gates.files import (
    INDICES,
    MOST_THRESHOLDS,
    STATS,
    read_indices,
    read_json,
    read_thresholds,
    summary,
)
from probes.gates.gates import Gates
from probes.gates.masks import INDICES_THRESHOLD, Point
from probes.records import Result
from vindex.errors import PatchError

TOLERANCE = 1e-3  # published figures have three decimals
FIGURES = ("total_gates", "mean", "std", "min", "max")


class Claim(NamedTuple):
    """A figure that a file of the directory states, beside the same figure recomputed."""

    file: str
    name: str
    stated: float
    recomputed: float

    @property
    def holds(self) -> bool:
        return abs(self.stated - self.recomputed) <= TOLERANCE


@dataclass(frozen=True, repr=False)
class Stats(Result):
    name: str
    layers: int
    neurons: int
    """To a layer."""
    gates: int
    mean: float
    std: float  # population
    min: float
    max: float
    points: tuple[Point, ...]
    """At the thresholds the directory selected, or else at our quantiles."""
    claims: tuple[Claim, ...]
    """What gate_stats.json states under the names that the published cards use; empty where it has none of them."""
    indices: str
    """What neuron_indices.json lists: "below" or "above" 0.5, "neither", or "missing"."""

    @property
    def wrong(self) -> tuple[Claim, ...]:
        return tuple(claim for claim in self.claims if not claim.holds)

    def record(self) -> dict[str, Any]:
        claims = [claim._asdict() | {"holds": claim.holds} for claim in self.claims]
        return asdict(self) | {"record": "vindex-gates-stats/1", "points": self.rows(), "claims": claims}

    def rows(self) -> list[dict[str, Any]]:
        return [point._asdict() for point in self.points]

    def __repr__(self) -> str:
        return f"<{self.name}: {self.gates:,} gates, {len(self.claims)} figures stated, {len(self.wrong)} wrong>"


def read_stats(directory: str | Path) -> Stats:
    """Recompute a directory's figures and check what its files state. Raises PatchError when a file is unreadable."""
    directory = Path(directory)
    gates = Gates.read(directory)
    own = summary(gates.values)
    stated = read_json(directory / STATS) if os.path.lexists(directory / STATS) else {}
    thresholds = (read_thresholds(directory) if directory.is_dir() else None) or gates.selected_thresholds()
    return Stats(
        name=directory.name,
        layers=gates.logits.shape[0],
        neurons=gates.logits.shape[1],
        gates=own["total_gates"],
        **{name: own[name] for name in FIGURES[1:]},
        points=tuple(gates.point(threshold) for threshold in thresholds),
        claims=tuple(_claims(stated, own, gates, directory)) if isinstance(stated, dict) else (),
        indices=_direction(directory, gates),
    )


def _claims(stated: dict[str, Any], own: dict[str, Any], gates: Gates, directory: Path) -> Iterator[Claim]:
    for name in FIGURES:
        if _is_number(stated.get(name)):
            yield Claim(STATS, name, float(stated[name]), own[name])
    points = stated.get("selected_thresholds")
    points = points if isinstance(points, list) else []
    if len(points) > MOST_THRESHOLDS:
        raise PatchError(f"{directory / STATS}: expected at most {MOST_THRESHOLDS} thresholds, found {len(points):,}")
    for at in points:
        if isinstance(at, dict) and _is_number(at.get("threshold")) and _is_number(at.get("off_fraction")):
            found = gates.point(at["threshold"]).off_fraction
            yield Claim(STATS, f"off-fraction at {at['threshold']:g}", float(at["off_fraction"]), found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _direction(directory: Path, gates: Gates) -> str:
    if not os.path.lexists(directory / INDICES):
        return "missing"
    listed = ~read_indices(directory, tuple(gates.logits.shape))  # type: ignore[arg-type]
    below = ~gates.keep(INDICES_THRESHOLD)
    if torch.equal(listed, below):
        return "below"
    return "above" if torch.equal(listed, gates.values > INDICES_THRESHOLD) else "neither"
