"""How long work tells what it has done: one style for every function of the three packages.

A function that takes `progress` calls it at the beginning of each stage with its name and how many steps it has, and
gets a function back, to be called with the number of steps done since and, where there is something to say, a note.
"""

from __future__ import annotations

from typing import Protocol


class Advance(Protocol):
    """So many more steps of a stage are done."""

    def __call__(self, count: int, note: str = "", /) -> object: ...


class Progress(Protocol):
    """A stage begins. total: how many steps it has, None where that is not known."""

    def __call__(self, stage: str, total: int | None, /) -> Advance: ...


def unseen(count: int, note: str = "", /) -> None:
    """An `Advance` for work that nobody watches."""


def silent(stage: str, total: int | None) -> Advance:  # noqa: ARG001
    """A `Progress` for work that nobody watches."""
    return unseen
