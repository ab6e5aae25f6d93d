"""A build of Qwen3-8B's shapes: memory, and time beside the kernels nobody can avoid.

    python -m benchmarks.build [--layers 2 8] [--threads 2] [--scratch DIR]

For each number of layers: a random sharded bfloat16 checkpoint is written, its kernels are timed bare (reading every
byte, one Gram product WᵀW for each gate_proj and down_proj, one product of all directions with each vocabulary matrix),
and `vindex build` runs in a process of its own. Both clocks are shown: on a machine that others use as well, the
ratio of processor seconds is the one to read. Needs about 12 GB of disk; --scratch keeps the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.synthetic import QWEN3_8B, write_checkpoint
from extract.checkpoint import open_checkpoint
from extract.svd import gram_matrix

FEATURES = 128


class Cost(NamedTuple):
    """Seconds of wall clock and of processor time, of all threads and child processes."""

    wall: float
    processor: float

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.wall + other.wall, self.processor + other.processor)

    def times(self, count: float) -> Cost:
        return Cost(self.wall * count, self.processor * count)


class Kernels(NamedTuple):
    """The bare work. `gram` is one full product each, `half_gram` the rank-k update that a build uses."""

    read: Cost
    gram: Cost
    half_gram: Cost
    project: Cost


def cost(work, repeats: int = 1) -> Cost:
    """The least of several runs, in each of the two clocks."""
    costs = []
    for _ in range(repeats):
        started, used = time.perf_counter(), sum(os.times()[:4])
        work()
        costs.append(Cost(time.perf_counter() - started, sum(os.times()[:4]) - used))
    return least(costs)


def least(costs: Iterable[Cost]) -> Cost:
    return Cost(*(min(clock) for clock in zip(*costs, strict=True)))


def read_all(directory: Path) -> None:
    buffer = bytearray(1 << 24)
    for file in directory.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def bare_kernels(source: Path, layers: int) -> Kernels:
    """Time each kind of kernel on one layer's weights and one block of vocabulary, times how many there are."""
    gate = open_checkpoint(str(source)).tensor("model.layers.0.mlp.gate_proj.weight")
    gram = cost(lambda: gate.T @ gate, 3)
    half_gram = cost(lambda: gram_matrix(gate), 3)
    directions, rows = torch.randn(FEATURES, QWEN3_8B.hidden), torch.randn(4096, QWEN3_8B.hidden)
    project = cost(lambda: [directions @ rows.T for _ in range(10)], 3).times(0.1)
    blocks = QWEN3_8B.vocabulary / len(rows) * layers * 2
    return Kernels(
        cost(lambda: read_all(source)), gram.times(2 * layers), half_gram.times(2 * layers), project.times(blocks)
    )


def run(layers: int, threads: int, where: Path) -> dict:
    source, target = where / f"{layers}-layers", where / f"{layers}.vindex"
    if not source.exists():
        write_checkpoint(source, QWEN3_8B, layers)
    torch.set_num_threads(threads)
    before = bare_kernels(source, layers)
    build = f"vindex build {source} -o {target} --threads {threads} --force".split()
    command = [sys.executable, "-m", *build]
    whole = cost(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    after = bare_kernels(source, layers)
    kernels = Kernels(*(least(pair) for pair in zip(before, after, strict=True)))
    manifest = json.loads((target / "manifest.json").read_text())
    return {
        "build": whole,
        "kernels": kernels,
        "full": kernels.read + kernels.gram + kernels.project,
        "half": kernels.read + kernels.half_gram + kernels.project,
        "peak_bytes": manifest["peak_memory_bytes"],
        "worst_certificate": max(certificate["max_residual"] or 0.0 for certificate in manifest["certificates"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="keep the checkpoints in this directory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = arguments.scratch or Path(temporary)
        print("layers clock       build   read   Gram   half project  ÷ full  ÷ half")
        for layers in arguments.layers:
            r = run(layers, arguments.threads, where)
            for clock in Cost._fields:
                build, full, half = (getattr(r[name], clock) for name in ("build", "full", "half"))
                read, gram, half_gram, project = (getattr(kernel, clock) for kernel in r["kernels"])
                print(
                    f"{layers:6} {clock:9} {build:7.1f} {read:6.1f} {gram:6.1f} {half_gram:6.1f} {project:7.1f}"
                    f" {build / full:7.2f} {build / half:7.2f}"
                )
            print(f"peak {r['peak_bytes'] / 1e6:.0f} MB, worst certificate {r['worst_certificate']:.1e}", flush=True)


if __name__ == "__main__":
    main()
