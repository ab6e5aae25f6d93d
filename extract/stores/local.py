"""Files of a directory. Each read opens and closes its file, so that any thread or process can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vindex.checksums import sha256_of_all
from vindex.errors import CheckpointError
from vindex.manifest import SourceFile


class LocalFiles:
    """The plain files of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.name = directory, directory.resolve().name
        self.sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}

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
            raise CheckpointError(
                f"{file} ends at byte {start + done}, {len(content) - done} too early; it was cut short"
            )
        return content

    def fingerprint(
        self, names: Sequence[str], threads: int, advance: Callable[[int], object]
    ) -> tuple[SourceFile, ...]:
        digests = sha256_of_all([self.directory / name for name in names], threads, advance)
        return tuple(SourceFile(name, self.sizes[name], digests[name], "vindex") for name in names)
