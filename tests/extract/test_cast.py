from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from extract.cast import require_finite, to_half
from vindex.errors import NumericError


@given(numpy_strategies.arrays(np.float32, st.integers(1, 30), elements=st.floats(-65000, 65000, width=32)))
def test_counts_and_errors_are_those_of_numpy(values):
    half = to_half(torch.from_numpy(values), "t")
    expected = values.astype(np.float16)
    np.testing.assert_array_equal(half.values.numpy(), expected)
    assert half.flushed_to_zero == int(((expected == 0) & (values != 0)).sum())
    kept = expected != 0
    errors = np.abs(expected[kept].astype(np.float64) / values[kept] - 1)
    assert half.max_relative_error == pytest.approx(errors.max(initial=0.0), abs=1e-6)


def test_overflow_names_tensor_and_element():
    with pytest.raises(NumericError, match=r"embed\[102, 1\] is 70000: too large for float16 \(at most 65504\)"):
        to_half(torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 70000.0]]), "embed", first_row=100)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_not_finite_names_tensor_and_element(bad):
    with pytest.raises(NumericError, match=r"norm\[1\] is (nan|-inf): not a finite number"):
        to_half(torch.tensor([1.0, bad]), "norm")
    with pytest.raises(NumericError, match=r"norm\[1\] is (nan|-inf): not a finite number"):
        require_finite(torch.tensor([1.0, bad]), "norm")
