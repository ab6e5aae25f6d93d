"""Masks of the size of a gates' mask: what chance does, and what mean |h| does, which needs no training.

At random (5 seeds), and by mean |h| where an entity is about to be said: those neurons that fire the most, those that
fire the least, and those that fire the most there compared with reasoning text. The rows come from the atlas's training
data, or, where files are given, from the files' own rows, which favours these controls.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.gates.activations import mean_magnitude
from probes.gates.data import Forget, Retain
from probes.gates.encode import forget_example, retain_example
from probes.gates.gates import Gates
from probes.gates.masks import lowest_keep, random_keep
from probes.gates.options import TrainOptions
from probes.live.load import Loaded
from vindex.progress import Progress, silent

RANDOM_SEEDS = 5
ACTIVATION_ROWS = 400  # of each kind, at most


class Magnitudes(NamedTuple):
    """Mean |h| of every neuron (L, I): before entity tokens of forget text, and in retain text."""

    forget: Tensor
    retain: Tensor


def magnitudes(
    loaded: Loaded,
    forget: Sequence[Forget],
    retain: Sequence[Retain],
    *,
    chat: bool,
    count: int = ACTIVATION_ROWS,
    seed: int = 0,
    progress: Progress = silent,
) -> Magnitudes:
    """Mean |h| over at most `count` rows of each kind, drawn with `seed`."""
    rng = random.Random(seed)
    facts = rng.sample(list(forget), min(count, len(forget)))
    sums = rng.sample(list(retain), min(count, len(retain)))
    settings: dict[str, Any] = {"chat": chat, "max_tokens": TrainOptions().max_tokens}
    said = [forget_example(row, loaded.tokenizer, **settings) for row in facts]
    worked = [retain_example(row, loaded.tokenizer, **settings) for row in sums]
    advance = progress("activations", len(said) + len(worked))
    return Magnitudes(
        mean_magnitude(loaded, said, entity=True, advance=advance),
        mean_magnitude(loaded, worked, entity=False, advance=advance),
    )


def masks(gates: Gates, threshold: float, magnitudes: Magnitudes | None) -> Iterator[tuple[str, int | None, Tensor]]:
    """(family, seed, keep) of the gates' mask and of every control of its size."""
    keep = gates.keep(threshold)
    yield "gates", None, keep
    for seed in range(RANDOM_SEEDS):
        yield "random", seed, random_keep(keep, seed)
    if magnitudes:
        yield "largest |h|", None, lowest_keep(-magnitudes.forget, keep)
        yield "smallest |h|", None, lowest_keep(magnitudes.forget, keep)
        tiny = torch.finfo(torch.float32).tiny
        yield "|h| ratio", None, lowest_keep(-magnitudes.forget / magnitudes.retain.clamp_min(tiny), keep)
