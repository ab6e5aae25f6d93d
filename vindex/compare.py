"""How far apart two vindexes are: principal angles between their subspaces and drift of their spectra, per layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vindex.errors import QueryError
from vindex.reader import Vindex


class SideDifference(NamedTuple):
    """One projection of one layer. Angles in radians; drift is ‖σ_A − σ_B‖ / ‖σ_A‖.

    None where a weight is zero: without directions there is no angle, and without a spectrum no drift from it.
    """

    largest_angle: float | None
    mean_cosine: float | None
    spectrum_drift: float | None


class LayerDifference(NamedTuple):
    """Both projections of one layer; of one expert where `expert` says so (see reader.FeatureHit)."""

    layer: int
    gate: SideDifference
    down: SideDifference
    expert: int | None = None


def principal_angles(rows_a: np.ndarray, rows_b: np.ndarray) -> np.ndarray:
    """Principal angles (radians, smallest first) between the row spaces of (F, H) arrays, accurate near 0 and π/2.

    Rows need not be orthonormal: float16 rounding is removed by QR. Zero rows are left out. Method: Björck & Golub
    1973, cosines for large angles and sines for small ones.
    """
    basis_a, basis_b = (_orthonormal_basis(rows) for rows in (rows_a, rows_b))
    if basis_a.shape[1] < basis_b.shape[1]:
        basis_a, basis_b = basis_b, basis_a
    overlap = basis_a.T @ basis_b
    cosines = np.clip(np.linalg.svd(overlap, compute_uv=False), 0.0, 1.0)
    sines = np.clip(np.linalg.svd(basis_b - basis_a @ overlap, compute_uv=False)[::-1], 0.0, 1.0)
    return np.where(cosines**2 < 0.5, np.arccos(cosines), np.arcsin(sines))


def _orthonormal_basis(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return np.linalg.qr(rows[np.any(rows != 0, axis=1)].T)[0]


def compare(a: Vindex, b: Vindex, advance: Callable[[int], object] = lambda layers: None) -> list[LayerDifference]:
    """Differences of every layer, and in a mixture of every expert, over the features both have.

    `advance` is told of each layer done. Raises QueryError when layers, experts or hidden sizes differ.
    """
    for what in ("num_layers", "hidden_size", "num_experts", "num_shared_experts"):
        ours, theirs = getattr(a.index, what), getattr(b.index, what)
        if ours != theirs:
            raise QueryError(f"cannot compare: {what} is {ours} in {a.path.name} and {theirs} in {b.path.name}")
    differences = []
    for entry, other in zip(a.index.layers, b.index.layers, strict=True):
        if entry.groups != other.groups:
            raise QueryError(
                f"cannot compare: layer {entry.layer} has {entry.groups} weight(s) for each projection in "
                f"{a.path.name} and {other.groups} in {b.path.name}"
            )
        kept = min(entry.features, other.features)
        ours, theirs = a.layer(entry.layer), b.layer(entry.layer)
        for at in range(entry.groups):
            gate = (ours.gate, theirs.gate, ours.gate_sigma, theirs.gate_sigma)
            down = (ours.down, theirs.down, ours.down_sigma, theirs.down_sigma)
            reads, writes = (_side_difference(*(array[at, :kept] for array in side)) for side in (gate, down))
            differences.append(LayerDifference(entry.layer, reads, writes, at if entry.num_experts else None))
        advance(1)
    return differences


def by_layer(differences: list[LayerDifference]) -> list[LayerDifference]:
    """One for each layer: of its experts the largest angle, the mean cosine and the largest drift, where defined."""
    layers = itertools.groupby(differences, key=lambda difference: difference.layer)
    return [
        LayerDifference(layer, _together([one.gate for one in experts]), _together([one.down for one in experts]))
        for layer, group in layers
        for experts in [list(group)]
    ]


def _together(sides: list[SideDifference]) -> SideDifference:
    angles, cosines, drifts = ([value for value in values if value is not None] for values in zip(*sides, strict=True))
    mean = sum(cosines) / len(cosines) if cosines else None
    return SideDifference(max(angles, default=None), mean, max(drifts, default=None))


def _side_difference(
    rows_a: np.ndarray, rows_b: np.ndarray, sigma_a: np.ndarray, sigma_b: np.ndarray
) -> SideDifference:
    size = float(np.linalg.norm(sigma_a))
    drift = float(np.linalg.norm(sigma_a - sigma_b) / size) if size else None
    if not rows_a.any() or not rows_b.any():
        return SideDifference(None, None, drift)
    angles = principal_angles(rows_a, rows_b)
    return SideDifference(float(angles.max()), float(np.cos(angles).mean()), drift)
