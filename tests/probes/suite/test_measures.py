"""Intervals: right on known data, reproducible, and absent where there is nothing to resample."""

import numpy as np
import pytest

from probes.suite.measures import interval, mean_of, measure


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        low, high = interval(generator.standard_normal(30))
        hits += low <= 0 <= high
    assert 86 <= hits <= 100


def test_the_interval_is_reproducible_and_none_for_a_single_sample():
    assert interval([1.0, 2.0, 4.0]) == interval([1.0, 2.0, 4.0])
    assert interval([1.0]) is None
    assert interval([3.0, 3.0]) == (3.0, 3.0)


def test_headline_value_or_mean():
    first = measure([1.0, 3.0], "x", null=0.5)
    assert (first.value, first.mean, first.n, first.null, first.over) == (1.0, 2.0, 2, 0.5, "texts")
    assert mean_of([1.0, 3.0], "x", over="layer pairs").value == pytest.approx(2.0)
