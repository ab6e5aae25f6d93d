"""What several processes need to write one unfinished vindex: pieces, what was written, and a claim to go by."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from vindex.errors import TargetError
from vindex.places import JOURNAL


class Piece(NamedTuple):
    """A contiguous buffer and where it goes: the name of a file of the vindex and an offset in bytes."""

    file: str
    offset: int
    data: Any


class Written(NamedTuple):
    """Bytes that were written, and what they were."""

    file: str
    offset: int
    length: int
    sha256: str


class Claim(NamedTuple):
    """What another process needs to write blocks into an unfinished vindex: where it is, and what it is."""

    partial: str
    fingerprint: bytes

    def check(self) -> None:
        """Raise TargetError when the directory is not there or is no longer the build that gave this claim."""
        try:
            with (Path(self.partial) / JOURNAL).open("rb") as journal:
                first_line = journal.readline().rstrip(b"\n")
        except OSError as error:
            raise TargetError(
                f"{self.partial} is not seen by the worker on {os.uname().nodename} ({error.strerror}); write to a "
                "directory that every worker sees under the same path"
            ) from error
        if first_line != self.fingerprint:
            raise TargetError(f"{self.partial} belongs to another build by now; what this worker made is dropped")


class ClaimedFiles:
    """The files of an unfinished vindex that another process holds. What is written is durable when `close` returns."""

    def __init__(self, claim: Claim) -> None:
        claim.check()
        self._claim = claim
        self._files: dict[str, int] = {}
        self.written: list[Written] = []

    def write(self, file: str, offset: int, data: Any) -> None:
        """Write a contiguous buffer at a byte offset. Raises TargetError as Claim.check does."""
        self._claim.check()
        self.written.append(write_all(self._descriptor(file), file, offset, data))

    def read(self, file: str, offset: int, length: int) -> bytes:
        """Read bytes of a finished block."""
        return os.pread(self._descriptor(file), length, offset)

    def _descriptor(self, file: str) -> int:
        if file not in self._files:
            self._files[file] = os.open(Path(self._claim.partial) / file, os.O_RDWR | os.O_NOFOLLOW)
        return self._files[file]

    def close(self) -> None:
        """Wait until everything is on the disk."""
        for descriptor in self._files.values():
            os.fsync(descriptor)
            os.close(descriptor)


def write_all(descriptor: int, file: str, offset: int, data: Any) -> Written:
    """Write a contiguous buffer into an open file, at a byte offset."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return Written(file, offset, len(view), hashlib.sha256(view).hexdigest())
