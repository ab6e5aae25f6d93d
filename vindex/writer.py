"""Write a vindex so that nothing half-written is ever taken for whole.

1. Everything goes into NAME.partial beside the target, which only one process may hold (a lock on the directory).
2. Blocks have known offsets, so they are written in any order, each once. A finished block is fsynced and then noted,
   with its record, in a journal whose first line fingerprints the job: source hashes, options, versions. One thread
   does this in the background, in order, so that computing does not wait for the disk.
3. A stopped build resumes when the fingerprints agree, skips the journalled blocks, and says why when they do not.
4. Other processes may write blocks too, with a claim from the one that holds the directory; it notes them itself.
5. Text files follow, SHA256SUMS last; the journal goes, and the rename to the target is the commit.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from vindex.checksums import render_sums
from vindex.errors import TargetError
from vindex.format import SUMS, FileSpec

JOURNAL = "journal.jsonl"
LARGE = 1 << 24  # bytes in one write that go to the disk at once, so that the end of the block need not wait for them


class Piece(NamedTuple):
    """A contiguous buffer and where it goes: the name of a file of the vindex and an offset in bytes."""

    file: str
    offset: int
    data: Any


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

    def write(self, file: str, offset: int, data: Any) -> None:
        """Write a contiguous buffer at a byte offset. Raises TargetError as Claim.check does."""
        self._claim.check()
        _write_all(self._descriptor(file), offset, data)

    def read(self, file: str, offset: int, length: int) -> bytes:
        """Read bytes of a finished block."""
        return os.pread(self._descriptor(file), length, offset)

    def _descriptor(self, file: str) -> int:
        if file not in self._files:
            self._files[file] = os.open(Path(self._claim.partial) / file, os.O_RDWR)
        return self._files[file]

    def close(self) -> None:
        """Wait until everything is on the disk."""
        for descriptor in self._files.values():
            os.fsync(descriptor)
            os.close(descriptor)


def _write_all(descriptor: int, offset: int, data: Any) -> None:
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


class Writer:
    """An unfinished vindex, held by this process alone. Use `open_writer`."""

    def __init__(self, target: Path, partial: Path, fingerprint: dict[str, Any], lock: int) -> None:
        self.target, self.partial, self._lock = target, partial, lock
        self._journal = partial / JOURNAL
        self.finished: dict[str, Any] = self._replay(fingerprint)
        self.claim = Claim(str(partial.resolve()), self._journal.read_bytes().partition(b"\n")[0])
        self._files: dict[str, int] = {}
        self._unsynced: set[str] = set()
        self._flusher = ThreadPoolExecutor(1, "vindex-flush")
        self._pending: list[Future[None]] = []

    def _replay(self, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """{block: record} of the blocks an earlier run finished; a new journal when there is none."""
        whole_lines = self._journal.read_bytes().rpartition(b"\n")[0] if self._journal.exists() else b""
        if not whole_lines:
            self._rewrite_journal(orjson.dumps(fingerprint) + b"\n")
            return {}
        first, *rest = whole_lines.split(b"\n")
        before = orjson.loads(first)
        if before != fingerprint:
            raise TargetError(
                f"{self.partial.name} was begun with other inputs ({_first_difference(before, fingerprint)}); "
                "repeat the first call to resume it, or add --force to start over"
            )
        self._rewrite_journal(whole_lines + b"\n")  # a torn last line would corrupt the next one
        return {entry["block"]: entry["record"] for entry in map(orjson.loads, rest)}

    def _rewrite_journal(self, content: bytes) -> None:
        fresh = self._journal.with_suffix(".new")
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._journal)

    def allocate(self, spec: FileSpec, size: int) -> None:
        """Give a file its final size, so that blocks land at their offsets in any order."""
        path = self.partial / spec.name
        if spec.name not in self._files:
            self._files[spec.name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._files[spec.name], size)

    def write(self, file: str, offset: int, data: Any) -> None:
        """Write a contiguous buffer at a byte offset of an allocated file, given by name."""
        self._unsynced.add(file)
        _write_all(self._files[file], offset, data)
        if memoryview(data).nbytes >= LARGE:
            self._pending.append(self._flusher.submit(os.fsync, self._files[file]))

    def read(self, file: str, offset: int, length: int) -> bytes:
        """Read back bytes written earlier."""
        return os.pread(self._files[file], length, offset)

    def finish_block(self, block: str, record: Any) -> None:
        """Make what was written since the last call durable, then note the block and its record in the journal.

        This happens in the background; an error of the disk is raised by a later call.
        """
        line = orjson.dumps({"block": block, "record": record}) + b"\n"
        self.finished[block] = orjson.loads(line)["record"]
        self._pending.append(self._flusher.submit(self._make_durable, sorted(self._unsynced), line))
        self._unsynced.clear()
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def _make_durable(self, names: list[str], line: bytes) -> None:
        for name in names:
            os.fsync(self._files[name])
        with self._journal.open("ab", buffering=0) as journal:
            journal.write(line)
            os.fsync(journal.fileno())

    def flush(self) -> None:
        """Wait until every finished block is durable and in the journal."""
        while self._pending:
            self._pending.pop(0).result()

    def write_text(self, spec: FileSpec, content: bytes) -> None:
        """Write a whole small file at once."""
        path = self.partial / spec.name
        path.write_bytes(content)
        _fsync(path)

    def commit(self, digests: Mapping[str, str], force: bool) -> None:
        """Write SHA256SUMS, then let the directory appear under its name."""
        self.flush()
        self.write_text(SUMS, render_sums(digests).encode())
        self._journal.unlink()
        _fsync(self.partial)
        replaced = self.target.with_name(self.target.name + ".replaced")
        if force and self.target.exists():
            os.rename(self.target, replaced)
        try:
            os.rename(self.partial, self.target)
        except OSError as error:
            raise TargetError(
                f"{self.target} appeared during the build; the new one is whole in {self.partial}"
            ) from error
        _fsync(self.target.parent)
        if replaced.exists():
            shutil.rmtree(replaced)

    def close(self) -> None:
        """Finish what the background is writing and let go of the directory."""
        self._flusher.shutdown(wait=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        os.close(self._lock)


@contextmanager
def open_writer(target: Path, fingerprint: dict[str, Any], size: int, *, resume: bool, force: bool) -> Iterator[Writer]:
    """Hold `target`.partial for one build.

    fingerprint: plain JSON that must agree for a build to be resumed. size: bytes the finished vindex will need.
    Raises TargetError when the target exists without force, a partial build exists without resume or force, another
    process holds it, its fingerprint differs, or the place is read-only or too small.
    """
    partial = target.with_name(target.name + ".partial")
    with _explained(target):
        refuse_taken(target, resume=resume, force=force)
        partial.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial)
        try:
            if force and not resume:
                _empty(partial)
            _require_space(partial, size)
            writer = Writer(target, partial, fingerprint, lock)
        except BaseException:
            os.close(lock)
            raise
        try:
            yield writer
        finally:
            writer.close()


def refuse_taken(target: Path, *, resume: bool, force: bool) -> None:
    """Raise TargetError when the target or an unfinished build of it is in the way."""
    partial = target.with_name(target.name + ".partial")
    if not force and (target.is_symlink() or target.exists()) and not _is_empty_directory(target):
        raise TargetError(f"{target} already exists; choose another -o, or add --force to replace it")
    if not resume and not force and partial.exists() and any(partial.iterdir()):
        os.close(_lock(partial))  # a running build is a better answer than a stopped one
        raise TargetError(f"an unfinished build is in {partial}; add --resume to continue it or --force to start over")


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _lock(directory: Path) -> int:
    """Lock a directory for this process; the kernel lets go when the process ends, however it ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise TargetError(f"another build is writing {directory}; wait for it or choose another -o") from error
    return descriptor


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def _require_space(directory: Path, size: int) -> None:
    there = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
    free = shutil.disk_usage(directory).free
    if size - there > free:
        raise TargetError(
            f"{directory.parent}: the vindex needs {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; make room or "
            "choose another -o"
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn what the operating system says about the target into one line that tells what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f"the disk is full while writing {target}; make room and repeat with --resume"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            advice = f"{target.parent} cannot be written to ({error.strerror}); choose another -o"
        else:
            raise
        raise TargetError(advice) from error


def _first_difference(before: Any, now: Any, path: str = "") -> str:
    """Where two fingerprints part, as `options.features: 128 then, 64 now`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                return _first_difference(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    return f"{path}: {before} then, {now} now"
