"""Scores beside chance: z, what random directions reach, poles and their coherence; and vindexes without statistics."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vindex
from extract.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.conftest import build_quietly
from tests.vindex.test_verify import agree, change, failures
from vindex.__main__ import app
from vindex.chance import alike, chance_of, cluster_of, random_directions, reach_of, sampled_tokens, scale_of
from vindex.errors import FormatError, QueryError
from vindex.format import GATE_META, SAMPLE, STATISTICS

TOKENS = 36  # of the test checkpoints; four rows of the embeddings are padding


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy.vindex")


@pytest.fixture(scope="module")
def old(built, tmp_path_factory):
    """A vindex as earlier versions built it, without statistics."""
    directory = shutil.copytree(built, tmp_path_factory.mktemp("old") / "old.vindex")
    index = json.loads((directory / "index.json").read_text())
    del index["has_gate_stats"]
    for spec in STATISTICS:
        (directory / spec.name).unlink()
        del index["checksums"][spec.name]
    (directory / "index.json").write_text(json.dumps(index))
    agree(directory)
    return directory


def run(*words, input=None) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], input=input, env={"COLUMNS": "100"})
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)


@pytest.mark.parametrize("which", ["", "_mixture"])
def test_the_statistics_are_what_the_format_says(which, request):
    """All of them at once in float64, from the source's own embeddings."""
    v = vindex.open(request.getfixturevalue(f"built{which}"))
    source = request.getfixturevalue(which.removeprefix("_") or "checkpoint")
    tokens = unit(open_checkpoint(str(source)).tensor("model.embed_tokens.weight").numpy()[:TOKENS])
    directions, found = unit(v.gate.reshape(-1, 16)), v.statistics
    cosines = directions @ tokens.T
    np.testing.assert_allclose(found.gate, [cosines.mean(axis=1), cosines.std(axis=1)], atol=1e-6)
    np.testing.assert_allclose(found.centre, tokens.mean(axis=0), atol=1e-6)
    z = np.abs(cosines - found.gate[0][:, None]) / found.gate[1][:, None]
    by_layer = np.split(z, [v.index.first_row(layer) for layer in range(1, v.index.num_layers)])
    expected = np.stack([of.max(axis=0) for of in by_layer])[:, np.arange(SAMPLE) * TOKENS // SAMPLE]
    np.testing.assert_allclose(found.peaks, expected, rtol=2e-3)
    order = np.argsort(-(unit(random_directions(16)) @ tokens.T), axis=1, kind="stable")
    np.testing.assert_array_equal(found.random_poles[0], np.hstack([order[:, :10], order[:, ::-1][:, :10]]))


def test_a_planted_token_has_the_z_that_it_must_have(tmp_path):
    """One token lies on a direction that all others are at right angles to: its z is √(T − 1)."""

    def plant(tensors):
        gate, embeddings = tensors["model.layers.1.mlp.gate_proj.weight"], tensors["model.embed_tokens.weight"]
        gate[:, 0] = 0
        gate[0] = 0
        gate[0, 0] = 100
        embeddings[:, 0] = 0
        embeddings[3] = 0
        embeddings[3, 0] = -1

    build_quietly(write_checkpoint(tmp_path / "m", edit=plant), tmp_path / "v")
    best = vindex.open(tmp_path / "v").score(" France", k=2).top[0]
    first = best.hits[0]
    assert (first.layer, first.feature) == (1, 0) and first.cosine == pytest.approx(-1, abs=1e-5)
    assert first.z == pytest.approx(-math.sqrt(TOKENS - 1), rel=1e-4) and best.judged.token_share <= 2 / TOKENS


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-16, 1e-24, 1e-38])
def test_a_row_that_float16_rounds_to_zero_is_a_zero_row(tmp_path, size):
    """The poles and statistics are those of the embeddings that the vindex holds; the token itself has no score."""

    def shrink(tensors):
        tensors["model.embed_tokens.weight"][[3, 17, 30]] *= size

    build_quietly(write_checkpoint(tmp_path / "m", edit=shrink, dtype=torch.float32), tmp_path / "v")
    assert not failures(tmp_path / "v")
    v = vindex.open(tmp_path / "v")
    assert not v.embeddings[[3, 17, 30]].any()
    poles = v.meta_records(GATE_META, 1)[1]["tokens"]
    assert not poles["score"][np.isin(poles["token_id"], (3, 17, 30))].any() and np.abs(poles["score"]).max() < 1.001
    for query, number in ((17, 17), ([" the", " France"], 3), (" France", 3)):
        with pytest.raises(QueryError, match=f"token {number} has no embedding: its row is zero; ask for another"):
            v.score(query)


