"""What each command costs beside another, in processor seconds of one run, so that a busy machine will do.

    python -m benchmarks.ratios MODEL [--layers-of CHECKPOINT]

1. The probe suite beside a forward pass and the same statistics (benchmarks/probe.py).
2. `verify --source` and a cold `score` beside the build of MODEL, and an interpreter with numpy beside `score`: each a
   process of its own, rounds interleaved, the least of each.
3. Builds of 2, 4 and 8 layers of CHECKPOINT, such as `python -m benchmarks.build --layers 8 --scratch DIR` leaves.
4. Builds of one layer of 4096 × 3072, 6144 and 12288, with a small vocabulary.

Builds of 3. and 4. run in this process, without what it takes to start one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import extract
from benchmarks.build import cost
from benchmarks.probe import times
from benchmarks.synthetic import Shapes, write_checkpoint

ROUNDS = 2
LAYERS, NEURONS = (2, 4, 8), (3072, 6144, 12288)
VOCABULARY = 16384


def interleaved(jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The least processor seconds of each job, of all its threads and processes."""
    rounds = [{name: cost(job).processor for name, job in jobs.items()} for _ in range(ROUNDS)]
    return {name: min(found[name] for found in rounds) for name in jobs}


def command(*words: object) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)


def commands(model: str, target: Path) -> None:
    vindex = ("-m", "vindex")
    found = interleaved(
        {
            "build": command(*vindex, "build", model, "-o", target, "--threads", 1, "--force"),
            "verify --source": command(*vindex, "verify", target, "--source", model),
            "score, cold": command(*vindex, "score", target, " Paris"),
            "python -c 'import numpy'": command("-c", "import numpy"),
        }
    )
    for name, seconds in found.items():
        print(f"  {name:26}{seconds:8.2f} s{seconds / found['build']:8.3f} × build", flush=True)


def shallower(source: Path, layers: int, directory: Path) -> Path:
    """The same checkpoint with its first layers only, by links."""
    directory.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": layers}
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    dropped = tuple(f"model.layers.{layer}." for layer in range(layers, max(LAYERS)))
    kept = {name: file for name, file in index.items() if not name.startswith(dropped)} if dropped else index
    for file in {*kept.values(), "tokenizer.json"}:
        (directory / file).symlink_to((source / file).resolve())
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": kept}))
    return directory


def growth(what: str, checkpoints: dict[int, Path], target: Path) -> None:
    """Builds of these checkpoints, each beside the first."""
    jobs = {
        str(size): lambda source=source: extract.build(source, target, threads=1, force=True)
        for size, source in checkpoints.items()
    }
    found = interleaved(jobs)
    first, least = next(iter(checkpoints)), next(iter(found.values()))
    for size, seconds in zip(checkpoints, found.values(), strict=True):
        print(f"  {size:6} {what}{seconds:8.2f} s{seconds / least:7.2f} × for {size / first:.0f} ×", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers-of", metavar="CHECKPOINT", type=Path)
    asked = parser.parse_args()
    times(asked.model, "float32")
    with tempfile.TemporaryDirectory() as folder:
        here, target = Path(folder), Path(folder) / "target.vindex"
        commands(asked.model, target)
        if asked.layers_of:
            growth("layers", {n: shallower(asked.layers_of, n, here / f"{n}") for n in LAYERS}, target)
        shapes = {n: Shapes(4096, n, VOCABULARY) for n in NEURONS}
        growth("neurons", {n: write_checkpoint(here / f"of-{n}", of, 1) for n, of in shapes.items()}, target)


if __name__ == "__main__":
    main()
