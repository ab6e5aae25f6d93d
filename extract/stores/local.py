"""Files of a directory. Each read opens and closes its file, so that any thread or process can read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vindex.checksums import sha256_of_all
from vindex.errors import CheckpointError
from vindex.manifest import SourceFile


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
    """The plain files of one directory. stamps: what they were when it was opened, at `opened` nanoseconds."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.name = directory, directory.resolve().name
        self.opened = time.time_ns()
        self.stamps = {path.name: stamp_of(path) for path in sorted(directory.iterdir()) if path.is_file()}
        self.sizes = {name: stamp.size for name, stamp in self.stamps.items()}

    def read(self, file: str, start: int = 0, stop: int | None = None) -> bytearray:
        content = bytearray((self.sizes[file] if stop is None else stop) - start)
        view, done = memoryview(content), 0
        try:
            with (self.directory / file).open("rb", buffering=0) as opened:
                opened.seek(start)
                while done < len(view) and (count := opened.readinto(view[done:])):
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.directory / file} cannot be read ({error.strerror})") from error
        if done < len(content):
            short = f"it ends {len(content) - done} bytes too early"
            raise CheckpointError(f"{file} is cut short: {short}; download it again")
        return content

    def fingerprint(
        self, names: Sequence[str], threads: int, advance: Callable[[int], object]
    ) -> tuple[SourceFile, ...]:
        try:
            digests = sha256_of_all([self.directory / name for name in names], threads, advance)
            changed = [name for name in names if stamp_of(self.directory / name)[:3] != self.stamps[name][:3]]
        except OSError as error:
            raise CheckpointError(f"{self.name} cannot be hashed ({error.strerror}: {error.filename})") from error
        if changed:
            raise CheckpointError(f"{self.name}: {changed[0]} changed while it was being hashed; call this again")
        return tuple(SourceFile(name, self.sizes[name], digests[name], "vindex") for name in names)
