"""What long work tells, and Ctrl-C in the middle of it."""

from __future__ import annotations

import signal
from collections.abc import Mapping


class Told:
    """A `Progress` that adds up; where a stage has done so much, Ctrl-C comes, as the signal that it is."""

    def __init__(self, stop: Mapping[str, int] | None = None) -> None:
        self.stop, self.total, self.done = dict(stop or {}), {}, {}

    def __call__(self, stage, total):
        self.total[stage], self.done[stage] = total, 0

        def advance(count, note="", /):
            self.done[stage] += count
            if self.done[stage] >= self.stop.get(stage, total + 1):
                signal.raise_signal(signal.SIGINT)

        return advance
