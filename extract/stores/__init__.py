"""Where weights lie and how they are read: a `Files` gives bytes, a `Store` on top of it gives tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from vindex.manifest import SourceFile

FLOATS = frozenset({"BF16", "F16", "F32"})
Memory = Callable[[int], torch.Tensor]
"""Memory for so many bytes: (n,) uint8 on the CPU, which lives as long as what is made of it."""


class TensorInfo(NamedTuple):
    """Where a tensor lies, the shape it is read with, and its dtype as its file names it (BF16, F8_E4M3, Q4_0)."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    """Byte offset of its first element in the file."""


class Files(Protocol):
    """Files of one checkpoint, on disk or on the Hub, read in pieces."""

    name: str
    """For messages: the directory's own name, or the Hub id."""

    @property
    def revision(self) -> str | None:
        """The commit on the Hub, None for a directory outside the Hub's cache."""

    @property
    def dangling(self) -> tuple[str, ...]:
        """Names of links to nothing."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file there is."""

    def read(self, file: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Bytes start … stop − 1 of a file. Raises CheckpointError when they cannot be had."""

    def read_into(self, file: str, start: int, view: memoryview) -> None:
        """Fill writable bytes with those of a file from `start` on. Raises as `read` does."""

    def missing(self, names: Sequence[str]) -> str:
        """What to say of files that are not there, with the way out."""

    def fingerprint(
        self, names: Sequence[str], threads: int, advance: Callable[[int], object]
    ) -> tuple[SourceFile, ...]:
        """Name, size and SHA-256 of files; `advance` is told the bytes accounted for."""


class Store(Protocol):
    """Named tensors, read one at a time. Reading is safe from several threads."""

    dtypes: frozenset[str]
    """The dtypes that `read` can turn into numbers; FLOATS among them are read exactly."""
    method: str
    """How the others are dequantised, in words; empty when there are none."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name."""

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows first … last − 1, along the first dimension: as stored, or float32 where they had to be dequantised.

        The memory is the caller's own.
        """
