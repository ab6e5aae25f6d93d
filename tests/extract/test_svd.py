"""The directions are the singular vectors of float64 LAPACK, signed by the rule, certified, and refused when not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extract import svd
from extract.svd import gram_matrix, is_bfloat16, lifted, top_directions
from vindex.differences import principal_angles
from vindex.errors import NumericError

TOLERANCE = 1e-4


def spectrum_matrix(neurons: int, hidden: int, seed: int = 0) -> torch.Tensor:
    """A random matrix whose singular values fall off like those of a trained gate_proj."""
    random = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(neurons, hidden, generator=random))[0]
    right = torch.linalg.qr(torch.randn(hidden, hidden, generator=random))[0]
    sigma = 30 / (1 + torch.arange(hidden)).sqrt() + 0.5
    return (left * sigma) @ right.T


@pytest.fixture(scope="module")
def large() -> torch.Tensor:
    """Large enough for the Lanczos path."""
    return spectrum_matrix(1400, 1024 + 80)


def lapack(weight: torch.Tensor):
    loadings, sigma, directions = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return loadings, sigma, directions


@pytest.mark.parametrize("path", ["block-lanczos", "lapack"])
def test_directions_equal_float64_svd(large, path):
    weight = large if path == "block-lanczos" else large[:, :300]
    found = top_directions(weight, 64, TOLERANCE, "w")
    _, sigma, directions = lapack(weight)
    assert found.method == path
    assert principal_angles(found.rows.numpy(), directions[:64]).max() < 1e-3
    np.testing.assert_allclose(found.sigma, sigma[:64], rtol=1e-5)
    assert found.residuals.max() <= 1e-5
    np.testing.assert_allclose(found.gap_at_cut, (sigma[63] - sigma[64]) / sigma[63], rtol=0.02)


@pytest.mark.parametrize("path", ["block-lanczos", "lapack"])
@pytest.mark.parametrize("exponent", [-15, -30, -46, -67, -90, -115])
def test_a_weight_of_tiny_numbers_has_the_directions_and_certificates_of_the_same_one_near_1(large, path, exponent):
    """Squares of what float32 holds need not be in it: without care certificates come out as 0."""
    weight = (large if path == "block-lanczos" else large[:, :300]).bfloat16().float()
    found, tiny = (top_directions(of, 24, TOLERANCE, "w") for of in (weight, weight * 2.0**exponent))
    assert found.method == tiny.method == path
    assert tiny.rows.equal(found.rows) and tiny.residuals.equal(found.residuals) and (found.residuals > 0).all()
    assert tiny.sigma.equal(found.sigma * 2.0**exponent) and tiny.gap_at_cut == found.gap_at_cut


@pytest.mark.parametrize("exponent", [-10, -126, -140, -149])
def test_the_smallest_numbers_are_lifted_and_others_left_alone(exponent):
    weight = torch.tensor([[0.5, -1.0], [0.0, 0.25]]) * 2.0**exponent
    near, half = lifted(weight)
    assert 0.25 <= near.abs().max() < 1 and (near.double() / half / half).equal(weight.double())
    for left in (torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([[1e-9, torch.nan]])):
        assert lifted(left)[0] is left and lifted(left)[1] == 1.0


def test_lanczos_and_lapack_agree_vector_by_vector_where_gaps_are_wide(large):
    """Not only the subspace: isolated directions are the same vectors with the same signs."""
    found = top_directions(large, 16, TOLERANCE, "w")
    loadings, _, directions = lapack(large)
    signs = np.sign(np.take_along_axis(loadings, np.abs(loadings).argmax(0)[None], 0)[0])
    cosines = (found.rows.numpy() * (directions * signs[:, None])[:16]).sum(1)
    np.testing.assert_allclose(cosines, 1.0, atol=1e-5)


def test_the_neuron_with_the_largest_loading_gets_a_positive_one(large):
    for weight in (large, large[:, :200]):
        loadings = weight @ top_directions(weight, 32, TOLERANCE, "w").rows.T
        peak = loadings.gather(0, loadings.abs().argmax(0)[None])
        assert (peak > 0).all()


def test_on_a_tie_the_lowest_neuron_decides_the_sign():
    weight = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    found = top_directions(weight, 1, TOLERANCE, "w")
    assert (weight @ found.rows[0])[0] > 0


def test_a_transposed_view_gives_what_down_proj_writes(large):
    down_proj = large.T.contiguous()  # (H, I) as on disk
    found = top_directions(down_proj.T, 8, TOLERANCE, "w")
    again = top_directions(large, 8, TOLERANCE, "w")
    assert principal_angles(found.rows.numpy(), again.rows.numpy()).max() < 1e-4


def test_gram_panels_equal_the_full_product():
    weight = torch.randn(50, 37)
    torch.testing.assert_close(gram_matrix(weight), weight.T @ weight)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_the_gram_matrix_keeps_the_bits_of_every_weight_whatever_units_the_processor_has(large, stored):
    weight = large.to(stored).float()
    exact = weight.double().T @ weight.double()
    off = (gram_matrix(weight) - exact).norm() / exact.norm()
    rounded = large.bfloat16().double()
    assert off < 1e-6 < (rounded.T @ rounded - large.double().T @ large.double()).norm() / exact.norm()


def test_weights_that_were_bfloat16_are_told_by_every_entry(large):
    weight = large.bfloat16().float()
    assert is_bfloat16(weight) and is_bfloat16(weight.T) and not is_bfloat16(weight.double())
    weight[700, 3] = 1.001
    assert not is_bfloat16(weight) and not is_bfloat16(weight.T)


@settings(max_examples=25, deadline=None)
@given(neurons=st.integers(2, 20), hidden=st.integers(2, 20), rank=st.integers(0, 6), seed=st.integers(0, 2**16))
def test_rows_past_the_rank_are_zero(neurons, hidden, rank, seed):
    random = torch.Generator().manual_seed(seed)
    true_rank = min(rank, neurons, hidden)
    weight = torch.randn(neurons, true_rank, generator=random) @ torch.randn(true_rank, hidden, generator=random)
    features = min(neurons, hidden)
    found = top_directions(weight.reshape(neurons, hidden), features, 1e-3, "w")
    assert found.rank <= true_rank
    assert not found.rows[found.rank :].any() and not found.sigma[found.rank :].any()
    identity = found.rows[: found.rank] @ found.rows[: found.rank].T
    torch.testing.assert_close(identity, torch.eye(found.rank), atol=1e-4, rtol=0)


def test_a_steep_spectrum_goes_to_float64(large):
    """Squares in a float32 Gram matrix lose singular values under 1e-3 of the first; the answer must not."""
    steep = large.clone()
    steep[:, 0] *= 1e5
    found = top_directions(steep, 32, TOLERANCE, "w")
    _, sigma, _ = lapack(steep)
    assert found.method == "lapack"
    np.testing.assert_allclose(found.sigma, sigma[:32], rtol=1e-4)


def test_close_neighbours_are_counted():
    weight = torch.diag(torch.tensor([5.0, 4.0, 3.9999, 3.9998, 1.0]))
    assert top_directions(weight, 5, TOLERANCE, "w").close_neighbours == 2


def test_full_side_has_no_gap():
    assert top_directions(torch.eye(4) * torch.arange(1, 5), 4, TOLERANCE, "w").gap_at_cut is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("hidden", [20, 1024 + 20])
def test_an_entry_that_is_not_finite_is_named(value, hidden):
    weight = torch.randn(30 if hidden == 20 else hidden, hidden)
    weight[3, 7] = value
    with pytest.raises(NumericError, match=r"blocks\.0 .*\[3, 7\] is (nan|inf): not a finite number"):
        top_directions(weight, 4, TOLERANCE, "blocks.0")


def test_squares_that_overflow_are_refused():
    weight = torch.full((1024 + 40, svd.SMALL_SIDE + 40), 1e30)
    with pytest.raises(NumericError, match="squares overflow float32"):
        top_directions(weight, 4, TOLERANCE, "w")


def test_more_features_than_a_side_are_refused():
    with pytest.raises(NumericError, match="w is 30×20 .* at most 20 directions, and 21 were asked for"):
        top_directions(torch.randn(30, 20), 21, TOLERANCE, "w")


def test_a_missed_certificate_is_an_error():
    with pytest.raises(
        NumericError, match=r"w: the worst direction has relative residual .* above the tolerance 1.0e-30"
    ):
        top_directions(torch.randn(30, 20), 4, 1e-30, "w")


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (1024, 800), (800, 1024)])
def test_a_weight_of_zeros_has_no_direction_and_no_certificate(shape):
    found = top_directions(torch.zeros(shape), 8, 1e-4, "w")
    assert (found.rank, len(found.residuals), found.gap_at_cut, found.close_neighbours) == (0, 0, None, 0)
    assert not found.rows.any() and not found.sigma.any()
