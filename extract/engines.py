"""Where the blocks of the plan run. An engine runs each block once, in any order, and notes each in the writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from extract.blocks import extract_block
from extract.checkpoint import Checkpoint
from extract.plan import DirectionBlock
from vindex.options import BuildOptions
from vindex.writer import Writer

# Runs the blocks, writes and notes them, and yields after each one.
Engine = Callable[[Checkpoint, Sequence[DirectionBlock], BuildOptions, Writer], Iterator[None]]


def in_process(
    checkpoint: Checkpoint, blocks: Sequence[DirectionBlock], options: BuildOptions, writer: Writer
) -> Iterator[None]:
    """One block after the other in this process."""
    for block in blocks:
        result = extract_block(checkpoint, block, options)
        for piece in result.pieces:
            writer.write(piece.file, piece.offset, piece.data)
        writer.finish_block(block.name, result.record)
        yield
