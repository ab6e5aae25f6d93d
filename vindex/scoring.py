"""Cosines between vectors and feature directions: arrays in, arrays out."""

from __future__ import annotations

import numpy as np

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
