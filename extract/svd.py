"""The leading singular directions of one weight on its residual side, with a certificate.

A weight W is seen as (I, H): a row for each neuron, a column for each residual dimension. Its right singular vectors
are what gate_proj reads; down_proj is passed transposed, so that they are what it writes.

1. Gram matrix G = WᵀW (H, H), float32, upper blocks only: the symmetric rank-k update in half the multiplications.
2. Block Lanczos on G with full reorthogonalisation (Golub & Underwood 1977; Saad, Numerical Methods for Large
   Eigenvalue Problems, ch. 6): an orthonormal basis grows by a block a step until the Rayleigh-Ritz residuals of the
   wanted pairs are small.
3. Certificate from W itself, not from G: ‖WᵀWv − σ²v‖ / σ² for every kept direction.
4. Where the matrix is small, the certificate fails or the spectrum falls off too far for float32, the float64 Gram
   matrix goes to LAPACK instead, and is certified in the same way.
5. Sign: the neuron with the largest |loading| gets a positive one.

Randomised SVD is not used: at F = 128 it returns residuals of 0.03-0.2 on real weights (benchmarks/svd.py).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from extract.cast import require_finite
from vindex.errors import NumericError

BLOCK = 32  # Lanczos block: wide enough that G is read seldom, narrow enough that few products are wasted
FIRST_CHECK = 5  # basis vectors for each wanted pair before the first Rayleigh-Ritz check
CHECK_EVERY = 4  # steps between checks, each an eigenproblem of the basis size
RITZ_TARGET = 2e-6  # where float32 rounding of G takes over; more steps do not improve the certificate
SMALL_SIDE = 1024  # below this LAPACK in float64 is as fast and exact
DYNAMIC_RANGE = 1e-3  # σ_F/σ_1 under which the squares in a float32 Gram matrix have lost σ_F
RANK_TOLERANCE = 1e-6  # σ/σ_1 under which a direction of a float64 Gram matrix is rounding, not signal
CLOSE = 1e-3  # relative distance under which neighbours in the spectrum count as close
GRAM_PANELS = 16


class Directions(NamedTuple):
    """The F leading directions of a weight.

    rows: (F, H) float32 unit rows, largest singular value first; rows past `rank` are zero. sigma: (F,) float32.
    residuals: (rank,) float32 certificates. gap_at_cut: (σ_F − σ_F+1)/σ_F or None. close_neighbours: see Certificate.
    """

    rows: torch.Tensor
    sigma: torch.Tensor
    rank: int
    residuals: torch.Tensor
    gap_at_cut: float | None
    close_neighbours: int
    method: str


class _Eigenpairs(NamedTuple):
    """Leading eigenpairs of G, largest first: values (F+1,) or (H,) when F is the whole side; vectors as rows."""

    values: torch.Tensor
    vectors: torch.Tensor


def top_directions(weight: torch.Tensor, features: int, tolerance: float, name: str) -> Directions:
    """The leading right singular vectors of `weight`.

    weight: (I, H) float32, on the device to compute on, a view is fine. features: F ≤ min(I, H).
    tolerance: the largest certificate allowed. name: the tensor, for messages.
    Raises NumericError when F is larger than a side, an entry is not finite, or the certificate fails.
    """
    neurons, hidden = weight.shape
    if features > min(neurons, hidden):
        raise NumericError(
            f"{name} is {neurons}×{hidden} (neurons × hidden): it has at most {min(neurons, hidden)} directions, and "
            f"{features} were asked for; use --features {min(neurons, hidden)} or fewer"
        )
    if hidden > SMALL_SIDE:
        gram = gram_matrix(weight)
        _require_finite(gram, weight, name)
        pairs = _block_lanczos(gram, features + 1) if features < hidden else None
        if pairs and pairs.values[features - 1] > pairs.values[0] * DYNAMIC_RANGE**2:
            directions = _certified(weight, pairs, features, "block-lanczos")
            if directions.residuals.max() <= tolerance:
                return directions
        del gram
    exact_weight = weight.double()
    gram = exact_weight.T @ exact_weight
    _require_finite(gram, exact_weight, name)
    directions = _certified(exact_weight, _lapack(gram), features, "lapack")
    if directions.rank and not directions.residuals.max() <= tolerance:
        raise NumericError(
            f"{name}: the worst direction has relative residual {directions.residuals.max():.1e}, above the tolerance "
            f"{tolerance:.1e}; keep fewer --features or raise --tolerance"
        )
    return directions


def gram_matrix(weight: torch.Tensor) -> torch.Tensor:
    """WᵀW (H, H) from its upper block panels, mirrored: 53 % of the multiplications of the full product."""
    hidden = weight.shape[1]
    gram = weight.new_empty(hidden, hidden)
    edges = [hidden * panel // GRAM_PANELS for panel in range(GRAM_PANELS + 1)]
    for left, right in itertools.pairwise(edges):
        panel = weight[:, left:right].T @ weight[:, left:]
        gram[left:right, left:] = panel
        gram[right:, left:right] = panel[:, right - left :].T
    return gram


def _block_lanczos(gram: torch.Tensor, count: int) -> _Eigenpairs | None:
    """The `count` largest eigenpairs of a symmetric (H, H) matrix, or None when half the space was not enough."""
    hidden = gram.shape[0]
    steps = hidden // (2 * BLOCK)
    basis = gram.new_empty(steps * BLOCK, hidden)  # orthonormal rows
    projected = gram.new_zeros(steps * BLOCK, steps * BLOCK)  # basis · G · basisᵀ
    seed = torch.Generator().manual_seed(0)
    block = torch.linalg.qr(torch.randn(hidden, BLOCK, generator=seed).to(gram)).Q  # (H, b), orthonormal columns
    for step in range(steps):
        old, new = step * BLOCK, (step + 1) * BLOCK
        basis[old:new] = block.T
        known = basis[:new]
        image = gram @ block
        coefficients = known @ image
        image -= known.T @ coefficients
        correction = known @ image  # "twice is enough": one pass leaves the basis orthogonal only to 1e-4
        image -= known.T @ correction
        coefficients += correction
        projected[:new, old:new] = coefficients
        projected[old:new, :new] = coefficients.T
        block, coupling = torch.linalg.qr(image)
        if new >= FIRST_CHECK * count and (step + 1) % CHECK_EVERY == 0:
            values, vectors = torch.linalg.eigh(projected[:new, :new])
            values, ritz = values.flip(0)[:count], vectors.flip(1)[:, :count]
            residuals = (coupling @ ritz[old:new]).norm(dim=0) / values.clamp_min(1e-30)
            if residuals.max() <= RITZ_TARGET:
                return _Eigenpairs(values, ritz.T @ known)
    return None


def _lapack(gram: torch.Tensor) -> _Eigenpairs:
    """All eigenpairs of a symmetric (H, H) matrix, largest first."""
    values, vectors = torch.linalg.eigh(gram)
    return _Eigenpairs(values.flip(0), vectors.flip(1).T)


def _certified(weight: torch.Tensor, pairs: _Eigenpairs, features: int, method: str) -> Directions:
    """Measure the leading pairs against the weight itself, fix their signs, and zero what is past the rank."""
    directions = pairs.vectors[:features].contiguous()
    loadings = weight @ directions.T.contiguous()  # (I, F)
    sigma = loadings.norm(dim=0)
    real = sigma > RANK_TOLERANCE * sigma[0] if sigma[0] > 0 else torch.zeros_like(sigma, dtype=torch.bool)
    rank = int(real.sum())
    image = loadings.T @ weight  # (F, H)
    squares = sigma.square()[:, None]
    residuals = (image - squares * directions).norm(dim=1)[:rank] / squares[:rank, 0]
    signs = _signs(loadings)
    directions = directions * (signs * real)[:, None]
    sigma = sigma * real
    return Directions(
        directions.float(),
        sigma.float(),
        rank,
        residuals.float(),
        _gap_at_cut(sigma, pairs.values, features),
        int(((sigma[:-1] - sigma[1:])[: max(rank - 1, 0)] < CLOSE * sigma[: max(rank - 1, 0)]).sum()),
        method,
    )


def _signs(loadings: torch.Tensor) -> torch.Tensor:
    """±1 for each column of (I, F): the sign of its largest-magnitude entry, the lowest index on a tie."""
    peak = loadings.gather(0, loadings.abs().argmax(dim=0)[None])[0]  # argmax gives the first of equals
    return torch.where(peak < 0, -1.0, 1.0).to(loadings.dtype)


def _gap_at_cut(sigma: torch.Tensor, eigenvalues: torch.Tensor, features: int) -> float | None:
    last = float(sigma[-1])
    if last == 0 or features >= len(eigenvalues):
        return None
    following = float(eigenvalues[features].clamp_min(0).sqrt())
    return (last - following) / last


def _require_finite(gram: torch.Tensor, weight: torch.Tensor, name: str) -> None:
    """Raise NumericError naming the first NaN or infinite entry. A bad entry shows on the Gram diagonal."""
    if torch.isfinite(gram.diagonal()).all():
        return
    if torch.isfinite(weight).all():
        raise NumericError(f"{name} has entries whose squares overflow float32; it cannot be decomposed")
    require_finite(weight, f"{name} (neuron, dimension) ")
