"""What a directory of gates says about itself, recomputed from the logits and compared with what its files claim.

Published directories carry gate_stats.json without a documented layout, so its numbers are found by their names
(`mean`, `std`, …) wherever they stand, and thresholds in any of the usual forms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from probes.gates.files import (
    INDICES,
    MOST_THRESHOLDS,
    STATS,
    read_gates,
    read_indices,
    read_json,
    read_thresholds,
    summary,
)
from probes.gates.masks import INDICES_THRESHOLD, Gates, Point, point
from vindex.errors import PatchError

TOLERANCE = 1e-3  # published figures have three decimals
NAMES = {
    "gates": ("gates", "total_gates", "total", "num_gates", "n_gates", "count", "total_neurons", "numel"),
    "mean": ("mean", "mean_gate", "gate_mean", "mean_lambda", "mean_sigmoid", "mean_sigmoid_gate"),
    "std": ("std", "std_gate", "gate_std", "std_lambda", "stddev"),
    "min": ("min", "min_gate", "gate_min", "minimum"),
    "max": ("max", "max_gate", "gate_max", "maximum"),
}


class Claim(NamedTuple):
    """A figure that a file of the directory states, beside the same figure recomputed."""

    file: str
    name: str
    stated: float
    recomputed: float

    @property
    def holds(self) -> bool:
        return abs(self.stated - self.recomputed) <= TOLERANCE


class Stats(NamedTuple):
    layers: int
    neurons: int
    gates: int
    mean: float
    std: float  # population
    min: float
    max: float
    points: tuple[Point, ...]
    """At the thresholds the directory selected, or else at our quantiles."""
    claims: tuple[Claim, ...]
    indices: str
    """What neuron_indices.json lists: "below" or "above" 0.5, "neither", or "missing"."""


def read_stats(directory: Path) -> Stats:
    """Recompute a directory's figures and check what its files state. Raises PatchError when a file is unreadable."""
    gates = read_gates(directory)
    own = summary(gates)
    figures = {"gates": own["total_gates"], **{name: own[name] for name in ("mean", "std", "min", "max")}}
    stated = read_json(directory / STATS) if os.path.lexists(directory / STATS) else {}
    claims = [
        Claim(STATS, name, value, figures[name])
        for name, aliases in NAMES.items()
        for key, value in _numbers(stated)
        if key in aliases
    ]
    points = list(islice(_stated_points(stated), MOST_THRESHOLDS + 1))
    if len(points) > MOST_THRESHOLDS:
        raise PatchError(f"{directory / STATS}: expected at most {MOST_THRESHOLDS} thresholds, found more")
    for threshold, off in points:
        claims.append(Claim(STATS, f"off-fraction at {threshold:g}", off, point(gates, threshold).off_fraction))
    thresholds = (read_thresholds(directory) if directory.is_dir() else None) or gates.selected_thresholds()
    return Stats(
        layers=gates.logits.shape[0],
        neurons=gates.logits.shape[1],
        points=tuple(point(gates, threshold) for threshold in thresholds),
        claims=tuple(claims),
        indices=_direction(directory, gates),
        **figures,
    )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(last key in lower case, number) of every number outside a list."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, str(name).lower())
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, float(value)


def _stated_points(value: Any) -> Iterator[tuple[float, float]]:
    """(threshold, off-fraction) pairs: [{"threshold": …, "off_fraction": …}] or {"0.432": 0.05}; percentages too."""
    if isinstance(value, list):
        for item in value:
            yield from _stated_points(item)
    elif isinstance(value, dict):
        fraction = next((value[k] for k in ("off_fraction", "fraction_off", "off", "masked") if k in value), None)
        if isinstance(value.get("threshold"), int | float) and isinstance(fraction, int | float):
            yield float(value["threshold"]), float(fraction)
            return
        for name, inner in value.items():
            if isinstance(inner, dict | list):
                yield from _stated_points(inner)
            elif _is_threshold(name) and isinstance(inner, int | float):
                yield float(name), float(inner) if inner <= 1 else float(inner) / 100


def _is_threshold(name: Any) -> bool:
    try:
        return 0 < float(name) < 1
    except (TypeError, ValueError):
        return False


def _direction(directory: Path, gates: Gates) -> str:
    if not os.path.lexists(directory / INDICES):
        return "missing"
    listed = ~read_indices(directory, tuple(gates.logits.shape))  # type: ignore[arg-type]
    below = ~gates.keep(INDICES_THRESHOLD)
    if torch.equal(listed, below):
        return "below"
    return "above" if torch.equal(listed, gates.values > INDICES_THRESHOLD) else "neither"
