"""Write a vindex so that nothing half-written is ever taken for whole.

1. Everything goes into NAME.partial beside the target, which only one process may hold (vindex/places.py).
2. Blocks have known offsets, so they are written in any order, each once. A finished block is fsynced and then noted in
   a journal: its record, and where its bytes lie, with their SHA-256. The journal's first line fingerprints the job
   (source hashes, options, versions); each line ends with a SHA-256 over it and the line before. One thread does this
   in the background, in order, so that computing does not wait for the disk.
3. A stopped build resumes when the fingerprints agree, and says why when they do not. Every line must be one that was
   written here; a block whose bytes are lost or changed is made again.
4. Other processes may write blocks too, with a claim from the one that holds the directory; it notes them itself.
5. Text files follow, SHA256SUMS last; then the directory takes its name (`places.put`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from vindex import places, targets
from vindex.checksums import render_sums
from vindex.claims import Claim, Written, write_all
from vindex.errors import TargetError
from vindex.files import TEXT_LIMIT, Kind, opened
from vindex.format import FILES, SUMS, FileSpec
from vindex.places import JOURNAL, partial_of

MAKING = "vindex"
LARGE = 1 << 24  # bytes in one write that go to the disk at once, so that the end of the block need not wait for them
START_OVER = "start over with --force (force=True)"
OF_A_JOURNAL = Kind(TargetError, START_OVER, limit=None)


class Line(NamedTuple):
    """What the journal says of a finished block."""

    record: Any
    written: tuple[Written, ...]


class Writer:
    """An unfinished vindex, held by this process alone. Use `open_writer`."""

    def __init__(self, target: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        self.target, self.partial = target, partial_of(target)
        self._journal = self.partial / JOURNAL
        self._lines: dict[str, Line] = {}
        if resume and self._journal.exists():
            self._replay(fingerprint)
        else:
            places.empty(self.partial)
            places.begin(self.partial, MAKING, (spec.name for spec in FILES), fingerprint=fingerprint)
        first, *rest = self._journal.read_bytes().splitlines()
        self.claim = Claim(str(self.partial.resolve()), first)
        self._sum = _sum_of(rest[-1]) if rest else hashlib.sha256(first).hexdigest()
        self._files: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._unsynced: set[str] = set()
        self._written: list[Written] = []
        self._flusher = ThreadPoolExecutor(1, "vindex-flush")
        self._pending: list[Future[None]] = []
        self._failed = False

    @property
    def finished(self) -> dict[str, Any]:
        """{block: record} of every finished block, those of an earlier run among them."""
        return {block: line.record for block, line in self._lines.items()}

    def _replay(self, fingerprint: Mapping[str, Any]) -> None:
        """Take over what an earlier run finished, and write the journal anew without what cannot be used."""
        head = places.journal_head(self.partial) or {}
        if head["making"] != MAKING:
            raise TargetError(f"{self.partial} is an unfinished {head['making']}, not to be resumed; {START_OVER}")
        if head.get("fingerprint") != fingerprint:
            difference = _first_difference(head.get("fingerprint"), fingerprint)
            raise TargetError(
                f"{self.partial.name} was begun with other inputs ({difference}); "
                f"repeat the first call to resume it, or {START_OVER}"
            )
        self._require_own_files()
        lines = self._whole_lines()
        first = next(lines, b"")
        content, before = first + b"\n", hashlib.sha256(first).hexdigest()
        after = before
        for number, line in enumerate(lines, 2):
            block, found = self._parsed(number, before, line)
            before = _sum_of(line)
            if all(self._holds(written) for written in found.written):
                self._lines[block] = found
                line = _rendered(after, block, found)
                content, after = content + line + b"\n", _sum_of(line)
        targets.write_bytes(self._journal, content)

    def _whole_lines(self) -> Iterator[bytes]:
        """The journal's lines, one at a time, without their ends; a torn last line is dropped."""
        with opened(self._journal, OF_A_JOURNAL) as file:
            while (line := file.readline(TEXT_LIMIT)).endswith(b"\n"):
                yield line.removesuffix(b"\n")
        if len(line) == TEXT_LIMIT:
            raise OF_A_JOURNAL.refusal(self._journal, f"a line has more than {TEXT_LIMIT:,} bytes")

    def _require_own_files(self) -> None:
        """Raise TargetError when a file here has another name elsewhere: writing to it would change that one, too."""
        for path in self.partial.iterdir():
            if path.lstat().st_nlink != 1:
                raise TargetError(f"{path} is a hard link to a file elsewhere; move it away, or {START_OVER}")

    def _parsed(self, number: int, before: str, line: bytes) -> tuple[str, Line]:
        """A line of the journal. Raises TargetError when it was not written here, after the line before it."""
        try:
            entry = orjson.loads(line)
            found = Line(entry["record"], tuple(Written(*written) for written in entry["written"]))
            block = entry["block"]
            if line == _rendered(before, block, found):
                return block, found
        except (orjson.JSONDecodeError, KeyError, TypeError):
            pass
        raise TargetError(f"{self._journal}: line {number} is damaged or was not written by this build; {START_OVER}")

    def _holds(self, written: Written) -> bool:
        """Whether bytes are still what they were when they were written."""
        digest, left = hashlib.sha256(), written.length
        try:
            with (self.partial / written.file).open("rb", buffering=0) as file:
                file.seek(written.offset)
                while left and (content := file.read(min(left, LARGE))):
                    digest.update(content)
                    left -= len(content)
        except FileNotFoundError:
            return False
        return not left and digest.hexdigest() == written.sha256

    def allocate(self, spec: FileSpec, size: int) -> None:
        """Give a file its final size, so that blocks land at their offsets in any order."""
        with self._explained():
            targets.step(f"allocate {spec.name}")
            if spec.name not in self._files:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                self._files[spec.name] = os.open(self.partial / spec.name, flags, 0o644)
            os.ftruncate(self._files[spec.name], size)
            self._sizes[spec.name] = size

    def write(self, file: str, offset: int, data: Any) -> None:
        """Write a contiguous buffer at a byte offset of an allocated file, given by name."""
        with self._explained():
            targets.step(f"write {file}")
            self._unsynced.add(file)
            self._written.append(write_all(self._files[file], file, offset, data))
        if memoryview(data).nbytes >= LARGE:
            self._pending.append(self._flusher.submit(os.fsync, self._files[file]))

    def adopt(self, written: Iterable[Written]) -> None:
        """Take what another process wrote with this writer's claim, durably, as part of the next block to finish."""
        self._written += written

    def read(self, file: str, offset: int, length: int) -> bytes:
        """Read back bytes written earlier."""
        with self._explained():
            return os.pread(self._files[file], length, offset)

    def finish_block(self, block: str, record: Any) -> None:
        """Make what was written since the last call durable, then note the block and its record in the journal.

        This happens in the background; an error of the disk is raised by a later call.
        """
        line = _rendered(self._sum, block, Line(record, tuple(self._written)))
        self._lines[block] = Line(orjson.loads(line)["record"], tuple(self._written))
        self._sum = _sum_of(line)
        self._pending.append(self._flusher.submit(self._make_durable, sorted(self._unsynced), line + b"\n"))
        self._unsynced.clear()
        self._written.clear()
        with self._explained():
            while self._pending and self._pending[0].done():
                self._pending.pop(0).result()

    def _make_durable(self, names: list[str], line: bytes) -> None:
        """Nothing is noted after a failure: each line of the journal goes on from the one before."""
        if self._failed:
            return
        self._failed = True
        for name in names:
            targets.step(f"sync {name}")
            os.fsync(self._files[name])
        with self._journal.open("ab", buffering=0) as journal:
            targets.step("write journal")
            if journal.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(journal.fileno())
        self._failed = False

    def flush(self) -> None:
        """Wait until every finished block is durable and in the journal."""
        with self._explained():
            while self._pending:
                self._pending.pop(0).result()

    def write_text(self, spec: FileSpec, content: bytes) -> None:
        """Write a whole small file at once."""
        targets.write_bytes(self.partial / spec.name, content)

    def require_covered(self) -> None:
        """Raise TargetError unless every byte of every allocated file belongs to exactly one finished block."""
        end = dict.fromkeys(self._sizes, 0)
        for file, offset, length, _ in sorted(w for line in self._lines.values() for w in line.written):
            end[file] = offset + length if offset == end.get(file) else -1
        wrong = [file for file, reached in end.items() if reached != self._sizes.get(file)]
        if wrong:
            raise TargetError(f"{self._journal}: its blocks are not the whole of {wrong[0]}, each once; {START_OVER}")

    def commit(self, digests: Mapping[str, str], force: bool) -> None:
        """Write SHA256SUMS, then let the directory appear under its name."""
        self.flush()
        self.write_text(SUMS, render_sums(digests).encode())
        with self._explained():
            places.put(self.target, force=force)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        with targets.explained(self.target, "repeat with --resume"):
            yield

    def close(self) -> None:
        """Finish what the background is writing and let go of the files."""
        self._flusher.shutdown(wait=True)
        for descriptor in self._files.values():
            os.close(descriptor)


