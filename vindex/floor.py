"""The spectrum that chance gives: singular values of a large matrix of independent entries (Marchenko & Pastur 1967).

For a matrix of shape (m, n) with entries of variance s², its squared singular values over ‖W‖²_F / min(m, n) have a law
on [(1 − √r)², (1 + √r)²], r = min / max of the shape, with mean 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

STEPS = 20_001


class Law(NamedTuple):
    """Of the largest eigenvalues first, each (STEPS,): the eigenvalue, and the shares of their number and of their sum
    that are as large or larger.
    """

    eigenvalue: np.ndarray
    number: np.ndarray
    energy: np.ndarray


def law(shape: tuple[int, int]) -> Law:
    """The law of a matrix of this shape, along an angle on which its density is smooth."""
    short, long = sorted(shape)
    ratio = short / long
    theta = np.linspace(0, np.pi, STEPS)
    eigenvalue = 1 + ratio + 2 * np.sqrt(ratio) * np.cos(theta)
    with np.errstate(invalid="ignore", divide="ignore"):
        density = 2 * np.sin(theta) ** 2 / (np.pi * np.maximum(eigenvalue, 1e-300))  # of theta
    density[-1] = density[-2] if ratio == 1 else 0.0  # 0/0 at the edge of a square matrix, with a finite limit
    count, energy = _cumulative(density, theta), _cumulative(density * eigenvalue, theta)
    return Law(eigenvalue, count / count[-1], energy / energy[-1])


def floor_of(shape: tuple[int, int], features: int) -> np.ndarray:
    """(F,) the leading singular values of such a matrix with ‖W‖²_F = min(m, n), largest first."""
    found = law(shape)
    places = (np.arange(features) + 0.5) / min(shape)
    return np.sqrt(np.maximum(np.interp(places, found.number, found.eigenvalue), 0.0))


def _cumulative(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    steps = (values[1:] + values[:-1]) / 2 * np.diff(at)
    return np.concatenate([[0.0], steps.cumsum()])
