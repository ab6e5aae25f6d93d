"""The artifact on a real model: `make test-real`."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vindex
from extract.checkpoint import open_checkpoint
from tests.commands import run
from tests.conftest import build_quietly
from tests.vindex.test_published_readers import load_like_larql, run_published
from vindex.differences import principal_angles

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real_vindex(real_model, tmp_path_factory):
    target = tmp_path_factory.mktemp("real") / "real.vindex"
    build_quietly(real_model, target, features=128)
    return target


def test_every_direction_equals_float64_numpy_svd(real_model, real_vindex):
    """Subspace angle below 2e-3 per layer and the sign rule, for every gate_proj and down_proj."""
    v, source = vindex.open(real_vindex), open_checkpoint(str(real_model))
    for layer in range(v.index.num_layers):
        for side, stored in (("gate", v.gate[layer]), ("down", v.down[layer])):
            weight = source.tensor(f"model.layers.{layer}.mlp.{side}_proj.weight").double().numpy()
            by_neuron = weight if side == "gate" else weight.T
            loadings, sigma, directions = np.linalg.svd(by_neuron, full_matrices=False)
            assert principal_angles(stored, directions[:128]).max() < 2e-3, (layer, side)
            row = 0 if side == "gate" else 1
            np.testing.assert_allclose(v.singular_values[row, layer], sigma[:128], rtol=1e-5)
            signs = np.sign(np.take_along_axis(loadings, np.abs(loadings).argmax(0)[None], 0)[0])[:128]
            alone = np.minimum(-np.diff(sigma[:129]), -np.diff(sigma[:128], prepend=np.inf)) > 1e-3 * sigma[:128]
            cosines = (stored * (signs[:, None] * directions[:128])).sum(1)
            assert alone.sum() > 60 and (cosines[alone] > 0.999).all(), (layer, side)


def test_commands_and_published_code(real_model, real_vindex):
    assert run("verify", real_vindex, "--source", real_model).returncode == 0
    best = json.loads(run("score", real_vindex, " Paris", "-k", 1, "--by", "cosine", "--json").stdout)["scores"][0]
    assert best["piece"] == " Paris"
    top = best["features"][0]
    said = run_published(real_vindex, best["token_id"])
    assert said == f"Top feature: layer={top['layer']}, feature={top['feature']}, score={top['cosine']:.4f}"
    same = json.loads(run("compare", real_vindex, real_vindex, "--json").stdout)
    assert max(layer[side]["largest_angle"] for layer in same["layers"] for side in ("gate", "down")) < 1e-6
    load_like_larql(real_vindex)
