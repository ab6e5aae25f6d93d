"""Cosines between vectors and feature directions, and the numbers in a question: plain values in, plain values out."""

from __future__ import annotations

from typing import Any

import numpy as np

from vindex.errors import QueryError

ROWS = 1 << 9
EPSILON = 1e-8  # as in the published reader: a zero row scores zero, it does not divide by zero


def cosines(directions: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Cosine of every vector with every direction.

    directions: (L, F, H) or (R, H), any float dtype. vectors: (H,) or (B, H). Returns float32 (L, F) or (R,), with B in
    front for a batch. ROWS directions are converted at a time, so memory does not grow with their number.
    """
    batch = np.atleast_2d(vectors).astype(np.float32)  # (B, H)
    lengths = _lengths(batch)[:, None]
    flat = directions.reshape(-1, directions.shape[-1])
    scores = np.empty((len(batch), len(flat)), np.float32)
    for first in range(0, len(flat), ROWS):
        rows = flat[first : first + ROWS].astype(np.float32)
        scores[:, first : first + ROWS] = batch @ rows.T / (lengths * _lengths(rows))
    scores = scores.reshape(len(batch), *directions.shape[:-1])
    return scores if vectors.ndim == 2 else scores[0]


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nh,nh->n", rows, rows)) + EPSILON


def largest(scores: np.ndarray, k: int) -> list[int]:
    """Flat positions of the k largest scores; the earlier position wins a tie."""
    return [int(position) for position in np.argsort(-scores, axis=None, kind="stable")[:k]]


def whole(what: str, value: Any) -> int:
    """An int or NumPy integer as an int; bool, float and what only looks like a number is none. Raises QueryError."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise QueryError(f"{what} {str(value)[:40]}: expected an integer, got {type(value).__name__}")


def positive(what: str, value: Any) -> int:
    """The same, from 1."""
    number = whole(what, value)
    if number < 1:
        raise QueryError(f"{what} {number}: expected a positive integer")
    return number