def cloud(random, tokens: int, hidden: int) -> np.ndarray:
    """Unit rows with a common mean, axes of unequal spread, and tokens near to the mean and far from it."""
    spread = np.linspace(2, 0.5, hidden) * random.lognormal(0, 0.5, (tokens, 1))
    return unit(random.standard_normal((tokens, hidden)) * spread + np.linspace(1, 2, hidden))


def test_random_directions_reach_what_chance_says_and_not_without_the_tokens_distance():
    random = np.random.RandomState(1)
    tokens, directions = cloud(random, 2000, 256), unit(random.standard_normal((400, 256)))
    cosines = tokens @ directions.T
    reached = np.abs((cosines - cosines.mean(axis=0)) / cosines.std(axis=0)).max(axis=1)
    centre = tokens.mean(axis=0)
    scales = [scale_of(token, centre) for token in tokens]
    beyond = [chance_of(peak, scale, 400) < 0.05 for peak, scale in zip(reached, scales, strict=True)]
    assert 0.03 < np.mean(beyond) < 0.08
    assert np.mean([chance_of(peak, 1.0, 400) < 0.05 for peak in reached]) > 0.15, "ρ matters"


def test_chance_and_reach_are_each_others_inverse():
    for scale, directions in ((1.0, 1), (1.4, 4608), (0.7, 200_000)):
        assert chance_of(reach_of(scale, directions, 0.05), scale, directions) == pytest.approx(0.05)
    assert chance_of(1.959964, 1.0, 1) == pytest.approx(0.05, abs=1e-6) and chance_of(0.0, 1.0, 5) == 1.0


def test_every_sampled_token_is_among_those_that_reach_as_far_as_it(built):
    """Its z is computed again, from the rounded embedding, and its peak is stored in float32."""
    v = vindex.open(built)
    ids = sampled_tokens(v.index.vocab_size)
    for token in np.unique(ids):
        assert v.score(int(token), k=1).top[0].judged.token_share >= np.mean(ids == token)


def test_best_is_z_of_the_cosines_in_order(built):
    v = vindex.open(built)
    cosines, (mean, deviation) = v.cosines(" Paris").reshape(-1), v.statistics.gate
    z = (cosines - mean) / deviation
    best = v.score(" Paris", k=16).top[0]
    assert [abs(hit.z) for hit in best.hits] == sorted(np.abs(z), reverse=True)
    assert all(cosines.reshape(2, 8)[hit.layer, hit.feature] == np.float32(hit.cosine) for hit in best.hits)
    share = np.mean(v.statistics.peaks.max(axis=0) >= np.abs(z).max() * (1 - 1e-5))
    assert best.judged.token_share == share and best.judged.directions == 16
    published = v.score(" Paris", k=4, by="cosine").top[0]
    assert [hit[:4] for hit in published.hits] == [hit[:4] for hit in v.top_features(" Paris", k=4)]
    assert "16 random directions reach" in best.summary and v.score(" Paris").rows()[0]["z"] == best.hits[0].z
    assert json.loads(json.dumps(best.record()))["judged"]["token_share"] == share


def test_a_vindex_without_statistics_opens_and_says_what_is_missing(old, built):
    before, now = vindex.open(old), vindex.open(built)
    assert before.id == now.id and failures(old) == {}
    best = before.score(" Paris", k=3).top[0]
    assert (
        best.by == "cosine"
        and best.judged is None
        and [hit.cosine for hit in best.hits] == [hit.cosine for hit in now.top_features(" Paris", k=3)]
    )
    with pytest.raises(QueryError, match=r"old.vindex has no statistics \(gate_stats.bin .*build it again"):
        before.score(" Paris", by="z").top[0]
    with pytest.raises(QueryError, match="old.vindex has no statistics"):
        before.coherence(0, 0)
    assert "no z: old.vindex has no statistics; build it again" in run("score", old, " Paris")
    assert "no coherence: old.vindex has no statistics" in run("feature", old, 0, 0)
    assert json.loads(run("score", old, " Paris", "--json"))["scores"][0]["judged"] is None


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda v: v.score(" Paris", by="size").top[0], "by 'size': expected 'z' or 'cosine'"),
        (lambda v: v.score(" Paris", k=0).top[0], "k 0: expected a positive integer"),
        (lambda v: v.search(""), "expected a token, got an empty text"),
        (lambda v: v.search("nonsense"), "neither ' nonsense' nor 'nonsense' is a single token"),
        (lambda v: v.clusters(0, 9), "feature 9 is out of range"),
    ],
)
def test_questions_that_cannot_be_answered(built, ask, message):
    with pytest.raises(QueryError, match=message):
        ask(vindex.open(built))


