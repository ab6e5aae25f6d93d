"""Open what others wrote: a regular file of a bounded size, and JSON that says one thing.

Every file that the project reads is opened here. Links are followed, since the Hub's cache is made of links into
blobs/, and what they lead to must be a regular file: a FIFO, device or directory is refused and never waited for.

JSON is read strictly: UTF-8, no key twice in an object, no NaN or infinity, no half of a surrogate pair, no more than
NESTING levels and MOST_VALUES values. Integers past 64 bits come out as floats, so that whoever asks for a count
refuses them.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from vindex.errors import VindexError

TEXT_LIMIT = 1 << 26  # bytes of a JSON or text file; the manifest of a mixture of 60,000 experts has a third of it
MOST_VALUES = 1 << 22  # of a JSON text, counted by commas and brackets; a large tokenizer has a quarter of it
NESTING = 64
HOLES = 1 << 30  # bytes of a file that may be holes; a file that is mostly a hole takes hours to read and says nothing
ODD_KINDS = {
    stat.S_IFDIR: "is a directory",
    stat.S_IFIFO: "is a FIFO",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
    stat.S_IFSOCK: "is a socket",
}


class Kind(NamedTuple):
    """A kind of file: what is raised where one cannot be read, the way out, and how many bytes one may have."""

    error: type[VindexError]
    way_out: str = ""
    limit: int | None = TEXT_LIMIT

    def refusal(self, path: str | Path, what: str) -> VindexError:
        """The error, not raised yet: `path: what; way out`, in one line."""
        return self.error(" ".join(f"{path}: {what}".split()) + (f"; {self.way_out}" if self.way_out else ""))


ANY = Kind(VindexError, limit=None)


@contextmanager
def opened(path: Path, kind: Kind = ANY) -> Iterator[BufferedReader]:
    """A regular file, open for reading; what the operating system says of it, even later, is one line."""
    try:
        with os.fdopen(_descriptor(path, kind), "rb") as file:
            yield file
    except OSError as error:
        raise kind.refusal(path, _why(path, error)) from error


def read_bytes(path: Path, kind: Kind) -> bytes:
    """The whole content of a file, which has at most `kind.limit` bytes."""
    with opened(path, kind) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
    if len(content) != size:
        raise kind.refusal(path, "changes while it is read")
    return content


def read_text(path: Path, kind: Kind) -> str:
    """A UTF-8 file."""
    return decoded(read_bytes(path, kind), path, kind)


def decoded(content: bytes, where: str | Path, kind: Kind) -> str:
    """UTF-8 bytes as text. where: what messages call them."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise kind.refusal(where, f"is not text: byte {error.start} is not UTF-8") from error


def read_json(path: Path, kind: Kind) -> Any:
    """The value in a JSON file."""
    return parse_json(read_bytes(path, kind), str(path), kind)


def read_lines(path: Path, kind: Kind, longest: int = TEXT_LIMIT) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of every line that is not blank, none longer than `longest` bytes."""
    with opened(path, kind) as file:
        number = 0
        while line := file.readline(longest + 1):
            number += 1
            if len(line) > longest:
                raise kind.refusal(path, f"line {number} is longer than {longest:,} bytes")
            if line.strip():
                yield number, line


@contextmanager
def uncollected() -> Iterator[None]:
    """Let garbage collection rest while much is made that stays, which it would look through again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def parse_json(content: bytes | bytearray, where: str, kind: Kind) -> Any:
    """The value that JSON text stands for, read strictly. where: what messages call it."""
    if kind.limit is not None and len(content) > kind.limit:
        raise kind.refusal(where, f"has {len(content):,} bytes, and at most {kind.limit:,} are read")
    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise kind.refusal(where, f"holds more than {MOST_VALUES:,} values")
    try:
        value = orjson.loads(content)
        if _keys(value) != _keys_written(content):
            json.loads(content.decode(), object_pairs_hook=_once)  # slower, and says which key it is
    except ValueError as error:  # orjson's and json's errors among them
        raise kind.refusal(where, f"not valid JSON ({error})") from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> None:
    """Refuse an object that has a key twice."""
    if len(dict(pairs)) < len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {again[:60]!r} stands twice in one object")


def _keys_written(content: bytes | bytearray) -> int:
    """How many keys there are in valid JSON, kept or not: a colon outside of strings follows each."""
    unescaped = content.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(unescaped.split(b'"')[::2]).count(b":")


def _holds_more(values: Collection[Any]) -> bool:
    """Whether an object or a list is among the values, of which a vocabulary has hundreds of thousands."""
    return not {dict, list}.isdisjoint(map(type, values))


def _keys(value: Any) -> int:
    """How many keys all objects in a value have. Raises ValueError when it is nested too deep."""
    level, keys = [value] if isinstance(value, dict | list) else [], 0
    for _ in range(NESTING):
        keys += sum(len(one) for one in level if isinstance(one, dict))
        insides = [one.values() if isinstance(one, dict) else one for one in level]
        level = [inner for inside in insides if _holds_more(inside) for inner in inside if type(inner) in (dict, list)]
    if level:
        raise ValueError(f"nested more than {NESTING} levels deep")
    return keys


def _descriptor(path: Path, kind: Kind) -> int:
    """A file descriptor of a regular file of a size that is allowed. Without O_NONBLOCK a FIFO would wait for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as error:  # a NUL in the path
        raise kind.refusal(repr(str(path)), f"cannot be read ({error})") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            odd = ODD_KINDS.get(stat.S_IFMT(found.st_mode), "is no regular file")
            raise kind.refusal(path, f"cannot be read: it {odd}, and a regular file was expected")
        if kind.limit is not None and found.st_size > kind.limit:
            raise kind.refusal(path, f"has {found.st_size:,} bytes, and at most {kind.limit:,} are read")
        if found.st_size > HOLES and _holes(descriptor, found.st_size) > HOLES:
            raise kind.refusal(path, f"has {found.st_size:,} bytes, more than {HOLES:,} of them holes; it is not whole")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _holes(descriptor: int, size: int) -> int:
    """Bytes of a sparse file that were never written, counted until they are more than HOLES."""
    holes, at = 0, 0
    while at < size and holes <= HOLES:
        try:
            data = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            data = size if error.errno == errno.ENXIO else at  # ENXIO: nothing but a hole from here on
            holes += data - at
            break
        holes, at = holes + data - at, os.lseek(descriptor, data, os.SEEK_HOLE)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return holes


def _why(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOENT and path.is_symlink():
        return f"cannot be read: it is a link to {os.readlink(path)}, which is not there"
    if error.errno == errno.ENXIO:
        return "cannot be read: it is a socket or a device, and a regular file was expected"
    return f"cannot be read ({re.sub(r'[^ -~]', '?', error.strerror or type(error).__name__)})"
