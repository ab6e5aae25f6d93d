"""Stages of a model as an optimal segmentation of its layers: kernel change-point detection.

Harchaoui & Cappé 2007 take the similarity matrix S (L, L) of the layers as a kernel. A stage that spans layers
a … b − 1 costs its scatter Σ_i S_ii − Σ_ij S_ij / (b − a), zero when its layers are the same. Dynamic programming finds
the cheapest cut into every number of stages; the number chosen has the least scatter + penalty × stages.

The penalty 2(1 − τ) is the scatter of splitting a long stage from one odd layer whose similarity to it is exactly τ, so
that τ means here what it means for C5's adjacent pairs. Unlike those, a slow drift that is nowhere sharp can still be
cut, and a single odd pair between like neighbours need not be.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Segmentation(NamedTuple):
    """The chosen stages."""

    starts: tuple[int, ...]
    """First layer of each stage; the first is 0."""
    penalty: float
    scatter: tuple[float, ...]
    """Least scatter with 1, 2, … L stages."""


def segment(similarity: np.ndarray, threshold: float) -> Segmentation:
    """The optimal stages of a symmetric similarity matrix (L, L) with ones on its diagonal."""
    layers = len(similarity)
    cost = _costs(np.asarray(similarity, dtype=np.float64))
    best = np.full((layers + 1, layers + 1), np.inf)  # best[k, b]: least scatter of layers 0 … b − 1 in k stages
    last = np.zeros((layers + 1, layers + 1), dtype=int)  # last[k, b]: where the k-th of them starts
    best[0, 0] = 0.0
    for stages in range(1, layers + 1):
        for end in range(stages, layers + 1):
            totals = best[stages - 1, :end] + cost[:end, end]
            last[stages, end] = int(totals.argmin())
            best[stages, end] = totals[last[stages, end]]
    scatter = best[1:, layers]
    penalty = 2 * (1 - threshold)
    stages = 1 + int((scatter + penalty * np.arange(1, layers + 1)).argmin())
    return Segmentation(_starts(last, stages, layers), penalty, tuple(float(value) for value in scatter))


def _costs(similarity: np.ndarray) -> np.ndarray:
    """cost[a, b]: scatter of the stage a … b − 1, infinite where that is empty."""
    layers = len(similarity)
    block = np.pad(similarity.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # summed-area table
    trace = np.concatenate([[0.0], np.diag(similarity).cumsum()])
    cost = np.full((layers + 1, layers + 1), np.inf)
    for start in range(layers):
        for end in range(start + 1, layers + 1):
            total = block[end, end] - block[start, end] - block[end, start] + block[start, start]
            cost[start, end] = trace[end] - trace[start] - total / (end - start)
    return cost


def _starts(last: np.ndarray, stages: int, end: int) -> tuple[int, ...]:
    starts = []
    for count in range(stages, 0, -1):
        end = int(last[count, end])
        starts.append(end)
    return tuple(reversed(starts))
