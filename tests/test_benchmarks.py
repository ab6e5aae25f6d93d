"""What benchmarks compare this project with must be right before it is timed."""

from __future__ import annotations

import torch

from benchmarks.chebyshev import leading, orthonormal
from benchmarks.gpu import LIMITS, WHOLE
from benchmarks.gpu_stages import STAGES
from benchmarks.synthetic import real_looking_weight


def test_chebyshev_finds_the_leading_pairs():
    weight = real_looking_weight(700, 400)
    gram = weight.T @ weight
    found = leading(gram, 20, 2e-6)
    values, vectors = torch.linalg.eigh(gram.double())
    torch.testing.assert_close(found.values.double(), values.flip(0)[:20], rtol=1e-5, atol=0)
    overlaps = (found.vectors.double() @ vectors.flip(1)[:, :20]).diagonal().abs()
    assert overlaps.min() > 1 - 1e-6 and found.residual <= 2e-6
    one_at_a_time = leading(gram, 20, 1e-1)
    assert one_at_a_time.products < found.products and one_at_a_time.residual > found.residual


def test_cholesky_qr_keeps_the_span():
    block = torch.randn(300, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -5, 20)
    found = orthonormal(block)
    torch.testing.assert_close(found.T @ found, torch.eye(20), rtol=0, atol=1e-6)
    torch.testing.assert_close(found @ (found.T @ block), block, rtol=0, atol=1e-5)


def test_every_stage_has_a_limit():
    assert set(LIMITS) == set(STAGES) and max(LIMITS.values()) < WHOLE < 480
