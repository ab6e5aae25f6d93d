"""One block of the plan, from the weight to the bytes of its directions.

Nothing here knows of the directory the bytes go to, nor of the other blocks: an engine (extract/engines.py) may run a
block anywhere, at any time and more than once, and gets the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import torch

from extract.cast import HalfCast, to_half
from extract.checkpoint import Checkpoint
from extract.device import wide
from extract.planning import DirectionBlock
from extract.svd import Directions, top_directions
from vindex import format as form
from vindex.claims import Piece
from vindex.manifest import CastReport, Certificate
from vindex.options import BuildOptions


class BlockFiles(Protocol):
    """The files of the vindex as a block sees them: places to write to, and what earlier blocks wrote."""

    def write(self, file: str, offset: int, data: Any) -> None: ...

    def read(self, file: str, offset: int, length: int) -> bytes: ...


class Method(NamedTuple):
    """How blocks of one kind are computed, in two halves, so that the first can be done ahead.

    read(checkpoint, block, options): what the block needs. compute(block, what was read, options, files, advance):
    writes, and returns the block's record. steps(block): how often `advance` counts up during it.
    """

    read: Callable[[Checkpoint, Any, BuildOptions], Any]
    compute: Callable[[Any, Any, BuildOptions, BlockFiles, Callable[[int], object]], dict[str, Any]]
    steps: Callable[[Any], int]


class BlockResult(NamedTuple):
    """What one block gives: bytes to write, and what the manifest and the index say of them."""

    pieces: tuple[Piece, ...]
    certificate: Certificate
    rank: int
    cast: CastReport

    @property
    def record(self) -> dict[str, Any]:
        """All but the bytes, as the journal keeps it."""
        return {"certificate": asdict(self.certificate), "rank": self.rank, "casts": [asdict(self.cast)]}


def read_block(checkpoint: Checkpoint, block: DirectionBlock, options: BuildOptions) -> torch.Tensor:
    """The block's weight, a row for each neuron: (I, H) float32, on the device to compute on (extract/device.py)."""
    return wide(block.weight.by_neuron(checkpoint), options.device)


def decompose_block(block: DirectionBlock, by_neuron: torch.Tensor, options: BuildOptions) -> BlockResult:
    """The directions of a weight that is already read: (I, H)."""
    directions = top_directions(by_neuron, block.features, options.tolerance, block.weight.name)
    half = to_half(directions.rows, f"directions of {block.weight.name}")
    pieces = (
        Piece(block.file, block.offset, half.values.numpy()),
        Piece(form.SIGMA.name, block.sigma_offset, directions.sigma.cpu().numpy()),
    )
    return BlockResult(
        pieces, _certificate(block, directions), directions.rank, cast_report(f"{block.side}.{block.layer}", half)
    )


def write_block(
    block: DirectionBlock,
    by_neuron: torch.Tensor,
    options: BuildOptions,
    files: BlockFiles,
    advance: Callable[[int], object],
) -> dict[str, Any]:
    """Decompose, write, and return the record."""
    result = decompose_block(block, by_neuron, options)
    for piece in result.pieces:
        files.write(piece.file, piece.offset, piece.data)
    advance(1)
    return result.record


def cast_report(block: str, half: HalfCast) -> CastReport:
    return CastReport(block, half.values.numel(), half.flushed_to_zero, half.max_relative_error)


def _certificate(block: DirectionBlock, directions: Directions) -> Certificate:
    residuals = directions.residuals.cpu()
    return Certificate(
        layer=block.layer,
        projection=block.side,
        tensor=block.weight.name,
        max_residual=float(residuals.max()) if len(residuals) else None,
        median_residual=float(residuals.median()) if len(residuals) else None,
        gap_at_cut=directions.gap_at_cut,
        close_neighbours=directions.close_neighbours,
        method=directions.method,
        expert=block.expert,
    )


def _one(_: DirectionBlock) -> int:
    return 1


DIRECTIONS = Method(read_block, write_block, _one)
