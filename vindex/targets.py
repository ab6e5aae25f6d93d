"""Everything that is written is written here: beside its place first, then put there in one step.

A file:
1. It is written under a fresh name beside its place (`.NAME.<8 hex digits>.new`, never through a link), synced, and
   renamed. A reader finds the old file or the new one.

A directory, NAME:
1. It is made in NAME.partial, which one process holds by a lock. A journal in it says which files it will have; only a
   directory with such a journal and nothing else in it is ever continued, emptied or removed.
2. When it is whole, NAME.replacing is made and takes the new directory (as `new`) and then its journal.
3. `new` and NAME change places in one step (renameat2 with RENAME_EXCHANGE). Where the system cannot do that, NAME
   becomes NAME.replacing/old first. An error up to here is undone, step by step.
4. NAME.replacing goes, its journal last.
A process may die between any two of these steps. NAME is then the old directory or the new one, or (3, without the
exchange) missing for a moment; `recover`, which every later run calls first, puts it back and removes what is left.

What stands under NAME is only ever replaced when this tool made all of it (`Kind`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from vindex.errors import TargetError
from vindex.format import FILES, INDEX, SUMS

JOURNAL = "journal.jsonl"
BEGINNING = b'{"vindex":"unfinished",'  # of the first line of every journal
NEW, OLD = "new", "old"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.new")
PENDING = f".{SUMS.name}.pending"  # the next one, until the file of which it has a new line is there (checksums.py)
BAKED, HISTORY = "baked_gates.json", "vindex_patches"
TRAINING, STATE = "training.json", "training_state.safetensors"
GATE_FILES = (
    "lambda_logits.pt",
    "lambda_logits.safetensors",
    "neuron_indices.json",
    "gate_stats.json",
    "selected_thresholds.txt",
)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)


class Kind(NamedTuple):
    """What this tool makes: the names that tell it, and the only files and directories that it may hold."""

    name: str
    marks: tuple[str, ...]
    files: frozenset[str] | None = None
    """None: plain files of any name."""
    folders: frozenset[str] = frozenset()

    def allows(self, file: str) -> bool:
        """Whether a plain file of this path belongs to it."""
        return self.files is None or file in self.files


VINDEX = Kind("vindex", (SUMS.name, INDEX.name), frozenset({*(spec.name for spec in FILES), PENDING}))
BAKED_CHECKPOINT = Kind("baked checkpoint", (BAKED,), folders=frozenset({HISTORY}))
PATCHED_CHECKPOINT = Kind("patched checkpoint", (HISTORY,), folders=frozenset({HISTORY}))
REPLACEABLE = (VINDEX, BAKED_CHECKPOINT, PATCHED_CHECKPOINT)
_TRAINED = frozenset({*GATE_FILES, TRAINING, STATE})
TRAINED_GATES = (Kind("trained gates", (TRAINING,), _TRAINED), Kind("stopped training", (STATE,), _TRAINED))


def step(what: str) -> None:
    """Called before every change on the disk, with what it is; tests put a function here that stops at one of them."""


# ---- files


def check_file(path: Path, *, or_stdout: bool = False) -> None:
    """Raise TargetError unless a file can be written at `path`: in a directory that is there, and over nothing but a
    plain file. A link is never followed, nor replaced.

    or_stdout: whether the message may say that - stands for stdout.
    """
    other = "name a plain file" + (", or - for stdout" if or_stdout else "")
    with _explained_file(path):
        found = _lstat(path) if path.name else path.stat()
        if found is not None and stat.S_ISLNK(found.st_mode):
            raise TargetError(f"{path}: is a symbolic link, which is not followed; {other}")
        if (found is not None and stat.S_ISDIR(found.st_mode)) or path.name == "..":
            raise TargetError(f"{path}: is a directory; name a file in it")
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise TargetError(f"{path}: is a device, a pipe or a socket; {other}")
        if not path.parent.is_dir():
            raise TargetError(f"{path}: the directory {path.parent} does not exist; make it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise TargetError(f"{path}: cannot be written: {path.parent} is read-only; choose another place")


@contextmanager
def written(path: Path) -> Iterator[BufferedRandom]:
    """A file to write and read, which appears at `path` when this is left without an error, whole, or not at all."""
    check_file(path)
    with _explained_file(path):
        _drop_leftovers(path)
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        step(f"create {beside.name}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(beside, flags, 0o666), "w+b") as file:
            try:
                with suppress(OSError):  # only tells others that this process is alive
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield file
                file.flush()
                step(f"sync {beside.name}")
                os.fsync(file.fileno())
                step(f"rename {beside.name} to {path.name}")
                os.replace(beside, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(beside)
                raise
        sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file, or nothing. Raises TargetError, as `written` does."""
    with written(path) as file:
        step(f"write {path.name}")
        file.write(content)