@contextmanager
def open_writer(
    target: Path, fingerprint: Mapping[str, Any], size: int, *, resume: bool, force: bool, reads: Iterable[Path] = ()
) -> Iterator[Writer]:
    """Hold `target`.partial for one build.

    fingerprint: plain JSON that must agree for a build to be resumed. size: bytes the finished vindex will need.
    reads: `places.check_directory`. Raises TargetError when the target exists without force or is nothing that force
    replaces, a partial build exists without resume or force, another process holds it, its fingerprint differs, its
    journal is not ours, or the place is read-only or too small.
    """
    refuse_taken(target, resume=resume, force=force, reads=reads)
    with places.held(target) as partial:
        try:
            with targets.explained(target, "repeat with --resume"):
                if force and not resume:
                    places.empty(partial)
                _require_space(partial, size)
                writer = Writer(target, fingerprint, resume=resume)
        except BaseException:
            with suppress(OSError):  # only where nothing is in it
                os.rmdir(partial)
            raise
        try:
            yield writer
        finally:
            writer.close()


def refuse_taken(target: Path, *, resume: bool, force: bool, reads: Iterable[Path] = ()) -> None:
    """Raise TargetError when the target or an unfinished build of it is in the way."""
    places.check_directory(target, force=force, reads=reads)
    begun = places.unfinished(target)
    if begun is not None and not resume and not force:
        what = "build" if begun["making"] == MAKING else begun["making"]
        raise TargetError(
            f"an unfinished {what} is in {partial_of(target)}; continue it with --resume (resume=True), or "
            + START_OVER
        )


def _rendered(before: str, block: str, line: Line) -> bytes:
    """A line of the journal, without its end; before: the sum of the one before it."""
    body = orjson.dumps({"block": block, "record": line.record, "written": [list(w) for w in line.written]})
    return orjson.dumps({**orjson.loads(body), "sum": hashlib.sha256(before.encode() + body).hexdigest()})


def _sum_of(line: bytes) -> str:
    return orjson.loads(line)["sum"]


def _require_space(directory: Path, size: int) -> None:
    there = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
    free = shutil.disk_usage(directory).free
    if size - there > free:
        raise TargetError(
            f"{directory.parent}: the vindex needs {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; make room or "
            "choose another place"
        )


def _first_difference(before: Any, now: Any, path: str = "") -> str:
    """Where two fingerprints part, as `options.features: 128 then, 64 now`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                return _first_difference(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    return f"{path}: {before} then, {now} now"
