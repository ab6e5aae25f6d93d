"""What one deletion does when, and about how long each part of it takes: for a progress display, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from probes.deletion.bench import FROM_WEIGHTS, Bench
from vindex.progress import Advance

SECONDS = {
    "unpatched answers": 5, "attacks on the unpatched": 25, "generic text": 12, "keys in every layer": 5,
    "trial in layer": 10, "value in layer": 40, "what it says by itself": 20, "measuring": 5, "attacks on": 30,
    "controls for": 5,
}  # fmt: skip
"""By the beginning of a stage's name: of SmolLM2-135M on one thread. Any other stage takes one."""


@contextmanager
def staged(bench: Bench, advance: Advance, note: str = "") -> Iterator[None]:
    """Let the stages of `bench` be steps of `advance` inside the block: as many as the seconds that they should take.

    note: what is said before the name of each. At the end all is done, also what has told nothing.
    """
    now, left = 0, expected_seconds(bench)

    def step(seconds: int, told: str) -> None:
        nonlocal left
        seconds = min(seconds, left)
        left -= seconds
        advance(seconds, told)

    def tick(stage: str) -> None:
        nonlocal now
        step(now, note + stage)
        now = seconds_of(stage)

    bench.tick = tick
    yield
    step(left, note)


def expected_seconds(bench: Bench) -> int:
    """Of one fact by all methods of the bench."""
    return sum(map(seconds_of, expected(bench)))


def expected(bench: Bench) -> list[str]:
    """The beginnings of the names of the stages of one fact, in about the order in which they come."""
    attacks = bench.options.certificate
    trials = ["trial in layer"] * len(bench.layers)
    found = ["unpatched answers", *["attacks on the unpatched"] * attacks]
    for method in bench.options.methods or ("given",):
        if method == "forward":
            found += ["generic text", *(["keys in every layer", *trials] if len(trials) > 1 else [])]
            found += ["value in layer", "what it says by itself"]
        elif method != "given":
            found += [method, *(() if method in FROM_WEIGHTS else trials)]
        found += ["measuring", *["attacks on"] * attacks, "controls for"]
    return found


def seconds_of(stage: str) -> int:
    """About how long it takes."""
    return next((seconds for name, seconds in SECONDS.items() if stage.startswith(name)), 1)
