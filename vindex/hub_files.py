"""Files of a repository on the Hub, read by byte range; nothing is written to disk here.

1. One call to the Hub pins the revision to a commit and gives every file's size and hash: a `Listing`.
2. A read is cut into pieces, a few of which travel at the same time. Each is asked for at that commit, follows the
   Hub's redirect to its storage, and is tried again with growing pauses on server errors and broken connections.
3. Every answer must be the range that was asked for, of a file of that size, with the hash that the Hub gave at the
   start (its ETag); anything else is refused before it is read. huggingface_hub's HfFileSystem checks none of these
   and gives up after 23 seconds, so the calls below it are used.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from vindex.errors import CheckpointError
from vindex.hub import explained
from vindex.manifest import SourceFile

PIECE = 1 << 24
CONNECTIONS = 4
RETRIES, FIRST_PAUSE, LONGEST_PAUSE = 20, 1.0, 8.0  # seconds; about two and a half minutes of patience
LONGEST_ASKED = 300.0  # what a server may ask for; the Hub counts requests in windows of 5 minutes
WORTH_REPEATING = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")


class Entry(NamedTuple):
    """What the Hub says of a file. etag: the SHA-256 of a large file's content, else its git blob id."""

    size: int
    etag: str
    large: bool


class Listing(NamedTuple):
    """What the Hub says of a repository at one commit, and of every file in it by its path."""

    commit: str
    entries: dict[str, Entry]


def listing_of(repo: str, revision: str | None, retries: int | None = None) -> Listing:
    """Ask the Hub. retries: how often more where it does not answer, by default RETRIES. Raises CheckpointError."""
    from huggingface_hub import HfApi

    with explained(repo, revision):
        info = _patiently(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True), retries)
    entries = {
        file.rfilename: Entry(file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id or "", bool(file.lfs))
        for file in info.siblings or ()
    }
    return Listing(info.sha or "main", entries)


class HubFiles:
    """The files of a Hub repository at one commit."""

    dangling = ()

    def __init__(self, repo: str, revision: str | None = None, listing: Listing | None = None) -> None:
        self.name = repo
        self.revision, self._entries = listing or listing_of(repo, revision)
        self.sizes = {name: entry.size for name, entry in self._entries.items()}

    def read(self, file: str, start: int = 0, stop: int | None = None) -> bytearray:
        content = bytearray((self.sizes[file] if stop is None else stop) - start)
        self.read_into(file, start, memoryview(content))
        return content

    def read_into(self, file: str, start: int, view: memoryview) -> None:
        stop = start + len(view)

        def fetch(at: int) -> None:
            end = min(at + PIECE, stop)
            view[at - start : end - start] = self._range(file, at, end)

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for _ in pool.map(fetch, range(start, stop, PIECE)):
                pass  # a failed piece raises here

    def missing(self, names: Sequence[str]) -> str:
        return f"{self.name}: {names[0]} is missing at revision {self.revision[:12]}; the repository is not complete"

    def fingerprint(
        self,
        names: Sequence[str],
        threads: int,  # noqa: ARG002 - there is little to hash
        advance: Callable[[int], object],
    ) -> tuple[SourceFile, ...]:
        """The Hub's own SHA-256 of large files, which would have to be read whole; the others are read and hashed."""
        found = []
        for name in names:
            entry = self._entries[name]
            digest = entry.etag if entry.large else hashlib.sha256(self.read(name)).hexdigest()
            found.append(SourceFile(name, entry.size, digest, "hub" if entry.large else "vindex"))
            advance(entry.size)
        return tuple(found)

    def _range(self, file: str, start: int, stop: int) -> bytes:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.name, file, revision=self.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}

        def ask() -> bytes:
            with get_session().stream("GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response:
                hf_raise_for_status(response)
                self._check(file, start, stop, response)
                content = response.read()
            if len(content) != stop - start:
                raise CheckpointError(
                    f"{self.name}/{file}: expected {stop - start:,} bytes, got {len(content):,}; try again"
                )
            return content

        with explained(f"{self.name}/{file}", self.revision):
            return _patiently(ask)

    def _check(self, file: str, start: int, stop: int, response: Any) -> None:
        """Refuse an answer that is not these bytes of the file that was opened, before its body is read."""
        where, entry = f"{self.name}/{file}", self._entries[file]
        etag = _etag_of([*response.history, response])
        if etag != entry.etag:
            raise CheckpointError(
                f"{where} changed on the Hub while it was read: its ETag was {entry.etag[:12]}… and is "
                f"{etag[:12] or 'missing'}…; start again"
            )
        if response.status_code == 200 and (start, stop) == (0, entry.size):
            return  # the whole file, as was asked for
        expected, got = f"bytes {start}-{stop - 1}/{entry.size}", response.headers.get("Content-Range")
        if response.status_code != 206 or got != expected:
            raise CheckpointError(
                f"{where}: asked for {expected} and got status {response.status_code}, {got or 'no Content-Range'}; "
                "a proxy or mirror on the way does not keep to byte ranges"
            )


def _etag_of(answers: Sequence[Any]) -> str:
    """What the Hub itself says a file is, on the way to whoever has its bytes.

    A large file: in the redirect that leaves for the storage, which has ETags of its own. A small one: in the last
    answer, be it after redirects within the Hub, to the repository's new name or to a cache.
    """
    linked = [answer.headers["X-Linked-Etag"] for answer in answers if "X-Linked-Etag" in answer.headers]
    return (linked or [answers[-1].headers.get("ETag", "")])[0].removeprefix("W/").strip('"')


def _patiently(call: Callable[[], T], retries: int | None = None) -> T:
    """Repeat a call to the Hub that failed with a server error or a broken connection, with growing pauses."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    pause = FIRST_PAUSE
    for _ in range(RETRIES if retries is None else retries):
        asked = None
        try:
            return call()
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError):
                if error.response.status_code not in WORTH_REPEATING:
                    raise
                asked = _pause_asked_for(error.response.headers)
        time.sleep(pause if asked is None else min(asked, LONGEST_ASKED))
        pause = min(2 * pause, LONGEST_PAUSE)
    return call()


def _pause_asked_for(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks to wait: until its window of counted requests is over, or what Retry-After says."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit, plain = parse_ratelimit_headers(headers), headers.get("Retry-After", "")
    if limit and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    return float(plain) if plain.isdigit() else None
