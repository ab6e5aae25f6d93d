"""The leading singular directions of one weight on its residual side, with a certificate.

A weight W is seen as (I, H): a row for each neuron, a column for each residual dimension. Its right singular vectors
are what gate_proj reads; down_proj is passed transposed, so that they are what it writes.

1. Gram matrix G of W's shorter side: WᵀW (H, H), or WWᵀ (I, I) where the neurons are fewer, as in the experts of a
   mixture. Float32, upper blocks only: the symmetric rank-k update in half the multiplications. Weights that were
   stored in bfloat16 go through the processor's bfloat16 units, where it has them: nothing is rounded but the sums.
2. Block Lanczos on G with full reorthogonalisation (Golub & Underwood 1977; Saad, Numerical Methods for Large
   Eigenvalue Problems, ch. 6): an orthonormal basis grows by a block a step until the Rayleigh-Ritz residuals of the
   wanted pairs are small.
3. Eigenvectors u of WWᵀ become directions v = Wᵀu / σ; those of WᵀW are directions already.
   Certificate from W itself, not from G: ‖WᵀWv − σ²v‖ / σ² for every kept direction.
4. Where the matrix is small, the certificate fails or the spectrum falls off too far for float32, the float64 Gram
   matrix goes to LAPACK instead, and is certified in the same way.
5. Sign: the neuron with the largest |loading| gets a positive one.
6. A weight of tiny numbers is decomposed times a power of two: float32 cannot hold the square of a small residual.

Randomised SVD is not used: at F = 128 it returns residuals of 0.03-0.2 on real weights (benchmarks/svd.py).
"""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from typing import NamedTuple

import torch

from extract.cast import require_finite
from extract.device import bfloat16_products
from vindex.errors import NumericError

PAIRS_PER_VECTOR = 4  # wanted pairs for each vector of a Lanczos block: G is read seldom, and few products are wasted
SMALLEST_BLOCK = 8
FIRST_CHECK = 7.75  # basis vectors for each wanted pair at the first Rayleigh-Ritz check; real spectra need 6.8 to 7.7
CHECK_GROWTH = 1.35  # how much larger the basis is at each further check; random matrices need 10.4 for each pair
RITZ_TARGET = 2e-6  # where float32 rounding of G takes over; more steps do not improve the certificate
SMALL_SIDE = 384  # below this, or below SIDE_PER_PAIR for each wanted pair, LAPACK in float64 is as fast and exact
SIDE_PER_PAIR = 2 * FIRST_CHECK  # so that half the space holds the basis of the first check
DYNAMIC_RANGE = 1e-3  # σ_F/σ_1 under which the squares in a float32 Gram matrix have lost σ_F
RANK_TOLERANCE = 1e-6  # σ/σ_1 under which a direction of a float64 Gram matrix is rounding, not signal
JACOBI_ROWS = 512  # up to which torch solves float32 eigenproblems on a GPU by rotations
CLOSE = 1e-3  # relative distance under which neighbours in the spectrum count as close
GRAM_PANELS, PANEL_WIDTH = 16, 128  # at most so many panels, none much narrower
SMALLEST_PEAK = 2.0**-8  # largest entry of a weight, under which squares of its residuals could leave float32
PIECE_ROWS = 64  # looked at in one go, so that what a check needs stays in the cache


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
    """Leading eigenpairs of G, largest first: values (F+1,), or all of them from LAPACK; vectors as rows."""

    values: torch.Tensor
    vectors: torch.Tensor


def top_directions(weight: torch.Tensor, features: int, tolerance: float, name: str) -> Directions:
    """The leading right singular vectors of `weight`.

    weight: (I, H) float32, on the device to compute on; a view is fine. features: F ≤ min(I, H). tolerance: the largest
    certificate allowed. name: the tensor, for messages.
    Raises NumericError when F is larger than a side, an entry is not finite, or the certificate fails.
    """
    neurons, hidden = weight.shape
    if features > min(neurons, hidden):
        raise NumericError(
            f"{name} is {neurons}×{hidden} (neurons × hidden): it has at most {min(neurons, hidden)} directions, and "
            f"{features} were asked for; use --features {min(neurons, hidden)} or fewer"
        )
    weight, half = lifted(weight)
    found = _certified_directions(weight, features, tolerance, name)
    return found._replace(sigma=found.sigma / half / half)


