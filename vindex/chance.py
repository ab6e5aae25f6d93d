"""What a score is worth: how far it lies from the direction's other scores, and what random directions reach.

Definitions, with the symbols of docs/scores.md:

1. ê is an embedding at length one, ē the mean of ê over the tokens; a cosine is ê · d of a direction d.
2. z = (cosine − mean) / deviation, both over the tokens, of that direction.
3. Across random directions d, z of one token is close to normal with the standard deviation ρ = ‖ê − ē‖ / √(1 − ‖ē‖²),
   how far the token lies from the mean beside how far tokens do. So R random directions reach a largest |z| of x or
   more with the probability 1 − (1 − 2Φ(−x/ρ))^R.
4. The coherence of a pole is the mean cosine between ê − ē of its ten tokens.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from vindex.format import META_TOP_K, RANDOM_DIRECTIONS, SAMPLE

POLE = META_TOP_K // 2
CHANCE = 0.05  # what random directions reach more often than this is called chance
CLOSE = 1e-3  # relative distance of neighbouring singular values that makes a cluster …
ROUNDING = 1e-5  # relative: a peak is stored in float32, and a token reaches its own
RESIDUALS = 10  # … or so many residuals of the certificate: past it they turn a direction by at most 0.05 radians


def random_directions(hidden_size: int) -> np.ndarray:
    """(RANDOM_DIRECTIONS, H) float32 of length one, always the same: NumPy's frozen RandomState, seed 0."""
    rows = np.random.RandomState(0).standard_normal((RANDOM_DIRECTIONS, hidden_size))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def sampled_tokens(tokens: int) -> np.ndarray:
    """(SAMPLE,) int64: the ids of evenly spread tokens; in a smaller vocabulary some come several times."""
    return np.arange(SAMPLE) * tokens // SAMPLE


class Statistics(NamedTuple):
    """What scores are judged by, as arrays of the files: GATE_STATS (2, R), GATE_PEAKS (L, SAMPLE), MEAN_EMBEDDING (H,)
    and RANDOM_POLES (2, RANDOM_DIRECTIONS, META_TOP_K).
    """

    gate: np.ndarray
    peaks: np.ndarray
    centre: np.ndarray
    random_poles: np.ndarray


class Judged(NamedTuple):
    """What the scores of one token or vector are judged by.

    z: (R,) float32. scale: ρ. directions: how many there are that are not zero. reached: the largest |z|. token_share:
    the share of the sampled tokens that reach as much. chance_reach: the |z| that so many random directions reach with
    the probability CHANCE.
    """

    z: np.ndarray
    scale: float
    directions: int
    reached: float
    token_share: float
    chance_reach: float

    def chance(self, z: float) -> float:
        """How often as many random directions reach |z| or more for this token."""
        return chance_of(z, self.scale, self.directions)


def judge(cosines: np.ndarray, vector: np.ndarray, statistics: Statistics) -> Judged:
    """Cosines (R,) of a vector (H,) with every gate direction, beside what a vindex's statistics say."""
    mean, deviation = statistics.gate
    z = np.divide(cosines - mean, deviation, out=np.zeros_like(mean), where=deviation > 0)
    scale, directions, reached = scale_of(vector, statistics.centre), int((deviation > 0).sum()), float(np.abs(z).max())
    share = float((statistics.peaks.max(axis=0) >= reached * (1 - ROUNDING)).mean())
    return Judged(z, scale, directions, reached, share, reach_of(scale, directions))


def scale_of(vector: np.ndarray, centre: np.ndarray) -> float:
    """ρ of a vector (H,) of any length, with the mean embedding (H,)."""
    unit = vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))
    return float(np.linalg.norm(unit - centre) / math.sqrt(1.0 - float(centre.astype(np.float64) @ centre)))


def chance_of(z: float, scale: float, directions: int) -> float:
    """How often `directions` random directions reach |z| or more for a token of this ρ."""
    tail = math.erfc(abs(z) / scale / math.sqrt(2.0))
    return -math.expm1(directions * math.log1p(-tail)) if tail < 1.0 else 1.0


def reach_of(scale: float, directions: int, share: float = CHANCE) -> float:
    """The |z| that so many random directions reach with the probability `share`, for a token of this ρ."""
    tail = -math.expm1(math.log1p(-share) / max(directions, 1))
    return -NormalDist().inv_cdf(tail / 2) * scale


def alike(ids: np.ndarray, embeddings: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Coherence of poles: ids (n, POLE) of tokens, embeddings (V, H) of any float dtype, centre (H,) → (n,) float32.

    A token whose embedding is the mean has no direction from there, and counts as cosine 0.
    """
    found = np.empty(len(ids), np.float32)
    for at, pole in enumerate(ids):
        rows = embeddings[pole].astype(np.float32)
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30) - centre
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
        total = rows.sum(axis=0)
        found[at] = (total @ total - (rows * rows).sum()) / (len(pole) * (len(pole) - 1))
    return found


def cluster_of(sigma: np.ndarray, feature: int, residual: float | None) -> range:
    """The consecutive directions whose singular values are nearly those of their neighbours, this one among them.

    sigma: (F,) largest first. residual: the largest of the weight's certificate. A direction alone is a range of one.
    """
    limit = max(CLOSE, RESIDUALS * (residual or 0.0))
    apart = np.flatnonzero(sigma[:-1] - sigma[1:] >= limit * sigma[:-1]) + 1
    at = int(np.searchsorted(apart, feature, side="right"))
    edges = [0, *map(int, apart), len(sigma)]
    return range(edges[at], edges[at + 1])
