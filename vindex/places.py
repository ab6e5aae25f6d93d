"""A directory is made beside its place and takes that place in one step, whole or not at all.

For a directory, NAME:
1. It is made in NAME.partial, which one process holds by a lock. A journal in it says which files it will have; only a
   directory with such a journal and nothing else in it is ever continued, emptied or removed.
2. When it is whole, NAME.replacing is made and takes the new directory (as `new`) and then its journal.
3. `new` and NAME change places in one step (renameat2 with RENAME_EXCHANGE). Where the system cannot do that, NAME
   becomes NAME.replacing/old first. An error up to here is undone, step by step.
4. NAME.replacing goes, its journal last.
A process may die between any two of these steps. NAME is then the old directory or the new one, or (3, without the
exchange) missing for a moment; `recover`, which every later run calls first, puts it back and removes what is left.

What stands under NAME is only ever replaced when this tool made all of it (vindex/kinds.py).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

from vindex import targets
from vindex.errors import TargetError
from vindex.kinds import REPLACEABLE, VINDEX, Kind, first_foreign, objection
from vindex.targets import explained, hold, lstat, make_directory, remove, sync, write_bytes

JOURNAL = "journal.jsonl"
BEGINNING = b'{"vindex":"unfinished",'  # of the first line of every journal
NEW, OLD = "new", "old"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)


def partial_of(target: Path) -> Path:
    """Where the directory `target` is made."""
    return target.with_name(target.name + ".partial")


def replacing_of(target: Path) -> Path:
    """Where the directory `target` is exchanged for another."""
    return target.with_name(target.name + ".replacing")


def check_directory(
    target: Path, *, force: bool | None, reads: Iterable[Path] = (), kinds: Sequence[Kind] = REPLACEABLE
) -> None:
    """Raise TargetError unless a directory may be made at `target`; first put right what a killed process left there.

    force: whether what is there may be replaced if it is of these kinds; None where the command has no such option.
    reads: files and directories that are read meanwhile; what holds one of them is never replaced.
    An empty directory is taken as if nothing were there.
    """
    if target.name in ("", ".."):
        raise TargetError(f"{str(target)!r} cannot be made anew; name a directory that does not exist yet")
    with explained(target):
        recover(target)
        _check(target, force, reads, kinds)


def _check(target: Path, force: bool | None, reads: Iterable[Path], kinds: Sequence[Kind]) -> None:
    found = lstat(target)
    if found is None:
        return
    if stat.S_ISLNK(found.st_mode):
        raise TargetError(f"{target} is a symbolic link, which is not followed; choose another place")
    if not stat.S_ISDIR(found.st_mode):
        raise TargetError(f"{target} already exists and is not a directory; choose another place")
    for source in reads:
        there = Path(os.path.realpath(source))
        if any(os.path.samestat(found, os.stat(place)) for place in (there, *there.parents) if place.exists()):
            raise TargetError(f"{target} is, or holds, {source}, which is being read; choose another place")
    if not os.listdir(target):
        return
    if force is None:
        raise TargetError(f"{target} already exists; choose another place")
    if against := objection(target, kinds):
        raise TargetError(f"{target} already exists and {against}, so it is not replaced; choose another place")
    if not force:
        raise TargetError(f"{target} already exists; choose another place, or replace it with --force (force=True)")


@contextmanager
def new_directory(
    target: Path,
    files: Iterable[str],
    *,
    making: str,
    force: bool | None = None,
    reads: Iterable[Path] = (),
    kinds: Sequence[Kind] = REPLACEABLE,
) -> Iterator[Path]:
    """A directory to write these files into, which appears at `target` whole when this is left without an error.

    files: the paths in it, none but which may be written, each by `written`. making: what it is, in words. The rest:
    `check_directory`.
    """
    check_directory(target, force=force, reads=reads, kinds=kinds)
    before = unfinished(target)
    if before is not None and before["making"] != making and not force:
        raise TargetError(
            f"{partial_of(target)} is an unfinished {before['making']}; finish or remove it, or choose another place"
        )
    with held(target) as partial, explained(target):
        empty(partial)
        begin(partial, making, files)
        try:
            yield partial
            sync(partial)
        except BaseException:
            with suppress(OSError):  # the error that stopped the work is the one to tell
                empty(partial)
                os.rmdir(partial)
            raise
        put(target, force=force, kinds=kinds)


def unfinished(target: Path) -> dict[str, Any] | None:
    """The first line of the journal of a stopped run in `target`.partial; None when there is none.

    Raises TargetError when another process is at it, or when anything there is not of such a run.
    """
    partial = partial_of(target)
    with explained(target):
        if lstat(partial) is None:
            return None
        with hold(partial, os.O_RDONLY | os.O_DIRECTORY):
            return journal_head(partial)


@contextmanager
def held(target: Path) -> Iterator[Path]:
    """`target`.partial, made where it is missing, for this process alone. Raises TargetError as `unfinished` does."""
    partial = partial_of(target)
    with ExitStack() as stack:
        with explained(target):
            make_directory(target.parent)
            targets.step(f"make {partial.name}")
            with suppress(FileExistsError):
                os.mkdir(partial)
            stack.enter_context(hold(partial, os.O_RDONLY | os.O_DIRECTORY))
            journal_head(partial)
        yield partial


def begin(partial: Path, making: str, files: Iterable[str], **more: Any) -> None:
    """Write the first line of the journal: what is being made, and of which files."""
    head = {"vindex": "unfinished", "making": making, "files": sorted(files), **more}
    write_bytes(partial / JOURNAL, orjson.dumps(head) + b"\n")


def empty(partial: Path) -> None:
    """Remove everything from a directory of ours, its journal last."""
    for name in sorted(os.listdir(partial), key=lambda name: (name == JOURNAL, name)):
        remove(partial / name)


def journal_head(directory: Path) -> dict[str, Any] | None:
    """The first line of a directory's journal, None in an empty one. Raises TargetError when it holds anything else."""
    head = _first_line(directory / JOURNAL)
    files = set() if head is None else set(head["files"])
    folders = {str(parent) for file in files for parent in Path(file).parents}
    foreign = first_foreign(directory, lambda path: path in files or (path == JOURNAL and head is not None), folders)
    if foreign is not None:
        raise TargetError(
            f"{directory} holds {foreign}, which is of no stopped run of this tool; move it away or "
            "choose another place"
        )
    return head


