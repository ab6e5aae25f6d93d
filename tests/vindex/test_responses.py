"""Responses in a vindex: added in one step or not at all, read back as they were, and checked."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

import vindex
from tests.kills import die_at, fail_at, steps_of, tree
from tests.probes.test_command import run
from tests.responses import MEASURED, add_made_up
from tests.vindex.test_verify import agree, change, failures
from vindex import targets
from vindex.adding import add_responses, check_place
from vindex.console import visible
from vindex.errors import FormatError, QueryError, TargetError
from vindex.format import RESPONSE_FILES, RESPONSE_PLACES, RESPONSE_TEXTS
from vindex.places import begin

OF_PLACES = {RESPONSE_TEXTS.name, RESPONSE_PLACES.name}
NEW = {"index.json", "manifest.json", "README.md", "SHA256SUMS"}


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy.vindex")


@pytest.fixture(scope="module")
def answered(built, tmp_path_factory):
    target = shutil.copytree(built, tmp_path_factory.mktemp("answered") / "tiny.vindex")
    add_made_up(vindex.open(target))
    return target


@pytest.fixture
def answered_copy(answered, tmp_path):
    return shutil.copytree(answered, tmp_path / "copy.vindex")


def test_what_was_added_is_read_back_and_all_else_stays(built, answered):
    before, v = vindex.open(built), vindex.open(answered)
    assert v.id == before.id and v.index.has_responses and v.manifest.responses == MEASURED and failures(answered) == {}
    old, new = tree(built), tree(answered)
    assert new.keys() - old.keys() == {spec.name for spec in RESPONSE_FILES}
    assert {name for name in old if old[name] != new[name]} == NEW
    assert "responses.bin" in new["README.md"].decode() and "responses" in v.info()
    assert v.responses.shape == v.gate.shape and v.response_stats.r2.shape == v.gate.shape[:-1]
    found = v.response(1, 3)
    assert (found.r2, found.tokens, found.slope, found.beyond) == (0.5, 100, 2.0, True)
    assert v.feature(1, 3).response == found and len(found.writes) == len(found.writes_against) == 10
    scores = (v.embeddings[:40].astype(np.float32) * v.norms["norm"].astype(np.float32)) @ v.responses[1, 3].astype(
        "f4"
    )
    assert found.writes[0].token_id == scores.argmax() and found.writes_against[0].token_id == scores.argmin()
    assert found.writes[0].score == pytest.approx(scores.max(), rel=1e-4)
    assert not v.response(0, 0).beyond and v.response(0, 0).slope == 0
    assert [(one.text, one.position, one.z) for one in v.snippets(1, 3)] == [
        ("story", at, z) for at, z in ((200, 4), (5, 3), (3, 3), (7, -2), (255, -1))
    ]
    pieces = [v.vocabulary.piece((600 + at) % 36) for at in range(9)]
    assert v.snippets(1, 3)[1][4:] == ("".join(pieces[:5]), pieces[5], "".join(pieces[6:])) and v.snippets(0, 0) == []


def test_responses_of_before_there_were_places_are_read_and_what_is_missing_is_said(answered_copy):
    for name in OF_PLACES:
        (answered_copy / name).unlink()
    index = json.loads((answered_copy / "index.json").read_text())
    del index["response_texts"]
    index["checksums"] = {name: of for name, of in index["checksums"].items() if name not in OF_PLACES}
    (answered_copy / "index.json").write_text(json.dumps(index))
    agree(answered_copy)
    v = vindex.open(answered_copy)
    assert v.response(1, 3).r2 == 0.5 and failures(answered_copy) == {}
    with pytest.raises(QueryError, match=r"keeps no places in texts \(response_places.bin and another\): `vindex resp"):
        v.snippets(1, 3)
    assert add_made_up(v).snippets(1, 3) and failures(answered_copy) == {}


def test_in_a_mixture_they_are_asked_by_expert(built_whole):
    v = vindex.open(built_whole)
    assert failures(built_whole) == {}
    assert v.responses.shape == v.gate.shape and v.response(1, 2, expert=3).r2 == 0.5
    with pytest.raises(QueryError, match="has experts: say which one"):
        v.response(1, 2)


def test_a_vindex_without_them_opens_and_says_what_is_missing(built):
    v = vindex.open(built)
    assert v.feature(0, 0).response is None and v.info()["responses"] == "none (vindex respond)"
    for ask in (lambda: v.responses, lambda: v.response_stats, lambda: v.response(0, 0)):
        with pytest.raises(QueryError, match=r"has no responses \(responses.bin and others\): `vindex respond MODEL"):
            ask()


def test_keys_that_we_do_not_know_stay_and_an_edited_card_is_left_alone(copy):
    index = json.loads((copy / "index.json").read_text()) | {"of_another_tool": [1]}
    (copy / "index.json").write_text(json.dumps(index))
    agree(copy)
    (copy / "README.md").write_text("mine")
    add_made_up(vindex.open(copy))
    assert json.loads((copy / "index.json").read_text())["of_another_tool"] == [1]
    assert (copy / "README.md").read_text() == "mine" and list(failures(copy)) == ["README.md"]


def test_stopped_anywhere_the_vindex_is_the_old_one_or_the_new_one(built, tmp_path, monkeypatch, unsynced):
    place = tmp_path / "v.vindex"

    def fresh():
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        shutil.copytree(built, place)

    def work():
        add_made_up(vindex.open(place))

    fresh()
    names = steps_of(work, monkeypatch)
    new, old = tree(place), tree(built)
    exchange = next(at for at, name in enumerate(names) if name.startswith("exchange"))
    fresh()
    seen = set()
    for number in sorted({*range(0, len(names), 8), *range(exchange - 2, exchange + 3)}):
        died = die_at(number, work)
        seen.add(("died", "old" if tree(place) == old else "new" if tree(place) == new else number))
        fresh()
        said = fail_at(number, work, monkeypatch)
        seen.add(("failed", "old" if tree(place) == old else "new" if tree(place) == new else number))
        assert died and said
    assert seen == {(how, which) for how in ("died", "failed") for which in ("old", "new")}
    work()
    assert tree(place) == new and [path.name for path in tmp_path.iterdir()] == ["v.vindex"]


def test_without_links_files_are_copied(copy, monkeypatch):
    def refused(*of):
        raise OSError(1, "not here")

    before = (copy / "gate_vectors.bin").stat().st_ino
    monkeypatch.setattr(os, "link", refused)
    add_made_up(vindex.open(copy))
    assert failures(copy) == {} and (copy / "gate_vectors.bin").stat().st_ino != before


def test_what_is_in_the_way_is_told_in_one_line(copy, built_mixture, tmp_path, monkeypatch):
    v = vindex.open(copy)
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(TargetError, match=r"holds notes.txt, which this tool did not write; responses go into"):
        add_made_up(v)
    (copy / "notes.txt").unlink()
    (tmp_path / "copy.vindex.partial").mkdir()
    begin(tmp_path / "copy.vindex.partial", "vindex", ["norms.bin"])
    with pytest.raises(TargetError, match=r"copy.vindex.partial is an unfinished vindex; finish or remove it first"):
        add_made_up(v)
    shutil.rmtree(tmp_path / "copy.vindex.partial")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *of: False)
        with pytest.raises(TargetError, match="which is read-only|is read-only, and"):
            add_made_up(v)
    shutil.rmtree(copy)
    shutil.copytree(built_mixture, copy)
    with pytest.raises(TargetError, match="is another vindex than was opened; open it again"):
        add_made_up(v)


def test_a_vindex_of_another_family_is_refused(tmp_path):
    from tests.foreign import leading, weights, write_published

    rows = np.stack([leading(weights(24, 16, seed=layer), 4) for layer in range(2)])
    other = write_published(tmp_path / "published", rows, rows, weights(40, 16, seed=9), model="Qwen/Qwen3-8B")
    with pytest.raises(QueryError, match="needs a vindex that `vindex build` made"):
        check_place(vindex.open(other))


def test_responses_of_another_shape_are_no_file_of_this_vindex(copy):
    v = vindex.open(copy)
    with pytest.raises(AssertionError, match=r"responses\.bin"):
        add_responses(v, np.zeros((3, 16)), np.zeros((5, 3)), np.zeros(0), np.zeros((1, 256)), np.zeros(0), MEASURED)
    assert failures(copy) == {}


@pytest.mark.parametrize(
    ("name", "dtype", "place", "value", "what", "said"),
    [
        ("response_stats.bin", "<f4", 1, 1.5, "response_stats.bin", "an R² is not from 0 to 1"),
        ("response_stats.bin", "<f4", 3 * 16 + 1, -1, "response_stats.bin", "a slope is negative"),
        ("response_stats.bin", "<f4", 4 * 16 + 1, 2.5, "response_stats.bin", "a number of tokens is none"),
        ("response_stats.bin", "<f4", 3 * 16 + 1, 0, "response_stats.bin", "responses.bin row 1 has length 1"),
        ("responses.bin", "<f2", 16, 3, "response_stats.bin", "responses.bin row 1 has length"),
        ("responses.bin", "<f2", 40, np.nan, "responses.bin finite", "row 2, column 8 is nan"),
        ("response_meta.bin", "<f4", 6, 9.0, "response_meta.bin tokens", "top_score is not the first score"),
        ("response_meta.bin", "<u4", 7, 36, "response_meta.bin recomputed", "expected token ids below 36"),
        ("response_texts.bin", "<u4", 3, 40, "response_places.bin", "response_texts.bin: expected token ids below 40"),
        ("response_places.bin", "<f4", 6, 256, "response_places.bin", "a place is none of the texts' 256 tokens"),
        ("response_places.bin", "<f4", 6, 0.5, "response_places.bin", "a place is none of the texts' 256 tokens"),
        ("response_places.bin", "<f4", 6, 5, "response_places.bin", "a place stands twice"),
        (
            "response_places.bin",
            "<f4",
            102,
            -4,
            "response_places.bin",
            "a z is of the other sign, or not the strongest",
        ),
        ("response_places.bin", "<f4", 102, 2, "response_places.bin", "a z is of the other sign, or not the strongest"),
    ],
)
def test_damage_is_found_even_when_checksums_agree(answered_copy, name, dtype, place, value, what, said):
    change(answered_copy, name, dtype, lambda values: values.__setitem__(place, value), resum=True)
    assert said in failures(answered_copy)[what]


def test_tokens_of_other_responses_are_found(answered_copy):
    change(answered_copy, "responses.bin", "<f2", lambda v: v[16:].__imul__(-1), resum=True)
    assert list(failures(answered_copy)) == ["response_meta.bin recomputed"]


def test_a_manifest_that_does_not_know_of_them(answered_copy):
    manifest = json.loads((answered_copy / "manifest.json").read_text())
    del manifest["responses"]
    (answered_copy / "manifest.json").write_text(json.dumps(manifest))
    agree(answered_copy)
    assert "responses are there and not so here" in failures(answered_copy)["manifest.json"]


def test_commands_say_what_is_written_then_and_the_down_direction_only_when_asked(built, answered, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert run(monkeypatch, "feature", answered, 1, 3) == 0
    shown = capsys.readouterr().out
    assert "writes +" in shown and "writes −" in shown and "down +" not in shown
    assert "story 200" in shown and f"»{visible(vindex.open(answered).piece(800 % 36))}«" in shown
    assert "response R² 50.00% (95 % of random directions 20.00%, permuted 10.00%, n 100): more than chance" in shown
    assert run(monkeypatch, "feature", built, 1, 3) == 0
    shown = capsys.readouterr().out
    assert "no responses: vindex respond MODEL tiny.vindex" in shown
    assert "writes +" not in shown and "down" not in shown
    assert run(monkeypatch, "feature", answered, 0, 0, "--down") == 0
    shown = capsys.readouterr().out
    assert "down +" in shown and "which is another direction" in shown and "chance explains it" in shown
    assert run(monkeypatch, "score", answered, " Paris", "-k", 16) == 0
    shown = capsys.readouterr().out
    assert "reads → writes" in shown and "(50.0%, 20.0%)" in shown
    assert run(monkeypatch, "score", built, " Paris") == 0
    assert "what it reads" in capsys.readouterr().out
    rows = vindex.open(answered).score(" Paris", k=16).rows()
    against = next(row for row in rows if row["z"] < 0 and row["r2"])
    response = vindex.open(answered).response(against["layer"], against["feature"])
    assert against["writes"] == [token.piece for token in response.writes_against[:4]]


def test_places_in_texts_that_are_not_there(answered_copy):
    change(answered_copy, "response_places.bin", "<f4", lambda values: values.__setitem__(7, 256), resum=True)
    with pytest.raises(FormatError, match=r"response_places.bin has places in none of its texts; run vindex verify"):
        vindex.open(answered_copy).snippets(1, 3)
    index = json.loads((answered_copy / "index.json").read_text())
    (answered_copy / "index.json").write_text(json.dumps(index | {"response_texts": [2, 128]}))
    agree(answered_copy)
    assert "texts of responses are (2, 128) there and (1, 256) here" in failures(answered_copy)["manifest.json"]
    (answered_copy / "index.json").write_text(json.dumps(index | {"response_texts": [2**20, 256]}))
    with pytest.raises(FormatError, match=r"response_texts: expected 16,777,216 tokens or fewer, got 1048576 × 256"):
        vindex.open(answered_copy)


def test_a_manifest_of_responses_is_read_strictly(answered_copy):
    manifest = json.loads((answered_copy / "manifest.json").read_text())
    manifest["responses"]["tokens"] = 0
    (answered_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"responses\.tokens: expected an integer from 1, got 0"):
        vindex.open(answered_copy).manifest  # noqa: B018


def test_two_do_not_add_at_once(copy):
    with targets.locked(copy), pytest.raises(TargetError, match="another command is writing"):
        add_made_up(vindex.open(copy))
    assert replace(vindex.open(copy).index).has_responses is None
