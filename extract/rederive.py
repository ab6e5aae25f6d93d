"""Derive a sample of directions, and of embeddings, again from the weights and compare them with what a vindex holds.

The weights must be those that the vindex was built from: first the hashes of their files are compared.

Single vectors are only defined up to rotations inside a cluster of nearly equal singular values, so the spectrum is
cut at its gaps and the subspace of each cluster is compared: one vector where it stands alone, all F together only
where no gap separates them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from extract.cast import to_half
from extract.checkpoint import Checkpoint, open_checkpoint
from extract.layouts import Layout, find_layout
from extract.planning import DirectionBlock, direction_blocks
from extract.svd import top_directions
from vindex import checks, scoring
from vindex.demo import or_bundled
from vindex.differences import HALF_ANGLE, TINY, principal_angles
from vindex.errors import QueryError
from vindex.progress import Progress, silent
from vindex.reader import Vindex, as_vindex
from vindex.verification import Check, Verification

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


def verify(
    v: Vindex | str | Path, source: str | Path, *, layers: int = 3, experts: int = 4, progress: Progress = silent
) -> Verification:
    """All that `vindex.verify` checks, and a sample of directions and embeddings derived again from the weights.

    source: the checkpoint that v was built from; another one is refused before anything else is done. layers, experts:
    so many layers, and experts of each, evenly spread. Raises QueryError or CheckpointError.
    """
    v = as_vindex(v)
    layers, experts = scoring.positive("layers", layers), scoring.positive("experts", experts)
    checkpoint = open_checkpoint(or_bundled(str(source)))
    require_same_weights(v, checkpoint, progress)
    found = checks.verify(v, progress)
    return replace(found, checks=(*found.checks, *_derived_again(v, checkpoint, layers, experts, progress)))


def require_same_weights(v: Vindex, checkpoint: Checkpoint, progress: Progress = silent) -> None:
    """Raise QueryError at the first weight file of the checkpoint that is not the one in the vindex's manifest."""
    read = {file.name: file for file in v.manifest.source.files}
    missing = [name for name in checkpoint.weight_files if name not in read]
    if missing:
        weights = [name for name in read if Path(name).suffix == Path(missing[0]).suffix]
        raise _another(v, checkpoint, f"there is {missing[0]}", ", ".join(weights) or "other files")
    sizes = {name: checkpoint.files.sizes[name] for name in checkpoint.weight_files}
    for name, size in sizes.items():
        if size != read[name].size:
            raise _another(v, checkpoint, f"{name} has {size:,} bytes", f"one of {read[name].size:,} bytes")
    advance = progress("hash source", sum(sizes.values()))
    for name in sizes:
        (file,) = checkpoint.files.fingerprint([name], 1, advance)
        if file.sha256 != read[name].sha256:
            what, ours = (f"SHA-256 {digest[:12]}…" for digest in (file.sha256, read[name].sha256))
            raise _another(v, checkpoint, f"{name} has {what}", f"one with {ours}")


def _another(v: Vindex, checkpoint: Checkpoint, what: str, ours: str) -> QueryError:
    return QueryError(
        f"{checkpoint.model} is not the checkpoint that {v.path.name} was built from: {what}, and the vindex was built "
        f"from {ours}; give that one"
    )


def _derived_again(v: Vindex, checkpoint: Checkpoint, layers: int, experts: int, progress: Progress) -> Iterator[Check]:
    blocks = sample_blocks(v, checkpoint, evenly(v.index.num_layers, layers), experts)
    advance = progress("re-derive", len(blocks))
    for found in rederive(v, checkpoint, blocks):
        detail = f"angle {found.largest_angle:.0e} (limit {found.angle_limit:.0e}), σ error {found.sigma_error:.0e}"
        yield Check(found.tensor[found.tensor.index("layers.") :].removesuffix(".weight"), found.holds, detail)
        advance(1)
    if v.index.has_embeddings:
        compared = compare_embeddings(v, checkpoint)
        other = compared.first_other
        detail = f"{compared.rows:,} rows, bit by bit" if other is None else f"row {other} is not the source's"
        yield Check("embeddings", other is None, detail)


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
    blocks = direction_blocks(layout, v.own_index)
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
    for block in blocks:
        by_neuron = block.weight.by_neuron(checkpoint).to(torch.float32)
        fresh = top_directions(by_neuron, block.features, v.manifest.options.tolerance, block.weight.name)
        frames, group = v.layer(block.layer), block.expert or 0
        stored = (frames.gate if block.side == "gate" else frames.down)[group]
        sigma = (frames.gate_sigma if block.side == "gate" else frames.down_sigma)[group]
        certificate = v.certificate(block.layer, block.side, block.expert)
        narrowest = min(GAP, certificate.gap_at_cut or GAP)
        yield Rederived(
            block.weight.name,
            _largest_angle(stored[: fresh.rank], fresh.rows[: fresh.rank].numpy(), fresh.sigma[: fresh.rank].numpy()),
            HALF_ANGLE + (certificate.max_residual or 0.0) / max(narrowest, TINY),
            float((np.abs(sigma - fresh.sigma.numpy()) / np.maximum(sigma, 1e-30)).max()) if sigma.any() else 0.0,
        )


def _require_same_shapes(v: Vindex, checkpoint: Checkpoint, layout: Layout) -> None:
    ours = (layout.intermediate_size, layout.hidden_size, [len(ffn.gate) for ffn in layout.ffns])
    theirs = (v.own_index.intermediate_size, v.index.hidden_size, [entry.groups for entry in v.index.layers])
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
