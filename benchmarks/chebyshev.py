"""Leading eigenpairs of a Gram matrix by Chebyshev-filtered subspace iteration, for a GPU to try beside block Lanczos.

Block Lanczos multiplies G by a few columns at a time and factorises as often; a GPU likes neither. Here a block of m
columns, half as many again as are wanted, is all there ever is (Zhou, Saad, Tiago & Chelikowsky 2006).

1. A random block, orthonormal.
2. Rayleigh-Ritz in the block: eigenpairs of XᵀGX, of m × m. The residuals of the wanted ones decide whether to stop.
3. Filter: X becomes p(G) X, p the Chebyshev polynomial that is at most 1 on [0, cut] and grows beyond; the cut is the
   block's smallest Ritz value, below everything wanted. The degree is such that no column grows by more than GROWTH.
4. Orthonormal again by CholeskyQR2: X = X R⁻¹ with RᵀR = XᵀX, twice, that small product in float64.
5. From the Ritz values it is known what a filter of that degree gains, so that Rayleigh-Ritz, whose eigenproblem is
   what a GPU is slow at, is done again only when the target should be reached.

`rough`: the first filters may multiply in bfloat16 with float32 sums, until roundings would show; the rest, and every
Rayleigh-Ritz, is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

OVER = 1.5  # columns for each wanted pair; more make each product dearer and fewer of them needed
MULTIPLE = 32  # of columns, as matrix units like them
GROWTH = 1e5  # of a column in one filter: what CholeskyQR2 with float64 sums takes with ease
ROUGH_RESIDUAL = 2e-2  # relative residual that filters in bfloat16 reach
MOST_PRODUCTS = 120

Multiply = Callable[[torch.Tensor], torch.Tensor]


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


def leading(gram: torch.Tensor, count: int, target: float, *, rough: bool = False, small: str = "cpu") -> Found:
    """The `count` largest eigenpairs of a symmetric positive (n, n), to a relative residual ‖Gv − λv‖/λ of `target`.

    small: the device on which the m × m eigenproblem is solved.
    """
    side = gram.shape[0]
    width = min(side, math.ceil(OVER * count / MULTIPLE) * MULTIPLE)
    exact: Multiply = lambda block: gram @ block  # noqa: E731
    block = orthonormal(torch.randn(side, width, generator=torch.Generator().manual_seed(0)).to(gram))
    block = orthonormal(exact(block))
    ritz, products = _rayleigh_ritz(exact, block, count, small), 2
    multiply = _in_bfloat16(gram) if rough else exact
    while (worst := max(ritz.residuals)) > target and products < MOST_PRODUCTS:
        top, last, cut = ritz.values[0], ritz.values[count - 1], ritz.values[-1]
        degree = max(1, int(math.log(GROWTH) / _growth(top, cut)))
        aim = max(target / 2, ROUGH_RESIDUAL) if multiply is not exact else target / 2
        wanted = math.log(worst / aim) / _growth(last, cut) if worst > aim else 1
        rounds = max(1, min(math.ceil(wanted / degree), (MOST_PRODUCTS - products) // degree))
        if products < 6:
            rounds = 1  # the first Ritz values say little of the spectrum
        block = ritz.block
        for _ in range(rounds):
            block = orthonormal(_filtered(multiply, block, degree, top, cut))
        ritz = _rayleigh_ritz(exact, block, count, small)
        products += rounds * degree + 1
        if max(ritz.residuals) <= ROUGH_RESIDUAL * 2 or max(ritz.residuals) > worst / 2:
            multiply = exact
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


def _filtered(multiply: Multiply, block: torch.Tensor, degree: int, top: float, cut: float) -> torch.Tensor:
    """p(G) · block, scaled so that the largest eigenvalue is multiplied by about 1 (Zhou et al., algorithm 4.3)."""
    half = cut / 2  # centre and half width of [0, cut]
    sigma = first = half / (top - half)
    before, now = block, (multiply(block) - half * block) * (first / half)
    for _ in range(degree - 1):
        following = 1 / (2 / first - sigma)
        after = (multiply(now) - half * now).mul_(2 * following / half).sub_(before, alpha=sigma * following)
        before, now, sigma = now, after, following
    return now


def _growth(value: float, cut: float) -> float:
    """How many e-folds a filter gains on what lies below the cut with each degree, at an eigenvalue above it."""
    return math.acosh(max(2 * value / cut - 1, 1 + 1e-9))


def _rayleigh_ritz(multiply: Multiply, block: torch.Tensor, count: int, small: str) -> _Ritz:
    image = multiply(block)
    projected = (block.T @ image).to(small)
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    values, turn = values.flip(0), vectors.flip(1).to(block)
    block, image = block @ turn, image @ turn
    of = values.to(block)[:count]
    residuals = (image[:, :count] - block[:, :count] * of).norm(dim=0) / of
    return _Ritz(values.tolist(), block, residuals.tolist())


def _in_bfloat16(gram: torch.Tensor) -> Multiply:
    """Products with operands rounded to bfloat16 and sums in float32."""
    small = gram.bfloat16()
    if gram.is_cuda:
        return lambda block: torch.mm(small, block.bfloat16(), out_dtype=torch.float32)
    return lambda block: small.float() @ block.bfloat16().float()
