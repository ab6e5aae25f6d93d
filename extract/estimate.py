"""What a build will take, from config.json (or a GGUF's header) alone: blocks, bytes, operations, hours.

Operations are floating-point, a multiplication with its addition being two:
1. Directions of an (I, H) weight, n its shorter side and m the longer: the Gram matrix's upper panels m n² (1 + 1/16);
   block Lanczos to a basis of b = 7 F vectors 2 n² b, orthogonalised twice 4 n b²; certificate 4 I H F.
2. Tokens: every direction, and RANDOM_DIRECTIONS besides, meets every row of the vocabulary, 2 V H. What scores are
   judged by (docs/format.md) falls off on the way, but for the largest |z| of SAMPLE tokens: these meet every gate
   direction once more, 2 SAMPLE H.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from extract.checkpoint import Checkpoint, open_checkpoint
from extract.planning import DENSE_FEATURES, EXPERT_FEATURES
from extract.svd import FIRST_CHECK, GRAM_PANELS, top_directions
from extract.vocab import RUN, STEP, Spread, TopTokens, scores_of, unit_rows
from vindex.demo import or_bundled
from vindex.errors import CheckpointError, NumericError
from vindex.files import Kind, read_json
from vindex.format import HALF, META_COUNT, META_HEADER, META_TOP_K, RANDOM_DIRECTIONS, SAMPLE, meta_record
from vindex.hub import snapshot
from vindex.model_config import checked, mixture_of, positive, towers
from vindex.progress import Progress, silent
from vindex.results import Result

CONFIG = Kind(CheckpointError, "give a checkpoint, its config.json or a GGUF file")
WORKERS = (1, 2, 4, 8, 16, 32, 64)
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of one weight, by config.json's dtype
MEASURED_ROWS = 4096  # of the vocabulary, in a timed product


class Work(NamedTuple):
    """All blocks of one kind.

    shape: of the matrix each reads. features: directions in each block. read, written: bytes. flop: operations.
    """

    kind: str
    shape: tuple[int, int]
    features: int
    blocks: int
    read: int
    flop: float
    written: int


class Shapes(NamedTuple):
    """What config.json says of sizes. ffns: {neurons: how many FFNs, of a layer or an expert, have so many}."""

    hidden: int
    vocabulary: int
    layers: int
    experts: int
    ffns: Counter[int]
    weight_bytes: float


@dataclass(frozen=True, repr=False)
class Plan(Result):
    """What a build of one checkpoint will take. seconds: of one block of each kind, where they were timed."""

    checkpoint: str
    threads: int
    work: tuple[Work, ...]
    seconds: tuple[float, ...] | None = None

    def __repr__(self) -> str:
        blocks, read = sum(of.blocks for of in self.work), sum(of.read for of in self.work)
        return f"<plan of {Path(self.checkpoint).name}: {blocks:,} blocks, {read / 1e9:.3g} GB to read>"

    @property
    def hours(self) -> dict[int, float]:
        """{workers: wall time in hours}; empty where no block was timed."""
        return {count: hours(self.work, self.seconds, count) for count in WORKERS} if self.seconds else {}

    def rows(self) -> list[dict[str, Any]]:
        seconds: Sequence[float | None] = self.seconds or [None] * len(self.work)
        timed = [{} if each is None else {"seconds_per_block": each} for each in seconds]
        return [kind._asdict() | more for kind, more in zip(self.work, timed, strict=True)]

    def record(self) -> dict[str, Any]:
        return {"threads": self.threads, "work": self.rows(), "hours": {str(n): of for n, of in self.hours.items()}}


def plan(
    checkpoint: str | Path,
    *,
    features: int | None = None,
    measure: bool = False,
    threads: int = 1,
    progress: Progress = silent,
) -> Plan:
    """What a build of a checkpoint will take. No weight is read, and of a Hub model only config.json is downloaded.

    checkpoint: a directory, its config.json, a GGUF file, a Hub id, or "atlas". features: see BuildOptions. measure:
    time one block of each kind here, with so many threads. Raises CheckpointError or NumericError.
    """
    name = str(checkpoint)
    work = tuple(work_of(_shapes(or_bundled(name)), features))
    if not measure:
        return Plan(name, threads, work)
    advance, seconds = progress("measure", len(work)), []
    for kind in work:
        seconds.append(seconds_of(kind, threads))
        advance(1, kind.kind)
    return Plan(name, threads, work, tuple(seconds))


def _shapes(name: str) -> Shapes:
    """The sizes of what `name` stands for: from a GGUF's header, or from config.json here or on the Hub."""
    path = Path(name).expanduser()
    bare = path.is_dir() and not os.path.lexists(path / "config.json")
    if path.suffix == ".gguf" or (bare and any(path.glob("*.gguf"))):
        opened = open_checkpoint(name)
        return shapes_of(opened.config, name)._replace(weight_bytes=_bytes_of_a_weight(opened))
    if path.is_dir():
        path /= "config.json"
    elif not os.path.lexists(path):
        path = snapshot(name.removeprefix("hf://"), wanted=["config.json"]) / "config.json"
    config = read_json(path, CONFIG)
    if not isinstance(config, dict):
        raise CONFIG.refusal(path, "does not hold a JSON object")
    return shapes_of(config, name)


def _bytes_of_a_weight(checkpoint: Checkpoint) -> float:
    """Over all tensors: quantised ones take less than a byte."""
    size = sum(checkpoint.files.sizes[name] for name in checkpoint.weight_files)
    return size / sum(math.prod(info.shape) for info in checkpoint.tensors.values())


