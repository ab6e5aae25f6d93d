"""Where the blocks of the plan run. An engine runs each block, in any order, and notes each in the writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

from extract.blocks import decompose_block, read_block
from extract.checkpoint import Checkpoint
from extract.plan import DirectionBlock
from vindex.options import BuildOptions
from vindex.writer import Writer

# Runs the blocks, writes and notes them, and yields after each one.
Engine = Callable[[Checkpoint, Sequence[DirectionBlock], BuildOptions, Writer], Iterator[None]]


def in_process(
    checkpoint: Checkpoint, blocks: Sequence[DirectionBlock], options: BuildOptions, writer: Writer
) -> Iterator[None]:
    """One block after the other in this process; a thread reads the next weight while one is decomposed."""
    with ThreadPoolExecutor(1, "vindex-read") as reader:
        reading = [reader.submit(read_block, checkpoint, block, options) for block in blocks[:1]]
        for block, following in zip_longest(blocks, blocks[1:]):
            weight = reading.pop().result()
            if following:
                reading.append(reader.submit(read_block, checkpoint, following, options))
            result = decompose_block(block, weight, options)
            del weight  # at most two are in memory: this one, and the one being read
            for piece in result.pieces:
                writer.write(piece.file, piece.offset, piece.data)
            writer.finish_block(block.name, result.record)
            yield
