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

from typing import NamedTuple

import torch
from torch import Tensor

from probes.definition import PERMUTATIONS
from vindex.errors import ProbeError


class Similarity(NamedTuple):
    """Similarity of every pair of layers over the same tokens; L = layers."""

    debiased: Tensor
    """(L, L) float64, HSIC₁; may be negative."""
    biased: Tensor
    """(L, L) float64, HSIC₀, in 0 to 1."""
    with_sink: Tensor
    """(L, L) float64, HSIC₁ with every token, sinks included."""
    permuted: Tensor
    """(PERMUTATIONS, L − 1) float64: debiased, adjacent layers, the tokens of one of them permuted."""
    permuted_biased: Tensor
    """(PERMUTATIONS, L − 1) float64."""


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


def hsic1(one: Tensor, other: Tensor) -> Tensor:
    """Unbiased HSIC of two Gram matrices (n, n)."""
    n = one.shape[-1]
    return (u_centre(one) * u_centre(other)).sum() / (n * (n - 3))


def linear_cka(one: Tensor, other: Tensor, *, debiased: bool = True) -> float:
    """CKA of activations (n, p) and (n, q) of the same n tokens."""
    grams = torch.stack([gram(one), gram(other)])
    return float(cosines(u_centre(grams) if debiased else double_centre(grams))[0, 1])


def gram(activations: Tensor) -> Tensor:
    """XXᵀ in float64 of activations (n, p) about their mean: (n, n)."""
    centred = activations.double() - activations.double().mean(0)
    return centred @ centred.mT


def cosines(centred: Tensor) -> Tensor:
    """Cosine of every pair among L centred Gram matrices (L, n, n): (L, L).

    Raises ProbeError naming the first layer whose activations do not vary.
    """
    unit = _unit(centred)
    return unit @ unit.mT


def compare(grams: Tensor, kept: Tensor, *, seed: int = 0) -> Similarity:
    """All of Similarity from the layers' Gram matrices (L, n, n) and the tokens that `no_sink` keeps, (n,) bool."""
    chosen = grams[:, kept][:, :, kept]
    debiased, biased = _unit(u_centre(chosen)), _unit(double_centre(chosen))
    side = chosen.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(side, generator=generator).to(grams.device) for _ in range(PERMUTATIONS)]
    return Similarity(
        debiased @ debiased.mT,
        biased @ biased.mT,
        cosines(u_centre(grams)),
        torch.stack([_adjacent_permuted(debiased, order) for order in orders]),
        torch.stack([_adjacent_permuted(biased, order) for order in orders]),
    )


def _adjacent_permuted(unit: Tensor, order: Tensor) -> Tensor:
    """Similarity of layer l with layer l + 1 whose tokens are taken in another order: (L, n²) → (L − 1,)."""
    side = len(order)
    shuffled = unit[1:].view(-1, side, side)[:, order[:, None], order].flatten(1)
    return (unit[:-1] * shuffled).sum(-1)


def _unit(centred: Tensor) -> Tensor:
    """Each matrix flattened to length 1: (L, n, n) → (L, n²)."""
    flat = centred.flatten(1)
    norms = flat.norm(dim=1, keepdim=True)
    constant = (norms.squeeze(1) == 0).nonzero()
    if len(constant):
        raise ProbeError(f"layers.{int(constant[0])}: the residual stream is the same for every token; CKA is undefined")
    return flat / norms
