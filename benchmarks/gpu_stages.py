"""The stages of benchmarks/gpu.py, each in a process of its own: `python -m benchmarks.gpu_stages NAME --rows FILE`."""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import SIZES, Bench
from benchmarks.gpu_build import build
from benchmarks.gpu_commands import atlas, tests
from benchmarks.gpu_directions import methods
from extract.device import fetched, page_locked, wide
from extract.stores.safetensors import fresh


def machine(bench: Bench) -> None:
    """Versions, card and driver, and the two rates that everything else is measured against."""
    names = ("torch", "transformers", "numpy", "accelerate")
    bench.say("Python", platform.python_version(), "", ", ".join(f"{name} {metadata.version(name)}" for name in names))
    bench.say("CPU threads", torch.get_num_threads(), "", platform.processor() or platform.machine())
    if bench.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        bench.say("card", card.name, "", f"{card.total_memory / 1e9:.0f} GB, {card.multi_processor_count} SMs")
        bench.say("CUDA of torch", str(torch.version.cuda), "", f"TF32 {torch.backends.cuda.matmul.fp32_precision}")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        bench.attempt("driver", lambda: bench.say("driver", subprocess.check_output(query, text=True).strip()))
    side = bench.sizes.square
    big = torch.empty(side, side, 4, device=bench.device)
    spent = bench.milliseconds(lambda: big.clone())
    bench.say("copy on the device", 2 * big.nbytes / spent / 1e6, "GB/s", "bytes read and written")
    for dtype, size in ((torch.bfloat16, side), (torch.float32, side // 2), (torch.float64, side // 2)):
        left, right = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
        spent = bench.milliseconds(lambda left=left, right=right: left @ right)
        bench.say(
            f"product in {str(dtype).removeprefix('torch.')}", 2 * size**3 / spent / 1e9, "TFLOP/s", f"side {size}"
        )


def transfer(bench: Bench) -> None:
    """One stored weight's way up."""
    hidden, neurons, _ = bench.sizes.shapes
    stored = torch.randn(neurons, hidden).bfloat16()
    path = bench.scratch / "weight.bin"
    stored.view(torch.uint8).numpy().tofile(path)

    def say(what: str, work: Callable[[], object], note: str = "") -> None:
        def measured() -> None:
            spent = bench.milliseconds(work)
            bench.say(what, spent, "ms", f"{stored.nbytes / spent / 1e6:.1f} GB/s of stored bytes{note}")

        bench.attempt(what, measured)

    size = stored.nbytes
    say("read into fresh memory, small pages", lambda: _read(path, bytearray(size)))
    say("read into fresh memory, huge pages", lambda: _read(path, fresh(size).numpy()), "; as built for a CPU")
    say("up from memory of small pages", lambda: wide(stored, bench.device), "; by a page-locked copy")
    if bench.device != "cuda":
        return

    def straight() -> torch.Tensor:
        memory = page_locked(size)
        _read(path, memory.numpy())
        return wide(memory.view(torch.bfloat16).view(neurons, hidden), "cuda")

    locked = page_locked(size).view(torch.bfloat16).view(neurons, hidden)
    there = locked.to("cuda")
    say("read into page-locked memory", lambda: _read(path, page_locked(size).numpy()))
    say("up from page-locked memory, widened there", lambda: wide(locked, "cuda"))
    say("read, up, widened there", straight, "; as built")
    say("float32, up from small pages", lambda: stored.float().to("cuda"), "; widened on the CPU")
    say("back to small pages", lambda: there.cpu())
    say("back to page-locked memory", lambda: fetched(there), "; as built")


def _read(path: Path, buffer: Any) -> None:
    view, done = memoryview(buffer).cast("B"), 0
    with path.open("rb", buffering=0) as opened:
        while done < len(view) and (count := opened.readinto(view[done:])):
            done += count


STAGES = {each.__name__: each for each in (machine, methods, transfer, build, tests, atlas)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    sizes = SIZES["cpu" if arguments.device == "cpu" else "quick" if arguments.quick else "cuda"]
    arguments.rows.unlink(missing_ok=True)
    STAGES[arguments.stage](Bench(arguments.stage, arguments.device, sizes, arguments.rows, arguments.scratch))


if __name__ == "__main__":
    main()
