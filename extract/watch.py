"""Are the weight files still the ones that were hashed?

The manifest gives the hash of every source file, and a build reads the weights for hours after hashing them. Hashing
them all again at the end would double the reading, and would still not notice blocks that an earlier, killed run read
from other bytes. So the size, the times of change and the inode of each local file are kept from the moment it was
opened and compared before each finished block is noted, which costs a few system calls. Only a file whose stamp
differs is hashed again: a new link to it, as `vindex patch apply` makes, changes the stamp and not the bytes. A file
written less than two seconds before it was opened could change within one tick of the file system's clock; it is
hashed again once, at the end. Reads from the Hub compare its hashes themselves (vindex/hub_files.py).
"""

from __future__ import annotations

from pathlib import Path

from extract.checkpoint import Checkpoint
from vindex.checksums import sha256_of
from vindex.directory import LocalFiles, Stamp, stamp_of
from vindex.errors import CheckpointError
from vindex.manifest import Source

TICK = 2_000_000_000  # nanoseconds; the coarsest clock of a file system in use is FAT's


def local_paths(checkpoint: Checkpoint) -> list[Path]:
    """The directory and the weight files of a local checkpoint, and a tokenizer that stands elsewhere."""
    own = [checkpoint.own_tokenizer] if checkpoint.own_tokenizer else []
    if not isinstance(checkpoint.files, LocalFiles):
        return own
    directory = checkpoint.files.directory
    return [directory, *(directory / name for name in checkpoint.weight_files), *own]


class SourceWatch:
    """The weight files of an opened and hashed checkpoint; none where they are read from the Hub."""

    def __init__(self, checkpoint: Checkpoint, source: Source) -> None:
        files, digests = checkpoint.files, {file.name: file.sha256 for file in source.files}
        self._watched = [
            _Watched(files.directory / name, digests[name], files.stamps[name], files.opened)
            for name in (checkpoint.weight_files if isinstance(files, LocalFiles) else ())
            if isinstance(files, LocalFiles)
        ]

    def require_unchanged(self, *, at_the_end: bool = False) -> None:
        """Raise CheckpointError when a weight file is not the one that was hashed."""
        for file in self._watched:
            file.require_unchanged(at_the_end)


class _Watched:
    def __init__(self, path: Path, sha256: str, stamp: Stamp, opened: int) -> None:
        self._path, self._sha256, self._stamp = path, sha256, stamp
        self._young = opened - stamp.modified < TICK

    def require_unchanged(self, at_the_end: bool) -> None:
        try:
            now = stamp_of(self._path)
            if now == self._stamp and not (at_the_end and self._young):
                return
            if sha256_of(self._path) != self._sha256:
                raise CheckpointError(
                    f"{self._path} changed after it was hashed and read; build again with --force (force=True)"
                )
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read any more ({error.strerror})") from error
        self._stamp = now
