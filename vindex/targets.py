"""Everything that is written is written here: beside its place first, then put there in one step.

A file is written under a fresh name beside its place (`.NAME.<8 hex digits>.new`, never through a link), synced, and
renamed. A reader finds the old file or the new one. For directories: vindex/places.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any

import orjson

from vindex.errors import TargetError
from vindex.format import SUMS
from vindex.weights import CONFIG

OTHER_KINDS = {".html", ".png", ".svg", ".pdf", ".csv", ".parquet", ".txt", ".md", ".safetensors"}  # no record is one
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.new")
PENDING = f".{SUMS.name}.pending"  # the next one, until the file of which it has a new line is there (checksums.py)


def step(what: str) -> None:
    """Called before every change on the disk, with what it is; tests put a function here that stops at one of them."""


def check_file(path: Path) -> None:
    """Raise TargetError unless a user's file can be written at `path`: as `require_place` says, in no vindex, and over
    no file of a checkpoint.
    """
    require_place(path)
    if (path.parent / SUMS.name).exists():
        raise TargetError(f"{path}: is inside a vindex, which holds its own files alone; name a file elsewhere")
    if path.exists() and (path.parent / CONFIG).exists() and any(path.parent.glob("*.safetensors")):
        raise TargetError(f"{path}: is a file of a checkpoint; name another")


def require_place(path: Path) -> None:
    """Raise TargetError unless a file can be written at `path`: in a directory that is there, and over nothing but a
    plain file. A link is never followed, nor replaced.
    """
    other = "name a plain file"
    with _explained_file(path):
        found = lstat(path) if path.name else path.stat()
        if found is not None and stat.S_ISLNK(found.st_mode):
            raise TargetError(f"{path}: is a symbolic link, which is not followed; {other}")
        if (found is not None and stat.S_ISDIR(found.st_mode)) or path.name == "..":
            raise TargetError(f"{path}: is a directory; name a file in it")
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise TargetError(f"{path}: is a device, a pipe or a socket; {other}")
        if not path.parent.is_dir():
            raise TargetError(f"{path}: the directory {path.parent} does not exist; make it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise TargetError(f"{path}: cannot be written: {path.parent} is read-only; choose another place")


def check_record(path: Path) -> None:
    """Raise TargetError where a record, which is JSON, could not be written at `path`, or its name says otherwise."""
    if path.suffix in OTHER_KINDS:
        raise TargetError(f"{path}: a record is JSON, and {path.suffix} says otherwise; name it {path.stem}.json")
    check_file(path)


@contextmanager
def written(path: Path) -> Iterator[BufferedRandom]:
    """A file to write and read, which appears at `path` when this is left without an error, whole, or not at all."""
    require_place(path)
    with _explained_file(path):
        _drop_leftovers(path)
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        step(f"create {beside.name}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(beside, flags, 0o666), "w+b") as file:
            try:
                with suppress(OSError):  # only tells others that this process is alive
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield file
                file.flush()
                step(f"sync {beside.name}")
                os.fsync(file.fileno())
                step(f"rename {beside.name} to {path.name}")
                os.replace(beside, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(beside)
                raise
        sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file, or nothing. Raises TargetError, as `written` does."""
    with written(path) as file:
        step(f"write {path.name}")
        file.write(content)


def write_json(path: Path, record: Any, *, indent: bool = False) -> None:
    """Write a record as a file of JSON, whole or not at all."""
    write_bytes(path, orjson.dumps(record, option=orjson.OPT_INDENT_2 if indent else 0) + b"\n")


def _drop_leftovers(path: Path) -> None:
    """Remove what processes that were killed left beside a file; one that is alive holds a lock on its own."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.new")
    for name in os.listdir(path.parent):
        if ours.fullmatch(name):
            with suppress(OSError, TargetError), hold(path.parent / name, os.O_RDONLY | os.O_NONBLOCK):
                step(f"remove {name}")
                os.unlink(path.parent / name)


def is_left_over(path: Path) -> bool:
    """Whether this is a file that a killed process left; the next one that writes there removes it."""
    plain = path.is_file() and not path.is_symlink()
    return plain and (path.name == PENDING or TEMPORARY.fullmatch(path.name) is not None)


@contextmanager
def _explained_file(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TargetError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def hold(path: Path, flags: int) -> Iterator[None]:
    """Hold the lock of a file or directory, not of what a link leads to; the kernel lets go when the process ends."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise TargetError(f"{path} is in the way and no directory; move it away or choose another place") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TargetError(f"another command is writing {path}; wait for it or choose another place") from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let no other process change a directory in place meanwhile. Raises TargetError when one is at it."""
    with explained(directory), hold(directory.resolve(), os.O_RDONLY | os.O_DIRECTORY):
        yield


def make_directory(directory: Path) -> None:
    """Make a directory and those above it where they are missing, of which a path may name thousands."""
    for place in reversed([directory, *directory.parents]):
        if not place.is_dir():
            with suppress(FileExistsError):  # another process was faster
                os.mkdir(place)


def remove(path: Path) -> None:
    """Remove a file, a link (never what it leads to), or a directory with all that is in it."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        step(f"remove {path.name}")
        os.unlink(path)
        return
    for name in sorted(os.listdir(path)):
        remove(path / name)
    step(f"remove {path.name}")
    os.rmdir(path)


def sync(directory: Path) -> None:
    """Make the names in a directory durable."""
    step(f"sync {directory.name}")
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lstat(path: Path) -> os.stat_result | None:
    """What is at a path, not what a link there leads to; None when nothing is."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


@contextmanager
def explained(target: Path, again: str = "repeat") -> Iterator[None]:
    """Turn what the operating system says about a target into one line. again: what to do when there is room."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f"the disk is full while writing {target}; make room and {again}"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            advice = f"{target.parent} cannot be written to ({error.strerror}); choose another place"
        else:
            advice = f"{target} cannot be written ({error.strerror or error}); {again}, or choose another place"
        raise TargetError(advice) from error
