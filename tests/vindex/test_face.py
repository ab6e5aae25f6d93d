"""What a Python user does as the commands do: results with rows, a record, one line; errors of ours."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import extract
import vindex
from tests.checkpoints import write_checkpoint
from tests.conftest import build_quietly
from vindex.errors import QueryError, TargetError
from vindex.norms import UnknownNorm


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Of other weights than `built`, with fewer features."""
    directory = tmp_path_factory.mktemp("other")
    build_quietly(write_checkpoint(directory / "m", seed=3), directory / "other.vindex", features=6)
    return directory / "other.vindex"


@pytest.fixture(scope="module")
def results(built, other, checkpoint):
    v = vindex.open(built)
    return {
        "score": v.score([" Paris", " Berlin"], k=3),
        "verify": vindex.verify(v),
        "compare": vindex.compare(v, vindex.open(other)),
        "plan": extract.plan(checkpoint, features=8),
        "audit": extract.audit(v, checkpoint),
    }


@pytest.mark.parametrize("name", ["score", "verify", "compare", "plan", "audit"])
def test_every_result_has_rows_a_record_and_one_line(results, name, tmp_path):
    found = results[name]
    assert repr(found).startswith("<") and "\n" not in repr(found) and len(repr(found)) < 250
    assert len({tuple(row) for row in found.rows()}) == 1
    assert f"<th>{next(iter(found.rows()[0]))}</th>" in found._repr_html_()
    found.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(found.record()))


def test_scores_of_several_tokens_are_those_of_each(built, results):
    v, found = vindex.open(built), results["score"]
    assert found.cosines.shape == (2, *v.gate.shape[:-1])
    for at, token in enumerate((" Paris", " Berlin")):
        np.testing.assert_array_equal(v.cosines(token), v.score(token).cosines[0])
        np.testing.assert_allclose(found.cosines[at], v.cosines(token), atol=1e-6)
        hits = [hit[:3] for hit in v.score(token, k=3, by="cosine").top[0].hits]
        assert hits == [hit[:3] for hit in v.top_features(token, k=3)]
        rows = [row for row in found.rows() if row["token"] == token]
        assert [row["feature"] for row in rows] == [hit.feature for hit in v.score(token, k=3).top[0].hits]
    vector = v.score(v.embeddings[0].astype(np.float32), k=1)
    assert vector.record()["scores"][0]["token"] is None and "a vector" in repr(vector)


def test_objects_print_in_one_line(built, built_mixture):
    for directory in (built, built_mixture):
        v = vindex.open(directory)
        for each in (v, v.index, v.manifest, v.norms, v.layer(0)):
            assert "\n" not in repr(each) and len(repr(each)) < 200, repr(each)
    assert v.id in repr(v) and list(v.norms)[-1] in repr(v.norms)


def test_a_name_that_is_no_norm_is_a_key_error_of_ours(built):
    norms = vindex.open(built).norms
    assert "norm" in norms and "nrm" not in norms and norms.get("nrm") is None
    with pytest.raises(KeyError) as caught:
        norms["nrm"]
    assert str(caught.value).startswith("no norm is called 'nrm' here; there are ")
    assert isinstance(caught.value, UnknownNorm) and isinstance(caught.value, QueryError)


def test_an_edited_card_and_a_foreign_file_are_no_reason_to_build_again(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "v")
    (copy / "README.md").write_text("mine")
    found = vindex.verify(vindex.open(copy))
    assert not found.holds and "vindex card" in found.verdict and "build it again" not in found.verdict
    (copy / "notes.txt").touch()
    assert "notes.txt; remove it" in vindex.verify(vindex.open(copy)).verdict
    sigma = bytearray((copy / "singular_values.bin").read_bytes())
    sigma[0] ^= 1
    (copy / "singular_values.bin").write_bytes(sigma)
    damaged = vindex.verify(vindex.open(copy)).verdict
    assert "first: checksums: changed since the build: singular_values.bin; build it again or download it" in damaged


def test_two_builds_of_the_same_weights_differ_by_noise_and_other_weights_by_more(built, checkpoint, results, tmp_path):
    v, again = vindex.open(built), extract.build(checkpoint, tmp_path / "again.vindex", features=7, threads=1)
    same = vindex.compare(v, again)
    assert same.same_weights and "no weight differs by more than two builds of the same weights" in same.summary
    assert "leading 7 directions of each weight: tiny.vindex has 8 and again.vindex has 7" in same.kept
    assert all(side.largest_angle <= side.noise for one in same for side in (one.gate, one.down))
    apart = results["compare"]
    assert not apart.same_weights and apart.summary.startswith("4 of 4 weights differ by more")
    assert vindex.compare(v, v).kept == ""
    assert vindex.compare(built, str(again.path)).summary == same.summary
    assert vindex.verify(built).holds and extract.verify(built, checkpoint).holds


def test_a_record_is_not_written_under_a_name_that_says_otherwise(results, tmp_path):
    with pytest.raises(TargetError, match="a record is JSON, and .html says otherwise; name it a.json"):
        results["compare"].save(tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_a_comparison_is_drawn(results, tmp_path):
    for name in ("a.html", "a.png"):
        results["compare"].plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(TargetError, match="plots are written as .html or .png"):
        results["compare"].plot(tmp_path / "a.pdf")


def test_packages_list_what_a_user_wants():
    assert dir(extract) == ["audit", "build", "plan", "repair", "verify"] and all(
        callable(getattr(extract, name)) for name in dir(extract)
    )
    assert {"open", "compare", "verify", "write_card"} < set(dir(vindex)) and callable(vindex.compare)
    with pytest.raises(
        AttributeError, match="module 'extract' has no attribute 'make'; it has audit, build, plan, repair, verify"
    ):
        extract.make  # noqa: B018
    with pytest.raises(AttributeError, match="module 'vindex' has no attribute 'make'; it has Comparison, .*, open, "):
        vindex.make  # noqa: B018


def stages(told: list[str]):
    """A Progress that notes which stages there were."""

    def progress(stage, total):
        told.append(stage)
        return lambda count, note="": None

    return progress


def test_a_build_leaves_the_number_of_threads_as_it_was(checkpoint, tmp_path):
    before, told = torch.get_num_threads(), []
    v = extract.build(checkpoint, tmp_path / "v", features=8, threads=before + 1, progress=stages(told))
    assert torch.get_num_threads() == before and v.manifest.options.threads == before + 1
    assert told == ["hash source", "directions", "vocabulary", "checksums"]
    with pytest.raises(TargetError, match="already exists"):
        extract.build("someone/nowhere", tmp_path / "v")  # refused before anything is looked for
    with pytest.raises(QueryError, match="--features 0: expected a positive integer"):
        extract.build(checkpoint, tmp_path / "w", features=0)


def test_a_wrong_source_is_refused_before_anything_else(built, tmp_path):
    told, other = [], write_checkpoint(tmp_path / "m", shards=2, seed=1)
    with pytest.raises(QueryError, match="m is not the checkpoint that tiny.vindex was built from"):
        extract.verify(vindex.open(built), other, progress=stages(told))
    assert told == ["hash source"]
