"""What the stages of one build share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from extract.checkpoint import Checkpoint
from extract.layouts import Layout
from vindex.index import Index
from vindex.options import BuildOptions
from vindex.tokens import Vocabulary
from vindex.writer import Writer

# Called with a stage's name and its number of steps; gives back what is called with each step done.
Stages = Callable[[str, int], Callable[[int], object]]


@dataclass(frozen=True)
class Job:
    """Everything the stages of one build share."""

    checkpoint: Checkpoint
    layout: Layout
    options: BuildOptions
    index: Index
    writer: Writer
    tokenizer: bytes
    vocabulary: Vocabulary
