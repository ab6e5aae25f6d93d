"""The tokens at the two poles of every direction, in one pass over the vocabulary matrix.

The matrix is read a block of rows at a time; each block meets every direction and leaves behind only the running
extremes and sums. A few random directions pass with the model's own, to show what poles are like by chance. Where
experts make the directions many, the layers are taken in runs, with one pass for each: memory is one block and one
run, whatever the vocabulary and the number of layers, and a run that is finished is never redone.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from vindex.chance import sampled_tokens
from vindex.format import META_TOP_K, meta_record
from vindex.index import Index

POLE = META_TOP_K // 2
GROUP = 64
RUN = 1 << 14  # directions whose product with the vocabulary takes far longer than reading it
STEP = 1 << 10  # directions at a time
FLUSHED = 2.0**-25  # what float16 rounds to zero, and all below; float32 can square what is above


class TopTokens:
    """Running ten highest and ten lowest scores of so many features, kept where they are computed."""

    def __init__(self, features: int, device: str = "cpu") -> None:
        shape = (2, features, POLE)  # first axis: highest, lowest (negated, so that both are maxima)
        self._scores = torch.full(shape, -torch.inf, device=device)
        self._ids = torch.zeros(shape, dtype=torch.int64, device=device)

    def update(self, first_feature: int, scores: torch.Tensor, first_id: int) -> None:
        """Take in scores (m, n) of m features and the tokens first_id … first_id + n − 1."""
        rows = slice(first_feature, first_feature + len(scores))
        for pole, signed in enumerate((scores, -scores)):
            values, positions = _largest(signed)
            candidates = torch.cat([self._scores[pole, rows], values], dim=1)
            ids = torch.cat([self._ids[pole, rows], positions + first_id], dim=1)
            kept = candidates.topk(POLE, dim=1)
            self._scores[pole, rows], self._ids[pole, rows] = kept.values, ids.gather(1, kept.indices)

    def records(self) -> np.ndarray:
        """A record of a meta file for every feature, in order (docs/format.md)."""
        scores, ids = self._scores.cpu().numpy(), self._ids.cpu().numpy()
        order = np.lexsort((ids, -scores))  # equal scores: the lower token id first
        scores, ids = np.take_along_axis(scores, order, -1), np.take_along_axis(ids, order, -1)
        records = np.zeros(scores.shape[1], meta_record(META_TOP_K))
        records["tokens"]["score"] = np.concatenate([scores[0], -scores[1]], axis=-1)
        records["tokens"]["token_id"] = np.concatenate([ids[0], ids[1]], axis=-1)
        records["top_token_id"] = records["tokens"]["token_id"][:, 0]
        records["top_score"] = records["tokens"]["score"][:, 0]
        return records


class Spread:
    """Running mean and standard deviation of the scores of so many features, and the sum of the tokens' rows.

    Blocks are joined as in Chan, Golub & LeVeque 1983, in float64.
    """

    def __init__(self, features: int, device: str = "cpu") -> None:
        self._mean, self._squares, self._count = torch.zeros(3, features, dtype=torch.float64, device=device)

    def update(self, first_feature: int, scores: torch.Tensor) -> None:
        """Take in scores (m, n) of m features and n more tokens."""
        rows, more = slice(first_feature, first_feature + len(scores)), scores.shape[1]
        variance, mean = (part.double() for part in torch.var_mean(scores, dim=1, correction=0))
        before, step = self._count[rows], mean - self._mean[rows]
        share = more / (before + more)
        self._mean[rows] += step * share
        self._squares[rows] += variance * more + step.square() * before * share
        self._count[rows] += more

    def result(self) -> torch.Tensor:
        """(2, features) float32: means, and standard deviations over all tokens."""
        return torch.stack([self._mean, (self._squares / self._count).sqrt()]).float()


class Sample:
    """The rows of format.SAMPLE tokens, evenly spread over `tokens` ids, and the mean of all rows."""

    def __init__(self, tokens: int) -> None:
        self._ids = sampled_tokens(tokens)
        self._rows: list[torch.Tensor] = []
        self._sum: torch.Tensor | float = 0.0
        self._tokens = tokens

    def update(self, first_id: int, rows: torch.Tensor) -> None:
        """Take in rows (n, H) of the tokens first_id … first_id + n − 1."""
        self._sum = self._sum + rows.sum(dim=0).double()
        inside = self._ids[(self._ids >= first_id) & (self._ids < first_id + len(rows))] - first_id
        self._rows.append(rows[torch.from_numpy(inside).to(rows.device)])

    def rows(self) -> torch.Tensor:
        """(SAMPLE, H), in the order of `sampled_tokens`."""
        return torch.cat(self._rows)

    def mean(self) -> torch.Tensor:
        """(H,) float32."""
        return (torch.as_tensor(self._sum) / self._tokens).float()


def peaks_of(
    directions: Iterable[tuple[int, torch.Tensor]], stats: torch.Tensor, rows: torch.Tensor, layer_of: torch.Tensor
) -> torch.Tensor:
    """Largest |z| of each row in each layer: (layers, n) float32.

    directions: (first feature, (m, H) unit rows) pieces of all features. stats: `Spread.result`. rows: (n, H) of length
    one.
    layer_of: (features,) int64, from 0. A direction without spread, as a zero one, has z 0.
    """
    peaks = torch.zeros(int(layer_of[-1]) + 1, len(rows), device=rows.device)
    mean, deviation = stats[:, :, None]
    for first, piece in directions:
        at = slice(first, first + len(piece))
        size = ((scores_of(piece, rows) - mean[at]).abs() / deviation[at]).where(deviation[at] > 0, 0.0)
        for layer in layer_of[at].unique().tolist():
            peaks[layer] = peaks[layer].maximum(size[layer_of[at] == layer].amax(dim=0))
    return peaks


def runs_of(index: Index) -> list[range]:
    """Neighbouring layers that meet the vocabulary together: as many as have RUN directions between them."""
    runs, first, features = [], 0, 0
    for entry in index.layers:
        features += entry.num_features
        if features >= RUN or entry.layer == index.num_layers - 1:
            runs.append(range(first, entry.layer + 1))
            first, features = entry.layer + 1, 0
    return runs


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


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """(n, H) rows of length one. One that float16 rounds to zero, as embeddings.bin keeps it, is zero."""
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True).where(largest > FLUSHED, torch.inf)


def scores_of(directions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(F, n) scores of each of (F, H) directions with each of (n, H) tokens' rows.

    A gate direction's is a cosine, of unit rows with unit rows. A down direction's is its logit lens, scaled by the
    final norm's weight, with the rows of the unembedding as they are.
    """
    return directions @ rows.T
