"""A vindex of a mixture of experts: a feature is a layer, an expert and a rank."""

from __future__ import annotations

import shutil

import numpy as np
import orjson
import pytest
from typer.testing import CliRunner

import vindex
from tests.checkpoints import write_mixture
from tests.conftest import build_quietly
from tests.vindex.test_published_readers import load_like_larql, run_published
from tests.vindex.test_verify import change, failures
from vindex.__main__ import app
from vindex.differences import by_layer, compare
from vindex.errors import FormatError, QueryError

ROWS, FEATURES = 4 + 16 + 16, 4  # a dense layer, then two of three experts and a shared one


@pytest.fixture
def copy(built_mixture, tmp_path):
    return shutil.copytree(built_mixture, tmp_path / "copy.vindex")


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    """A mixture without a dense layer: every layer has the same number of rows."""
    directory = tmp_path_factory.mktemp("uniform")
    build_quietly(write_mixture(directory / "m", dense_layers=()), directory / "m.vindex", features=FEATURES)
    return directory / "m.vindex"


def test_shapes(built_mixture, uniform):
    ragged, alike = vindex.open(built_mixture), vindex.open(uniform)
    assert ragged.gate.shape == ragged.down.shape == (ROWS, 16) and ragged.singular_values.shape == (2, ROWS)
    assert alike.gate.shape == (3, 16, 16) and alike.singular_values.shape == (2, 3, 16)
    assert [ragged.layer(at).gate.shape for at in range(3)] == [(1, 4, 16), (4, 4, 16), (4, 4, 16)]
    np.testing.assert_array_equal(alike.layer(2).down[3, 1], alike.down[2, 13])
    assert "3 layers × 3 experts × 4 features × 16" in repr(ragged)


@pytest.mark.parametrize("which", ["built_mixture", "uniform"])
def test_every_feature_is_found_by_its_own_direction(which, request):
    v = vindex.open(request.getfixturevalue(which))
    for layer in range(3):
        entry = v.index.layers[layer]
        for group in range(entry.groups):
            expert = group if entry.num_experts else None
            hit = v.top_features(v.layer(layer).gate[group, 2].astype(np.float32), k=1)[0]
            assert (hit.layer, hit.expert, hit.feature) == (layer, expert, 2)
            assert hit.cosine == pytest.approx(1, abs=1e-3) and hit.gate_sigma == v.layer(layer).gate_sigma[group, 2]
            found = v.feature(layer, 2, expert=expert)
            assert found.expert == expert and found.down_sigma == v.layer(layer).down_sigma[group, 2]
    scores = v.cosines(" Paris")
    assert scores.shape == v.gate.shape[:-1] and v.cosines([0, 1]).shape == (2, *scores.shape)
    nearest = v.nearest_features(1, 2, k=99, expert=3)
    assert (1, 3, 2) not in [(hit.layer, hit.expert, hit.feature) for hit in nearest]
    assert len(nearest) == min(99, v.gate[..., 0].size - 1)


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda v: v.feature(1, 0), r"layer 1 of .* has experts: say which one, 0 to 2, 3 for the shared one"),
        (lambda v: v.feature(1, 0, expert=4), r"expert 4 is out of range: .* has experts 0 to 3"),
        (lambda v: v.feature(1, 4, expert=0), r"feature 4 is out of range: .* has features 0 to 3"),
        (lambda v: v.feature(0, 0, expert=0), r"layer 0 of .* is dense: it has no experts and no router"),
        (lambda v: v.router(0), r"layer 0 of .* is dense"),
        (lambda v: v.layer(3), r"layer 3 is out of range: .* has layers 0 to 2"),
    ],
)
def test_questions_that_have_no_answer(built_mixture, ask, message):
    with pytest.raises(QueryError, match=message):
        ask(vindex.open(built_mixture))


def test_without_a_shared_expert(tmp_path):
    build_quietly(write_mixture(tmp_path / "m", shared_neurons=0), tmp_path / "out.vindex", features=FEATURES)
    v = vindex.open(tmp_path / "out.vindex")
    assert not (v.path / "shared_expert_gates.bin").exists() and v.index.num_shared_experts is None
    with pytest.raises(QueryError, match=r"layer 1 of out.vindex has no shared expert"):
        v.shared_expert_gate(1)
    with pytest.raises(QueryError, match=r"say which one, 0 to 2$"):
        v.feature(1, 0)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda i: i["layers"][1].update(num_experts=4), r"layers\[1\].num_experts: expected 3, got 4"),
        (lambda i: i["layers"][1].pop("num_features_per_expert"), r"num_features_per_expert: expected 4, got None"),
        (lambda i: i["layers"][2].update(offset=0), r"layers\[2\].offset: expected 640, got 0"),
        (lambda i: i["layers"][0].update(num_features=16), r"layers\[0\].num_features: expected 4, got 16"),
        (lambda i: i.update(num_feats=4), r"num_feats: expected 16, got 4"),
        (lambda i: i.update(num_experts="3"), r"num_experts: expected an integer from 1 to 65536, got '3'"),
        (lambda i: i["layers"][1]["effective_rank"].update(gate=5), r"effective_rank.gate: expected at most 4, got 5"),
        (
            lambda i: [entry.pop("num_experts", None) for entry in i["layers"]],
            r"num_experts: expected a layer with 3 experts, got none",
        ),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(copy, edit, message):
    index = orjson.loads((copy / "index.json").read_bytes())
    edit(index)
    (copy / "index.json").write_bytes(orjson.dumps(index))
    with pytest.raises(FormatError, match=message):
        vindex.open(copy)


