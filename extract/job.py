"""What the stages of one build share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from extract.checkpoint import Checkpoint
from extract.layouts import Layout
from extract.watch import SourceWatch
from vindex.claims import Written
from vindex.index import Index
from vindex.options import BuildOptions
from vindex.tokens import Vocabulary
from vindex.writer import Writer


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
    source: SourceWatch

    def finish(self, block: str, record: Any, written: Iterable[Written] = ()) -> None:
        """Note a finished block, of weights that are still those that were hashed. written: by another process."""
        self.source.require_unchanged()
        self.writer.adopt(written)
        self.writer.finish_block(block, record)
