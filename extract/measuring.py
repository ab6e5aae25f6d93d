"""Figures of directions that somebody claims for a weight, beside the weight's own.

1. The weight's leading directions are found anew, with a certificate (extract/svd.py).
2. The claimed rows v meet the weight: ‖WᵀWv − σ²v‖/σ², and how much of it lies outside their span.
3. So do the true directions, rounded as the claimed ones are stored, and as far as arithmetic in float32 rounds, which
   shows what rounding alone does.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from extract.svd import lifted, top_directions
from extract.vocab import unit_rows
from vindex.differences import principal_angles
from vindex.errors import NumericError
from vindex.options import DEFAULTS
from vindex.verdicts import LIMITS, Figures

REPEATED = 1e-4  # eigenvalue of the unit rows' Gram matrix under which a row is one that the others give
NEURONS = 1 << 10  # rows that meet all neurons at a time
TINY = 1e-30


def measure(rows: np.ndarray, sigma: np.ndarray | None, weight: torch.Tensor, name: str) -> Figures:
    """Claimed directions (F, H), as stored, beside those of a weight (I, H) float32, a row for each neuron.

    sigma: (F,) as stated, or None. name: the tensor, for messages. Raises NumericError where a row or the weight is not
    finite.
    """
    raw, most = torch.from_numpy(np.array(rows)), min(weight.shape)
    odd = torch.nonzero(~torch.isfinite(raw).all(dim=1))
    if len(odd):
        raise NumericError(
            f"row {int(odd[0])} of the directions said to be of {name} holds what is no finite number; run vindex "
            "verify, and get the vindex again"
        )
    weight, half = lifted(weight)
    truth = top_directions(weight, min(len(raw), most), DEFAULTS.tolerance, name)
    rank = truth.rank if len(raw) <= most else 0  # of more rows than there are directions, none is compared
    best, square = truth.rows[:rank], max(float(weight.square().sum(dtype=torch.float64)), TINY)
    unit = unit_rows(raw[:rank].float())
    claimed, rounded = _Image(unit, weight), _Image(unit_rows(_rounded(best).to(raw.dtype).float()), weight)
    cosines = (unit @ best.T).abs()
    match = cosines.argmax(dim=1) if rank else torch.zeros(0, dtype=torch.int64)
    turn = _orthonormalising(unit)
    basis = turn @ unit.double()
    stated = None if sigma is None else np.asarray(sigma[:rank], np.float64)
    own, smaller = claimed.residual(claimed.quotient), (truth.sigma[match] / claimed.quotient).square()
    found = Figures(
        beyond=int(raw[rank:].any(dim=1).sum()),
        residual=own if stated is None else claimed.residual(torch.from_numpy(stated * half * half)),
        own=own,
        outside=claimed.outside(basis.float()),
        rounded=rounded.residual(rounded.quotient)[match.numpy()] * smaller.where(unit.any(dim=1), 1.0).numpy(),
        quotient=(claimed.quotient / half / half).numpy(),
        sigma=(truth.sigma[:rank] / half / half).numpy(),
        stated=stated,
        match=match.numpy(),
        cosine=cosines.gather(1, match[:, None])[:, 0].numpy(),
        flipped=claimed.flipped,
        angles=principal_angles(basis.numpy(), best.numpy()),
        defect=_defect(raw[:rank].float()),
        held=float((claimed.loadings.double() @ turn.T).square().sum()) / square,
        best=float(truth.sigma.double().square().sum()) / square,
        fraction=rank / weight.shape[1],
    )
    if found.true.any() or not raw.any():
        return found
    return replace(found, neuron=_nearest_neuron(unit_rows(raw.float()), weight))


def _rounded(rows: torch.Tensor) -> torch.Tensor:
    """Rows with as many bits in each number as a decomposition in float32 gets right."""
    mantissa, exponent = torch.frexp(rows)
    return torch.ldexp((mantissa * 2.0**LIMITS.bits).round() * 2.0**-LIMITS.bits, exponent)


class _Image:
    """What a weight makes of unit rows v (n, H): loadings Wv (I, n), their lengths (n,), and WᵀWv (n, H)."""

    def __init__(self, unit: torch.Tensor, weight: torch.Tensor) -> None:
        self.unit = unit
        self.loadings = weight @ unit.T
        self.quotient = self.loadings.norm(dim=0)
        self.image = self.loadings.T @ weight

    def residual(self, sigma: torch.Tensor) -> np.ndarray:
        """‖WᵀWv − σ²v‖/σ² (n,); 1 for a row that is zero."""
        squares = sigma.square()[:, None]
        return self._relative(self.image - squares * self.unit, squares)

    def outside(self, basis: torch.Tensor) -> np.ndarray:
        """‖WᵀWv − PWᵀWv‖/‖Wv‖² (n,), where P projects on the span of an orthonormal basis (m, H)."""
        return self._relative(self.image - (self.image @ basis.T) @ basis, self.quotient.square()[:, None])

    @property
    def flipped(self) -> np.ndarray:
        """(n,) whether the largest |loading| is a negative one, and no positive one comes near."""
        if not len(self.unit):
            return np.zeros(0, dtype=bool)
        largest = self.loadings.abs().amax(dim=0)
        return (self.loadings.amax(dim=0) < (1 - LIMITS.sign) * largest).numpy()

    def _relative(self, rest: torch.Tensor, squares: torch.Tensor) -> np.ndarray:
        lost = rest.norm(dim=1) / squares[:, 0].clamp_min(TINY)
        return lost.where(self.unit.any(dim=1), 1.0).numpy()


def _orthonormalising(unit: torch.Tensor) -> torch.Tensor:
    """(m, n) float64, the product of which with unit rows (n, H) is an orthonormal basis of their span."""
    values, vectors = torch.linalg.eigh(unit.double() @ unit.double().T)
    kept = values > REPEATED
    return (vectors[:, kept] / values[kept].sqrt()).T


def _defect(rows: torch.Tensor) -> float:
    """The largest |row·row − identity|."""
    return float((rows @ rows.T - torch.eye(len(rows))).abs().max()) if len(rows) else 0.0


def _nearest_neuron(unit: torch.Tensor, weight: torch.Tensor) -> float:
    """The least |cosine| of any of the rows (n, H) with the neuron of (I, H) that it is closest to."""
    neurons = unit_rows(weight)
    return min(float((part @ neurons.T).abs().amax(dim=1).min()) for part in unit.split(NEURONS))
