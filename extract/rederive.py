"""Derive a sample of directions again from the weights and compare them with what a vindex holds.

Single vectors are only defined up to rotations inside a cluster of nearly equal singular values, so the spectrum is
cut at its gaps and the subspace of each cluster is compared: one vector where it stands alone, all F together only
where no gap separates them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from extract.checkpoint import Checkpoint
from extract.layouts import find_layout
from extract.plan import direction_blocks
from extract.svd import top_directions
from vindex.compare import principal_angles
from vindex.errors import QueryError
from vindex.reader import Vindex

HALF_ANGLE = 2e-3  # radians: what float16 rounding of the rows may turn a subspace by
GAP = 1e-2  # relative distance between neighbours that separates two clusters
SIGMA_TOLERANCE = 1e-4


class Rederived(NamedTuple):
    """One weight: largest angle (radians) of any cluster to the stored one, its limit, largest relative error of σ."""

    tensor: str
    largest_angle: float
    angle_limit: float
    sigma_error: float

    @property
    def holds(self) -> bool:
        return self.largest_angle <= self.angle_limit and self.sigma_error <= SIGMA_TOLERANCE


def rederive(v: Vindex, checkpoint: Checkpoint, layers: list[int]) -> Iterator[Rederived]:
    """Both projections of the given layers, one at a time.

    The limit on an angle is float16 rounding plus residual / gap: what lies beside a nearly closed gap is only as
    certain as the certificate makes it. Raises QueryError when the checkpoint has other shapes than the vindex.
    """
    layout = find_layout(checkpoint)
    shape = (layout.num_layers, layout.hidden_size, layout.intermediate_size)
    expected = (v.index.num_layers, v.index.hidden_size, v.index.intermediate_size)
    if shape != expected:
        raise QueryError(
            f"{checkpoint.model} has {shape[0]} layers of {shape[2]}×{shape[1]} and {v.path.name} was built from "
            f"{expected[0]} layers of {expected[2]}×{expected[1]}; give the checkpoint it was built from"
        )
    certificates = {(c.projection, c.layer): c for c in v.manifest.certificates}
    for block in direction_blocks(layout, v.index):
        if block.layer not in layers:
            continue
        weight = checkpoint.tensor(block.tensor)
        by_neuron = weight if block.side == "gate" else weight.T
        fresh = top_directions(by_neuron, v.index.num_feats, v.manifest.options.tolerance, block.tensor)
        stored = (v.gate if block.side == "gate" else v.down)[block.layer]
        sigma = v.singular_values[0 if block.side == "gate" else 1, block.layer]
        certificate = certificates[block.side, block.layer]
        narrowest = min(GAP, certificate.gap_at_cut or GAP)
        yield Rederived(
            block.tensor,
            _largest_angle(stored[: fresh.rank], fresh.rows[: fresh.rank].numpy(), fresh.sigma[: fresh.rank].numpy()),
            HALF_ANGLE + certificate.max_residual / max(narrowest, 1e-12),
            float((np.abs(sigma - fresh.sigma.numpy()) / np.maximum(sigma, 1e-30)).max()) if sigma.any() else 0.0,
        )


def _largest_angle(stored: np.ndarray, fresh: np.ndarray, sigma: np.ndarray) -> float:
    """The largest principal angle (radians) between corresponding clusters of (rank, H) rows."""
    cuts = np.flatnonzero(sigma[:-1] - sigma[1:] > GAP * sigma[:-1]) + 1
    clusters = zip(np.split(stored, cuts), np.split(fresh, cuts), strict=True)
    return max((float(principal_angles(a, b).max(initial=0.0)) for a, b in clusters), default=0.0)
