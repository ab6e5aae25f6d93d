from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

import vindex
from tests.checkpoints import write_checkpoint
from tests.conftest import build_quietly
from vindex.differences import compare, principal_angles
from vindex.errors import QueryError


def frame(rows, columns, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(columns, rows)))[0].T


@given(rows=st.integers(1, 6), seed=st.integers(0, 1000))
def test_angles_equal_scipys(rows, seed):
    a, b = frame(rows, 12, seed), frame(rows, 12, seed + 1)
    np.testing.assert_allclose(principal_angles(a, b), scipy.linalg.subspace_angles(a.T, b.T)[::-1], atol=1e-10)


def test_small_angles_are_not_lost_to_rounding():
    a = np.eye(2, 5)
    b = np.array([[1, 0, 1e-9, 0, 0], [0, 1, 0, 0, 0]], float)
    np.testing.assert_allclose(principal_angles(a, b), [0, 1e-9], atol=1e-16)


def test_a_smaller_frame_inside_a_larger_one():
    larger = frame(5, 12, 0)
    np.testing.assert_allclose(principal_angles(larger[:2], larger), 0, atol=1e-7)
    padded = np.vstack([larger[:2], np.zeros((3, 12))])
    np.testing.assert_allclose(principal_angles(padded, larger), 0, atol=1e-7)


def test_a_vindex_beside_itself_and_beside_another(built, tmp_path):
    v = vindex.open(built)
    for layer in compare(v, v):
        for side in (layer.gate, layer.down):
            assert side.largest_angle < 1e-7 and side.mean_cosine > 1 - 1e-12 and side.spectrum_drift == 0
    build_quietly(write_checkpoint(tmp_path / "m", seed=3), tmp_path / "other.vindex", features=6)
    for layer in compare(v, vindex.open(tmp_path / "other.vindex")):
        assert layer.gate.largest_angle > 0.5 and layer.down.spectrum_drift > 1e-3


def test_directions_that_span_everything_are_told_apart_by_their_spectra(tmp_path):
    """Every two subspaces as large as the space are the same, of whatever weights."""
    for name, seed in (("a", 0), ("b", 3)):
        build_quietly(
            write_checkpoint(tmp_path / name, seed=seed, hidden=24, neurons=48),
            tmp_path / f"{name}.vindex",
            features=24,
        )
    v, other = (vindex.open(tmp_path / f"{name}.vindex") for name in ("a", "b"))
    apart, same = compare(v, other), compare(v, v)
    assert all(side.spans and side.largest_angle is None for one in apart for side in (one.gate, one.down))
    assert apart.summary.startswith("4 of 4 weights differ by more than two builds of the same weights: up to ")
    assert " of σ (layer " in apart.summary and "the directions of all weights span" in apart.without_angles
    assert same.summary.endswith("no weight differs by more than two builds of the same weights: at most 0 of σ")


@pytest.mark.parametrize("size", [0.0, 2.0**-80])
def test_a_weight_that_is_zero_or_nearly_differs_from_another_whichever_stands_first(built, tmp_path, size):
    def shrink(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"] *= size

    build_quietly(write_checkpoint(tmp_path / "m", edit=shrink), tmp_path / "zero.vindex", features=6)
    zero, whole = vindex.open(tmp_path / "zero.vindex"), vindex.open(built)
    for first, second in ((zero, whole), (whole, zero)):
        found = compare(first, second)
        assert re.match("1 of 4 weights differ by more than two .* up to 1 of σ", found.summary)
        drifts = [layer["down"]["spectrum_drift"] for layer in found.record()["layers"]]
        assert drifts == [0, pytest.approx(1, abs=1e-6)] and found.rows()[1]["down_spectrum_drift"] == drifts[1]
    assert "no weight differs by more" in compare(zero, zero).summary


def test_other_shapes_are_refused(built, tmp_path):
    build_quietly(write_checkpoint(tmp_path / "m", layers=1), tmp_path / "other.vindex")
    with pytest.raises(QueryError, match="cannot compare: num_layers is 2 in tiny.vindex and 1 in other.vindex"):
        compare(vindex.open(built), vindex.open(tmp_path / "other.vindex"))
