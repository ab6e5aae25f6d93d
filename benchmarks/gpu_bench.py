"""Where a stage of benchmarks/gpu.py measures, and what it measures on."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu import Row
from benchmarks.synthetic import QWEN3_8B, Shapes

TOLERANCE = 1e-4


class Sizes(NamedTuple):
    """What a run measures on."""

    shapes: Shapes
    layers: int
    features: int
    repeat: int
    square: int
    """Side of the matrices whose product shows the machine's rate."""


SIZES = {
    "cuda": Sizes(QWEN3_8B, 4, 128, 5, 8192),
    "quick": Sizes(QWEN3_8B._replace(vocabulary=32768), 2, 128, 3, 8192),
    "cpu": Sizes(Shapes(512, 1024, 4096), 2, 24, 1, 512),
}


@dataclass
class Bench:
    """Where a stage measures, and where its rows go as soon as they are known."""

    stage: str
    device: str
    sizes: Sizes
    rows: Path
    scratch: Path

    def say(self, what: str, value: float | int | str, unit: str = "", note: str = "") -> None:
        with self.rows.open("a") as file:
            file.write(json.dumps(Row(self.stage, what, value, unit, note)) + "\n")

    def milliseconds(self, work: Callable[[], object], repeat: int | None = None) -> float:
        """Median of the repeats after one to warm up, from before the call to when the device has done it."""
        times = []
        for _ in range(1 + (repeat or self.sizes.repeat)):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times[1:])

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def attempt(self, what: str, work: Callable[[], object]) -> None:
        """Do it; an error becomes a row, and the stage goes on."""
        try:
            work()
        except Exception as error:
            first = str(error).strip().splitlines()[:1]
            self.say(what, "FAILED", "", f"{type(error).__name__}: {first[0] if first else ''}"[:150])
