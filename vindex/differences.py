"""How far apart two vindexes are: principal angles between their subspaces and drift of their spectra, per layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vindex.charts import COLOURS, Curve, draw_curves
from vindex.errors import FormatError, QueryError
from vindex.format import DOWN, GATE, MANIFEST, SIGMA
from vindex.progress import Advance, Progress, silent
from vindex.reader import Vindex, as_vindex
from vindex.records import to_json
from vindex.results import Result

RECORD = "vindex-comparison/1"


HALF_ANGLE = 2e-3  # radians: what float16 rounding of the rows may turn a subspace by
SINGLE_DRIFT = 1e-6  # what float32 sums may change σ by, in shares of it
TINY = 1e-12


class SideDifference(NamedTuple):
    """One projection of one layer. Angles in radians; drift is ‖σ_A − σ_B‖ over the larger of ‖σ_A‖ and ‖σ_B‖.

    noise, drift_noise: the largest angle and drift of two builds of the same weights, from their certificates; None
    without. spans: whether the directions of both span the hidden space; every two such subspaces are the same, and
    there is no angle. None as well where a weight is zero, or one of the vindexes lacks it: without directions there
    is no angle, and without a spectrum no drift. A zero weight has drift 1 from any other, and none from another zero.
    """

    largest_angle: float | None
    mean_cosine: float | None
    spectrum_drift: float | None
    noise: float | None = 0.0
    drift_noise: float | None = 0.0
    spans: bool = False

    @property
    def turned(self) -> bool:
        """Whether the directions stand further apart than those of two builds of one weight."""
        return self.largest_angle is not None and self.noise is not None and self.largest_angle > self.noise

    @property
    def stands_out(self) -> bool:
        """Whether the weights differ, in angle or in spectrum, by more than two builds of one weight do."""
        drift, noise = self.spectrum_drift, self.drift_noise
        return self.turned or (drift is not None and noise is not None and drift > noise)


class LayerDifference(NamedTuple):
    """Both projections of one layer; of one expert where `expert` says so (see reader.FeatureHit)."""

    layer: int
    gate: SideDifference
    down: SideDifference
    expert: int | None = None


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Two vindexes side by side: names, ids, features of a weight in each, whether their source weights are the same
    files, and what differs by layer (and expert).
    """

    names: tuple[str, str]
    ids: tuple[str, str]
    features: tuple[int, ...]
    same_weights: bool
    differences: tuple[LayerDifference, ...]

    def __repr__(self) -> str:
        return f"<comparison of {' and '.join(self.names)}: {self.summary}>"

    def __iter__(self) -> Iterator[LayerDifference]:
        return iter(self.differences)

    @property
    def noise(self) -> float | None:
        """The largest of all weights, in radians; None where one of the two has no certificates."""
        return max((side.noise for _, _, side in self._sides() if side.noise is not None), default=None)

    @property
    def summary(self) -> str:
        """In one line: how many weights differ by more than two builds of the same weights do, and where most."""
        sides = list(self._sides())
        apart = [one for one in sides if one[2].stands_out]
        by_angle = any(side.turned for _, _, side in apart) or (
            not apart and any(side.largest_angle is not None for *_, side in sides)
        )
        unit = "rad" if by_angle else "of σ"

        def size(one: tuple[int, str, SideDifference]) -> float:
            return (one[2].largest_angle if by_angle else one[2].spectrum_drift) or 0.0

        most = max(apart or sides, key=size, default=None)
        shown = f"{size(most) if most else 0.0:.3g} {unit}"
        same = "same weight files; " if self.same_weights else ""
        if self.noise is None:
            return f"at most {shown} apart; without certificates of both nobody can say how much of it is noise"
        if not apart or most is None:
            return f"{same}no weight differs by more than two builds of the same weights: at most {shown}"
        return (
            f"{same}{len(apart)} of {len(sides)} weights differ by more than two builds of the same weights: up to "
            f"{shown} (layer {most[0]}, {most[1]})"
        )

    @property
    def without_angles(self) -> str:
        """Where no angle tells two weights apart, as their directions span the hidden space; else empty."""
        count = sum(side.spans for _, _, side in self._sides())
        if not count:
            return ""
        which = "all weights" if count == 2 * len(self.differences) else f"{count} weights"
        return f"the directions of {which} span the hidden space, where no angle tells: build with fewer --features"

    @property
    def kept(self) -> str:
        """What is compared where one has more features than the other; empty where they have as many."""
        if len(set(self.features)) == 1:
            return ""
        counts = " and ".join(f"{name} has {count}" for name, count in zip(self.names, self.features, strict=True))
        return f"compared are the leading {min(self.features)} directions of each weight: {counts}"

    def rows(self) -> list[dict[str, Any]]:
        """One for each layer; of all experts what `by_layer` says."""
        rows = []
        for one in by_layer(self.differences):
            sides = {"gate": one.gate._asdict(), "down": one.down._asdict()}
            figures = {f"{name}_{key}": value for name, side in sides.items() for key, value in side.items()}
            rows.append({"layer": one.layer, **figures})
        return rows

    def record(self) -> dict[str, Any]:
        return {
            "record": RECORD,
            "names": list(self.names),
            "ids": list(self.ids),
            "features": list(self.features),
            "same_weights": self.same_weights,
            "summary": self.summary,
            "without_angles": self.without_angles,
            "layers": to_json(self.differences),
        }

    def plot(self, path: str | Path) -> None:
        """Draw the angles by layer to a .html or .png. Raises TargetError."""
        draw(self.record(), Path(path))

    def _sides(self) -> Iterator[tuple[int, str, SideDifference]]:
        return ((one.layer, name, getattr(one, name)) for one in self.differences for name in ("gate", "down"))


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw a comparison's record: each projection's largest angle by layer, above the noise. Raises TargetError."""
    layers: dict[int, list[dict[str, Any]]] = {}
    for one in record["layers"]:
        layers.setdefault(one["layer"], []).append(one)
    curves = []
    for name, colour in zip(("gate", "down"), COLOURS, strict=False):
        for label, key, dashed in (("", "largest_angle", False), (": two builds of the same weights", "noise", True)):
            values = [
                max((one[name][key] for one in group if one[name][key] is not None), default=None)
                for group in layers.values()
            ]
            curves.append(Curve(f"{name}_proj{label}", list(layers), values, colour, dashed))
    title = f"{' beside '.join(record['names'])}: largest principal angle (rad) by layer"
    draw_curves(curves, path, title, "layer", "rad", log=True)


def principal_angles(rows_a: np.ndarray, rows_b: np.ndarray) -> np.ndarray:
    """Principal angles (radians, smallest first) between the row spaces of (F, H) arrays, accurate near 0 and π/2.

    Rows need not be orthonormal: float16 rounding is removed by QR. Zero rows are left out. Method: Björck & Golub
    1973, cosines for large angles and sines for small ones.
    """
    basis_a, basis_b = (orthonormal_basis(rows) for rows in (rows_a, rows_b))
    if basis_a.shape[1] < basis_b.shape[1]:
        basis_a, basis_b = basis_b, basis_a
    overlap = basis_a.T @ basis_b
    cosines = np.clip(np.linalg.svd(overlap, compute_uv=False), 0.0, 1.0)
    sines = np.clip(np.linalg.svd(basis_b - basis_a @ overlap, compute_uv=False)[::-1], 0.0, 1.0)
    return np.where(cosines**2 < 0.5, np.arccos(cosines), np.arcsin(sines))


def orthonormal_basis(rows: np.ndarray) -> np.ndarray:
    """(H, rank) float64: an orthonormal basis of the rows (F, H) that are not zero."""
    rows = rows.astype(np.float64)
    return np.linalg.qr(rows[np.any(rows != 0, axis=1)].T)[0]


def compare(a: Vindex | str | Path, b: Vindex | str | Path, *, progress: Progress = silent) -> Comparison:
    """Two vindexes, opened or named: every layer, in a mixture every expert, over the leading directions of both.

    What one of them lacks is not compared. Raises QueryError when layers, experts or hidden sizes differ, or one holds
    neurons and not directions.
    """
    a, b = as_vindex(a), as_vindex(b)
    for v in (a, b):
        if v.family.neurons:
            raise QueryError(
                f"cannot compare: {v.name} holds neurons, which span every direction; build a vindex of its model"
            )
    for what in ("num_layers", "hidden_size", "num_experts", "num_shared_experts"):
        ours, theirs = getattr(a.index, what), getattr(b.index, what)
        if ours != theirs:
            raise QueryError(f"cannot compare: {what} is {ours} in {a.name} and {theirs} in {b.name}")
    advance = progress("compare", sum(entry.groups for entry in a.index.layers))
    found = tuple(one for layer in range(a.index.num_layers) for one in _differences(a, b, layer, advance))
    features = tuple(v.index.num_features_per_expert or v.index.num_feats for v in (a, b))
    weights = [v.manifest.source.weights_sha256 if v.has(MANIFEST) else None for v in (a, b)]
    return Comparison((a.name, b.name), (a.id, b.id), features, weights[0] == weights[1] is not None, found)


def _differences(a: Vindex, b: Vindex, layer: int, advance: Advance) -> Iterator[LayerDifference]:
    entry, other = a.index.layers[layer], b.index.layers[layer]
    if entry.groups != other.groups:
        raise QueryError(
            f"cannot compare: layer {layer} has {entry.groups} weight(s) for each projection in {a.name} and "
            f"{other.groups} in {b.name}"
        )
    kept = min(entry.features, other.features)
    for at in range(entry.groups if kept else 0):
        reads, writes = (_side_difference(a, b, side, layer, at, kept) for side in ("gate", "down"))
        yield LayerDifference(layer, reads, writes, at if entry.num_experts else None)
        advance(1, f"layer {layer}")


def _uncertainty(v: Vindex, side: str, layer: int, at: int, kept: int) -> float:
    """Radians by which the first `kept` directions of one weight may be turned away from the exact ones.

    What float16 rounds off, and residual / gap: directions at a cut that lies in no gap are only as certain as their
    certificate makes them (Davis & Kahan 1970).
    """
    entry = v.index.layers[layer]
    certificate = v.certificate(layer, side, at if entry.num_experts else None)
    gap = certificate.gap_at_cut
    if kept < entry.features:
        cut, after = getattr(v.layer(layer), f"{side}_sigma")[at, kept - 1 : kept + 1]
        gap = float((cut - after) / cut) if cut else None
    return HALF_ANGLE + (_residual(v, side, layer, at) / max(gap, TINY) if gap is not None else 0.0)


def _residual(v: Vindex, side: str, layer: int, at: int) -> float:
    """‖WᵀWv − σ²v‖/σ², at most: by which share σ² may differ from an exact one."""
    certificate = v.certificate(layer, side, at if v.index.layers[layer].num_experts else None)
    return certificate.max_residual or 0.0


def by_layer(differences: Sequence[LayerDifference]) -> list[LayerDifference]:
    """One for each layer: of its experts the largest angle, drift and noise, and the mean cosine, where defined."""
    layers = itertools.groupby(differences, key=lambda difference: difference.layer)
    return [
        LayerDifference(layer, _together([one.gate for one in experts]), _together([one.down for one in experts]))
        for layer, group in layers
        for experts in [list(group)]
    ]


def _together(sides: list[SideDifference]) -> SideDifference:
    angles, cosines, drifts, noise, drift_noise, spans = (
        [value for value in values if value is not None] for values in zip(*sides, strict=True)
    )
    mean = sum(cosines) / len(cosines) if cosines else None
    angle, drift, most, most_drift = (max(values, default=None) for values in (angles, drifts, noise, drift_noise))
    return SideDifference(angle, mean, drift, most, most_drift, any(spans))


def _side_difference(a: Vindex, b: Vindex, side: str, layer: int, at: int, kept: int) -> SideDifference:
    noise = drift_noise = drift = None
    if a.has(MANIFEST) and b.has(MANIFEST):
        noise = sum(_uncertainty(v, side, layer, at, kept) for v in (a, b))
        drift_noise = sum(SINGLE_DRIFT + _residual(v, side, layer, at) for v in (a, b))
    if a.has(SIGMA) and b.has(SIGMA):
        ours, theirs = (getattr(v.layer(layer), f"{side}_sigma")[at, :kept].astype(np.float64) for v in (a, b))
        size = float(max(np.linalg.norm(ours), np.linalg.norm(theirs)))
        drift = float(np.linalg.norm(ours - theirs) / size) if size else None
    spec = GATE if side == "gate" else DOWN
    rows = [v.side(layer, side)[at, :kept] if v.has(spec) else np.empty(0) for v in (a, b)]
    for v, frames in zip((a, b), rows, strict=True):
        if not np.isfinite(frames).all():
            raise FormatError(f"{v.name}: {spec.name} holds a number that is not finite, in layer {layer}")
    if not rows[0].any() or not rows[1].any():
        return SideDifference(None, None, drift, noise, drift_noise)
    if all(np.any(frames, axis=1).sum() >= frames.shape[1] for frames in rows):
        return SideDifference(None, None, drift, noise, drift_noise, spans=True)
    angles = principal_angles(*rows)
    return SideDifference(float(angles.max()), float(np.cos(angles).mean()), drift, noise, drift_noise)
