"""Directions against an SVD, and the Marchenko–Pastur floor against published values and simulation."""

import numpy as np
import pytest
import torch

from probes.suite.spectrum import floor, given, leading


def test_directions_and_singular_values_are_those_of_an_svd():
    weight = torch.randn(48, 20, generator=torch.Generator().manual_seed(0))
    left, values, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    reads, gate_directions = leading(weight, 5, side=1)
    writes, down_directions = leading(weight, 5, side=0)
    np.testing.assert_allclose(reads.singular_values, values[:5], rtol=1e-10)
    np.testing.assert_allclose(writes.singular_values, values[:5], rtol=1e-10)
    np.testing.assert_allclose(abs((gate_directions * right[:5]).sum(1)), 1, atol=1e-10)
    np.testing.assert_allclose(abs((down_directions * left.T[:5]).sum(1)), 1, atol=1e-10)
    assert reads.share(3) == pytest.approx((values[:3] ** 2).sum() / (values**2).sum())
    assert leading(weight, 128, side=1)[0].singular_values.shape == (20,)


def test_given_singular_values_give_the_same_shares():
    weight = torch.randn(48, 20, generator=torch.Generator().manual_seed(1))
    exact, _ = leading(weight, 20, side=1)
    assert given(weight, exact.singular_values).share(7) == pytest.approx(exact.share(7), rel=1e-6)


def test_the_floor_at_the_shapes_the_definition_states():
    assert floor((12288, 4096), [64])[0] == pytest.approx(0.037, abs=5e-4)
    assert floor((2048, 4096), [64])[0] == pytest.approx(0.084, abs=5e-4)


@pytest.mark.parametrize("shape", [(200, 800), (800, 200), (400, 400)])
def test_the_floor_is_what_random_matrices_have(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    spectrum, _ = leading(weight, 128, side=1 if shape[0] >= shape[1] else 0)
    for rank, expected in zip((64, 128), floor(shape), strict=True):
        assert spectrum.share(rank) == pytest.approx(expected, rel=0.02)
    assert floor(shape, [min(shape), 10_000]) == (pytest.approx(1.0), pytest.approx(1.0))