def _first_line(journal: Path) -> dict[str, Any] | None:
    """None when it is no journal of ours. One that was begun here and is damaged now belongs to a build."""
    found = lstat(journal)
    if found is None or not stat.S_ISREG(found.st_mode):
        return None
    with journal.open("rb") as file:
        line = file.readline(1 << 26)
    if not (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
        return None
    with suppress(orjson.JSONDecodeError):
        head = orjson.loads(line)
        files = head.get("files")
        if isinstance(head.get("making"), str) and isinstance(files, list) and all(isinstance(f, str) for f in files):
            return head
    return {"making": "build with a damaged journal", "files": sorted(VINDEX.files or ())}


def put(target: Path, *, force: bool | None, kinds: Sequence[Kind] = REPLACEABLE) -> None:
    """Let the finished `target`.partial, which this process holds, appear under its name in the place of what is there.

    Raises TargetError, with everything as it was, when that is not to be replaced or cannot be.
    """
    partial, place = partial_of(target), replacing_of(target)
    try:
        _check(target, force, (), kinds)
    except TargetError as error:
        reason = error if force else f"{target} appeared during the build"
        raise TargetError(f"{reason}; the new one is whole in {partial}") from error
    moves = _Moves()
    try:
        targets.step(f"make {place.name}")
        os.mkdir(place)
        moves.made = place
        with hold(place, os.O_RDONLY | os.O_DIRECTORY):
            moves.move(partial, place / NEW)
            moves.move(place / NEW / JOURNAL, place / JOURNAL)
            sync(place)
            if lstat(target) is None or not os.listdir(target):
                moves.move(place / NEW, target)
            elif not exchange(place / NEW, target):
                moves.move(target, place / OLD)
                moves.move(place / NEW, target)
    except OSError as error:
        moves.undo()
        raise TargetError(
            f"{target} cannot be put in place ({error.strerror}); the new one is whole in {partial}"
        ) from error
    try:
        sync(target.parent)
        _clear(place)
    except OSError as error:
        raise TargetError(
            f"{target} is new and whole; what it replaced is left in {place} and cannot be removed ({error.strerror}): "
            "the next run does that, or remove it yourself"
        ) from error


class _Moves:
    """Renames that can be taken back."""

    def __init__(self) -> None:
        self.made: Path | None = None
        self._done: list[tuple[Path, Path]] = []

    def move(self, source: Path, to: Path) -> None:
        targets.step(f"rename {source.name} to {to.name}")
        os.rename(source, to)
        self._done.append((source, to))

    def undo(self) -> None:
        for source, to in reversed(self._done):
            try:
                os.rename(to, source)
            except OSError as error:
                raise TargetError(
                    f"{source} is whole in {to} and cannot be put back ({error.strerror}): the next run does that, or "
                    "rename it yourself"
                ) from error
        if self.made:
            with suppress(OSError):
                os.rmdir(self.made)


def exchange(a: Path, b: Path) -> bool:
    """Let two names change places in one step. False where the system or the file system cannot."""
    targets.step(f"exchange {a.name} and {b.name}")
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def recover(target: Path) -> None:
    """Put right what a process left that died while `target` was being put in its place (`put`).

    Raises TargetError when another process is at it, or when `target`.replacing is something else.
    """
    place = replacing_of(target)
    if lstat(place) is None:
        return
    with hold(place, os.O_RDONLY | os.O_DIRECTORY):
        begun = _first_line(place / NEW / JOURNAL) is not None  # then nothing has happened to the target
        entries = os.listdir(place)
        if not (begun or not entries or _first_line(place / JOURNAL)) or not all(_is_half(place / n) for n in entries):
            raise TargetError(f"{place} is in the way and not of this tool; move it away or choose another place")
        if begun and lstat(partial_of(target)) is None:
            targets.step(f"rename {NEW} to {partial_of(target).name}")
            os.rename(place / NEW, partial_of(target))
        elif lstat(target) is None and lstat(place / NEW) is not None:
            targets.step(f"rename {NEW} to {target.name}")
            os.rename(place / NEW, target)
        sync(target.parent)
        _clear(place)


def _is_half(path: Path) -> bool:
    """Whether something in NAME.replacing is what `put` puts there."""
    is_kind = {NEW: stat.S_ISDIR, OLD: stat.S_ISDIR, JOURNAL: stat.S_ISREG}.get(path.name)
    return is_kind is not None and is_kind(os.lstat(path).st_mode)


def whereabouts(target: Path) -> str:
    """For a message that `target` is missing: where it is, when a process died while putting it in its place."""
    place = replacing_of(target)
    with suppress(OSError):
        for whole in (place / NEW, place / OLD):
            if whole.is_dir():
                return f"; it is whole in {whole}: repeat what made it, or rename that to {target.name}"
    return ""


def _clear(place: Path) -> None:
    """Remove a directory of two halves and a journal, the journal last."""
    for name in (NEW, OLD, JOURNAL):
        if lstat(place / name) is not None:
            remove(place / name)
    targets.step(f"remove {place.name}")
    os.rmdir(place)
