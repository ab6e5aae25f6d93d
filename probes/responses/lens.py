"""The tokens at the poles of directions by the logit lens, as records of a meta file (docs/format.md).

The head is read once, some tokens at a time; each part meets all directions and leaves behind the extremes so far.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vindex.format import meta_record
from vindex.progress import Advance

TOKENS, DIRECTIONS = 1 << 14, 1 << 10  # at a time


def poles(directions: Tensor, final_norm: Tensor, head: Tensor, top_k: int, advance: Advance) -> np.ndarray:
    """(R,) records of the top_k tokens of lm_head · (γ ⊙ d), half of them the highest and half the lowest.

    directions: (R, H). final_norm: γ (H,). head: (tokens, H), of any float dtype. advance: told of every token.
    """
    half = top_k // 2
    highest = _Extremes(len(directions), half, highest=True)
    lowest = _Extremes(len(directions), top_k - half, highest=False)
    for first in range(0, len(head), TOKENS):
        tokens = head[first : first + TOKENS].float().T
        for row in range(0, len(directions), DIRECTIONS):
            scores = (directions[row : row + DIRECTIONS].float() * final_norm) @ tokens
            highest.update(row, scores, first)
            lowest.update(row, scores, first)
        advance(tokens.shape[1])
    records = np.zeros(len(directions), meta_record(top_k))
    for name in ("score", "token_id"):
        records["tokens"][name] = np.concatenate([of.sorted()[name] for of in (highest, lowest)], axis=1)
        records[f"top_{name}"] = records["tokens"][name][:, 0]
    return records


class _Extremes:
    """The `count` highest or lowest scores of each of so many directions, and whose they are."""

    def __init__(self, directions: int, count: int, *, highest: bool) -> None:
        self.largest, self.count = highest, count
        self.scores = torch.full((directions, count), -torch.inf if highest else torch.inf)
        self.ids = torch.zeros(directions, count, dtype=torch.int64)

    def update(self, row: int, scores: Tensor, first: int) -> None:
        """Take in scores (m, n) of the directions from `row` on and the tokens from `first` on."""
        here = slice(row, row + len(scores))
        new = scores.topk(min(self.count, scores.shape[1]), dim=1, largest=self.largest)
        candidates = torch.cat([self.scores[here], new.values.cpu()], dim=1)
        ids = torch.cat([self.ids[here], new.indices.cpu() + first], dim=1)
        kept = candidates.topk(self.count, dim=1, largest=self.largest)
        self.scores[here], self.ids[here] = kept.values, ids.gather(1, kept.indices)

    def sorted(self) -> dict[str, np.ndarray]:
        """The farthest first; of equal scores the lower id."""
        scores, ids = self.scores.numpy(), self.ids.numpy()
        order = np.lexsort((ids, -scores if self.largest else scores))
        return {"score": np.take_along_axis(scores, order, 1), "token_id": np.take_along_axis(ids, order, 1)}
