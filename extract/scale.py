"""What a build will take, from config.json alone: blocks, bytes to read, multiplications, bytes to write.

Floating-point operations, a multiplication with its addition being two:
1. Gram matrix of an (I, H) weight on its shorter side n, m the longer: m n² + m n² / 16, as only the upper panels are
   multiplied; block Lanczos to a basis of about 6 F vectors: 2 n² · 6F + 8 n (6F)²; certificate: 4 I H F.
2. Every direction meets every row of the vocabulary: 2 V H for each.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from extract.svd import top_directions
from extract.vocab import down_scores
from vindex.errors import CheckpointError
from vindex.format import META_TOP_K

BASIS = 6  # Lanczos vectors for each direction, about
DENSE_FEATURES, EXPERT_FEATURES = 128, 32
RUN = 1 << 14  # directions that meet the vocabulary in one block
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a stored weight for config.json's dtype."""


class Work(NamedTuple):
    """Blocks of one kind. read, written: bytes; flop: operations; all of them together. shape: of one weight."""

    what: str
    shape: tuple[int, int]
    features: int
    blocks: int
    read: int
    flop: float
    written: int


class Shapes(NamedTuple):
    """What config.json says of sizes. ffns: how many FFNs (a layer's, or an expert's) have so many neurons."""

    hidden: int
    vocabulary: int
    layers: int
    ffns: Counter[int]
    tied: bool
    experts: int
    weight_bytes: int


def shapes_of(config: dict[str, Any], name: str) -> Shapes:
    """Sizes from a config.json of any supported family. Raises CheckpointError naming the key that is missing."""
    text = config.get("text_config", config)
    layers = _integer(text, "num_hidden_layers", name)
    experts = text.get("num_experts") or text.get("num_local_experts") or 0
    ffns: Counter[int] = Counter()
    for layer in range(layers):
        dense = layer in text.get("mlp_only_layers", []) or (layer + 1) % text.get("decoder_sparse_step", 1)
        if experts and not dense:
            ffns[_integer(text, "moe_intermediate_size", name)] += experts
            if shared := text.get("shared_expert_intermediate_size"):
                ffns[shared] += 1
        else:
            ffns[_integer(text, "intermediate_size", name)] += 1
    stored = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "bfloat16")
    quantised = config.get("quantization_config")
    return Shapes(
        _integer(text, "hidden_size", name),
        _integer(text, "vocab_size", name),
        layers,
        ffns,
        bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        experts,
        1 if quantised else BYTES.get(stored, 2),
    )


def work_of(shapes: Shapes, features: int | None) -> list[Work]:
    """The blocks of a build, by kind. features: directions for each weight, by default 128, or 32 of an expert."""
    kept = features or (EXPERT_FEATURES if shapes.experts else DENSE_FEATURES)
    hidden, stored = shapes.hidden, shapes.weight_bytes
    work = []
    for neurons, count in sorted(shapes.ffns.items(), reverse=True):
        each = direction_flop(neurons, hidden, kept)
        for side, shape in (("gate_proj", (neurons, hidden)), ("down_proj", (hidden, neurons))):
            written = count * kept * (hidden * 2 + 4)
            work.append(Work(side, shape, kept, count, count * neurons * hidden * stored, count * each, written))
    directions = sum(shapes.ffns.values()) * kept
    runs = math.ceil(directions / RUN)
    matrix = shapes.vocabulary * hidden
    record = 8 * (1 + META_TOP_K)
    for name, sides in (("embed_tokens", 1 + shapes.tied), ("lm_head", 1 - shapes.tied)):
        if sides:
            flop = 2.0 * matrix * directions * sides
            written = directions * record * sides + (matrix * 2 if name == "embed_tokens" else 0)
            read = matrix * min(stored + (stored == 1), 2) * runs
            work.append(Work(name, (shapes.vocabulary, hidden), directions * sides, runs, read, flop, written))
    return work


def direction_flop(neurons: int, hidden: int, features: int) -> float:
    """Operations of one weight's directions."""
    short, long = sorted((neurons, hidden))
    basis = min(BASIS * features, short)
    gram = long * short**2 * (1 + 1 / 16)
    return gram + 2 * short**2 * basis + 8 * short * basis**2 + 4 * neurons * hidden * features


def seconds_of(work: Work, threads: int) -> float:
    """Seconds of one block of this kind, computed here from a random weight whose spectrum falls like a real one's."""
    random = torch.Generator().manual_seed(0)
    torch.set_num_threads(threads)
    if work.what in ("gate_proj", "down_proj"):
        long, short = max(work.shape), min(work.shape)
        weight = torch.randn(long, short, generator=random) * torch.logspace(0, -1, short)
        by_neuron = weight if (work.what == "gate_proj") == (long == work.shape[0]) else weight.T
        started = time.perf_counter()
        top_directions(by_neuron, work.features, 1e-4, work.what)
        return time.perf_counter() - started
    rows = min(work.shape[0], (1 << 26) // (4 * work.shape[1]))
    features = min(work.features, 1024)
    vocabulary, directions = torch.randn(rows, work.shape[1]), torch.randn(features, work.shape[1])
    started = time.perf_counter()
    down_scores(directions, vocabulary)
    once = time.perf_counter() - started
    return once * (work.shape[0] / rows) * (work.features / features) / work.blocks


def hours(work: Sequence[Work], seconds: Sequence[float], workers: int) -> float:
    """Wall time of a build: the blocks of each kind in as many waves as the workers need."""
    return sum(math.ceil(of.blocks / workers) * each for of, each in zip(work, seconds, strict=True)) / 3600


def _integer(config: dict[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{name}: config.json {key}: expected a positive integer, got {value!r}")
    return value
