"""Weights that are bfloat16 in float32's clothes are multiplied as bfloat16, and certified all the same."""

from __future__ import annotations

import pytest
import torch

from extract import svd
from extract.device import narrow, narrowed, whole_products, wide
from extract.svd import top_directions
from tests.extract.test_svd import spectrum_matrix


@pytest.fixture(scope="module")
def stored() -> torch.Tensor:
    """As read from a bfloat16 checkpoint: (1400, 1104) float32, large enough for the Lanczos path."""
    return spectrum_matrix(1400, 1104).bfloat16().float()


def test_only_what_is_bfloat16_is_narrowed(stored):
    assert narrowed(stored).dtype == torch.bfloat16 and torch.equal(narrowed(stored).float(), stored)
    finer = stored.clone()
    finer[3, 5] *= 1 + 2**-12
    assert narrowed(finer) is finer


def test_on_the_cpu_all_is_float32(stored):
    assert narrow(stored, "cpu") is stored
    small = stored.bfloat16()
    for sent in (narrow(small, "cpu"), wide(small, "cpu"), narrow(small.T, "cpu").T):
        assert sent.dtype == torch.float32 and sent.equal(stored)


@pytest.mark.parametrize("choice", ["highest", "high"])
def test_tf32_is_off_inside_and_as_it_was_afterwards(choice):
    products = torch.backends.cuda.matmul
    default = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(choice)
        before = products.fp32_precision
        with pytest.raises(KeyError), whole_products():
            assert products.fp32_precision == "ieee"
            raise KeyError
        assert products.fp32_precision == before and torch.get_float32_matmul_precision() == choice
    finally:
        torch.set_float32_matmul_precision(default)


def test_directions_of_a_narrow_weight_are_those_of_the_wide_one(stored):
    wide, narrow = (top_directions(weight, 24, 1e-4, "t") for weight in (stored, narrowed(stored)))
    assert narrow.method == "block-lanczos" and narrow.residuals.max() < 1e-5
    torch.testing.assert_close(narrow.sigma, wide.sigma)
    torch.testing.assert_close((narrow.rows * wide.rows).sum(1), torch.ones(24))
    assert narrow.rows.dtype == narrow.sigma.dtype == torch.float32


def test_a_failed_certificate_leads_to_float32(stored, monkeypatch):
    product, multiplied = svd._product, []

    def rounded(left, right):
        multiplied.append(left.dtype)
        exact = product(left, right)
        return exact.bfloat16().float() if left.dtype == torch.bfloat16 else exact

    monkeypatch.setattr(svd, "_product", rounded)
    directions = top_directions(narrowed(stored), 24, 1e-4, "t")
    assert set(multiplied) == {torch.bfloat16, torch.float32} and multiplied[-1] == torch.float32
    assert directions.method == "block-lanczos" and directions.residuals.max() < 1e-5