def shapes_of(config: dict[str, Any], name: str) -> Shapes:
    """The sizes in a config.json. Raises CheckpointError naming the key that is missing or no positive integer."""
    text = towers(checked(config, name))[-1]
    layers = positive(text, name, "num_hidden_layers")
    mixture = mixture_of(text, name) if text.get("num_experts") or text.get("num_local_experts") else None
    mixtures = layers - len(mixture.dense_layers) if mixture else 0
    ffns: Counter[int] = Counter()
    if mixture:
        ffns[mixture.neurons] += mixtures * mixture.num_experts
        if mixture.shared_neurons:
            ffns[mixture.shared_neurons] += mixtures
    if mixtures < layers:
        ffns[positive(text, name, "intermediate_size")] += layers - mixtures
    dtype = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    stored = 1 if config.get("quantization_config") else BYTES.get(str(dtype), 2)
    hidden, vocabulary = (positive(text, name, key) for key in ("hidden_size", "vocab_size"))
    return Shapes(hidden, vocabulary, layers, mixture.num_experts if mixture else 0, ffns, stored)


def work_of(shapes: Shapes, features: int | None) -> list[Work]:
    """The blocks of a build, by kind. features: directions of each weight, None for the default of a build.

    Raises NumericError when a weight does not have as many.
    """
    kept = features or (EXPERT_FEATURES if shapes.experts else DENSE_FEATURES)
    most = min(shapes.hidden, *shapes.ffns)
    if kept > most:
        raise NumericError(f"a weight has at most {most} directions, and {kept} were asked for; use --features {most}")
    work = []
    for neurons, count in shapes.ffns.most_common():
        read = round(count * neurons * shapes.hidden * shapes.weight_bytes)
        written = count * kept * (shapes.hidden * HALF + 4)
        flop = count * direction_flop(neurons, shapes.hidden, kept)
        for kind, shape in (("gate_proj", (neurons, shapes.hidden)), ("down_proj", (shapes.hidden, neurons))):
            work.append(Work(kind, shape, kept, count, read, flop, written))
    directions, matrix = shapes.ffns.total() * kept, shapes.vocabulary * shapes.hidden
    runs, poles = math.ceil(directions / RUN), RANDOM_DIRECTIONS * META_TOP_K * 4
    meta = META_HEADER.itemsize + shapes.layers * META_COUNT.itemsize + directions * meta_record(META_TOP_K).itemsize
    statistics = 2 * directions * 4 + shapes.layers * SAMPLE * 4 + shapes.hidden * 4
    for kind, sampled, more in (("gate tokens", SAMPLE, matrix * HALF + statistics), ("down tokens", 0, 0)):
        products = shapes.vocabulary * (directions + RANDOM_DIRECTIONS) + sampled * directions
        shape, flop = (shapes.vocabulary, shapes.hidden), 2.0 * shapes.hidden * products
        read, written = runs * matrix * HALF, meta + poles + more
        work.append(Work(kind, shape, math.ceil(directions / runs), runs, read, flop, written))
    return work


def direction_flop(neurons: int, hidden: int, features: int) -> float:
    """Operations of one weight's directions, as above."""
    short, long = sorted((neurons, hidden))
    basis = min(FIRST_CHECK * features, short)
    gram = long * short**2 * (1 + 1 / GRAM_PANELS)
    return gram + 2 * short**2 * basis + 4 * short * basis**2 + 4 * neurons * hidden * features


def seconds_of(work: Work, threads: int) -> float:
    """Seconds of one block of this kind on idle cores of this machine, without reading.

    It is the CPU time of each thread, the least of three, so that other work on the machine matters little. The weight
    is random, of bfloat16 numbers as most are stored, with a spectrum that falls as a real one does.
    """
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(0)
    rows, columns = work.shape
    if work.kind.endswith("tokens"):
        few, step = min(rows, MEASURED_ROWS), min(work.features, STEP)
        vocabulary, directions = (torch.randn(count, columns, generator=random) for count in (few, step))
        part = 2.0 * few * step * columns * work.blocks / work.flop
        return cpu_seconds(lambda: _meet(work.kind == "gate tokens", directions, vocabulary)) / part / threads
    neurons, hidden = (rows, columns) if work.kind == "gate_proj" else (columns, rows)
    weight = (torch.randn(neurons, hidden, generator=random) * torch.logspace(0, -1, hidden)).bfloat16().float()
    if work.kind == "down_proj":
        weight = weight.T.contiguous().T  # as it lies in the file
    return cpu_seconds(lambda: top_directions(weight, work.features, 1e-4, work.kind)) / threads


def _meet(gate: bool, directions: torch.Tensor, rows: torch.Tensor) -> None:
    """One step of a token block: scores, their extremes, and of gate directions their spread."""
    scores = scores_of(directions, unit_rows(rows) if gate else rows)
    TopTokens(len(directions)).update(0, scores, 0)
    if gate:
        Spread(len(directions)).update(0, scores)


def cpu_seconds(compute: Callable[[], object]) -> float:
    """Of this process, the least of three."""
    times = []
    for _ in range(3):
        started = time.process_time()
        compute()
        times.append(time.process_time() - started)
    return min(times)


def hours(work: Sequence[Work], seconds: Sequence[float], workers: int) -> float:
    """Wall time when the blocks of each kind go to so many workers, in as many waves as that takes."""
    waves = (math.ceil(of.blocks / workers) * each for of, each in zip(work, seconds, strict=True))
    return sum(waves) / 3600
