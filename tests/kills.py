"""Stop a piece of work at each of its steps (`vindex.targets.step`), by death or by an error."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vindex import targets
from vindex.errors import TargetError

ERRNOS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EINVAL, errno.ENOTEMPTY)
DIED, DONE = 9, 0


def steps_of(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the steps of a piece of work, which is done."""
    names: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(targets, "step", names.append)
        work()
    return names


def counting(number: int, then: Callable[[], None]) -> Callable[[str], None]:
    """A `step` that calls `then` before step `number`."""
    left = iter(range(number + 1))

    def step(what: str) -> None:
        if next(left, None) == number:
            then()

    return step


def die_at(number: int, work: Callable[[], object]) -> bool:
    """Do a piece of work in a process of its own that is gone before its step `number`; whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            targets.step = counting(number, lambda: os._exit(DIED))
            work()
            os._exit(DONE)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (DIED, DONE)
    return status == DIED


def fail_at(number: int, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Do a piece of work in which step `number` is an error of the operating system; the one line it gives."""
    code = ERRNOS[number % len(ERRNOS)]

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(targets, "step", counting(number, fail))
        try:
            work()
        except TargetError as error:
            assert "\n" not in str(error)
            return str(error)
    return None


def tree(place: Path) -> dict[str, bytes] | bytes | None:
    """What stands at a place: the files of a directory, the content of a file, or nothing."""
    if not place.exists():
        return None
    if place.is_file():
        return place.read_bytes()
    files = (path for path in sorted(place.rglob("*")) if path.is_file())
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def each_way(count: int, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """For each of `count` steps: die there, then fail there. After either, what stopped is handed to the caller."""
    for number in range(count):
        assert die_at(number, work)
        yield f"died at step {number}"
        said = fail_at(number, work, monkeypatch)
        yield f"step {number}: {said}"
