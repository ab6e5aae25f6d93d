"""Where the blocks of the plan run. An engine runs each block, in any order, and notes each in the journal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from extract.ahead import ahead
from extract.blocks import Method
from extract.job import Job

# Runs blocks of one kind: engine(job, method, blocks, advance). `advance` is told of steps, as method.steps has them.
Engine = Callable[[Job, Method, Sequence[Any], Callable[[int], object]], None]


def in_process(job: Job, method: Method, blocks: Sequence[Any], advance: Callable[[int], object]) -> None:
    """One block after the other in this process; what the next one needs is read meanwhile."""
    for block, material in ahead((block, method.read(job.checkpoint, block, job.options)) for block in blocks):
        record = method.compute(block, material, job.options, job.writer, advance)
        job.finish(block.name, record)
        del material  # or it would be kept while the next but one is read
