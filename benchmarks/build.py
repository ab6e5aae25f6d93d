"""A build of Qwen3-8B's shapes: memory, and wall time beside the kernels nobody can avoid.

    python -m benchmarks.build [--layers 2 8] [--threads 2] [--scratch DIR]

For each number of layers: a random sharded bfloat16 checkpoint is written, its kernels are timed bare (reading every
byte, one Gram product WᵀW for each gate_proj and down_proj, one product of all directions with each vocabulary matrix),
and `vindex build` runs in a process of its own. Needs about 12 GB of disk; --scratch keeps the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.synthetic import QWEN3_8B, write_checkpoint
from extract.checkpoint import open_checkpoint
from extract.svd import gram_matrix

FEATURES = 128


class Kernels(NamedTuple):
    """Seconds of the bare work. `gram` is one full product each, `half_gram` the rank-k update that a build uses."""

    read: float
    gram: float
    half_gram: float
    project: float


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_all(directory: Path) -> None:
    buffer = bytearray(1 << 24)
    for file in directory.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def bare_kernels(source: Path, layers: int) -> Kernels:
    """Time each kind of kernel on one layer's weights and one block of vocabulary, times how many there are."""
    gate = open_checkpoint(str(source)).tensor("model.layers.0.mlp.gate_proj.weight")
    gram = min(seconds(lambda: gate.T @ gate) for _ in range(3))
    half_gram = min(seconds(lambda: gram_matrix(gate)) for _ in range(3))
    directions = torch.randn(FEATURES, QWEN3_8B.hidden)
    rows = torch.randn(4096, QWEN3_8B.hidden)
    product = min(seconds(lambda: directions @ rows.T) for _ in range(5))
    project = product * QWEN3_8B.vocabulary / len(rows) * layers * 2
    read = seconds(lambda: read_all(source))
    return Kernels(read, gram * 2 * layers, half_gram * 2 * layers, project)


def run(layers: int, threads: int, where: Path) -> dict:
    source, target = where / f"{layers}-layers", where / f"{layers}.vindex"
    if not source.exists():
        write_checkpoint(source, QWEN3_8B, layers)
    torch.set_num_threads(threads)
    before = bare_kernels(source, layers)
    command = [
        sys.executable,
        "-m",
        "vindex",
        "build",
        str(source),
        "-o",
        str(target),
        "--threads",
        str(threads),
        "--force",
    ]
    wall = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    after = bare_kernels(source, layers)
    kernels = Kernels(*(min(pair) for pair in zip(before, after, strict=True)))
    manifest = json.loads((target / "manifest.json").read_text())
    worst = max(certificate["max_residual"] or 0.0 for certificate in manifest["certificates"])
    bare = kernels.read + kernels.gram + kernels.project
    return {
        "layers": layers,
        "wall": wall,
        **kernels._asdict(),
        "ratio": wall / bare,
        "ratio_half_gram": wall / (bare - kernels.gram + kernels.half_gram),
        "peak_bytes": manifest["peak_memory_bytes"],
        "worst_certificate": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="keep the checkpoints in this directory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = arguments.scratch or Path(temporary)
        print("layers  wall s   read   Gram  (half)  project  ratio  (half)  peak MB")
        for layers in arguments.layers:
            r = run(layers, arguments.threads, where)
            print(
                f"{layers:6}{r['wall']:8.1f}{r['read']:7.1f}{r['gram']:7.1f}{r['half_gram']:8.1f}{r['project']:9.1f}"
                f"{r['ratio']:7.2f}{r['ratio_half_gram']:8.2f}{r['peak_bytes'] / 1e6:9.0f}   "
                f"worst certificate {r['worst_certificate']:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
