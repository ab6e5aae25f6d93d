"""The header of a GGUF file: metadata, and where every tensor lies.

Magic, version, counts, then (key, type, value) for each metadata entry and (name, dimensions, type, offset) for each
tensor; data begins at the next multiple of the alignment (github.com/ggml-org/ggml, docs/gguf.md). The gguf package's
own reader makes a NumPy array of every token and wants a local file; this one reads any `Files`, a piece at a time.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from extract.stores import Files
from vindex.errors import CheckpointError

STEP = 1 << 20
VERSIONS = (2, 3)
ALIGNMENT, LARGEST_ALIGNMENT = 32, 1 << 20
LARGEST_HEADER = 1 << 26  # bytes; a vocabulary of 262,144 tokens with its merges has a fifth of it
MOST_ITEMS = 1 << 22  # of an array
DIMENSIONS, NAME_BYTES, KEY_BYTES = 4, 64, 65535  # at most, as the format says
LEAST_ENTRY, LEAST_TENSOR = 13, 32  # bytes of one in the header
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY = 7, 8, 9


class Tensor(NamedTuple):
    """A tensor as the file has it. shape: outermost dimension first. kind: ggml's number. start: bytes in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


class Header(NamedTuple):
    """data: where in the file the tensors begin. alignment: what their places, counted from there, are multiples of."""

    metadata: dict[str, Any]
    tensors: list[Tensor]
    data: int
    alignment: int


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
    tensor_count, entry_count = cursor.count(LEAST_TENSOR), cursor.count(LEAST_ENTRY)
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.string(KEY_BYTES)
        if key in metadata:
            raise _Damaged(f"two values for {key}")
        metadata[key] = cursor.value(cursor.scalar("I"))
    found = {}
    for _ in range(tensor_count):
        name = cursor.string(NAME_BYTES)
        if name in found:
            raise _Damaged(f"two tensors called {name}")
        found[name] = (_shape(cursor, name), cursor.scalar("I"), cursor.scalar("Q"))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment is {str(alignment)[:40]}, expected a power of two")
    data = -(-cursor.at // alignment) * alignment
    tensors = [Tensor(name, shape, kind, data + offset) for name, (shape, kind, offset) in found.items()]
    return Header(metadata, tensors, data, alignment)


def _shape(cursor: _Cursor, name: str) -> tuple[int, ...]:
    count = cursor.scalar("I")
    shape = cursor.numbers("Q", count)[::-1] if 1 <= count <= DIMENSIONS else ()
    if not shape or 0 in shape:
        raise _Damaged(
            f"{name} has {count} dimensions or one of length 0; expected 1 to {DIMENSIONS} of length 1 or more"
        )
    return shape


class _Cursor:
    """Reads on through a file; what has been read stays, a header is small."""

    def __init__(self, files: Files, file: str) -> None:
        self._files, self.file, self._size = files, file, files.sizes[file]
        self._content, self.at = bytearray(), 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > self._size:
            raise _Damaged("its header is longer than the file")
        if end > LARGEST_HEADER:
            raise _Damaged(f"its header is longer than {LARGEST_HEADER:,} bytes")
        while len(self._content) < end:
            have = len(self._content)
            self._content += self._files.read(self.file, have, min(max(end, have + STEP), self._size))
        self.at = end
        return bytes(memoryview(self._content)[end - count : end])

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{kind}", self.take(count * struct.calcsize(f"<{kind}")))

    def scalar(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def count(self, least: int) -> int:
        """How many things of at least so many bytes follow."""
        count = self.scalar("Q")
        if count * least > self._size:
            raise _Damaged(f"it claims {count} entries, more than it has room for")
        return count

    def string(self, longest: int = LARGEST_HEADER) -> str:
        length = self.scalar("Q")
        if length > longest:
            raise _Damaged(f"a name of {length} bytes, longer than {longest}")
        return self.take(length).decode()

    def value(self, kind: int) -> Any:
        """A scalar, a string, or a list of either: an array of arrays is allowed by the format and used by no model."""
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return _true_or_false(self.numbers("B", 1))[0] if kind == BOOL else self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise _Damaged(f"a value of unknown type {kind}")
        inner, count = self.scalar("I"), self.count(1)
        if count > MOST_ITEMS:
            raise _Damaged(f"an array of {count} values, more than {MOST_ITEMS}")
        if inner == STRING:
            return [self.string() for _ in range(count)]
        if inner not in SCALARS:
            raise _Damaged(f"an array of values of type {inner}")
        return list(_true_or_false(self.numbers("B", count)) if inner == BOOL else self.numbers(SCALARS[inner], count))


def _true_or_false(values: tuple[int, ...]) -> tuple[bool, ...]:
    if values and max(values) > 1:
        raise _Damaged(f"a truth value of {max(values)}")
    return tuple(map(bool, values))