def test_verify_names_the_expert(copy):
    row = 4 + 2 * FEATURES  # layer 1, expert 2
    change(
        copy, "down_features.bin", "<f2", lambda v: v[row * 16 : (row + 1) * 16].__imul__(np.float16(0.9)), resum=True
    )
    assert "(layer 1, expert 2)" in failures(copy)["down_features.bin orthonormal"]
    change(copy, "singular_values.bin", "<f4", lambda v: v.__setitem__(row + 1, 1e6), resum=True)
    assert failures(copy)["singular values"] == "gate layer 1, expert 2, rises after feature 0"
    change(copy, "router_weights.bin", "<f2", lambda v: v.__setitem__(18, np.inf), resum=True)
    assert failures(copy)["router_weights.bin finite"] == "number 18 is inf"


def test_verify_compares_the_rank_with_the_singular_values(copy):
    change(copy, "singular_values.bin", "<f4", lambda v: v.__setitem__(4 + 3, 0), resum=True)
    expected = "layer 1: index.json says rank 4, and 3 singular values are not 0"
    assert failures(copy)["gate_vectors.bin orthonormal"] == expected


def test_compare_goes_expert_by_expert(built_mixture, uniform, built, tmp_path):
    def edit(tensors):
        tensors["model.layers.2.mlp.experts.1.gate_proj.weight"].normal_()

    build_quietly(write_mixture(tmp_path / "m", edit=edit), tmp_path / "out.vindex", features=3)
    ours, theirs = vindex.open(built_mixture), vindex.open(tmp_path / "out.vindex")
    differences = compare(ours, theirs)
    assert [(d.layer, d.expert) for d in differences] == [(0, None), *((at, e) for at in (1, 2) for e in range(4))]
    changed = [d for d in differences if d.gate.largest_angle > 1e-6]
    assert [(d.layer, d.expert) for d in changed] == [(2, 1)] and changed[0].down.largest_angle < 1e-6
    together = by_layer(differences)
    assert [d.layer for d in together] == [0, 1, 2]
    assert together[2].gate.largest_angle == changed[0].gate.largest_angle
    with pytest.raises(QueryError, match=r"layer 0 has 1 weight\(s\) for each projection in .* and 4 in"):
        compare(ours, vindex.open(uniform))
    with pytest.raises(QueryError, match="cannot compare: num_layers is 3 in .* and 2 in"):
        compare(ours, vindex.open(built))


def test_larqls_loader_rules_hold_for_a_mixture(built_mixture):
    loaded, v = load_like_larql(built_mixture), vindex.open(built_mixture)
    for layer in range(3):
        np.testing.assert_array_equal(loaded["gate"][layer], v.layer(layer).gate.reshape(-1, 16))
    found = v.feature(2, 1, expert=2)
    _, _, tokens = loaded["meta"][2][2 * FEATURES + 1]
    assert [(t.token_id, t.score) for t in found.writes + found.writes_against] == tokens
    moe = loaded["index"]["model_config"]["moe"]
    assert moe == {"num_experts": 3, "top_k": 2, "shared_expert": True, "router_type": "top_k_softmax"}


def test_the_published_code_runs_where_all_layers_are_alike(uniform, built_mixture):
    v = vindex.open(uniform)
    best = v.top_features(" Paris", k=1)[0]
    row = best.expert * FEATURES + best.feature
    assert run_published(uniform, v.token_id(" Paris")) == (
        f"Top feature: layer={best.layer}, feature={row}, score={best.cosine:.4f}"
    )
    assert "```python" not in (built_mixture / "README.md").read_text()
    assert "(4 of each of 3 experts and 1 shared)" in (built_mixture / "README.md").read_text()


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_commands(built_mixture, mixture):
    facts = orjson.loads(invoke("info", built_mixture, "--json"))
    assert facts["experts_per_layer"] == 3 and facts["dense_layers"] == "0" and facts["features_per_expert"] == 4
    table = invoke("score", built_mixture, " Paris", "-k", ROWS)
    assert "expert" in table and "shared" in table and "dense" in table
    hit = orjson.loads(invoke("score", built_mixture, " Paris", "--json"))["scores"][0]["features"][0]
    shown = orjson.loads(
        invoke("feature", built_mixture, hit["layer"], hit["feature"], "--expert", hit["expert"], "--json")
    )
    assert shown["reads"] == hit["reads"] and "expert" in shown["nearest"][0]
    assert "layer 1, expert shared, feature 2" in invoke("feature", built_mixture, 1, 2, "--expert", 3)
    checks = orjson.loads(invoke("verify", built_mixture, "--source", mixture, "--experts", 2, "--json"))
    assert checks["holds"] and "layers.1.mlp.shared_expert.gate_proj" in [check["what"] for check in checks["checks"]]
    assert "of all experts" in " ".join(invoke("compare", built_mixture, built_mixture).split())
    assert len(orjson.loads(invoke("compare", built_mixture, built_mixture, "--json"))["layers"]) == 9
