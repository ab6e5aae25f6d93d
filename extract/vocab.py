"""The tokens at the two poles of every direction, in one pass over the vocabulary matrix.

The matrix is read once, a block of rows at a time; each block meets every layer's directions and leaves behind only
the running extremes, so memory is one block whatever the vocabulary and the number of layers.
"""

from __future__ import annotations

import numpy as np
import torch

from vindex.format import META_HEADER, META_MAGIC, META_TOP_K, META_VERSION, meta_layer_dtype

POLE = META_TOP_K // 2
GROUP = 64


class TopTokens:
    """Running ten highest and ten lowest scores for every feature of every layer."""

    def __init__(self, num_layers: int, num_feats: int) -> None:
        shape = (num_layers, 2, num_feats, POLE)  # axis 1: highest, lowest (negated, so that both are maxima)
        self._scores = torch.full(shape, -torch.inf)
        self._ids = torch.zeros(shape, dtype=torch.int64)

    def update(self, layer: int, scores: torch.Tensor, first_id: int) -> None:
        """Take in scores (F, n) of the tokens first_id … first_id + n − 1."""
        for pole, signed in enumerate((scores, -scores)):
            values, positions = _largest(signed)
            candidates = torch.cat([self._scores[layer, pole], values.cpu()], dim=1)
            ids = torch.cat([self._ids[layer, pole], positions.cpu() + first_id], dim=1)
            kept = candidates.topk(POLE, dim=1)
            self._scores[layer, pole], self._ids[layer, pole] = kept.values, ids.gather(1, kept.indices)

    def to_bytes(self) -> bytes:
        """The meta file: header, then per layer a count and F records (docs/format.md)."""
        num_layers, _, num_feats, _ = self._scores.shape
        header = np.array((META_MAGIC, META_VERSION, num_layers, META_TOP_K), META_HEADER)
        layers = np.zeros(num_layers, meta_layer_dtype(num_feats, META_TOP_K))
        layers["num_features"] = num_feats
        scores, ids = self._scores.numpy(), self._ids.numpy()
        order = np.lexsort((ids, -scores))  # equal scores: the lower token id first
        scores, ids = np.take_along_axis(scores, order, -1), np.take_along_axis(ids, order, -1)
        tokens = layers["features"]["tokens"]
        tokens["score"] = np.concatenate([scores[:, 0], -scores[:, 1]], axis=-1)
        tokens["token_id"] = np.concatenate([ids[:, 0], ids[:, 1]], axis=-1)
        layers["features"]["top_token_id"] = tokens["token_id"][..., 0]
        layers["features"]["top_score"] = tokens["score"][..., 0]
        return header.tobytes() + layers.tobytes()


def _largest(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, positions) of the POLE largest of each row of (F, n), as topk gives them.

    The largest entries lie in the groups with the largest maxima, so topk sorts a few groups instead of whole rows.
    """
    rows, count = scores.shape
    whole = count // GROUP * GROUP
    if whole < POLE * GROUP:
        best = scores.topk(min(POLE, count), dim=1)
        return best.values, best.indices
    chosen = scores[:, :whole].unflatten(1, (-1, GROUP)).amax(dim=2).topk(POLE, dim=1).indices  # (F, POLE)
    positions = (chosen[:, :, None] * GROUP + torch.arange(GROUP, device=scores.device)).flatten(1)
    rest = torch.arange(whole, count, device=scores.device).expand(rows, -1)
    positions = torch.cat([positions, rest], dim=1)
    best = scores.gather(1, positions).topk(POLE, dim=1)
    return best.values, positions.gather(1, best.indices)


def gate_scores(directions: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Cosine of each direction with each embedding: (F, H), (n, H) → (F, n). A zero row scores zero."""
    unit = torch.nn.functional.normalize(directions, dim=1)
    return (unit @ embeddings.T) / embeddings.norm(dim=1).clamp_min(1e-30)


def down_scores(directions: torch.Tensor, unembedding: torch.Tensor) -> torch.Tensor:
    """Logit lens of each direction: (F, H) already scaled by the final norm's weight, (n, H) → (F, n)."""
    return directions @ unembedding.T
