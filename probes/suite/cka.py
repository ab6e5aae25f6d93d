"""Linear centred kernel alignment between layers, biased and debiased.

Kornblith et al. 2019 (arXiv:1905.00414) compare two sets of activations of the same n tokens, X (n, p) and Y (n, q), by
the alignment of their Gram matrices K = XXᵀ and L = YYᵀ: CKA = HSIC(K, L) / √(HSIC(K, K)·HSIC(L, L)).

- biased: HSIC₀ = ⟨HKH, HLH⟩ / (n − 1)², H the centring matrix. With few tokens and wide layers it is far from 0 even
  for independent data.
- debiased: HSIC₁, the unbiased estimator of Song et al. 2012 (JMLR 13:1393, eq. 5), used for CKA by Nguyen et al. 2021.
  It equals ⟨K̃, L̃⟩ / (n(n − 3)) for the U-centred K̃ of Székely & Rizzo 2014: off-diagonal entries
  K_ij − Σ_k K_ik/(n−2) − Σ_k K_kj/(n−2) + Σ_kl K_kl/((n−1)(n−2)) of K with a zero diagonal, diagonal 0.

Both are therefore cosines between centred Gram matrices, and a whole model is one matrix product. U-centring removes
any a_i + a_j from K_ij, so Gram matrices may be taken about any common origin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.suite.definition import PERMUTATIONS, SEED
from vindex.errors import ProbeError


class Similarity(NamedTuple):
    """Similarity of every pair of layers over the same tokens; L = layers."""

    debiased: Tensor
    """(L, L) HSIC₁; may be negative."""
    biased: Tensor
    """(L, L) HSIC₀, in 0 to 1."""
    with_sink: Tensor
    """(L − 1,) HSIC₁ of adjacent layers with every token, sinks included."""
    permuted: Tensor
    """(PERMUTATIONS, L − 1): debiased, adjacent layers, the tokens of one of them permuted."""
    permuted_biased: Tensor
    """(PERMUTATIONS, L − 1)."""


def double_centre(grams: Tensor) -> Tensor:
    """HKH for each Gram matrix: (…, n, n) → (…, n, n)."""
    rows = grams.mean(-1, keepdim=True)
    return grams - rows - grams.mean(-2, keepdim=True) + rows.mean(-2, keepdim=True)


def u_centre(grams: Tensor) -> Tensor:
    """U-centred Gram matrices, (…, n, n) → (…, n, n), n ≥ 4."""
    n = grams.shape[-1]
    if n < 4:
        raise ProbeError(f"debiased CKA needs at least 4 tokens, got {n}")
    diagonal = torch.eye(n, dtype=torch.bool, device=grams.device)
    hollow = grams.masked_fill(diagonal, 0)
    rows = hollow.sum(-1, keepdim=True)
    total = rows.sum(-2, keepdim=True)
    centred = hollow - (rows + rows.mT) / (n - 2) + total / ((n - 1) * (n - 2))
    return centred.masked_fill(diagonal, 0)


def gram(activations: Tensor, *, about: Tensor | None = None) -> Tensor:
    """XXᵀ, (n, n), of activations (n, p) about their mean, or about another origin (p,)."""
    centred = activations - (activations.mean(0) if about is None else about)
    return centred @ centred.mT


def compare(grams: Sequence[Tensor], kept: Sequence[int]) -> Similarity:
    """All of Similarity from the layers' Gram matrices, L times (n, n), and the tokens that `no_sink` keeps."""
    index = torch.tensor(kept, device=grams[0].device)
    chosen = [whole.index_select(0, index).index_select(1, index) for whole in grams]
    debiased, biased = _unit(map(u_centre, chosen)), _unit(map(double_centre, chosen))
    with_sink = _unit(map(u_centre, grams))
    generator = torch.Generator().manual_seed(SEED)
    orders = [torch.randperm(len(kept), generator=generator).to(index.device) for _ in range(PERMUTATIONS)]
    return Similarity(
        _cosines(debiased, len(kept)),
        _cosines(biased, len(kept)),
        (with_sink[:-1] * with_sink[1:]).sum(1),
        torch.stack([_adjacent_permuted(debiased, order) for order in orders]),
        torch.stack([_adjacent_permuted(biased, order) for order in orders]),
    )


def _cosines(unit: Tensor, side: int) -> Tensor:
    """Of every pair of rows, (L, n²) → (L, L): n sums of n products each, since a float32 sum of n² is off by 2e-5."""
    parts = unit.view(-1, side, side).transpose(0, 1)  # (n, L, n)
    return torch.bmm(parts, parts.mT).sum(0, dtype=torch.float64)


def _adjacent_permuted(unit: Tensor, order: Tensor) -> Tensor:
    """Similarity of layer l with layer l + 1 whose tokens are taken in another order: (L, n²) → (L − 1,)."""
    entry = (order[:, None] * len(order) + order).flatten()
    return (unit[:-1] * unit[1:].index_select(1, entry)).sum(1)


def _unit(centred: Iterable[Tensor]) -> Tensor:
    """Each of L matrices (n, n) flattened to length 1, one by one to stay in the processor's cache: (L, n²)."""
    rows = []
    for layer, matrix in enumerate(centred):
        norm = torch.linalg.vector_norm(matrix, dtype=torch.float64)
        if norm == 0:
            raise ProbeError(f"layers.{layer}: the residual stream is the same for every token; CKA is undefined")
        rows.append(matrix.flatten() / norm.to(matrix.dtype))
    return torch.stack(rows)
