"""Tokens that training never met, told by their embeddings. After Land & Bartolo, "Fishing for Magikarp", EMNLP 2024.

1. Some tokens are in no text (`Vocabulary.in_no_text`).
2. Where head and embeddings are one, every step of training pushes what is not written the same way, so that all these
   come to lie at one place. Where they do not, nothing is told.
3. A token at that place was not met either: cosine CLOSE or more with their mean, the vocabulary's mean taken off.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CLOSE = 0.99
TOGETHER = 0.9
"""The length of the mean of their directions from which on they lie at one place."""
BLOCK = 4096


def untrained(ids: np.ndarray, embeddings: np.ndarray, centre: np.ndarray, in_no_text: Sequence[int]) -> np.ndarray:
    """Which of these tokens training never met.

    ids: (n,) of tokens. embeddings: (V, H). centre: (H,) mean of the embeddings at length one. in_no_text: ids of
    tokens that are in no text. Returns (n,) bool, all false where it cannot be told.
    """

    def directions(of: np.ndarray) -> np.ndarray:
        rows = embeddings[of].astype(np.float32)
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30) - centre
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)

    place = directions(np.array(in_no_text, np.int64)).sum(axis=0) / max(len(in_no_text), 1)
    length = float(np.linalg.norm(place))
    if length < TOGETHER:
        return np.zeros(len(ids), bool)
    blocks = np.split(ids, range(BLOCK, len(ids), BLOCK))
    return np.concatenate([directions(block) @ (place / length) >= CLOSE for block in blocks])
