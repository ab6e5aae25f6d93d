"""Two vindexes: how far each layer turned, and the directions that left the other's subspace most, with their tokens.

How far a direction moved is the angle between it and the span of as many leading directions of the other vindex's same
weight; where they span all of the hidden space, none moved. Its counterpart is the other's of largest |cosine|.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vindex import scoring
from vindex.differences import by_layer, compare, orthonormal_basis
from vindex.format import DOWN, GATE
from vindex.progress import Progress, silent
from vindex.reader import Vindex
from vindex.records import TokenScore
from vindex.report.svg import Chart, Line, axis, chart, layers_axis

MOST = 20
POLE = 6
LEAST = 1e-6  # radians: what is less is drawn there


class Moved(NamedTuple):
    """A direction of ours and the other's most like it. side: "reads" or "writes". angle, noise: radians.

    noise: None where one of the two has no certificates.
    """

    side: str
    layer: int
    expert: int | None
    feature: int
    angle: float
    noise: float | None
    other: int
    cosine: float
    tokens: tuple[str, ...]
    other_tokens: tuple[str, ...]


class Beside(NamedTuple):
    names: tuple[str, str]
    ids: tuple[str, str]
    summary: str
    kept: str
    without_angles: str
    angles: Chart
    moved: tuple[Moved, ...]


def beside(v: Vindex, other: Vindex, progress: Progress = silent) -> Beside:
    """The comparison of `compare`, drawn, and what moved most. Raises QueryError where the two cannot be compared."""
    found = compare(v, other, progress=progress)
    layers = by_layer(found.differences)
    at = [float(one.layer) for one in layers]
    lines = []
    for place, side in enumerate(("gate", "down")):
        sides = [getattr(one, side) for one in layers]
        turned = [one.largest_angle or None for one in sides]
        notes = [
            f"layer {one.layer}: {angle:.2g} rad" if angle else "" for one, angle in zip(layers, turned, strict=True)
        ]
        lines.append(Line(side, f"c{place}", at, turned, notes))
        noise = [one.noise for one in sides]
        if any(noise):
            lines.append(Line(f"{side}: two builds of the same weights", f"floor c{place}", at, noise))
    y = axis("rad", [value and max(value, LEAST) for line in lines for value in line.y], log=True)
    angles = chart(
        f"Largest principal angle by layer; what is below {LEAST:.0e} is drawn there",
        layers_axis(v.index.num_layers),
        y,
        lines=lines,
    )
    noises = {(one.layer, one.expert, side): getattr(one, side).noise for one in found for side in ("gate", "down")}
    moved = tuple(_named(v, other, one) for one in _most(v, other, noises))
    return Beside(found.names, found.ids, found.summary, found.kept, found.without_angles, angles, moved)


class _Turned(NamedTuple):
    """A direction, and how far it turned; noise: what two builds of the same weights may differ by, where known."""

    angle: float
    noise: float | None
    side: str
    layer: int
    expert: int | None
    feature: int


def _most(v: Vindex, other: Vindex, noises: Mapping[tuple[int, int | None, str], float | None]) -> list[_Turned]:
    """The MOST that turned by more than noise, furthest first."""
    turned = []
    sides = [side for side, spec in (("gate", GATE), ("down", DOWN)) if v.has(spec) and other.has(spec)]
    for entry in v.index.layers:
        kept = min(entry.features, other.index.layers[entry.layer].features)
        for side, group in ((side, group) for side in sides for group in range(entry.groups)):
            rows, others = (of.side(entry.layer, side)[group, :kept].astype(np.float64) for of in (v, other))
            if not others.any():
                continue
            basis = orthonormal_basis(others)
            inside = rows @ basis
            outside = np.linalg.norm(rows - inside @ basis.T, axis=1)
            angles = np.arctan2(outside, np.linalg.norm(inside, axis=1))
            expert = group if entry.num_experts else None
            noise = noises[entry.layer, expert, side]
            found = np.flatnonzero((angles > (noise or 0.0)) & rows.any(axis=1)).tolist()
            turned += [_Turned(float(angles[at]), noise, side, entry.layer, expert, at) for at in found]
    return sorted(turned, key=lambda one: -one.angle)[:MOST]


def _named(v: Vindex, other: Vindex, one: _Turned) -> Moved:
    """With the other's direction most like it, and what both hold at the poles that face each other."""
    ours, theirs = (of.side(one.layer, one.side)[one.expert or 0] for of in (v, other))
    cosines = scoring.cosines(theirs, ours[one.feature].astype(np.float32))
    nearest = int(np.abs(cosines).argmax())
    name = {"gate": "reads", "down": "writes"}[one.side]
    mine = getattr(v.feature(one.layer, one.feature, expert=one.expert), name)
    pole = name if cosines[nearest] >= 0 else f"{name}_against"
    yours = getattr(other.feature(one.layer, nearest, expert=one.expert), pole)
    place = name, one.layer, one.expert, one.feature, one.angle, one.noise
    return Moved(*place, nearest, abs(float(cosines[nearest])), _pieces(mine), _pieces(yours))


def _pieces(tokens: list[TokenScore] | None) -> tuple[str, ...]:
    return tuple(token.piece for token in (tokens or ())[:POLE])
