"""From a cold process to a printed answer: `vindex score` and `vindex --help` beside a bare interpreter.

    python -m benchmarks.score [--layers 36]

The vindex has Qwen3-8B's shapes, random numbers, and a tokenizer of Qwen3's size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.synthetic import QWEN3_8B, write_tokenizer
from vindex import format as form
from vindex.checksums import render_sums
from vindex.index import EffectiveRank, Index, NormEntry, Projection, layer_entry
from vindex.schema import to_json

FEATURES = 128
SCALE = 0.01  # of random numbers: rows and the mean embedding are about as long as real ones


def write_vindex(directory: Path, layers: int) -> Path:
    """A vindex that opens and scores; its checksums are of nothing, which only `verify` would mind."""
    directory.mkdir()
    rank, block = EffectiveRank(FEATURES, FEATURES), FEATURES * QWEN3_8B.hidden * form.HALF
    entries = tuple(layer_entry(layer, FEATURES, layer * block, QWEN3_8B.hidden, rank) for layer in range(layers))
    norms = (NormEntry("norm", 0, QWEN3_8B.hidden),)
    sizes = (layers, FEATURES, QWEN3_8B.hidden, QWEN3_8B.neurons, QWEN3_8B.vocabulary)
    flags = ("f16", "none", "browse", False, True, 1.0, form.META_TOP_K)
    head = ({"name": form.FORMAT_NAME, "version": form.FORMAT_VERSION}, form.LARQL_VERSION, "random", "qwen3")
    index = Index(*head, *flags, *sizes, entries, norms, Projection("lm_head", True, False), {}, {}, {})
    index = replace(index, has_gate_stats=True)
    random = np.random.default_rng(0)
    for spec in form.files_of(index):
        if spec.shape and spec.dtype:
            with (directory / spec.name).open("wb") as file:
                for _ in range(spec.shape(index)[0]):
                    numbers = SCALE * random.standard_normal(spec.shape(index)[1:], np.float32)
                    file.write(numbers.astype(spec.dtype).tobytes())
        elif spec.byte_size:
            header = np.array((form.META_MAGIC, form.META_VERSION, layers, form.META_TOP_K), form.META_HEADER).tobytes()
            (directory / spec.name).write_bytes(header + bytes(spec.byte_size(index) - len(header)))
        else:
            (directory / spec.name).write_text("{}")
    write_tokenizer(directory / form.TOKENIZER.name, QWEN3_8B.vocabulary)
    digests = {spec.name: "0" * 64 for spec in form.files_of(index) if spec is not form.SUMS}
    payload = {spec.name: "0" * 64 for spec in form.files_of(index) if form.is_payload(spec)}
    (directory / form.INDEX.name).write_bytes(to_json(replace(index, checksums=payload)))
    (directory / form.SUMS.name).write_text(render_sums(digests))
    return directory


def best_of(count: int, *command: str) -> float:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        vindex = write_vindex(Path(scratch) / "random.vindex", arguments.layers)
        for name, command in {
            "python -c pass": ("-c", "pass"),
            "python -c 'import numpy'": ("-c", "import numpy"),
            "vindex --help": ("-m", "vindex", "--help"),
            'vindex score " Paris"': ("-m", "vindex", "score", str(vindex), " Paris"),
        }.items():
            print(f"{name:28}{best_of(5, *command):6.2f} s", flush=True)


if __name__ == "__main__":
    main()
