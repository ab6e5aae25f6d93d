"""What a build will take, from config.json alone: blocks, bytes to read and write, operations, hours.

Operations are floating-point, a multiplication with its addition being two:
1. Directions of an (I, H) weight, n its shorter side and m the longer: the Gram matrix's upper panels m n² (1 + 1/16);
   block Lanczos to a basis of b = 7 F vectors 2 n² b, orthogonalised twice 4 n b²; certificate 4 I H F.
2. Tokens: every direction meets every row of the vocabulary, 2 V H.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from extract.plan import DENSE_FEATURES, EXPERT_FEATURES
from extract.svd import FIRST_CHECK, GRAM_PANELS, top_directions
from extract.vocab import RUN, STEP, down_scores
from vindex.errors import NumericError
from vindex.format import HALF, META_TOP_K
from vindex.model_config import checked, mixture_of, positive, towers

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
    weight_bytes: int


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
        read, written = count * neurons * shapes.hidden * shapes.weight_bytes, count * kept * (shapes.hidden * HALF + 4)
        flop = count * direction_flop(neurons, shapes.hidden, kept)
        for kind, shape in (("gate_proj", (neurons, shapes.hidden)), ("down_proj", (shapes.hidden, neurons))):
            work.append(Work(kind, shape, kept, count, read, flop, written))
    directions, matrix = shapes.ffns.total() * kept, shapes.vocabulary * shapes.hidden
    runs = math.ceil(directions / RUN)
    for kind, copied in (("gate tokens", matrix * HALF), ("down tokens", 0)):
        written = copied + directions * 8 * (1 + META_TOP_K)
        shape, flop = (shapes.vocabulary, shapes.hidden), 2.0 * matrix * directions
        work.append(Work(kind, shape, math.ceil(directions / runs), runs, runs * matrix * HALF, flop, written))
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
    is random, with a spectrum that falls as a real one does.
    """
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(0)
    rows, columns = work.shape
    if work.kind.endswith("tokens"):
        few, step = min(rows, MEASURED_ROWS), min(work.features, STEP)
        vocabulary, directions = (torch.randn(count, columns, generator=random) for count in (few, step))
        part = (few / rows) * (step / work.features)
        return _cpu_seconds(lambda: down_scores(directions, vocabulary)) / part / threads
    neurons, hidden = (rows, columns) if work.kind == "gate_proj" else (columns, rows)
    weight = torch.randn(neurons, hidden, generator=random) * torch.logspace(0, -1, hidden)
    if work.kind == "down_proj":
        weight = weight.T.contiguous().T  # as it lies in the file
    return _cpu_seconds(lambda: top_directions(weight, work.features, 1e-4, work.kind)) / threads


def _cpu_seconds(compute: Callable[[], object]) -> float:
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
