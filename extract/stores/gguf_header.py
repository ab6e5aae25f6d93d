"""The header of a GGUF file: metadata, and where every tensor lies.

Magic, version, counts, then (key, type, value) for each metadata entry and (name, dimensions, type, offset) for each
tensor; data begins at the next multiple of the alignment (github.com/ggml-org/ggml, docs/gguf.md). The gguf package's
own reader makes a NumPy array of every token and wants a local file; this one reads any `Files`, a piece at a time.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

from extract.stores import Files
from vindex.errors import CheckpointError

STEP = 1 << 20
VERSIONS = (2, 3)
ALIGNMENT = 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Tensor(NamedTuple):
    """A tensor as the file has it. shape: outermost dimension first. kind: ggml's number. start: bytes in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


class Header(NamedTuple):
    metadata: dict[str, Any]
    tensors: list[Tensor]


class _Damaged(Exception):
    """The bytes cannot be a GGUF header."""


def read_header(files: Files, file: str) -> Header:
    """Parse a file's header. Raises CheckpointError when it is cut short, damaged, not GGUF or big-endian."""
    try:
        return _parse(_Cursor(files, file))
    except (_Damaged, UnicodeDecodeError) as error:
        what = f"is damaged, cut short or not GGUF ({error})"
        raise CheckpointError(f"{file} {what}; download it again") from error


def _parse(cursor: _Cursor) -> Header:
    if cursor.take(4) != b"GGUF":
        raise _Damaged("it does not begin with GGUF")
    version = cursor.scalar("I")
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{cursor.file} is written for big-endian machines; get a little-endian GGUF")
    if version not in VERSIONS:
        raise _Damaged(f"version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are known")
    tensor_count, entry_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(entry_count)}
    found = [
        (cursor.string(), cursor.numbers("Q", cursor.scalar("I")), cursor.scalar("I"), cursor.scalar("Q"))
        for _ in range(tensor_count)
    ]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    data = math.ceil(cursor.at / alignment) * alignment
    tensors = [Tensor(name, shape[::-1], kind, data + offset) for name, shape, kind, offset in found]
    return Header(metadata, tensors)


class _Cursor:
    """Reads on through a file; what has been read stays, a header is small."""

    def __init__(self, files: Files, file: str) -> None:
        self._files, self.file, self._size = files, file, files.sizes[file]
        self._content, self.at = bytearray(), 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > self._size:
            raise _Damaged("its header is longer than the file")
        while len(self._content) < end:
            have = len(self._content)
            self._content += self._files.read(self.file, have, min(max(end, have + STEP), self._size))
        self.at = end
        return bytes(memoryview(self._content)[end - count : end])

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{kind}", self.take(count * struct.calcsize(f"<{kind}")))

    def scalar(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise _Damaged(f"a value of unknown type {kind}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in SCALARS:
            return list(self.numbers(SCALARS[inner], count))
        return [self.value(inner) for _ in range(count)]
