"""What others publish opens, gives the scores of its numbers, and says what it lacks; what is damaged is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import vindex
from tests.foreign import ATLAS_TOKENIZER, leading, weights, write_browse, write_published, write_summary
from tests.vindex.report.records import written
from tests.vindex.report.test_report import Seen, data_in, numbers
from vindex.__main__ import app
from vindex.console import visible
from vindex.errors import FormatError, LackingError, QueryError, VindexError
from vindex.report.directions import directions
from vindex.report.moved import beside

PUBLISHED_CODE = Path(__file__).with_name("published_how_to_use.txt").read_text()
LAYERS, FEATURES, HIDDEN, TOKENS, NEURONS, EXPERTS = 3, 6, 16, 2000, 24, 4


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    return weights(TOKENS, HIDDEN, seed=1)


@pytest.fixture(scope="module")
def published(tmp_path_factory, embeddings) -> Path:
    gate = np.stack([leading(weights(NEURONS, HIDDEN, seed=10 + layer), FEATURES) for layer in range(LAYERS)])
    down = np.stack([leading(weights(NEURONS, HIDDEN, seed=20 + layer), FEATURES) for layer in range(LAYERS)])
    return write_published(tmp_path_factory.mktemp("a") / "published", gate, down, embeddings, model="Qwen/Qwen3-8B")


@pytest.fixture(scope="module")
def experts() -> dict[int, np.ndarray]:
    """Layers 1 and 2 of a model: its layer 0 is dense and not in the summary."""
    return {
        layer: np.stack([leading(weights(NEURONS, HIDDEN, seed=100 * layer + e), FEATURES) for e in range(EXPERTS)])
        for layer in (1, 2)
    }


@pytest.fixture(scope="module")
def summary(tmp_path_factory, experts) -> Path:
    return write_summary(tmp_path_factory.mktemp("b") / "summary", experts)


@pytest.fixture(scope="module")
def neurons() -> list[np.ndarray]:
    return [weights(NEURONS, HIDDEN, seed=30 + layer) for layer in range(LAYERS)]


@pytest.fixture(scope="module")
def browse(tmp_path_factory, neurons, embeddings) -> Path:
    return write_browse(tmp_path_factory.mktemp("c") / "browse", neurons, embeddings)


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


# Tokenizers


def test_words_are_found_with_the_models_tokenizer(published, tmp_path):
    by_file, by_directory = (vindex.open(published, place) for place in (ATLAS_TOKENIZER, ATLAS_TOKENIZER.parent))
    word = by_file.vocabulary.piece(500)
    np.testing.assert_array_equal(by_directory.cosines(word), vindex.open(published).cosines(500))
    shown = run("score", published, word, "--tokenizer", ATLAS_TOKENIZER.parent, "-k", 2)
    assert "id 500" in shown


@pytest.mark.parametrize(
    "place, message",
    [
        ("nowhere/here", "nowhere/here: .*"),
        (ATLAS_TOKENIZER.parent.parent, "tokenizer.json: cannot be read"),
    ],
)
def test_a_tokenizer_that_cannot_be_had(published, place, message):
    with pytest.raises(VindexError, match=message):
        vindex.open(published, place).token_id(" Paris")


def test_a_tokenizer_of_another_model_is_refused(browse, tmp_path):
    small = write_published(tmp_path / "p", weights(1, 2, 4), weights(1, 2, 4), weights(9, 4))
    with pytest.raises(
        QueryError, match=r"has token ids up to \d+, and p only 9 tokens: give the tokenizer of its own"
    ):
        vindex.open(small, ATLAS_TOKENIZER).token_id(" Paris")
    with pytest.raises(QueryError, match=r"browse has a tokenizer.json of its own; leave out --tokenizer"):
        vindex.open(browse, ATLAS_TOKENIZER).token_id(" Paris")


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
        (("search", summary, "Paris"), "summary has no tokenizer.json: build a vindex"),
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


# Reports


@pytest.mark.parametrize("family", ["published", "summary", "browse"])
def test_a_report_has_what_the_family_has_and_says_what_it_lacks(request, family, tmp_path):
    v = vindex.open(request.getfixturevalue(family))
    page = vindex.write_report(v, tmp_path / "r.html").read_text()
    seen, data = Seen(page), data_in(page)
    text = " ".join(seen.text.split())
    assert v.family.title in text and all(lack.what in text and lack.way_out in text for lack in v.lacks)
    assert "No spectra: " in text and "vindex build MODEL" in text and "probe.json" not in text
    assert data["sigma"] is data["coherence"] is data["response"] is data["snippets"] is None
    assert data["rows"] == v.index.num_rows and seen.text.count("singular values, which") == 1
    near = numbers(data["nearest"]["rows"], "<u4").reshape(v.index.num_rows, -1)
    best = v.hit(int(near[7, 0]), 0.0)
    place = v.hit(7, 0.0)
    expected = v.nearest_features(place.layer, place.feature, k=1, expert=place.expert)[0]
    assert (best.layer, best.expert, best.feature) == (expected.layer, expected.expert, expected.feature)


def test_a_report_of_a_browse_vindex_has_the_tokens_that_neurons_write(browse):
    v, data = vindex.open(browse), directions(vindex.open(browse))
    assert data["neurons"] and data["poles"] == 1 and list(data["sides"]) == ["writes"]
    tokens = numbers(data["sides"]["writes"]["tokens"], "<u4").reshape(v.index.num_rows, data["pole"])
    for layer, neuron in ((0, 3), (2, NEURONS - 1)):  # the last is a free place
        shown = [data["strings"][token] for token in tokens[v.row(layer, neuron, None)]]
        assert [piece for piece in shown if piece] == [token.piece for token in v.feature(layer, neuron).writes]


def test_a_report_sets_two_published_vindexes_side_by_side_without_noise(published, built, tmp_path):
    gate = np.stack([leading(weights(NEURONS, HIDDEN, seed=50 + layer), FEATURES) for layer in range(LAYERS)])
    other = write_published(tmp_path / "other", 3 * gate, gate, weights(9, HIDDEN))
    v = vindex.open(published)
    found = beside(v, vindex.open(other))
    assert len(found.moved) == 20 and {one.noise for one in found.moved} == {None} and found.moved[0].angle > 0.5
    assert 0 < found.moved[0].cosine < 1
    text = Seen(vindex.write_report(v, tmp_path / "r.html", against=vindex.open(other)).read_text()).text
    assert "nobody can say how much of it is noise" in text and "The 20 directions that moved most" in text
    record = written(vindex.open(built), tmp_path)["trace"]
    with pytest.raises(LackingError, match=r"trace.json: is of weights by their SHA-256, and published does not say"):
        vindex.write_report(v, tmp_path / "r.html", trace=record)


def test_numbers_that_are_not_finite_have_no_neighbours(published, tmp_path):
    directory = shutil.copytree(published, tmp_path / "v")
    numbers = np.memmap(directory / "gate_vectors.bin", np.float16, "r+")
    numbers[7] = np.nan
    numbers.flush()
    assert directions(vindex.open(directory))["nearest"] is None


# What is damaged


def change(directory: Path, name: str, edit) -> None:
    value = json.loads((directory / name).read_text())
    edit(value)
    (directory / name).write_text(json.dumps(value))


def cut(path: Path, by: int = -1) -> None:
    os.truncate(path, path.stat().st_size + by)


def repeat(directory: Path, *names: str) -> None:
    """As many numbers again."""
    for name in names:
        (directory / name).write_bytes(2 * (directory / name).read_bytes())


def shift(index: dict, by: int) -> None:
    for entry in index["layers"]:
        entry["offset"] += by


def link(directory: Path, name: str, to: str) -> None:
    (directory / name).unlink()
    (directory / name).symlink_to(to)


SUMMARY = "gate_vectors_index.json"
DAMAGE = [
    ("published", lambda d: cut(d / "gate_vectors.bin"), r"gate_vectors.bin: expected 576 bytes \(float16\) or 1,152"),
    ("published", lambda d: cut(d / "embeddings.bin"), "embeddings.bin: expected 64,000 bytes"),
    (
        "published",
        lambda d: change(d, "index.json", lambda i: i.update(num_layers=2**14)),
        "gate_vectors.bin: expected ",
    ),
    (
        "published",
        lambda d: change(d, "index.json", lambda i: i.update(num_layers=2**62)),
        "num_layers: expected an int",
    ),
    (
        "published",
        lambda d: change(d, "index.json", lambda i: i.update(hidden_size=-16)),
        "hidden_size: expected an in",
    ),
    (
        "published",
        lambda d: change(d, "index.json", lambda i: i.update(vocab_size="9")),
        "vocab_size: expected an integ",
    ),
    ("published", lambda d: change(d, "index.json", lambda i: i.pop("num_layers")), "num_layers: missing"),
    ("published", lambda d: (d / "index.json").write_text("{"), "index.json: not valid JSON"),
    ("published", lambda d: link(d, "gate_vectors.bin", "/dev/zero"), "gate_vectors.bin: cannot be read: it is a dev"),
    (
        "published",
        lambda d: link(d, "gate_vectors.bin", "gone"),
        "gate_vectors.bin: cannot be read: it is a link to go",
    ),
    (
        "published",
        lambda d: repeat(d, "gate_vectors.bin"),
        "by their sizes gate_vectors.bin is float32 and down_features.bin float16, so that one of them is not",
    ),
    (
        "published",
        lambda d: repeat(d, "gate_vectors.bin", "down_features.bin"),
        "by their sizes gate_vectors.bin is float32 and embeddings.bin float16",
    ),
    (
        "published",
        lambda d: (repeat(d, "gate_vectors.bin", "down_features.bin"), (d / "embeddings.bin").unlink()),
        "gate_vectors.bin is float32, or float16 of twice the layers, and no other file tells which; put its emb",
    ),
    (
        "published",
        lambda d: change(d, "index.json", lambda i: i.update(num_experts=3)),
        "num_experts: expected none, since nothing says which rows are whose",
    ),
    ("published", lambda d: (d / "gate_vectors.bin").unlink(), "gate_vectors.bin: cannot be read"),
    ("published", lambda d: (d / "SHA256SUMS").write_text("evil\n"), "SHA256SUMS line 1: expected"),
    ("published", lambda d: (d / "SHA256SUMS").write_text(f"{'0' * 64}  ../x\n"), "names '../x', which is not a plain"),
    ("summary", lambda d: cut(d / "gate_vectors.bin", -4), "gate_vectors.bin: expected 1,536 bytes"),
    ("summary", lambda d: cut(d / "gate_vectors.bin", 4), "gate_vectors.bin: expected 1,536 bytes"),
    (
        "summary",
        lambda d: change(d, SUMMARY, lambda i: i["layers"].update(x={})),
        "layers.x: expected the number of a l",
    ),
    ("summary", lambda d: change(d, SUMMARY, lambda i: i["layers"].clear()), "layers: expected one or more, got none"),
    (
        "summary",
        lambda d: change(d, SUMMARY, lambda i: i["layers"]["2"].update(shape=[4, 6, 99])),
        r"layers.2.shape: expected 4 experts × 64 × hidden size, the same in each, got \[4, 6, 99\]",
    ),
    (
        "summary",
        lambda d: change(d, SUMMARY, lambda i: i["layers"]["2"].update(shape=[4, 6])),
        "layers.2.shape: expected a list of 3 positive integers",
    ),
    (
        "summary",
        lambda d: change(d, SUMMARY, lambda i: i["layers"]["2"].update(file_offset=4)),
        "layers.2.file_offset: expected 1536, right after the layer before it, got 4",
    ),
    ("summary", lambda d: change(d, SUMMARY, lambda i: i["layers"].update({"2": 7})), "layers.2: expected an object"),
    (
        "summary",
        lambda d: change(d, SUMMARY, lambda i: i["model_config"].pop("moe")),
        "model_config.moe: missing",
    ),
    (
        "summary",
        lambda d: (change(d, SUMMARY, lambda i: i["layers"].pop("2")), cut(d / "gate_vectors.bin", -2304)),
        "layers: of one layer expected 1,536 bytes, float32, in gate_vectors.bin, got 768, which half of it has too",
    ),
    (
        "summary",
        lambda d: cut(d / "gate_vectors.bin", -1536),
        "layers.2.file_offset: expected 768, right after the layer before it, got 1536",
    ),
    (
        "summary",
        lambda d: change(d, SUMMARY, lambda i: i["layers"].update({"3": i["layers"]["2"], "4": i["layers"]["2"]})),
        "layers.2.file_offset: expected 768",
    ),
    (
        "browse",
        lambda d: change(d, "index.json", lambda i: i["layers"][0].update(num_features_per_expert=6)),
        "num_features_per_expert: 6, and no num_experts says of how many",
    ),
    (
        "browse",
        lambda d: (change(d, "index.json", lambda i: i.pop("dtype")), repeat(d, "gate_vectors.bin")),
        "gate_vectors.bin: expected 2,304 bytes",
    ),
    (
        "browse",
        lambda d: (change(d, "index.json", lambda i: i.pop("dtype")), cut(d / "gate_vectors.bin", -2304)),
        r"layers\[0\].length: expected 768, got 1536",
    ),
    ("browse", lambda d: cut(d / "gate_vectors.bin"), "gate_vectors.bin: expected 2,304 bytes"),
    ("browse", lambda d: cut(d / "down_meta.bin"), "down_meta.bin: expected 2,332 bytes, 3 tokens for each of 72 rows"),
    ("browse", lambda d: cut(d / "down_meta.bin", -2330), "down_meta.bin: expected a header of 16 bytes"),
    ("browse", lambda d: (d / "down_meta.bin").write_bytes(bytes(2332)), "down_meta.bin: expected header"),
    (
        "browse",
        lambda d: change(d, "index.json", lambda i: i.update(dtype="f16")),
        "dtype: gate_vectors.bin holds float32 by its size, and it says 'f16'",
    ),
    (
        "browse",
        lambda d: change(d, "index.json", lambda i: i["layers"][1].update(offset=0)),
        r"layers\[1\].offset: expected 1536, got 0",
    ),
    (
        "browse",
        lambda d: change(d, "index.json", lambda i: i["layers"][1].update(layer=0)),
        "layers: expected each layer once and in order, and rows in one of them",
    ),
    (
        "browse",
        lambda d: change(d, "index.json", lambda i: i["layers"][1].update(num_experts=5)),
        "layers of 5 experts: expected as many rows for each, got 24 in all",
    ),
]


@pytest.mark.parametrize("family, damage, message", DAMAGE, ids=range(len(DAMAGE)))
def test_what_is_damaged_is_refused_in_one_line(request, tmp_path, family, damage, message):
    directory = shutil.copytree(request.getfixturevalue(family), tmp_path / family)
    damage(directory)
    with pytest.raises(FormatError, match=message) as caught:
        vindex.open(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["published", "browse", "built"])
def test_a_clone_without_lfs_is_told_as_such(request, tmp_path, family):
    directory = shutil.copytree(request.getfixturevalue(family), tmp_path / "clone")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 576\n"
    (directory / "gate_vectors.bin").write_text(pointer)
    with pytest.raises(
        FormatError, match="gate_vectors.bin: is a git-lfs pointer, not the file; run `git lfs pull` there"
    ):
        vindex.open(directory)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_give_no_score(published, tmp_path, number):
    for name in ("gate_vectors.bin", "embeddings.bin"):
        directory = shutil.copytree(published, tmp_path / name)
        numbers = np.memmap(directory / name, np.float16, "r+")
        numbers[7] = number
        numbers.flush()
        with pytest.raises(FormatError, match=f"{name} holds a number that is not finite, or too large"):
            vindex.open(directory).cosines(0)
    with pytest.raises(FormatError, match=r"compared: gate_vectors.bin holds a number that is not finite, in layer 0"):
        v = vindex.open((tmp_path / "gate_vectors.bin").rename(tmp_path / "compared"))
        vindex.compare(v, v)


def test_a_damaged_vindex_of_ours_is_taken_for_no_other(built, tmp_path):
    for name, edit in (("index.json", lambda index: index.pop("format")), ("index.json", lambda index: index.clear())):
        directory = shutil.copytree(built, tmp_path / str(id(edit)))
        change(directory, name, edit)
        with pytest.raises(FormatError, match="index.json: format"):
            vindex.open(directory)
    (directory / "singular_values.bin").unlink()
    with pytest.raises(FormatError):
        vindex.open(directory)
