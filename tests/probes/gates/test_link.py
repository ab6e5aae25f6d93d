"""The bridge to a vindex: neurons that share a direction are found by it, neurons at random are not."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import vindex
from probes.gates.gates import Gates, Mask
from probes.gates.link import RANDOM, link_gates
from probes.live.sites import layers
from tests.conftest import build_quietly
from vindex.__main__ import app
from vindex.demo import CHECKPOINT
from vindex.errors import PatchError, ProbeError, QueryError


@pytest.fixture(scope="module")
def v(tmp_path_factory):
    target = tmp_path_factory.mktemp("linked") / "atlas.vindex"
    build_quietly(CHECKPOINT, target, features=16)
    return vindex.open(target)


def mask_of(rows, shape, layer=1):
    keep = torch.ones(shape, dtype=torch.bool)
    keep[layer, rows] = False
    return Mask(keep, "by hand")


def test_neurons_along_a_direction_are_found_by_it_and_random_ones_are_not(atlas, v):
    rows = layers(atlas.model)[1].gate_proj.weight
    unit = rows / rows.norm(dim=1, keepdim=True)
    squares = (unit @ torch.from_numpy(v.layer(1).gate[0].copy()).float().T) ** 2
    nearest = squares[:, 2].argsort(descending=True)[:6]
    shape = (v.index.num_layers, len(rows))
    found = link_gates(atlas, mask_of(nearest, shape), v, count=3)
    best = found.loadings[0]
    assert (best.layer, best.feature) == (1, 2) and best.loading > best.highest > best.chance and best.z > 3
    assert best.loading == pytest.approx(float(squares[nearest, 2].mean()), rel=1e-4)
    assert found.directions == v.index.num_feats and found.expected == found.directions / (RANDOM + 1)
    assert 1 <= found.beyond < found.directions and len(found.rows()) == 3 and len(best.tokens) == 5
    draw = torch.Generator().manual_seed(0)
    beyond = sum(
        link_gates(atlas, mask_of(torch.randperm(len(rows), generator=draw)[:6], shape), v).beyond for _ in range(10)
    )
    assert beyond <= 0.1 * 10 * found.directions
    assert json.loads(json.dumps(found.record()))["beyond"] == found.beyond and "by chance>" in repr(found)


def test_the_command_prints_directions_and_what_they_read(v, tmp_path):
    gates = Gates(torch.randn(4, 384, generator=torch.Generator().manual_seed(1)))
    gates.save(tmp_path / "gates")
    command = ["gates", "link", "atlas", str(tmp_path / "gates"), str(v.path), "--off", "10%", "-k", "2"]
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*command, "-o", str(tmp_path / "link.json")])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "directions are loaded more than by every random set" in " ".join(done.stdout.split())
    assert "next: vindex feature" in done.stdout
    assert len(json.loads((tmp_path / "link.json").read_text())["loadings"]) == 2


def test_gates_that_were_not_trained_have_no_loss_curves(tmp_path):
    with pytest.raises(PatchError, match="gates: no record of a training here, so that there are no loss curves"):
        Gates(torch.zeros(3, 20)).plot(tmp_path / "a.html")


def test_other_models_are_refused(atlas, v, built):
    with pytest.raises(PatchError, match="the gates are 3 × 20"):
        link_gates(atlas, Mask(torch.ones(3, 20, dtype=torch.bool), "x"), v)
    with pytest.raises(QueryError, match="count -1: expected a positive integer"):
        link_gates(atlas, Mask(torch.ones(4, 384, dtype=torch.bool), "x"), v.path, count=-1)
    with pytest.raises(ProbeError, match="give the model it was built from"):
        link_gates(atlas, Mask(torch.ones(4, 384, dtype=torch.bool), "x"), vindex.open(built))
