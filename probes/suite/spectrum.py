"""Leading singular directions of a weight on its residual side, and the floor that chance sets under its spectrum.

1. Exactly, without a vindex: LAPACK's symmetric eigensolver on the weight's Gram matrix on the residual side (H, H), in
   float64. Its leading eigenvectors are the directions, the roots of its eigenvalues the singular values. A mixture's
   experts are one weight here, their neurons side by side: their Gram matrices add up.
2. var@k: the k largest σ² as a share of Σσ² = ‖W‖²_F. It means nothing alone: a matrix of independent entries also has
   large and small singular values. Marchenko & Pastur 1967 give their law for shape (m, n), and `floor` its var@k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.suite.definition import RANK_TOLERANCE, SPECTRUM_RANKS
from vindex.floor import law


class Spectrum(NamedTuple):
    """The head of a weight's spectrum."""

    shape: tuple[int, int]
    singular_values: np.ndarray
    """(F,) float64, largest first."""
    energy: float
    """‖W‖²_F, of the whole weight."""

    def share(self, rank: int) -> float | None:
        """var@rank; None for a weight that is zero."""
        return float(np.square(self.singular_values[:rank]).sum() / self.energy) if self.energy else None


def leading(weights: Tensor | Iterable[Tensor], count: int, *, side: int) -> tuple[Spectrum, np.ndarray]:
    """The `count` largest singular values of a weight and their unit directions (count, H) float64.

    Past the weight's rank both are zero: what an eigensolver gives there is no direction of the weight.
    `side` is the weight's residual axis: 1 for gate_proj (I, H), which reads, and 0 for down_proj (H, I), which writes.
    Several weights stand for one: a mixture's experts, their neurons side by side. One at a time is held in float64.
    """
    gram, neurons = None, 0
    for weight in [weights] if isinstance(weights, Tensor) else weights:
        matrix = weight.detach().double()
        part = matrix.mT @ matrix if side == 1 else matrix @ matrix.mT
        gram = part if gram is None else gram.add_(part)
        neurons += weight.shape[1 - side]
    if gram is None:
        raise ValueError("no weights")
    values, vectors = torch.linalg.eigh(gram)  # ascending
    width = len(gram)
    shape = (neurons, width) if side == 1 else (width, neurons)
    count = min(count, *shape)
    head = values.flip(0)[:count].clamp_min(0).sqrt()
    head = head * (head > RANK_TOLERANCE * head[0])
    directions = vectors.flip(1)[:, :count].mT * (head > 0)[:, None]
    return (
        Spectrum(shape, head.cpu().numpy(), float(gram.diagonal().sum())),
        directions.contiguous().cpu().numpy(),
    )


def leading_read(weight: Tensor) -> np.ndarray:
    """The leading right singular vector (H,) of a gate_proj (I, H), by the Gram matrix of its shorter side.

    Zero for a weight that is zero.
    """
    matrix = weight.detach().double()
    if not matrix.any():
        return np.zeros(matrix.shape[1])
    if matrix.shape[0] >= matrix.shape[1]:
        return torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, -1].cpu().numpy()
    read = matrix.mT @ torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, -1]
    return (read / torch.linalg.vector_norm(read)).cpu().numpy()


def given(weight: Tensor, singular_values: np.ndarray) -> Spectrum:
    """The Spectrum of a weight whose leading singular values are already known."""
    energy = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64).square())
    return Spectrum(_shape(weight), np.asarray(singular_values, dtype=np.float64), energy)


def floor(shape: tuple[int, int], ranks: Sequence[int] = SPECTRUM_RANKS) -> tuple[float, ...]:
    """var@k of a large matrix of independent entries of this shape, for each k: the Marchenko–Pastur value."""
    found = law(shape)
    return tuple(float(np.interp(min(rank / min(shape), 1.0), found.number, found.energy)) for rank in ranks)


def _shape(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns
