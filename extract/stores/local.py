"""Files of a directory. Each read opens and closes its file, so that any thread or process can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vindex.checksums import sha256_of_all
from vindex.errors import CheckpointError
from vindex.files import Kind, opened
from vindex.manifest import SourceFile

WEIGHTS = Kind(CheckpointError, "download it again", limit=None)


class LocalFiles:
    """The plain files of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.name = directory, directory.resolve().name
        try:
            self.sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}
        except OSError as error:
            raise WEIGHTS.refusal(directory, f"cannot be read ({error.strerror})") from error

    def read(self, file: str, start: int = 0, stop: int | None = None) -> bytearray:
        content = bytearray((self.sizes[file] if stop is None else stop) - start)
        view, done = memoryview(content), 0
        with opened(self.directory / file, WEIGHTS) as source:
            source.seek(start)
            while done < len(view) and (count := source.readinto(view[done:])):
                done += count
        if done < len(content):
            short = f"it ends {len(content) - done} bytes too early"
            raise CheckpointError(f"{file} is cut short: {short}; download it again")
        return content

    def fingerprint(
        self, names: Sequence[str], threads: int, advance: Callable[[int], object]
    ) -> tuple[SourceFile, ...]:
        digests = sha256_of_all([self.directory / name for name in names], threads, advance, WEIGHTS)
        return tuple(SourceFile(name, self.sizes[name], digests[name], "vindex") for name in names)
