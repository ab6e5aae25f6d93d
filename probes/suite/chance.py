"""What chance gives: the nulls of C1 and C3 that have a closed form, or nearly."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import betainc

from probes.suite.definition import FRAME_DRAWS, SEED


def mean_abs_cosine(width: int) -> float:
    """E|cos| of two independent random directions in `width` dimensions: Γ(H/2) / (√π Γ((H+1)/2))."""
    return math.exp(math.lgamma(width / 2) - math.lgamma((width + 1) / 2)) / math.sqrt(math.pi)


def random_frame_cosine(width: int, count: int) -> float:
    """Mean principal-angle cosine of two random `count`-dim subspaces of `width` dimensions, from FRAME_DRAWS draws.

    By rotation invariance one subspace may be spanned by the first coordinates, so a draw is the head of one frame.
    """
    generator = np.random.default_rng(SEED)
    draws = [np.linalg.qr(generator.standard_normal((width, count)))[0][:count] for _ in range(FRAME_DRAWS)]
    return float(np.mean([np.linalg.svd(head, compute_uv=False).mean() for head in draws]))


def nearest_cosine(width: int, number: int) -> float:
    """E of |cos| of a random direction with the nearest of `number` others: ∫ 1 − F(x)^number dx, F that of one |cos|.

    cos² of random directions in H dimensions is Beta(1/2, (H − 1)/2).
    """
    cosine = np.linspace(0, 1, 20_001)
    return float(np.trapezoid(1 - betainc(0.5, (width - 1) / 2, cosine**2) ** number, cosine))


def gaussian_below(threshold: float, rms: float) -> float:
    """P(|x| < threshold) for x ~ N(0, rms²)."""
    return math.erf(threshold / (rms * math.sqrt(2))) if rms > 0 else 1.0
