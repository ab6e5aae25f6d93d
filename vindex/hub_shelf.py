"""A vindex opened where it lies on the Hub: what is asked for travels once, and what has travelled is checked.

1. One call pins the revision to a commit, and gives the size of every file and the SHA-256 of the large ones.
2. SHA256SUMS is fetched, and must say the same SHA-256 of each large file: no byte of theirs travels for that.
3. A file that is wanted whole is streamed into the cache and hashed on the way. It takes its name there only where its
   SHA-256 is that of SHA256SUMS (without one: the Hub's). So what has a name in the cache is whole and was checked.
4. Some rows of a large file come by byte range, and no hash covers a range. Each answer must be that range, of a file
   of that size, with the hash that 2. compared, at that commit (vindex/hub_files.py). What is left to trust is that the
   Hub's storage gives the bytes of the object that it names.

The cache is `vindex/OWNER--NAME/COMMIT/` in HF_HOME, beside it REVISION.json: what the Hub said of a revision, for
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np

from vindex.checksums import parse_sums
from vindex.errors import CheckpointError, FormatError, QueryError
from vindex.files import Kind, read_bytes, read_json
from vindex.format import SUMS
from vindex.hub import address_of
from vindex.hub_files import CONNECTIONS, Entry, HubFiles, Listing, listing_of
from vindex.progress import Advance, Progress, silent, unseen
from vindex.schema import OF_A_VINDEX
from vindex.targets import make_directory, write_json, written

STRIDE = 1 << 26  # bytes between two advances
WHOLE = 1 << 24  # bytes of a file that is not read by rows but whole
UNASKED = 1 << 28  # bytes of the largest file that is fetched without `vindex pull`
MANY = 1 << 8  # rows that are worth a range each
RETRIES = 3  # of the first call: somebody waits
OF_THE_CACHE = Kind(CheckpointError, "remove it, and open the vindex again")


class HubShelf:
    """The files of one vindex on the Hub, as `vindex.shelf.Shelf` has them. address: hf://owner/name[@revision]."""

    def __init__(self, address: str, progress: Progress = silent) -> None:
        from huggingface_hub.constants import HF_HOME

        self.repo, revision, file = address_of(address)
        if file is not None:
            raise CheckpointError(f"{address}: expected hf://owner/name[@revision] of a vindex")
        self.name, self.place, self._progress = f"hf://{self.repo}", address, progress
        self._folder = Path(HF_HOME) / "vindex" / self.repo.replace("/", "--")
        listing = self._listing(revision)
        self.commit = listing.commit
        self.cache = self._folder / self.commit
        self._entries = {name: entry for name, entry in listing.entries.items() if "/" not in name}
        self._files = HubFiles(self.repo, listing=listing)
        self._sums: dict[str, str] = {}
        if SUMS.name in self._entries:
            self._sums = parse_sums(self.read(SUMS.name), f"{address}/{SUMS.name}")
            self._compare()

    @property
    def path(self) -> Path:
        """The directory in the cache, with every file in it."""
        for name in self.files():
            self._fetched(name)
        return self.cache

    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def files(self) -> list[str]:
        """The files of the vindex: those in SHA256SUMS and it; without one all that are there."""
        listed = {SUMS.name, *self._sums} if self._sums else self.names() - {".gitattributes"}
        return sorted(listed, key=lambda name: (name == SUMS.name, name))

    def size(self, name: str) -> int:
        if name not in self._entries:
            raise FormatError(
                f"{self.place}/{name}: is not there at commit {self.commit[:12]}; choose another revision"
            )
        return self._entries[name].size

    def read(self, name: str, kind: Kind = OF_A_VINDEX) -> bytes:
        size = self.size(name)
        if kind.limit is not None and size > kind.limit:
            raise kind.refusal(f"{self.place}/{name}", f"has {size:,} bytes, and at most {kind.limit:,} are read")
        return read_bytes(self._fetched(name), kind)

    def array(self, name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
        size = self.size(name)
        if size > UNASKED and not (self.cache / name).is_file():
            raise QueryError(
                f"{self.place}/{name} is needed whole and has {size:,} bytes: `vindex pull {self.repo}`, and open that"
            )
        try:
            return np.memmap(self._fetched(name), dtype=dtype, mode="r", shape=shape, offset=offset)
        except ValueError as error:
            raise FormatError(f"{self.place}/{name}: cannot be mapped ({error})") from error

    def rows(self, name: str, dtype: np.dtype, shape: tuple[int, int], rows: Sequence[int]) -> np.ndarray:
        wanted, places = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        if (self.cache / name).is_file() or self.size(name) <= WHOLE or len(wanted) > MANY:
            return np.asarray(self.array(name, dtype, shape)[list(rows)])
        length = shape[1] * dtype.itemsize
        if shape[0] * length > self.size(name):
            raise FormatError(f"{self.place}/{name}: {self.size(name):,} bytes are no {shape} of {dtype}")

        def fetch(row: int) -> np.ndarray:
            return np.frombuffer(self._files.read(name, row * length, (row + 1) * length), dtype)

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return np.stack(list(pool.map(fetch, wanted.tolist())))[places]

    def put(self, name: str, path: Path, advance: Advance = unseen) -> None:
        """Write a file of the vindex to `path`, whole and checked, or not at all; from the cache where it is there."""
        if (self.cache / name).is_file():
            with written(path) as file, (self.cache / name).open("rb") as source:
                shutil.copyfileobj(source, file)
            advance(self.size(name))
            return
        size, seen, expected = self.size(name), hashlib.sha256(), self.expected(name)
        with written(path) as file:
            for start in range(0, size, STRIDE):
                piece = self._files.read(name, start, min(start + STRIDE, size))
                seen.update(piece)
                file.write(piece)
                advance(len(piece))
            if expected not in (None, seen.hexdigest()):
                raise self._changed(name, seen.hexdigest(), str(expected))

    def expected(self, name: str) -> str | None:
        """The SHA-256 that a file must have; None for a small one that SHA256SUMS does not list."""
        entry = self._entries[name]
        return self._sums.get(name) or (entry.etag if entry.large else None)

    def _fetched(self, name: str) -> Path:
        """A file in the cache, fetched where it is missing."""
        path = self.cache / name
        if not path.is_file():
            make_directory(self.cache)
            self.put(name, path, self._progress(f"fetch {name}", self.size(name)))
        return path

    def _compare(self) -> None:
        """Raise unless SHA256SUMS lists what is there, and says of large files what the Hub says."""
        for name, digest in self._sums.items():
            self.size(name)
            entry = self._entries[name]
            if entry.large and entry.etag != digest:
                raise self._changed(name, entry.etag, digest)

    def _changed(self, name: str, found: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.place}/{name} has SHA-256 {found[:12]}… and {SUMS.name} says {expected[:12]}…: it is not what was "
            "pushed; choose another revision, or ask its owner to push it again"
        )

    def _listing(self, revision: str | None) -> Listing:
        """What the Hub says of the revision, or said when it was last asked, where it may not be asked now."""
        from huggingface_hub import constants

        record = self._folder / f"{quote(revision or 'main', safe='')}.json"
        if not constants.HF_HUB_OFFLINE:
            listing = listing_of(self.repo, revision, RETRIES)
            make_directory(self._folder)
            entries = {name: list(entry) for name, entry in listing.entries.items()}
            write_json(record, {"commit": listing.commit, "entries": entries})
        elif record.is_file():
            listing = _read_listing(record)
        else:
            raise CheckpointError(
                f"{self.place}: HF_HUB_OFFLINE is set and this was never opened here; unset it to go on"
            )
        if not re.fullmatch(r"[0-9a-f]{40}", listing.commit):
            raise CheckpointError(
                f"{self.place}: expected a commit of 40 hex digits from the Hub, got {listing.commit!r}"
            )
        return listing


def _read_listing(path: Path) -> Listing:
    try:
        found = read_json(path, OF_THE_CACHE)
        entries = {
            str(name): Entry(int(size), str(etag), bool(large))
            for name, (size, etag, large) in found["entries"].items()
        }
        return Listing(str(found["commit"]), entries)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OF_THE_CACHE.refusal(path, "is no listing of a repository") from error