def write_json(path: Path, record: Any, *, indent: bool = False) -> None:
    """Write a record as a file of JSON, whole or not at all."""
    write_bytes(path, orjson.dumps(record, option=orjson.OPT_INDENT_2 if indent else 0) + b"\n")


def _drop_leftovers(path: Path) -> None:
    """Remove what processes that were killed left beside a file; one that is alive holds a lock on its own."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.new")
    for name in os.listdir(path.parent):
        if ours.fullmatch(name):
            with suppress(OSError, TargetError), _locked(path.parent / name, os.O_RDONLY | os.O_NONBLOCK):
                step(f"remove {name}")
                os.unlink(path.parent / name)


def is_left_over(path: Path) -> bool:
    """Whether this is a file that a killed process left; the next one that writes there removes it."""
    plain = path.is_file() and not path.is_symlink()
    return plain and (path.name == PENDING or TEMPORARY.fullmatch(path.name) is not None)


@contextmanager
def _explained_file(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TargetError(f"{path}: cannot be written: {error.strerror or error}") from error


# ---- directories


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
    found = _lstat(target)
    if found is None:
        return
    if stat.S_ISLNK(found.st_mode):
        raise TargetError(f"{target} is a symbolic link, which is not followed; choose another -o")
    if not stat.S_ISDIR(found.st_mode):
        raise TargetError(f"{target} already exists and is not a directory; choose another -o")
    for source in reads:
        there = Path(os.path.realpath(source))
        if any(os.path.samestat(found, os.stat(place)) for place in (there, *there.parents) if place.exists()):
            raise TargetError(f"{target} is, or holds, {source}, which is being read; choose another -o")
    if not os.listdir(target):
        return
    if force is None:
        raise TargetError(f"{target} already exists; choose another -o")
    if against := _against(target, kinds):
        raise TargetError(f"{target} already exists and {against}, so it is not replaced; choose another -o")
    if not force:
        raise TargetError(f"{target} already exists; choose another -o, or add --force to replace it")


def _against(directory: Path, kinds: Sequence[Kind]) -> str | None:
    """What speaks against replacing a directory; None when it is of one of these kinds and holds nothing else."""
    entries = set(os.listdir(directory))
    likely = [kind for kind in kinds if entries.issuperset(kind.marks)]
    if not likely:
        return f"is nothing that this tool made ({', '.join(kind.name for kind in kinds)})"
    foreign = [_foreign(directory, kind.allows, kind.folders) for kind in likely]
    return f"holds {foreign[0]}, which this tool did not write" if all(foreign) else None


def _foreign(directory: Path, allows: Callable[[str], bool], folders: Collection[str], inside: str = "") -> str | None:
    """The first entry that is no plain file with an allowed path, nor a directory of these; None when there is none."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = inside + entry.name
            if entry.is_dir(follow_symlinks=False) and path in folders:
                if found := _foreign(directory / entry.name, allows, folders, path + "/"):
                    return found
            elif not entry.is_file(follow_symlinks=False) or not (allows(path) or TEMPORARY.fullmatch(entry.name)):
                return path
    return None


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
            f"{partial_of(target)} is an unfinished {before['making']}; finish or remove it, or choose another -o"
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
        if _lstat(partial) is None:
            return None
        with _locked(partial, os.O_RDONLY | os.O_DIRECTORY):
            return journal_head(partial)


@contextmanager
def held(target: Path) -> Iterator[Path]:
    """`target`.partial, made where it is missing, for this process alone. Raises TargetError as `unfinished` does."""
    partial = partial_of(target)
    with ExitStack() as stack:
        with explained(target):
            make_directory(target.parent)
            step(f"make {partial.name}")
            with suppress(FileExistsError):
                os.mkdir(partial)
            stack.enter_context(_locked(partial, os.O_RDONLY | os.O_DIRECTORY))
            journal_head(partial)
        yield partial


def begin(partial: Path, making: str, files: Iterable[str], **more: Any) -> None:
    """Write the first line of the journal: what is being made, and of which files."""
    head = {"vindex": "unfinished", "making": making, "files": sorted(files), **more}
    write_bytes(partial / JOURNAL, orjson.dumps(head) + b"\n")


