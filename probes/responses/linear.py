"""The linear response of what is written to what is read, over tokens.

a (n, F) is what F directions read at n tokens, y (n, H) what is written there; ã and ỹ are both less their means.
1. r_f = Σ ã_f ỹ / Σ ã_f²: all F of them are rows of one product, ãᵀỹ.
2. R²_f = ‖Σ ã_f ỹ‖² / (Σ ã_f² Σ ‖ỹ‖²), the share of what is written that follows what direction f reads.
3. Null: the same with ã permuted over the tokens. Over all permutations its mean is 1/(n − 1) exactly, whatever a and y
   are (E ã_s ã_t of two tokens is −1/(n − 1) of E ã_t²). Its largest value in PERMUTATIONS random ones is reached by
   chance in 1 of PERMUTATIONS + 1: an exact test of 5 %, however ã and ỹ are distributed (Barnard 1963).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vindex.format import PLACES

PERMUTATIONS = 19
FEWEST = 3
"""Tokens; a line goes through two of them, and R² is 1."""
CONSTANT = 1e-10
"""What varies by less than this share of its sum of squares is constant, up to float32's rounding."""


class Linear(NamedTuple):
    """The responses to F directions, float32; where there is none, a zero row and zeros."""

    direction: Tensor
    """(F, H) r_f at length one."""
    r2: Tensor
    """(F,)"""
    null: Tensor
    """(F,) the largest R² of PERMUTATIONS permutations."""
    slope: Tensor
    """(F,) ‖r_f‖."""
    tokens: int


class Both(NamedTuple):
    """a and y about their means, and the sums of squares of each; infinite where it is constant."""

    read: Tensor
    written: Tensor
    reads: Tensor
    """(F,)"""
    writes: Tensor
    """()"""

    def products(self, order: Tensor | None = None) -> Tensor:
        """(F, H) Σ ã ỹ, the tokens of ã in another order if it is given."""
        return (self.read if order is None else self.read[order]).T @ self.written

    def share(self, products: Tensor) -> Tensor:
        """(F,) R²; past 1 only by rounding."""
        return (products.square().sum(1) / self.reads / self.writes).clamp(max=1.0)


def centred(a: Tensor, y: Tensor) -> Both:
    """From (n, F) and (n, H) float32, n ≥ FEWEST."""
    read, written = a - a.mean(0), y - y.mean(0)
    reads, writes = read.square().sum(0), written.square().sum()
    reads = reads.where(reads > CONSTANT * a.square().sum(0), torch.inf)
    return Both(read, written, reads, writes.where(writes > CONSTANT * y.square().sum(), torch.inf))


def strongest(a: Tensor, places: Tensor) -> Tensor:
    """(2, F, 2 · PLACES): where what F directions read is most above its mean, then where it is most below.

    a: (n, F) what is read at `places` (n,). Row 0 has places, −1 where that side has no more, and row 1 z: what is read
    less its mean, over its deviation.
    """
    none = a.new_tensor([-1.0, 0.0])[:, None, None].expand(2, a.shape[1], PLACES)
    if len(a) < FEWEST:
        return torch.cat([none, none], dim=2)
    both, sides = centred(a, a), []
    z = both.read / (both.reads / len(a)).sqrt()
    for sign in (1, -1):
        best = (sign * z).topk(PLACES, dim=0)
        found = torch.stack([places[best.indices].float(), sign * best.values]).mT
        sides.append(found.where(best.values.T > 0, none))
    return torch.cat(sides, dim=2)


def explained(a: Tensor, y: Tensor) -> Tensor:
    """(F,) R² of y (n, H) on a (n, F) alone."""
    if len(a) < FEWEST:
        return torch.zeros(a.shape[1], device=a.device)
    both = centred(a, y)
    return both.share(both.products())


def respond(a: Tensor, y: Tensor, generator: torch.Generator) -> Linear:
    """The responses of y (n, H) to a (n, F), float32. generator: of permutations, on the CPU."""
    if len(a) < FEWEST:
        none = torch.zeros(a.shape[1], device=a.device)
        return Linear(none[:, None].expand(-1, y.shape[1]), none, none, none, len(a))
    both = centred(a, y)
    products = both.products()
    r2, null = both.share(products), torch.zeros(a.shape[1], device=a.device)
    for _ in range(PERMUTATIONS):
        order = torch.randperm(len(a), generator=generator).to(a.device)
        null = null.maximum(both.share(both.products(order)))
    known = (r2 > 0)[:, None]
    return Linear(
        normalize(products, dim=1, eps=1e-30).where(known, 0.0), r2, null, products.norm(dim=1) / both.reads, len(a)
    )
