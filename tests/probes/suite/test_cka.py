"""CKA against closed forms, invariances, and estimators written another way."""

import itertools

import numpy as np
import pytest
import torch

from probes.suite.cka import compare, double_centre, gram, u_centre
from vindex.errors import ProbeError


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_cka(x: torch.Tensor, y: torch.Tensor, *, debiased: bool = True) -> float:
    found = compare([gram(x), gram(y)], range(len(x)))
    return float((found.debiased if debiased else found.biased)[0, 1])


def hsic1(k: torch.Tensor, l: torch.Tensor) -> float:
    return float((u_centre(k) * u_centre(l)).sum()) / (len(k) * (len(k) - 3))


def rotation(seed: int, width: int) -> torch.Tensor:
    return torch.linalg.qr(draw(seed, width, width)).Q


@pytest.mark.parametrize("debiased", [True, False])
def test_a_rotated_scaled_and_shifted_copy_is_the_same(debiased):
    x = draw(0, 50, 12)
    copy = 7.5 * x @ rotation(1, 12) + draw(2, 12)
    assert linear_cka(x, copy, debiased=debiased) == pytest.approx(1.0, abs=1e-12)


def test_independent_data_is_0_within_noise_when_debiased_and_visibly_not_when_biased():
    pairs = [(draw(seed, 100, 300), draw(seed + 1000, 100, 300)) for seed in range(20)]
    debiased = np.array([linear_cka(x, y) for x, y in pairs])
    biased = np.array([linear_cka(x, y, debiased=False) for x, y in pairs])
    assert abs(debiased.mean()) < 4 * debiased.std() / len(pairs) ** 0.5
    assert abs(debiased).max() < 0.1
    # E HSIC0 ∝ tr(HKH)·tr(HLH)/(n−1) against ‖HKH‖‖HLH‖: p / (p + n) for Gaussian data of width p
    assert biased.mean() == pytest.approx(300 / (300 + 100), abs=0.02)


def test_sharing_some_of_orthonormal_columns_has_a_closed_form():
    columns = draw(3, 60, 10)
    x = torch.linalg.qr(columns - columns.mean(0)).Q  # centred and orthonormal
    for shared in (1, 4, 9):
        assert linear_cka(x, x[:, :shared], debiased=False) == pytest.approx((shared / 10) ** 0.5, abs=1e-12)


def test_biased_cka_equals_the_feature_space_formula():
    x, y = draw(4, 40, 7), draw(5, 40, 9)
    y[:, :3] += x[:, :3]
    x0, y0 = x - x.mean(0), y - y.mean(0)
    expected = (y0.T @ x0).norm() ** 2 / ((x0.T @ x0).norm() * (y0.T @ y0).norm())
    assert linear_cka(x, y, debiased=False) == pytest.approx(float(expected), abs=1e-12)


def song(k: torch.Tensor, l: torch.Tensor) -> float:
    """Song et al. 2012, eq. 5, as printed."""
    n = len(k)
    k, l = k - k.diag().diag(), l - l.diag().diag()
    one = torch.ones(n, dtype=k.dtype)
    trace = (k @ l).trace()
    return float(
        (trace + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 * (one @ k @ l @ one) / (n - 2))
        / (n * (n - 3))
    )


def test_hsic1_equals_the_formula_of_song_et_al():
    k, l = gram(draw(6, 30, 5)), gram(draw(7, 30, 8))
    assert hsic1(k, l) == pytest.approx(song(k, l), rel=1e-10)


def test_hsic1_equals_the_u_statistic_over_all_quadruples():
    k, l = gram(draw(8, 6, 2)), gram(draw(9, 6, 3))
    total = count = 0.0
    for i, j, q, r in itertools.permutations(range(6), 4):
        total += float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]))
        count += 1
    assert hsic1(k, l) == pytest.approx(total / count, rel=1e-10)


def test_debiased_cka_does_not_depend_on_the_origin_of_the_gram_matrix():
    x, y = draw(10, 30, 6), draw(11, 30, 6)
    moved = gram(x, about=torch.full((6,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(u_centre(moved), u_centre(gram(x)))
    torch.testing.assert_close(double_centre(moved), double_centre(gram(x)))
    assert float(hsic1(moved, gram(y))) == pytest.approx(float(hsic1(gram(x), gram(y))), rel=1e-8)


def test_compare_agrees_with_pairs_and_leaves_out_the_sinks():
    streams = [draw(20, 40, 16), draw(21, 40, 16)]
    streams.append(streams[0] + 0.3 * streams[1])
    huge = [torch.cat([1e4 * draw(30 + index, 1, 16), stream]) for index, stream in enumerate(streams)]
    found = compare([gram(stream) for stream in huge], list(range(1, 41)))
    for one, other in itertools.product(range(3), repeat=2):
        assert float(found.debiased[one, other]) == pytest.approx(linear_cka(streams[one], streams[other]), abs=1e-6)
        biased = linear_cka(streams[one], streams[other], debiased=False)
        assert float(found.biased[one, other]) == pytest.approx(biased, abs=1e-6)
        if other == one + 1:
            assert float(found.with_sink[one]) == pytest.approx(linear_cka(huge[one], huge[other]), abs=1e-6)


def test_permuting_tokens_takes_debiased_cka_to_0_and_not_the_biased():
    x = draw(40, 100, 200)
    found = compare([gram(x), gram(x), gram(x)], list(range(100)))
    assert abs(float(found.permuted.mean())) < 0.05
    assert found.permuted_biased.min() > 0.5
    assert found.permuted.shape[1] == 2


def test_too_few_tokens_and_constant_layers_are_named():
    with pytest.raises(ProbeError, match="debiased CKA needs at least 4 tokens, got 3"):
        u_centre(torch.eye(3))
    with pytest.raises(ProbeError, match=r"layers\.1: the residual stream is the same for every token"):
        compare([gram(draw(0, 8, 3)), torch.zeros(8, 8, dtype=torch.float64)], list(range(8)))
