"""Cosines between vectors and feature directions, and the numbers in a question: plain values in, plain values out."""

from __future__ import annotations

from typing import Any

import numpy as np

from vindex.errors import FormatError, QueryError
from vindex.format import EMBEDDINGS, GATE

ROWS = 1 << 9
EPSILON = 1e-8  # as in the published reader: a zero row scores zero, it does not divide by zero


def cosines(
    directions: np.ndarray, vectors: np.ndarray, names: tuple[str, str] = (GATE.name, EMBEDDINGS.name)
) -> np.ndarray:
    """Cosine of every vector with every direction, to the last bit those of the published reader.

    directions: (L, F, H) or (R, H), any float dtype. vectors: (H,) or (B, H). Returns float32 (L, F) or (R,), with B in
    front for a batch. ROWS directions of a layer are converted at a time, so memory does not grow with their number.
    names: the files of the two, for messages. Raises FormatError when a number is not finite.
    """
    batch = _unit(np.atleast_2d(vectors).astype(np.float32), names[1])  # (B, H)
    layers = directions if directions.ndim == 3 else directions[None]
    scores = np.empty((len(batch), *layers.shape[:2]), np.float32)
    for layer, frames in enumerate(layers):
        for first in range(0, len(frames), ROWS):
            rows = _unit(frames[first : first + ROWS].astype(np.float32), names[0])
            for at, vector in enumerate(batch):  # one by one: a product of matrices adds up in another order
                scores[at, layer, first : first + ROWS] = rows @ vector
    scores = scores.reshape(len(batch), *directions.shape[:-1])
    return scores if vectors.ndim == 2 else scores[0]


def _unit(rows: np.ndarray, where: str) -> np.ndarray:
    """(n, H) at length one, as the published reader divides them."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise FormatError(f"{where} holds a number that is not finite, or too large; run vindex verify")
    return rows / (lengths + EPSILON)


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
