"""SHA256SUMS: written from SHA256SUMS.template, one line for each file, in the form `sha256sum -c` reads."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from vindex import targets
from vindex.errors import FormatError, TargetError
from vindex.files import ANY, Kind, decoded, opened, read_bytes
from vindex.format import CARD, FILES, SUMS, is_payload
from vindex.schema import require_plain_name

_CHUNK = 1 << 22
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class _Stopped(Exception):
    """Another file could not be hashed, or the user has had enough."""


OF_SUMS = Kind(FormatError, f"a directory without a readable {SUMS.name} is not a vindex")


@functools.cache
def _line_template() -> str:
    return (Path(__file__).parent / "SHA256SUMS.template").read_text()


def sha256_of(path: Path, advance: Callable[[int], object] = lambda count: None, kind: Kind = ANY) -> str:
    """Hex SHA-256 of a file, read in 4 MiB pieces; `advance` is told the bytes of each. Raises what `kind` says."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with opened(path, kind) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            advance(count)
    return digest.hexdigest()


def sha256_of_all(
    paths: Sequence[Path], threads: int, advance: Callable[[int], object] = lambda count: None, kind: Kind = ANY
) -> dict[str, str]:
    """{file name: hex SHA-256}, several files at a time: hashing lets go of the interpreter lock."""
    stopped = threading.Event()

    def go_on(count: int) -> None:
        if stopped.is_set():  # Ctrl-C must not wait for the rest of a large file
            raise _Stopped
        advance(count)

    with ThreadPoolExecutor(threads) as pool:
        try:
            digests = pool.map(lambda path: sha256_of(path, go_on, kind), paths)
            return dict(zip((path.name for path in paths), digests, strict=True))
        except BaseException:
            stopped.set()
            raise


def render_sums(digests: Mapping[str, str]) -> str:
    """The text of SHA256SUMS for {file name: hex digest}, sorted by name."""
    return "".join(_line_template().format(sha256=digests[name], name=name) for name in sorted(digests))


def load_sums(directory: Path) -> dict[str, str]:
    """Parse `directory`/SHA256SUMS into {file name: hex digest}.

    Raises FormatError when it is missing (then the directory is not a finished vindex), malformed, or names a path
    that is not a plain file name.
    """
    return _load_sums(directory / SUMS.name)


def _load_sums(path: Path) -> dict[str, str]:
    return parse_sums(read_bytes(path, OF_SUMS), str(path))


def parse_sums(content: bytes, where: str) -> dict[str, str]:
    """The same of the bytes of a SHA256SUMS; `where`: what messages call it where it is not text."""
    *lines, rest = decoded(content, where, OF_SUMS).split("\n")
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        line_at, match = f"{SUMS.name} line {number}", _LINE.fullmatch(line)
        if not match:
            raise FormatError(f"{line_at}: expected `<64 lower-case hex digits>  <file name>`, got {line[:80]!r}")
        digest, name = match.groups()
        require_plain_name(name, line_at)
        if name in digests:
            raise FormatError(f"{line_at}: lists {name} a second time; rebuild the vindex or download it again")
        digests[name] = digest
    if rest:
        raise FormatError(
            f"{SUMS.name}: its last line {rest[:80]!r} has no end; rebuild the vindex or download it again"
        )
    return digests


def renew_card(directory: Path, content: bytes) -> None:
    """Replace a vindex's README.md and its line in SHA256SUMS.

    No two files are renamed in one step, so the next SHA256SUMS is laid down first, under another name; a process that
    dies between the two leaves it, and `settle` finishes or drops it. Raises TargetError.
    """
    with targets.locked(directory), targets.explained(directory):
        _settle(directory)
        targets.require_place(directory / SUMS.name)
        digests = load_sums(directory) | {CARD.name: hashlib.sha256(content).hexdigest()}
        try:
            targets.write_bytes(directory / targets.PENDING, render_sums(digests).encode())
            targets.write_bytes(directory / CARD.name, content)
        finally:
            _settle(directory)


def settle(directory: Path) -> None:
    """Finish or drop what a killed `renew_card` left; where nothing can be changed, verify will say so."""
    if (directory / targets.PENDING).is_file():
        with suppress(TargetError), targets.locked(directory), targets.explained(directory):
            _settle(directory)


def _settle(directory: Path) -> None:
    pending, card = directory / targets.PENDING, directory / CARD.name
    if not pending.is_file() or pending.is_symlink():
        return
    try:
        before, after = load_sums(directory), _load_sums(pending)
        done = card.is_file() and after == before | {CARD.name: sha256_of(card)}
    except FormatError:
        done = False
    if done:
        targets.step(f"rename {pending.name} to {SUMS.name}")
        os.replace(pending, directory / SUMS.name)
    else:
        targets.step(f"remove {pending.name}")
        os.unlink(pending)
    targets.sync(directory)


def vindex_id(digests: Mapping[str, str]) -> str:
    """First 8 hex digits of the SHA-256 of the SHA256SUMS lines of the payload files, sorted by name.

    Optional ones are left out.
    """
    payload = {spec.name for spec in FILES if is_payload(spec) and not spec.optional}
    lines = render_sums({name: digest for name, digest in digests.items() if name in payload})
    return hashlib.sha256(lines.encode()).hexdigest()[:8]
