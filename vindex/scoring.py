"""Cosines between vectors and feature directions: arrays in, arrays out."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-8  # as in the published reader: a zero row scores zero, it does not divide by zero


def normalised(rows: np.ndarray) -> np.ndarray:
    """Rows (…, H) scaled to unit length, float32; a zero row stays zero."""
    rows = rows.astype(np.float32)
    return rows / (np.linalg.norm(rows, axis=-1, keepdims=True) + EPSILON)


def cosines(directions: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Cosine of every vector with every direction.

    directions: (L, F, H), any float dtype. vectors: (H,) or (B, H). Returns (L, F) or (B, L, F) float32.
    Layers are converted one at a time, so memory stays at one layer of float32.
    """
    unit_vectors = normalised(np.atleast_2d(vectors))  # (B, H)
    scores = np.stack([unit_vectors @ normalised(layer).T for layer in directions], axis=1)  # (B, L, F)
    return scores if vectors.ndim == 2 else scores[0]


def largest(scores: np.ndarray, k: int) -> list[tuple[int, int]]:
    """Positions (layer, feature) of the k largest entries of (L, F) scores; the earlier position wins a tie."""
    order = np.argsort(-scores, axis=None, kind="stable")[:k]
    return [(int(layer), int(feature)) for layer, feature in zip(*np.unravel_index(order, scores.shape), strict=True)]
