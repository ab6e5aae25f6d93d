"""Responses that no model gave, for tests of the files that hold them."""

from __future__ import annotations

import numpy as np
import torch

from probes.responses.lens import poles
from vindex.adding import add_responses
from vindex.manifest import MeasuredResponses
from vindex.progress import unseen
from vindex.reader import Vindex

MEASURED = MeasuredResponses("2026-11-27T00:00:00+00:00", "float32", "cpu", 256, {"story": "0" * 64}, 19, 0, {"x": "1"})


def add_made_up(v: Vindex, seed: int = 0, directions: np.ndarray | None = None) -> Vindex:
    """Random unit rows or those given, R² of 0.5 beside nulls of 0.1 and 0.2, and their tokens; the first has none.

    The text is 256 tokens from id 600 on, or the vocabulary over and over.
    """
    rows, width = v.index.num_rows, v.index.hidden_size
    if directions is None:
        directions = np.random.default_rng(seed).standard_normal((rows, width))
    directions = (directions / np.linalg.norm(directions.astype(float), axis=1, keepdims=True)).astype(np.float16)
    stats = np.tile(np.array([[0.5], [0.1], [0.2], [2.0], [100.0]], np.float32), rows)
    directions[0], stats[:, 0] = 0, (0, 0, 0.2, 0, 2)
    tokens = min(v.index.vocab_size, len(v.vocabulary))
    norm, words = (torch.tensor(np.asarray(of, np.float32)) for of in (v.norms["norm"], v.embeddings[:tokens]))
    records = poles(torch.from_numpy(directions), norm, words, v.index.down_top_k, unseen)
    texts = (600 + np.arange(256, dtype=np.uint32))[None] % tokens
    places = np.tile(np.array([[200, 5, 3, 7, 255, -1], [4, 3, 3, -2, -1, 0]], np.float32)[:, None], (1, rows, 1))
    places[:, 0] = np.array([[-1.0], [0.0]])
    return add_responses(v, directions, stats, records, texts, places, MEASURED)
