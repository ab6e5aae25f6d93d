"""Leading eigenpairs of a Gram matrix by Chebyshev-filtered subspace iteration: what block Lanczos is compared with.

Block Lanczos multiplies G by a few columns at a time and factorises as often; a GPU likes neither. Here a block of m
columns, half as many again as are wanted, is all there ever is (Zhou, Saad, Tiago & Chelikowsky 2006). On an H200 it
was no faster all the same (docs/scaling.md).

1. A random block, orthonormal.
2. Rayleigh-Ritz in the block: eigenpairs of XᵀGX, of m × m. The residuals of the wanted ones decide whether to stop.
3. Filter: X becomes p(G) X, p the Chebyshev polynomial that is at most 1 on [0, cut] and grows beyond; the cut is the
   block's smallest Ritz value, below everything wanted. The degree is such that no column grows by more than GROWTH.
4. Orthonormal again by CholeskyQR2: X = X R⁻¹ with RᵀR = XᵀX, twice, that small product in float64.
5. From the Ritz values it is known what a filter of that degree gains, so that Rayleigh-Ritz, whose eigenproblem is
   what a GPU is slow at, is done again only when the target should be reached.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

OVER = 1.5  # columns for each wanted pair; more make each product dearer and fewer of them needed
MULTIPLE = 32  # of columns, as matrix units like them
GROWTH = 1e5  # of a column in one filter: what CholeskyQR2 with float64 sums takes with ease
MOST_PRODUCTS = 120


class Found(NamedTuple):
    """values (count,), vectors (count, n) as rows, largest first; the largest relative residual in G; products of G."""

    values: torch.Tensor
    vectors: torch.Tensor
    residual: float
    products: int


class _Ritz(NamedTuple):
    """Rayleigh-Ritz in a block: values (m,) largest first, block (n, m), relative residuals (count,) as floats."""

    values: list[float]
    block: torch.Tensor
    residuals: list[float]


def leading(gram: torch.Tensor, count: int, target: float) -> Found:
    """The `count` largest eigenpairs of a symmetric positive (n, n), to a relative residual ‖Gv − λv‖/λ of `target`."""
    side = gram.shape[0]
    width = min(side, math.ceil(OVER * count / MULTIPLE) * MULTIPLE)
    block = orthonormal(torch.randn(side, width, generator=torch.Generator().manual_seed(0)).to(gram))
    ritz, products = _rayleigh_ritz(gram, orthonormal(gram @ block), count), 2
    while (worst := max(ritz.residuals)) > target and products < MOST_PRODUCTS:
        top, last, cut = ritz.values[0], ritz.values[count - 1], ritz.values[-1]
        degree = max(1, int(math.log(GROWTH) / _growth(top, cut)))
        wanted = math.log(2 * worst / target) / _growth(last, cut)
        rounds = max(1, min(math.ceil(wanted / degree), (MOST_PRODUCTS - products) // degree))
        if products < 6:
            rounds = 1  # the first Ritz values say little of the spectrum
        block = ritz.block
        for _ in range(rounds):
            block = orthonormal(_filtered(gram, block, degree, top, cut))
        ritz = _rayleigh_ritz(gram, block, count)
        products += rounds * degree + 1
    values = torch.tensor(ritz.values[:count]).to(gram)
    return Found(values, ritz.block.T[:count].contiguous(), max(ritz.residuals), products)


def orthonormal(block: torch.Tensor) -> torch.Tensor:
    """CholeskyQR2 (Fukaya et al. 2014) of (n, m), its sums in float64."""
    for _ in range(2):
        wide = block.double()
        wide = wide / wide.norm(dim=0)
        upper = torch.linalg.cholesky_ex(wide.T @ wide, upper=True).L
        block = torch.linalg.solve_triangular(upper, wide, upper=True, left=False).to(block.dtype)
    return block


def _filtered(gram: torch.Tensor, block: torch.Tensor, degree: int, top: float, cut: float) -> torch.Tensor:
    """p(G) · block, scaled so that the largest eigenvalue is multiplied by about 1 (Zhou et al., algorithm 4.3)."""
    half = cut / 2  # centre and half width of [0, cut]
    sigma = first = half / (top - half)
    before, now = block, (gram @ block - half * block) * (first / half)
    for _ in range(degree - 1):
        following = 1 / (2 / first - sigma)
        after = (gram @ now - half * now).mul_(2 * following / half).sub_(before, alpha=sigma * following)
        before, now, sigma = now, after, following
    return now


def _growth(value: float, cut: float) -> float:
    """How many e-folds a filter gains on what lies below the cut with each degree, at an eigenvalue above it."""
    return math.acosh(max(2 * value / cut - 1, 1 + 1e-9))


def _rayleigh_ritz(gram: torch.Tensor, block: torch.Tensor, count: int) -> _Ritz:
    image = gram @ block
    projected = block.T @ image
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    values, turn = values.flip(0), vectors.flip(1)
    block, image = block @ turn, image @ turn
    of = values[:count]
    residuals = (image[:, :count] - block[:, :count] * of).norm(dim=0) / of
    return _Ritz(values.tolist(), block, residuals.tolist())
