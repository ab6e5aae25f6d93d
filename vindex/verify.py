"""Check a vindex for what can go wrong with one: structure, sizes, checksums, finiteness, orthonormality."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from vindex.checksums import load_sums, sha256_of
from vindex.format import CARD, DOWN, EMBEDDINGS, GATE, NORMS, ROUTER, SHARED_GATES, SIGMA, FileSpec, files_of
from vindex.reader import Vindex

ORTHONORMALITY = 1e-3  # float16 rounding of unit rows leaves dot products within about 3e-4
ROWS = 1 << 14


class Check(NamedTuple):
    """One thing checked: what, whether it holds, and the figure or the offending place."""

    what: str
    holds: bool
    detail: str


def verify(v: Vindex, advance: Callable[[int], object] = lambda count: None) -> Iterator[Check]:
    """Every check of an opened vindex, in order; opening it has already checked structure and sizes.

    `advance` is told the bytes hashed.
    """
    specs = files_of(v.index)
    yield Check("structure", True, f"{len(specs)} files, every size as index.json says")
    yield from _checksums(v, advance)
    for spec, values in _arrays(v):
        yield _finite(spec, values)
    for spec, side in ((GATE, "gate"), (DOWN, "down")):
        yield _orthonormal(v, spec, side)
    yield _descending(v)
    v.manifest  # noqa: B018 - parses and validates manifest.json
    yield Check("manifest.json", True, f"worst certificate {v.manifest.worst_certificate.max_residual:.1e}")


def _checksums(v: Vindex, advance: Callable[[int], object]) -> Iterator[Check]:
    digests = load_sums(v.path)
    edited = sha256_of(v.path / CARD.name, advance) != digests.pop(CARD.name)
    wrong = [name for name, digest in digests.items() if sha256_of(v.path / name, advance) != digest]
    detail = f"{len(digests) + (not edited)} files" if not wrong else f"changed since the build: {', '.join(wrong)}"
    yield Check("checksums", not wrong, detail)
    if edited:
        yield Check(CARD.name, False, f"edited since it was written; `vindex card {v.path}` writes it anew")


def _arrays(v: Vindex) -> Iterator[tuple[FileSpec, np.ndarray]]:
    yield GATE, v.gate
    yield DOWN, v.down
    yield SIGMA, v.singular_values
    if v.index.has_embeddings:
        yield EMBEDDINGS, v.embeddings
    yield NORMS, np.concatenate(list(v.norms.values()))
    mixtures = [entry for entry in v.index.layers if entry.num_experts]
    if mixtures:
        yield ROUTER, np.concatenate([v.router(entry.layer) for entry in mixtures])
    if v.index.num_shared_experts:
        yield SHARED_GATES, np.stack([v.shared_expert_gate(entry.layer) for entry in mixtures])


def _finite(spec: FileSpec, values: np.ndarray) -> Check:
    flat = values.reshape(-1, values.shape[-1])
    for first in range(0, len(flat), ROWS):
        bad = np.argwhere(~np.isfinite(flat[first : first + ROWS]))
        if len(bad):
            row, column = bad[0]
            return Check(
                f"{spec.name} finite", False, f"row {first + row}, column {column} is {flat[first + row, column]}"
            )
    return Check(f"{spec.name} finite", True, f"{values.size:,} numbers")


def _orthonormal(v: Vindex, spec: FileSpec, side: str) -> Check:
    """Rows up to the rank have a Gram matrix within ORTHONORMALITY of the identity; the rest are zero.

    Each expert by itself. The rank of one is the number of its singular values that are not zero; index.json has the
    smallest of each layer.
    """
    worst, where = 0.0, ""
    for entry in v.index.layers:
        frames, stated = v.layer(entry.layer), getattr(entry.effective_rank, side)
        ranks = (getattr(frames, f"{side}_sigma") != 0).sum(axis=1)
        if ranks.min() != stated:
            detail = f"layer {entry.layer}: index.json says rank {stated}, and {ranks.min()} singular values are not 0"
            return Check(f"{spec.name} orthonormal", False, detail)
        for expert, (rank, group) in enumerate(zip(ranks, getattr(frames, side), strict=True)):
            rows = group.astype(np.float32)
            identity = np.zeros((len(rows), len(rows)), np.float32)
            np.fill_diagonal(identity[:rank, :rank], 1.0)
            error = float(np.abs(rows @ rows.T - identity).max())
            if not error <= worst:
                worst, where = error, f"layer {entry.layer}" + (f", expert {expert}" if entry.num_experts else "")
    return Check(
        f"{spec.name} orthonormal", worst <= ORTHONORMALITY, f"largest |row·row − identity| {worst:.1e} ({where})"
    )


def _descending(v: Vindex) -> Check:
    """Singular values are non-negative and fall, each expert's by themselves."""
    for entry in v.index.layers:
        frames = v.layer(entry.layer)
        for side, sigma in (("gate", frames.gate_sigma), ("down", frames.down_sigma)):
            rises = np.argwhere(np.diff(sigma, axis=-1) > 0)
            if len(rises):
                expert, feature = (int(i) for i in rises[0])
                place = f"layer {entry.layer}" + (f", expert {expert}," if entry.num_experts else "")
                return Check("singular values", False, f"{side} {place} rises after feature {feature}")
            if not (sigma >= 0).all():
                return Check("singular values", False, f"{side} layer {entry.layer} has a negative one")
    return Check("singular values", True, "non-negative, largest first")
