"""How far apart two vindexes are: principal angles between their subspaces and drift of their spectra, per layer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vindex.errors import QueryError
from vindex.reader import Vindex


class SideDifference(NamedTuple):
    """One projection of one layer. Angles in radians; drift is ‖σ_A − σ_B‖ / ‖σ_A‖."""

    largest_angle: float
    mean_cosine: float
    spectrum_drift: float


class LayerDifference(NamedTuple):
    layer: int
    gate: SideDifference
    down: SideDifference


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


def compare(a: Vindex, b: Vindex) -> list[LayerDifference]:
    """Differences layer by layer, over the features both have. Raises QueryError when layers or hidden sizes differ."""
    for what in ("num_layers", "hidden_size"):
        ours, theirs = getattr(a.index, what), getattr(b.index, what)
        if ours != theirs:
            raise QueryError(f"cannot compare: {what} is {ours} in {a.path.name} and {theirs} in {b.path.name}")
    kept = min(a.index.num_feats, b.index.num_feats)
    sides = (("gate", a.gate, b.gate), ("down", a.down, b.down))
    differences = []
    for layer in range(a.index.num_layers):
        found = {
            side: _side_difference(
                rows_a[layer, :kept],
                rows_b[layer, :kept],
                a.singular_values[row, layer, :kept],
                b.singular_values[row, layer, :kept],
            )
            for row, (side, rows_a, rows_b) in enumerate(sides)
        }
        differences.append(LayerDifference(layer, **found))
    return differences


def _side_difference(
    rows_a: np.ndarray, rows_b: np.ndarray, sigma_a: np.ndarray, sigma_b: np.ndarray
) -> SideDifference:
    angles = principal_angles(rows_a, rows_b)
    drift = np.linalg.norm(sigma_a - sigma_b) / max(float(np.linalg.norm(sigma_a)), 1e-30)
    return SideDifference(
        float(angles.max(initial=0.0)), float(np.cos(angles).mean()) if len(angles) else 1.0, float(drift)
    )
