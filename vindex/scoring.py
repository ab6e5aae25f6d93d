"""Cosines between vectors and feature directions: arrays in, arrays out."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-8  # as in the published reader: a zero row scores zero, it does not divide by zero


def cosines(directions: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Cosine of every vector with every direction.

    directions: (L, F, H), any float dtype. vectors: (H,) or (B, H). Returns (L, F) or (B, L, F) float32.
    Layers are converted one at a time, so memory stays at one layer of float32.
    """
    batch = np.atleast_2d(vectors).astype(np.float32)  # (B, H)
    lengths = _lengths(batch)[:, None]
    scores = np.empty((len(batch), *directions.shape[:2]), np.float32)
    for layer, frame in enumerate(directions):
        rows = frame.astype(np.float32)  # (F, H)
        scores[:, layer] = batch @ rows.T / (lengths * _lengths(rows))
    return scores if vectors.ndim == 2 else scores[0]


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nh,nh->n", rows, rows)) + EPSILON


def largest(scores: np.ndarray, k: int) -> list[tuple[int, int]]:
    """Positions (layer, feature) of the k largest entries of (L, F) scores; the earlier position wins a tie."""
    order = np.argsort(-scores, axis=None, kind="stable")[:k]
    return [(int(layer), int(feature)) for layer, feature in zip(*np.unravel_index(order, scores.shape), strict=True)]
