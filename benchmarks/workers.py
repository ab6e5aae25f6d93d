"""Builds by one and by two dask workers of one thread each, in turns: wall time, speed-up, the same bytes.

    python -m benchmarks.workers [--repeat 3]

Eight of the 28 layers of Qwen3-1.7B, hidden size 2048 and 6144 neurons, with a fifth of its vocabulary. Starting the
workers (seconds, once for a build) is not timed; the first of the repetitions warms them up and is not counted. Hashing
and committing are, in the coordinator.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.synthetic import Shapes, write_checkpoint
from extract.checkpoint import open_checkpoint
from extract.cluster import dask_engine
from extract.pipeline import build
from vindex.options import BuildOptions

SHAPES = Shapes(2048, 6144, 32768)


def run(source: Path, target: Path, engine) -> float:
    opened, options = open_checkpoint(str(source)), BuildOptions(threads=1)
    started = time.perf_counter()
    build(opened, target, options, lambda *_: lambda _: None, resume=False, force=True, engine=engine)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="keep the checkpoint in this directory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = arguments.scratch or Path(temporary)
        source = where / f"{arguments.layers}-layers-{SHAPES.hidden}"
        if not source.exists():
            write_checkpoint(source, SHAPES, arguments.layers)
        times: dict[int, list[float]] = {1: [], 2: []}
        with (
            dask_engine(str(source), None, scheduler=None, workers=1) as one,
            dask_engine(str(source), None, scheduler=None, workers=2) as two,
        ):
            for _ in range(arguments.repeat + 1):
                for workers, engine in ((1, one), (2, two)):
                    times[workers].append(run(source, Path(temporary) / f"{workers}.vindex", engine))
        files = sorted(file.name for file in (Path(temporary) / "1.vindex").glob("*.bin"))
        same = all(
            (Path(temporary) / "1.vindex" / name).read_bytes() == (Path(temporary) / "2.vindex" / name).read_bytes()
            for name in files
        )
    for workers, taken in times.items():
        print(f"{workers} workers: " + "  ".join(f"{seconds:.1f}" for seconds in taken[1:]) + " s")
    print(f"speed-up of the best {min(times[1][1:]) / min(times[2][1:]):.2f}; {len(files)} .bin files equal: {same}")


if __name__ == "__main__":
    main()
