"""Check a vindex for what can go wrong with one: structure, sizes, checksums, finiteness, orthonormality."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from vindex.checksums import load_sums, sha256_of
from vindex.format import DOWN, EMBEDDINGS, GATE, NORMS, SIGMA, FileSpec, files_of
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
    for spec, frames, side in ((GATE, v.gate, "gate"), (DOWN, v.down, "down")):
        ranks = [getattr(entry.effective_rank, side) for entry in v.index.layers]
        yield _orthonormal(spec, frames, ranks)
    yield _descending(v.singular_values)
    v.manifest  # noqa: B018 - parses and validates manifest.json
    yield Check("manifest.json", True, f"worst certificate {v.manifest.worst_certificate.max_residual:.1e}")


def _checksums(v: Vindex, advance: Callable[[int], object]) -> Iterator[Check]:
    digests = load_sums(v.path)
    wrong = [name for name, digest in digests.items() if sha256_of(v.path / name, advance) != digest]
    detail = f"{len(digests)} files" if not wrong else f"changed since the build: {', '.join(wrong)}"
    yield Check("checksums", not wrong, detail)


def _arrays(v: Vindex) -> Iterator[tuple[FileSpec, np.ndarray]]:
    yield GATE, v.gate
    yield DOWN, v.down
    yield SIGMA, v.singular_values
    if v.index.has_embeddings:
        yield EMBEDDINGS, v.embeddings
    yield NORMS, np.concatenate(list(v.norms.values()))


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


def _orthonormal(spec: FileSpec, frames: np.ndarray, ranks: list[int]) -> Check:
    """Each layer's rows up to its rank have a Gram matrix within ORTHONORMALITY of the identity; the rest are zero."""
    worst, where = 0.0, 0
    for layer, rank in enumerate(ranks):
        rows = frames[layer].astype(np.float32)
        identity = np.zeros((len(rows), len(rows)), np.float32)
        np.fill_diagonal(identity[:rank, :rank], 1.0)
        error = float(np.abs(rows @ rows.T - identity).max())
        if not error <= worst:
            worst, where = error, layer
    detail = f"largest |row·row − identity| {worst:.1e} (layer {where})"
    return Check(f"{spec.name} orthonormal", worst <= ORTHONORMALITY, detail)


def _descending(singular_values: np.ndarray) -> Check:
    rises = np.argwhere(np.diff(singular_values, axis=-1) > 0)
    if len(rises):
        side, layer, feature = (int(i) for i in rises[0])
        return Check("singular values", False, f"{('gate', 'down')[side]} layer {layer} rises after feature {feature}")
    return Check("singular values", bool((singular_values >= 0).all()), "non-negative, largest first")
