"""Where the bytes of a vindex are got: a directory here, or wherever another shelf gets them from.

Readers ask a shelf for sizes, whole texts, arrays and single rows, and open no file themselves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vindex import places
from vindex.checksums import settle
from vindex.errors import FormatError
from vindex.files import Kind, opened, read_bytes
from vindex.schema import OF_A_VINDEX

OF_NUMBERS = OF_A_VINDEX._replace(limit=None)
POINTER, LONGEST_POINTER = b"version https://git-lfs.github.com/spec/", 1 << 10  # what a clone without LFS has instead


class Shelf(Protocol):
    """The files of one vindex."""

    name: str
    """What messages call the vindex."""

    place: str
    """Where it is, in full."""

    @property
    def path(self) -> Path:
        """Its directory on disk. Raises VindexError on a shelf that has none."""

    def names(self) -> frozenset[str]:
        """What lies in it, without what lies in folders."""

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FormatError when there is no such regular file."""

    def read(self, name: str, kind: Kind = OF_A_VINDEX) -> bytes:
        """A whole text file. Raises what `kind` says."""

    def array(self, name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
        """Numbers of a file from a byte on, read-only. Raises FormatError."""

    def rows(self, name: str, dtype: np.dtype, shape: tuple[int, int], rows: Sequence[int]) -> np.ndarray:
        """These rows of a file that is a matrix, copied. Raises FormatError."""


class Directory:
    """A vindex on this machine, its arrays read-only memory maps."""

    def __init__(self, path: Path) -> None:
        if not os.path.isdir(path):  # which, unlike Path.is_dir, says no to a name that is too long
            found = places.whereabouts(path) or "; give the path of a vindex, as built by `vindex build`"
            raise FormatError(f"{path} is not a directory{found}")
        settle(path)
        self.path, self.name, self.place = path, path.name, str(path)

    def names(self) -> frozenset[str]:
        try:
            return frozenset(os.listdir(self.path))
        except OSError as error:
            raise FormatError(f"{self.path} cannot be listed ({error.strerror}); make it readable") from error

    def size(self, name: str) -> int:
        with opened(self.path / name, OF_NUMBERS) as file:
            size = os.fstat(file.fileno()).st_size
            if size < LONGEST_POINTER and file.read(len(POINTER)) == POINTER:
                raise FormatError(f"{self.path / name}: is a git-lfs pointer, not the file; run `git lfs pull` there")
            return size

    def read(self, name: str, kind: Kind = OF_A_VINDEX) -> bytes:
        return read_bytes(self.path / name, kind)

    def array(self, name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
        path = self.path / name
        with opened(path, OF_NUMBERS) as file:
            try:
                return np.memmap(file, dtype=dtype, mode="r", shape=shape, offset=offset)
            except ValueError as error:  # it was cut after it was opened
                raise OF_NUMBERS.refusal(path, f"cannot be mapped ({error})") from error

    def rows(self, name: str, dtype: np.dtype, shape: tuple[int, int], rows: Sequence[int]) -> np.ndarray:
        return np.asarray(self.array(name, dtype, shape)[list(rows)])