@pytest.mark.parametrize(
    "file, dtype, edit, message",
    [
        ("gate_stats.bin", "<f4", lambda a: a.__setitem__(0, a[0] + 0.01), "row 0 has mean .* and not .*, deviation"),
        ("gate_stats.bin", "<f4", lambda a: a.__setitem__(17, -0.1), "a mean or a deviation is none of cosines"),
        ("gate_stats.bin", "<f4", lambda a: a.__setitem__(3, np.nan), "row 0, column 3 is nan"),
        ("gate_peaks.bin", "<f4", lambda a: a.__setitem__(0, 9.0), "layer 0, token 0 has 9 and not"),
        ("gate_peaks.bin", "<f4", lambda a: a.__setitem__(5, -1.0), "a largest |z| is negative"),
        ("mean_embedding.bin", "<f4", lambda a: a.__setitem__(2, 0.5), "largest difference .* of its length"),
        ("random_poles.bin", "<u4", lambda a: a.__setitem__(0, a[5]), "largest difference .* deviations"),
        ("random_poles.bin", "<u4", lambda a: a.__setitem__(9, 36), "expected token ids below 36"),
    ],
)
def test_damaged_statistics_are_found_even_when_checksums_agree(copy, file, dtype, edit, message):
    change(copy, file, dtype, edit, resum=True)
    assert any(re.search(message.replace("|", r"\|"), detail) for detail in failures(copy).values())


def test_statistics_that_are_missing_or_cut_are_refused(copy):
    whole = (copy / "gate_peaks.bin").read_bytes()
    (copy / "gate_peaks.bin").write_bytes(whole[:-4])
    with pytest.raises(FormatError, match=f"gate_peaks.bin: expected {len(whole)} bytes, got {len(whole) - 4}"):
        vindex.open(copy)
    (copy / "gate_peaks.bin").unlink()
    with pytest.raises(FormatError, match="gate_peaks.bin"):
        vindex.open(copy)
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index | {"has_gate_stats": "yes"}))
    with pytest.raises(FormatError, match="has_gate_stats: expected true or false, got 'yes'"):
        vindex.open(copy)


def test_search_finds_every_direction_that_holds_a_token(built, built_mixture):
    for directory in (built, built_mixture):
        v = vindex.open(directory)
        found, expected = v.search("Paris"), set()
        for entry in v.index.layers:
            for expert in range(entry.groups):
                for number in range(entry.features):
                    which = {"expert": expert} if entry.num_experts else {}
                    feature = v.feature(entry.layer, number, **which)
                    for side in ("reads", "writes"):
                        for pole, tokens in (("+", getattr(feature, side)), ("−", getattr(feature, f"{side}_against"))):
                            place = (side, entry.layer, number, pole)
                            expected |= {
                                (*place, at, token.token_id, which.get("expert"))
                                for at, token in enumerate(tokens, 1)
                                if token.piece in (" Paris", "Paris")
                            }
        assert {(*one[:6], one.expert) for one in found} == expected and len(found) == len(expected) > 0
        assert {one.side for one in v.search(" Paris", writes=False)} == {"reads"}
        assert v.search(" Paris") == found


@pytest.mark.parametrize("name, at", [("gate_meta.bin", 7), ("random_poles.bin", 3)])
def test_coherence_of_tokens_that_are_none_is_refused(built, tmp_path, name, at):
    directory = shutil.copytree(built, tmp_path / "v")
    ids = np.fromfile(directory / name, "<u4")
    ids[at] = 1 << 24
    ids.tofile(directory / name)
    with pytest.raises(
        FormatError, match=f"{name} holds token id 16777216, and there are 40 tokens; run vindex verify"
    ):
        vindex.open(directory).coherence(0, 0)


