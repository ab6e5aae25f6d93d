"""A directory of a model on disk: its files, read in pieces, and what the Hub's cache calls it.

Each read opens and closes its file, so that any thread or process can read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vindex.checksums import sha256_of_all
from vindex.errors import CheckpointError
from vindex.files import Kind, opened
from vindex.hub import Cached, cached
from vindex.manifest import SourceFile

WEIGHTS = Kind(CheckpointError, "download it again", limit=None)


class Stamp(NamedTuple):
    """What tells that a file is another, or has been written to, without reading it. Times are nanoseconds."""

    size: int
    modified: int
    inode: int
    changed: int


def stamp_of(path: Path) -> Stamp:
    found = path.stat()
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)


class LocalFiles:
    """The plain files of one directory. stamps: what they were when it was opened, at `opened` nanoseconds.

    name: what messages call it, its own name or the Hub id in a cache.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cached: Cached | None = cached(directory)
        self.name = self.cached.repo if self.cached else directory.resolve().name
        self.revision = self.cached.revision if self.cached else None
        self.opened = time.time_ns()
        try:
            entries = sorted(directory.iterdir())
            self.stamps = {path.name: stamp_of(path) for path in entries if path.is_file()}
        except OSError as error:
            raise WEIGHTS.refusal(directory, f"cannot be read ({error.strerror})") from error
        self.sizes = {name: stamp.size for name, stamp in self.stamps.items()}
        self.dangling = tuple(path.name for path in entries if path.is_symlink() and not path.exists())
        """Links whose target is not there: files of a download that was stopped, or of a cache that was pruned."""

    def read(self, file: str, start: int = 0, stop: int | None = None) -> bytearray:
        content = bytearray((self.sizes[file] if stop is None else stop) - start)
        self.read_into(file, start, memoryview(content))
        return content

    def read_into(self, file: str, start: int, view: memoryview) -> None:
        done = 0
        with opened(self.directory / file, WEIGHTS) as source:
            source.seek(start)
            while done < len(view) and (count := source.readinto(view[done:])):
                done += count
        if done < len(view):
            short = f"it ends {len(view) - done} bytes too early"
            raise CheckpointError(f"{file} is cut short: {short}; download it again")

    def fingerprint(
        self, names: Sequence[str], threads: int, advance: Callable[[int], object]
    ) -> tuple[SourceFile, ...]:
        digests = sha256_of_all([self.directory / name for name in names], threads, advance, WEIGHTS)
        try:
            changed = [name for name in names if stamp_of(self.directory / name)[:3] != self.stamps[name][:3]]
        except OSError as error:
            raise WEIGHTS.refusal(error.filename, f"cannot be hashed ({error.strerror})") from error
        if changed:
            raise CheckpointError(f"{self.name}: {changed[0]} changed while it was being hashed; call this again")
        return tuple(SourceFile(name, self.sizes[name], digests[name], "vindex") for name in names)

    def missing(self, names: Sequence[str]) -> str:
        kind = "is a link to nothing" if names[0] in self.dangling else "is missing"
        others = f" ({len(names)} such files)" if len(names) > 1 else ""
        again = f"run `hf download {self.name}` again" if self.cached else "download it again"
        return f"{self.name}: {names[0]} {kind}{others}; the download is not complete, {again}"