def empty(partial: Path) -> None:
    """Remove everything from a directory of ours, its journal last."""
    for name in sorted(os.listdir(partial), key=lambda name: (name == JOURNAL, name)):
        _remove(partial / name)


def journal_head(directory: Path) -> dict[str, Any] | None:
    """The first line of a directory's journal, None in an empty one. Raises TargetError when it holds anything else."""
    head = _first_line(directory / JOURNAL)
    files = set() if head is None else set(head["files"])
    folders = {str(parent) for file in files for parent in Path(file).parents}
    foreign = _foreign(directory, lambda path: path in files or (path == JOURNAL and head is not None), folders)
    if foreign is not None:
        raise TargetError(
            f"{directory} holds {foreign}, which is of no stopped run of this tool; move it away or choose another -o"
        )
    return head


def _first_line(journal: Path) -> dict[str, Any] | None:
    """None when it is no journal of ours. One that was begun here and is damaged now belongs to a build."""
    found = _lstat(journal)
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
        step(f"make {place.name}")
        os.mkdir(place)
        moves.made = place
        with _locked(place, os.O_RDONLY | os.O_DIRECTORY):
            moves.move(partial, place / NEW)
            moves.move(place / NEW / JOURNAL, place / JOURNAL)
            sync(place)
            if _lstat(target) is None or not os.listdir(target):
                moves.move(place / NEW, target)
            elif not _exchange(place / NEW, target):
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
        step(f"rename {source.name} to {to.name}")
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


def _exchange(a: Path, b: Path) -> bool:
    """Let two names change places in one step. False where the system or the file system cannot."""
    step(f"exchange {a.name} and {b.name}")
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
    if _lstat(place) is None:
        return
    with _locked(place, os.O_RDONLY | os.O_DIRECTORY):
        begun = _first_line(place / NEW / JOURNAL) is not None  # then nothing has happened to the target
        entries = os.listdir(place)
        if not (begun or not entries or _first_line(place / JOURNAL)) or not all(_is_half(place / n) for n in entries):
            raise TargetError(f"{place} is in the way and not of this tool; move it away or choose another -o")
        if begun and _lstat(partial_of(target)) is None:
            step(f"rename {NEW} to {partial_of(target).name}")
            os.rename(place / NEW, partial_of(target))
        elif _lstat(target) is None and _lstat(place / NEW) is not None:
            step(f"rename {NEW} to {target.name}")
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
        if _lstat(place / name) is not None:
            _remove(place / name)
    step(f"remove {place.name}")
    os.rmdir(place)


def _remove(path: Path) -> None:
    """Remove a file, a link (never what it leads to), or a directory with all that is in it."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        step(f"remove {path.name}")
        os.unlink(path)
        return
    for name in sorted(os.listdir(path)):
        _remove(path / name)
    step(f"remove {path.name}")
    os.rmdir(path)


# ---- what both need


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[None]:
    """Hold the lock of a file or directory, not of what a link leads to; the kernel lets go when the process ends."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise TargetError(f"{path} is in the way and no directory; move it away or choose another -o") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TargetError(f"another build is writing {path}; wait for it or choose another -o") from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let no other process change a directory in place meanwhile. Raises TargetError when one is at it."""
    with explained(directory), _locked(directory.resolve(), os.O_RDONLY | os.O_DIRECTORY):
        yield


def make_directory(directory: Path) -> None:
    """Make a directory and those above it where they are missing, of which a path may name thousands."""
    for place in reversed([directory, *directory.parents]):
        if not place.is_dir():
            with suppress(FileExistsError):  # another process was faster
                os.mkdir(place)


def sync(directory: Path) -> None:
    """Make the names in a directory durable."""
    step(f"sync {directory.name}")
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lstat(path: Path) -> os.stat_result | None:
    """What is at a path, not what a link there leads to; None when nothing is."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


@contextmanager
def explained(target: Path, again: str = "repeat") -> Iterator[None]:
    """Turn what the operating system says about a target into one line. again: what to do when there is room."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f"the disk is full while writing {target}; make room and {again}"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            advice = f"{target.parent} cannot be written to ({error.strerror}); choose another -o"
        else:
            advice = f"{target} cannot be written ({error.strerror or error}); {again}, or choose another -o"
        raise TargetError(advice) from error
