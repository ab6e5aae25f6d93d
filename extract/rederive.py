"""Derive a sample of directions, and of embeddings, again from the weights and compare them with what a vindex holds.

The weights must be those that the vindex was built from: first the hashes of their files are compared.

Single vectors are only defined up to rotations inside a cluster of nearly equal singular values, so the spectrum is
cut at its gaps and the subspace of each cluster is compared: one vector where it stands alone, all F together only
where no gap separates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from extract.cast import to_half
from extract.checkpoint import Checkpoint
from extract.layouts import Layout, find_layout
from extract.plan import DirectionBlock, direction_blocks
from extract.svd import top_directions
from vindex.compare import principal_angles
from vindex.errors import QueryError
from vindex.reader import Vindex

HALF_ANGLE = 2e-3  # radians: what float16 rounding of the rows may turn a subspace by
GAP = 1e-2  # relative distance between neighbours that separates two clusters
SIGMA_TOLERANCE = 1e-4
ROWS, RUNS = 64, 16  # of the embeddings: rows to a run, and runs


class Rederived(NamedTuple):
    """One weight: largest angle (radians) of any cluster to the stored one, its limit, largest relative error of σ."""

    tensor: str
    largest_angle: float
    angle_limit: float
    sigma_error: float

    @property
    def holds(self) -> bool:
        return self.largest_angle <= self.angle_limit and self.sigma_error <= SIGMA_TOLERANCE


class Embeddings(NamedTuple):
    """Rows of the embeddings that were read again: how many, and the first that differs in any bit, if one does."""

    rows: int
    first_other: int | None


def require_same_weights(
    v: Vindex, checkpoint: Checkpoint, threads: int = 1, advance: Callable[[int], object] = lambda count: None
) -> None:
    """Raise QueryError, naming the file, unless the checkpoint's weight files are those in the vindex's manifest."""
    read = {file.name: file.sha256 for file in v.manifest.source.files}
    missing = [name for name in checkpoint.weight_files if name not in read]
    if missing:
        weights = [name for name in read if Path(name).suffix == Path(missing[0]).suffix]
        raise QueryError(
            f"{v.path.name} was not built from {missing[0]} of {checkpoint.model} but from "
            f"{', '.join(weights) or 'other files'}; give the checkpoint it was built from"
        )
    for file in checkpoint.files.fingerprint(checkpoint.weight_files, threads, advance):
        if file.sha256 != read[file.name]:
            raise QueryError(
                f"{file.name} of {checkpoint.model} has SHA-256 {file.sha256[:12]}…, and {v.path.name} was built from "
                f"{read[file.name][:12]}…; give the checkpoint it was built from"
            )


def compare_embeddings(v: Vindex, checkpoint: Checkpoint) -> Embeddings:
    """A sample of rows, evenly spread in runs, cast again and compared bit by bit."""
    name, count = find_layout(checkpoint).embeddings, len(v.embeddings)
    checkpoint.info(name)
    compared = 0
    for at in evenly(-(-count // ROWS), RUNS):
        first, last = at * ROWS, min((at + 1) * ROWS, count)
        fresh = to_half(checkpoint.store.read(name, first, last).to(torch.float32), name, first).values.numpy()
        other = np.flatnonzero((fresh.view("<u2") != v.embeddings[first:last].view("<u2")).any(axis=1))
        if len(other):
            return Embeddings(compared, first + int(other[0]))
        compared += last - first
    return Embeddings(compared, None)


def sample_blocks(v: Vindex, checkpoint: Checkpoint, layers: list[int], experts: int) -> list[DirectionBlock]:
    """Both projections of the given layers; of a mixture, so many of its experts, evenly spread, shared one included.

    Raises QueryError when the checkpoint has other shapes than the vindex.
    """
    layout = find_layout(checkpoint)
    _require_same_shapes(v, checkpoint, layout)
    kept = {layer: set(evenly(v.index.layers[layer].groups, experts)) for layer in layers}
    blocks = direction_blocks(layout, v.index)
    return [block for block in blocks if block.layer in kept and (block.expert or 0) in kept[block.layer]]


def evenly(count: int, sample: int) -> list[int]:
    """At most `sample` of the numbers 0 … count − 1, evenly spread, both ends included."""
    sample = min(sample, count)
    return sorted({round(at * (count - 1) / max(sample - 1, 1)) for at in range(sample)})


def rederive(v: Vindex, checkpoint: Checkpoint, blocks: list[DirectionBlock]) -> Iterator[Rederived]:
    """The given blocks, one at a time.

    The limit on an angle is float16 rounding plus residual / gap: what lies beside a nearly closed gap is only as
    certain as the certificate makes it.
    """
    certificates = {(c.projection, c.layer, c.expert): c for c in v.manifest.certificates}
    for block in blocks:
        by_neuron = block.weight.by_neuron(checkpoint).to(torch.float32)
        fresh = top_directions(by_neuron, block.features, v.manifest.options.tolerance, block.weight.name)
        frames, group = v.layer(block.layer), block.expert or 0
        stored = (frames.gate if block.side == "gate" else frames.down)[group]
        sigma = (frames.gate_sigma if block.side == "gate" else frames.down_sigma)[group]
        certificate = certificates[block.side, block.layer, block.expert]
        narrowest = min(GAP, certificate.gap_at_cut or GAP)
        yield Rederived(
            block.weight.name,
            _largest_angle(stored[: fresh.rank], fresh.rows[: fresh.rank].numpy(), fresh.sigma[: fresh.rank].numpy()),
            HALF_ANGLE + (certificate.max_residual or 0.0) / max(narrowest, 1e-12),
            float((np.abs(sigma - fresh.sigma.numpy()) / np.maximum(sigma, 1e-30)).max()) if sigma.any() else 0.0,
        )


def _require_same_shapes(v: Vindex, checkpoint: Checkpoint, layout: Layout) -> None:
    ours = (layout.intermediate_size, layout.hidden_size, [len(ffn.gate) for ffn in layout.ffns])
    theirs = (v.index.intermediate_size, v.index.hidden_size, [entry.groups for entry in v.index.layers])
    if ours != theirs:
        raise QueryError(
            f"{checkpoint.model} has {_described(*ours)} and {v.path.name} was built from {_described(*theirs)}; "
            "give the checkpoint it was built from"
        )


def _described(neurons: int, hidden: int, groups: list[int]) -> str:
    experts = f"{max(groups)} × " if max(groups) > 1 else ""
    return f"{len(groups)} layers of {experts}{neurons}×{hidden}"


def _largest_angle(stored: np.ndarray, fresh: np.ndarray, sigma: np.ndarray) -> float:
    """The largest principal angle (radians) between corresponding clusters of (rank, H) rows."""
    cuts = np.flatnonzero(sigma[:-1] - sigma[1:] > GAP * sigma[:-1]) + 1
    clusters = zip(np.split(stored, cuts), np.split(fresh, cuts), strict=True)
    return max((float(principal_angles(a, b).max(initial=0.0)) for a, b in clusters), default=0.0)