def test_coherence_is_the_mean_cosine_of_centred_tokens_beside_random_poles(built):
    v = vindex.open(built)
    centred = unit(unit(v.embeddings) - v.statistics.centre)

    def by_pairs(ids) -> float:
        return float(np.mean([centred[a] @ centred[b] for a in ids for b in ids if a != b]))

    feature, found = v.feature(1, 2), v.coherence(1, 2)
    by_chance = [by_pairs(pole) for row in v.statistics.random_poles[1] for pole in (row[:10], row[10:])]
    expected = by_pairs([token.token_id for token in feature.writes_against])
    assert found.writes_against.cosine == pytest.approx(expected, abs=1e-5)
    assert found.writes_against.z == pytest.approx((expected - np.mean(by_chance)) / np.std(by_chance), abs=1e-3)
    rows = np.eye(12, dtype=np.float16)
    assert alike(np.array([[0] * 10, range(10)]), rows, np.zeros(12)) == pytest.approx([1, 0], abs=1e-6)


def test_clusters_are_runs_of_nearly_equal_singular_values(built):
    sigma = np.array([3, 2.9999, 2.9998, 2, 1, 1, 0, 0], np.float32)
    assert [cluster_of(sigma, at, 1e-9) for at in (0, 2, 3, 5)] == [range(3), range(3), range(3, 4), range(4, 6)]
    assert cluster_of(np.array([1.0, 0.7, 0.1]), 0, 0.04) == range(2), "a residual widens what is not told apart"
    found = vindex.open(built).clusters(0, 3)
    assert found.gate == range(3, 4) and found.down == range(3, 4)


def test_sampled_tokens_are_evenly_spread():
    assert sampled_tokens(SAMPLE).tolist() == list(range(SAMPLE))
    few, many = sampled_tokens(36), sampled_tokens(150_000)
    assert set(few) == set(range(36)) and many[-1] < 150_000 and set(np.diff(many)) == {36, 37}


def test_score_takes_words_ids_files_and_standard_input(built, tmp_path):
    words: Path = tmp_path / "words.txt"
    words.write_text(" Paris\r\n\n Berlin\n")
    for arguments, input in (
        ((" Paris", " Berlin"), None),
        (("--file", words), None),
        (("--file", "-"), words.read_text()),
    ):
        record = json.loads(run("score", built, *arguments, "--json", "-k", 1, input=input))["scores"]
        assert [one["token_id"] for one in record] == [0, 1] and record[0]["judged"]["directions"] == 16
    assert json.loads(run("score", built, "--id", 1, "--json"))["scores"][0]["piece"] == " Berlin"
    shown = run("score", built, " Paris")
    assert "16 random directions reach" in shown and "chance explains all of these" in shown and "writes" not in shown
    assert "most tokens" not in run("score", built, " Paris", "--by", "cosine")


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ((), 2, "give a word, --id or --file"),
        (("--file", "nowhere.txt"), 1, "nowhere.txt: cannot be read"),
        (("--id", "40"), 1, "token id 40 is out of range"),
        ((" Paris", "--by", "size"), 1, "by 'size': expected 'z' or 'cosine'"),
    ],
)
def test_scores_of_nothing(built, arguments, status, message):
    done = CliRunner().invoke(app, ["score", str(built), *arguments])
    assert done.exit_code == status and message in f"{done.output}{done.exception}"


def test_standard_input_that_is_not_text(built):
    done = CliRunner().invoke(app, ["score", str(built), "--file", "-"], input=b"\xff")
    assert isinstance(done.exception, QueryError)
    assert str(done.exception) == "standard input is not text: byte 0 is not UTF-8"


def test_search_and_feature_print_what_they_found(built):
    shown = run("search", built, "Paris", "-k", 1)
    assert "reads" in shown and "writes" in shown and "more in --json" in shown
    assert "writes" not in run("search", built, "Paris", "--reads")
    record = json.loads(run("feature", built, 0, 1, "--json"))
    assert set(record["coherence"]) == {"reads", "reads_against", "writes", "writes_against"}
    assert record["clusters"] == {"gate": [1, 1], "down": [1, 1]}
