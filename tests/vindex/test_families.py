"""What others publish opens, gives the scores of its numbers, and says what it lacks; what is damaged is refused."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import vindex
from tests.foreign import (
    EXPERTS,
    FEATURES,
    HIDDEN,
    LAYERS,
    NEURONS,
    TOKENS,
    TOP_K,
    weights,
    write_browse,
    write_published,
)
from tests.vindex.damaged import change, cut, shift
from vindex.__main__ import app
from vindex.console import visible
from vindex.errors import FormatError, LackingError, QueryError

PUBLISHED_CODE = Path(__file__).with_name("published_how_to_use.txt").read_text()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100"})
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


# What the numbers say


def scores_of_the_published_code(directory: Path, token_id: int) -> np.ndarray:
    """Its `scores`, of its code as it stands on the card."""
    code = PUBLISHED_CODE.replace("path/to/downloaded/vindex", str(directory)).replace("12379", str(token_id))
    found: dict = {}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        exec(code, found)
    return found["scores"]


def test_scores_are_those_of_the_published_code_to_the_last_bit(published, tmp_path, embeddings):
    wide = write_published(tmp_path / "wide", weights(2, 700, 16, seed=5), weights(2, 700, 16), embeddings)
    tall = write_published(tmp_path / "tall", weights(2, 9, 515, seed=6), weights(2, 9, 515), weights(50, 515))
    for directory, token_ids in ((published, (0, 7, TOKENS - 1)), (wide, (3,)), (tall, (3,))):
        v = vindex.open(directory)
        for token_id in token_ids:
            theirs = scores_of_the_published_code(directory, token_id)
            np.testing.assert_array_equal(v.cosines(token_id), theirs)
            np.testing.assert_array_equal(v.cosines([1, token_id])[1], theirs)
        layer, feature = np.unravel_index(theirs.argmax(), theirs.shape)
        best = v.score(token_id, k=1).top[0].hits[0]
        assert (best.layer, best.feature, best.cosine) == (layer, feature, float(theirs.max()))


def test_the_same_holds_of_ours(built):
    v = vindex.open(built)
    np.testing.assert_array_equal(v.cosines(3), scores_of_the_published_code(built, 3))


def test_a_summary_of_a_mixture_answers_by_layer_and_expert(summary, experts):
    v = vindex.open(summary)
    assert (v.index.num_layers, v.index.num_experts, v.index.num_features_per_expert) == (3, EXPERTS, FEATURES)
    asked = experts[2][3, 1]
    best = v.top_features(asked, k=1)[0]
    assert (best.layer, best.expert, best.feature, best.gate_sigma) == (2, 3, 1, None)
    assert best.cosine == pytest.approx(1.0, abs=1e-6)
    expected = np.concatenate([unit(experts[layer]).reshape(-1, HIDDEN) @ unit(asked) for layer in (1, 2)])
    np.testing.assert_allclose(v.cosines(asked), expected, atol=1e-6)
    np.testing.assert_array_equal(v.side(1, "gate"), experts[1])
    assert v.side(0, "gate").shape == (1, 0, HIDDEN)
    near = v.nearest_features(1, 0, k=1, expert=2)[0]
    assert (near.layer, near.expert, near.feature) != (1, 2, 0)
    found = v.feature(2, 5, expert=0)
    assert found.reads is found.writes is found.down_sigma is None
    with pytest.raises(QueryError, match="layer 0 is not in summary: it has layers 1 to 2"):
        v.feature(0, 0)
    with pytest.raises(QueryError, match="layer 1 of summary has experts: say which one, 0 to 3$"):
        v.feature(1, 0)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_a_browse_vindex_answers_by_neuron(tmp_path, neurons, embeddings, dtype):
    uneven = [*neurons[:2], neurons[2][:5]]
    v = vindex.open(write_browse(tmp_path / "browse", uneven, embeddings, dtype))
    stored = [rows.astype(dtype.replace("f", "float").replace("16", "16")) for rows in uneven]
    expected = np.concatenate([unit(rows.astype(np.float32)) for rows in stored])
    asked = unit(embeddings[7].astype(stored[0].dtype).astype(np.float32))
    np.testing.assert_allclose(v.cosines(7), expected @ asked, atol=1e-5)
    for layer, rows in enumerate(stored):
        np.testing.assert_array_equal(v.side(layer, "gate")[0], rows)
    found = v.feature(2, 1)
    assert [(token.token_id, token.score) for token in found.writes] == [(1, 9.0), (2, 8.0), (3, 7.0)]
    assert found.writes_against is None and v.feature(2, 4).writes == []
    cosines = unit(v.embeddings.astype(np.float32))[: len(v.vocabulary)] @ expected[2 * NEURONS + 1]
    assert [token.token_id for token in found.reads] == np.argsort(-cosines)[:10].tolist()
    word = v.vocabulary.piece(500)
    assert v.score(word, k=1).top[0].token_id == 500


def test_what_a_direction_reads_is_computed_where_no_file_says_it(built, tmp_path):
    """As the build found it, token for token."""
    ours = vindex.open(built)
    directory = write_published(tmp_path / "p", ours.gate, ours.down, ours.embeddings)
    v = vindex.open(directory, built)
    for place in ((0, 0), (1, 7)):
        computed, stored = v.feature(*place), ours.feature(*place)
        for side in ("reads", "reads_against"):
            found, kept = getattr(computed, side), getattr(stored, side)
            assert [token[:2] for token in found] == [token[:2] for token in kept]
            np.testing.assert_allclose([token.score for token in found], [token.score for token in kept], atol=2e-3)
    assert v.score(3, k=1).top[0].features[0][0].reads is None, "a score computes nothing more"
    assert "–: not stored; vindex feature computes it" in run("score", directory, "--id", 3)
    shown = run("feature", directory, 1, 7)
    best = vindex.open(directory).feature(1, 7).reads[0]
    assert f"{visible(best.piece)}\u00a0{best.score:+.2f}" in shown and "respond" not in shown
    assert "no coherence: p has no statistics of the vocabulary" in shown
    (directory / "embeddings.bin").write_bytes(np.full(v.embeddings.size, np.nan, "<f2"))
    with pytest.raises(FormatError, match="embeddings.bin holds a number that is not finite"):
        vindex.open(directory).feature(0, 0)


def test_searching_a_browse_vindex_finds_the_neurons_that_write_a_token(browse):
    v = vindex.open(browse)
    word = v.vocabulary.piece(2)
    found = [(one.side, one.feature, one.pole, one.place) for one in v.search(word) if one.token_id == 2]
    assert found == [("writes", neuron, "+", place) for place, neuron in ((1, 2), (2, 1), (3, 0)) for _ in range(3)]
    with pytest.raises(LackingError, match=r"browse has no gate_meta.bin, which LARQL's browse form does not keep"):
        v.search(word, writes=False)
    assert not [one for one in v.search(v.vocabulary.piece(0)) if one.feature == NEURONS - 1], "a free place"
    unheld = v.vocabulary.piece(NEURONS + 9)
    assert f"among the {TOP_K} tokens of a pole" in " ".join(run("search", browse, unheld).split())


def test_layers_that_larqls_index_leaves_out_have_no_rows(browse, tmp_path):
    directory = shutil.copytree(browse, tmp_path / "gap")
    change(directory, "index.json", lambda index: index["layers"].pop(0))
    change(directory, "index.json", lambda index: shift(index, -NEURONS * HIDDEN * 4))
    cut(directory / "gate_vectors.bin", -NEURONS * HIDDEN * 4)
    (directory / "down_meta.bin").unlink()
    v = vindex.open(directory)
    assert v.index.num_layers == LAYERS and v.gate.shape == (2 * NEURONS, HIDDEN)
    with pytest.raises(QueryError, match="layer 0 is not in gap"):
        v.feature(0, 0)


def test_a_down_meta_in_larqls_layout_is_read_of_a_published_one(published, browse, tmp_path, neurons, embeddings):
    same = write_browse(tmp_path / "same", [rows[:FEATURES] for rows in neurons], embeddings)
    directory = shutil.copytree(published, tmp_path / "p")
    shutil.copy(same / "down_meta.bin", directory)
    assert [token.token_id for token in vindex.open(directory).feature(0, 2).writes] == [2, 3, 4]
    shutil.copy(browse / "down_meta.bin", directory)
    with pytest.raises(
        FormatError, match=r"down_meta.bin: expected 604 bytes, 3 tokens for each of 18 rows, got 2,332"
    ):
        vindex.open(directory)


def test_float32_is_taken_where_a_file_of_other_sizes_says_it(published, browse, tmp_path, neurons, embeddings):
    directory = shutil.copytree(published, tmp_path / "wide")
    expected = vindex.open(published).cosines(7)
    for name in ("gate_vectors.bin", "down_features.bin", "embeddings.bin"):
        np.fromfile(directory / name, "<f2").astype("<f4").tofile(directory / name)
    np.testing.assert_array_equal(vindex.open(directory).cosines(7), expected)
    (directory / "embeddings.bin").unlink()
    same = write_browse(tmp_path / "same", [rows[:FEATURES] for rows in neurons], embeddings)
    shutil.copy(same / "down_meta.bin", directory)
    assert vindex.open(directory).gate.dtype == np.float32, "the number of layers in down_meta.bin"


def test_larqls_early_magic_is_taken_as_its_loader_takes_it(browse, tmp_path):
    directory = shutil.copytree(browse, tmp_path / "early")
    content = (directory / "down_meta.bin").read_bytes()
    (directory / "down_meta.bin").write_bytes(b"DMET" + content[4:])
    assert vindex.open(directory).feature(0, 0).writes


# What is lacking


@pytest.mark.parametrize(
    "family, ask, message",
    [
        ("published", lambda v: v.singular_values, "published has no singular values, which the published dense form "),
        ("published", lambda v: v.manifest, "published has no certificates, .*: measure it with `vindex audit DIR "),
        ("published", lambda v: v.certificate(0, "gate"), "published has no certificates"),
        ("published", lambda v: v.norms, "published does not say which numbers of norms.bin are whose"),
        ("published", lambda v: v.cosines(" Paris"), "published has no tokenizer.json: ask by --id, or give"),
        ("published", lambda v: v.score(0, by="z"), "published has no statistics of the vocabulary"),
        ("published", lambda v: v.clusters(0, 0), "published has no singular values"),
        ("published", lambda v: v.index.source, "published does not say its source; a vindex that `vindex build`"),
        (
            "published",
            vindex.verify,
            "published is the published dense form, and this needs a vindex that `vindex build`",
        ),
        ("published", vindex.write_card, "published is the published dense form"),
        ("browse", lambda v: v.response_stats, "browse is LARQL's browse form, and this needs"),
        ("browse", lambda v: v.snippets(0, 0), "browse is LARQL's browse form, and this needs"),
        ("published", lambda v: v.index.router_offset(0), "published has no router of layer 0"),
        ("summary", lambda v: v.down, "summary has gate directions only: build a vindex of the model"),
        ("summary", lambda v: v.cosines(3), "summary has no embeddings: pass a vector of 16 numbers, or build"),
        ("summary", lambda v: v.router(1), "summary has no router of layer 1"),
        ("summary", lambda v: v.index.vocab_size, "summary does not say how many tokens the model has"),
        ("browse", lambda v: v.down, "browse holds the rows of gate_proj, neuron by neuron, and none of down_proj"),
        ("browse", lambda v: vindex.compare(v, v), "cannot compare: browse holds neurons, which span every direction"),
    ],
)
def test_what_is_lacking_is_named_with_what_would_give_it(request, family, ask, message):
    with pytest.raises(QueryError, match=message):
        ask(vindex.open(request.getfixturevalue(family)))


@pytest.mark.parametrize("family", ["published", "summary", "browse"])
def test_info_lists_what_is_lacking(request, family):
    directory = request.getfixturevalue(family)
    v, shown = vindex.open(directory), run("info", directory)
    assert "it lacks" in shown and "singular values" in shown
    facts = json.loads(run("info", directory, "--json"))
    assert facts["family"] == v.family.title and facts["lacks"] == [lack._asdict() for lack in v.lacks]
    assert facts["size_bytes"] <= sum(file.stat().st_size for file in directory.iterdir())
    assert v.family.title in repr(v)


def test_ours_lacks_nothing(built):
    v = vindex.open(built)
    assert v.lacks == () and v.family.title == "" and "lacks" not in v.info()


def test_an_id_is_that_of_the_checksums_or_the_name(published, summary, built, tmp_path):
    assert len(vindex.open(published).id) == 8 and vindex.open(summary).id == "summary"
    np.testing.assert_array_equal(vindex.open(published).score(3).vindex, vindex.open(published).id)


# Commands


def test_every_command_runs_on_every_family(published, summary, browse):
    for words in (
        ("score", published, "--id", 7, "-k", 3),
        ("feature", published, 1, 2),
        ("compare", published, published),
        ("feature", summary, 1, 2, "--expert", 3),
        ("compare", summary, summary),
        ("score", browse, "--id", 7),
        ("feature", browse, 0, 3),
    ):
        assert run(*words)
        json.loads(run(*words, "--json"))


def test_what_a_command_needs_and_does_not_find_is_named(summary, published):
    for words, message in (
        (("score", summary, "--id", 3), "summary has no embeddings: pass a vector of 16 numbers"),
        (("score", published, " Paris"), "published has no tokenizer.json: ask by --id"),
        (("search", published, "Paris"), "published has no gate_meta.bin, which .*: build a vindex of the model"),
        (("search", summary, "Paris"), "summary has no gate_meta.bin, which .*: build a vindex of the model"),
    ):
        with pytest.raises(LackingError, match=message):
            CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_comparing_without_certificates_says_that_noise_is_unknown(published, tmp_path):
    other = write_published(
        tmp_path / "other", weights(LAYERS, FEATURES, HIDDEN), weights(LAYERS, FEATURES, HIDDEN), weights(9, HIDDEN)
    )
    found = vindex.compare(vindex.open(published), vindex.open(other))
    assert "nobody can say how much of it is noise" in found.summary and found.noise is None
    assert all(one.gate.largest_angle > 0.1 and one.gate.spectrum_drift is None for one in found)
    same = vindex.compare(vindex.open(published), vindex.open(published))
    assert max(one.down.largest_angle for one in same) < 1e-6 and not same.same_weights
    found.plot(tmp_path / "angles.html")