def lifted(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(I, H) times half², and half: a power of two that brings tiny weights near 1; the others as they are, and 1.

    Nothing but exponents changes. The power is applied in halves, as float32 cannot hold the largest ones whole.
    """
    peak = float(torch.stack(torch.aminmax(_as_it_lies(weight))).abs().max())
    if not 0 < peak < SMALLEST_PEAK:
        return weight, 1.0
    half = 2.0 ** (-math.frexp(peak)[1] // 2)
    return (weight * half).mul_(half), half


def _certified_directions(weight: torch.Tensor, features: int, tolerance: float, name: str) -> Directions:
    """By Lanczos where it does, else by LAPACK. Raises NumericError as `top_directions` does."""
    if min(weight.shape) >= max(SMALL_SIDE, SIDE_PER_PAIR * (features + 1)):
        directions = _by_lanczos(weight, features, name)
        if directions and directions.residuals.max() <= tolerance:
            return directions
    exact_weight = weight.double()
    columns = _shorter_columns(exact_weight)
    gram = columns.T @ columns
    _require_finite(gram, exact_weight, name)
    directions = _certified(exact_weight, _lapack(gram), features, "lapack")
    if directions.rank and not directions.residuals.max() <= tolerance:
        raise NumericError(
            f"{name}: the worst direction has relative residual {directions.residuals.max():.1e}, above the tolerance "
            f"{tolerance:.1e}; keep fewer --features or raise --tolerance"
        )
    return directions


def _by_lanczos(weight: torch.Tensor, features: int, name: str) -> Directions | None:
    """From the float32 Gram matrix; None where it cannot be."""
    gram = gram_matrix(_shorter_columns(weight))
    _require_finite(gram, weight, name)
    pairs = _block_lanczos(gram, features + 1)
    if pairs and pairs.values[features - 1] > pairs.values[0] * DYNAMIC_RANGE**2:
        return _certified(weight, pairs, features, "block-lanczos")
    return None


def _shorter_columns(weight: torch.Tensor) -> torch.Tensor:
    """(I, H) as it is, or as its transpose (H, I): whichever has no more columns than rows."""
    return weight if weight.shape[1] <= weight.shape[0] else weight.T


def gram_matrix(weight: torch.Tensor) -> torch.Tensor:
    """WᵀW (n, n) of (m, n) from its upper block panels, mirrored: 53 % of the multiplications of the full product."""
    columns = weight.shape[1]
    gram = weight.new_empty(columns, columns)
    panels = min(GRAM_PANELS, max(1, columns // PANEL_WIDTH))
    edges = [columns * panel // panels for panel in range(panels + 1)]
    with bfloat16_products() if is_bfloat16(weight) else nullcontext():
        for left, right in itertools.pairwise(edges):
            panel = weight[:, left:right].T @ weight[:, left:]
            gram[left:right, left:] = panel
            gram[right:, left:right] = panel[:, right - left :].T
    return gram


def is_bfloat16(weight: torch.Tensor) -> bool:
    """Whether every entry of a float32 matrix on the CPU is a bfloat16 number: the lower half of its bits is zero."""
    if weight.is_cuda or weight.dtype != torch.float32:
        return False
    return not any((piece.view(torch.int32) & 0xFFFF).any() for piece in _as_it_lies(weight).split(PIECE_ROWS))


def _as_it_lies(weight: torch.Tensor) -> torch.Tensor:
    """(I, H), or its transpose where that is how it lies in memory."""
    return weight if weight.stride(1) == 1 else weight.T


def _block_lanczos(gram: torch.Tensor, count: int) -> _Eigenpairs | None:
    """The `count` largest eigenpairs of a symmetric (n, n) matrix, or None when half the space was not enough."""
    side, width = gram.shape[0], max(SMALLEST_BLOCK, count // PAIRS_PER_VECTOR)
    steps = side // (2 * width)
    basis = gram.new_empty(steps * width, side)  # orthonormal rows
    projected = gram.new_zeros(steps * width, steps * width)  # basis · G · basisᵀ
    seed = torch.Generator().manual_seed(0)
    block = torch.linalg.qr(torch.randn(side, width, generator=seed).to(gram)).Q  # (n, b), orthonormal columns
    next_check = FIRST_CHECK * count
    for step in range(steps):
        old, new = step * width, (step + 1) * width
        basis[old:new] = block.T
        known, nearest = basis[:new], basis[max(0, old - width) : new]
        image = gram @ block
        coefficients = gram.new_zeros(new, width)
        for part, among in ((coefficients[-len(nearest) :], nearest), (coefficients, known)):
            found = among @ image  # G·block lies in the two nearest blocks and the next; of the others only rounding is
            image -= among.T @ found  # left, but one pass over all of them leaves the basis orthogonal only to 1e-4
            part += found
        projected[:new, old:new] = coefficients
        projected[old:new, :new] = coefficients.T
        block, coupling = torch.linalg.qr(image)
        if new >= next_check or step + 1 == steps:
            next_check = CHECK_GROWTH * new
            values, ritz = _largest_pairs(_not_for_jacobi(projected[:new, :new]), count)
            residuals = (coupling @ ritz[old:new].to(coupling)).norm(dim=0) / values.clamp_min(1e-30)
            if residuals.max() <= RITZ_TARGET:
                rounding = values[0] * torch.finfo(values.dtype).eps / values[-1]
                if rounding > RITZ_TARGET:
                    values, ritz = _largest_pairs(projected[:new, :new].double(), count)
                return _Eigenpairs(values.to(gram), ritz.T.to(gram) @ known)
    return None


def _not_for_jacobi(matrix: torch.Tensor) -> torch.Tensor:
    """A float32 matrix, in float64 where torch would give it to cuSOLVER's Jacobi method.

    That sums up the roundings of all its rotations, to 1e-4 of the largest value, and no Ritz residual shows it.
    """
    return matrix.double() if matrix.is_cuda and len(matrix) <= JACOBI_ROWS else matrix


def _largest_pairs(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values (count,), eigenvectors as columns) of a small symmetric matrix, largest first."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:count], vectors.flip(1)[:, :count]


def _lapack(gram: torch.Tensor) -> _Eigenpairs:
    """All eigenpairs of a symmetric (n, n) matrix, largest first."""
    values, vectors = _largest_pairs(gram, len(gram))
    return _Eigenpairs(values, vectors.T)


def _certified(weight: torch.Tensor, pairs: _Eigenpairs, features: int, method: str) -> Directions:
    """Measure the leading pairs against the weight itself, fix their signs, and zero what is past the rank."""
    directions = _on_residual_side(weight, pairs.vectors[:features]).contiguous()
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


def _on_residual_side(weight: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Unit rows (F, H) from eigenvectors of either side: (F, H) as they are, (F, I) through v = Wᵀu / σ.

    Where σ is only rounding, so would be the direction: those rows are zero.
    """
    if vectors.shape[1] == weight.shape[1]:
        return vectors
    images = vectors @ weight
    sigma = images.norm(dim=1, keepdim=True)
    return torch.where(sigma > RANK_TOLERANCE * sigma[0], images / sigma, 0.0)


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
