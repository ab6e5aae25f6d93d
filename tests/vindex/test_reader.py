from __future__ import annotations

import os
import shutil

import numpy as np
import orjson
import pytest

import vindex
from vindex.errors import FormatError, QueryError
from vindex.format import FILES


def test_arrays_are_read_only_maps_of_the_documented_shapes(built):
    v = vindex.open(built)
    assert v.gate.shape == v.down.shape == (2, 8, 16) and v.gate.dtype == v.embeddings.dtype == np.float16
    assert v.embeddings.shape == (40, 16) and v.singular_values.shape == (2, 2, 8)
    assert v.norms["layers.0.input_layernorm"].shape == (16,) and v.norms["layers.1.k_norm"].shape == (8,)
    with pytest.raises(ValueError, match="read-only"):
        v.gate[0, 0, 0] = 1
    assert len(v.id) == 8 and v.id in repr(v)


def test_every_kind_of_query_gives_the_same_scores(built):
    v = vindex.open(built)
    by_text = v.cosines(" Paris")
    embedding = v.embeddings[0].astype(np.float32)
    expected = v.gate.astype(np.float32) @ embedding / np.linalg.norm(embedding)
    expected /= np.linalg.norm(v.gate.astype(np.float32), axis=-1)
    np.testing.assert_allclose(by_text, expected, atol=1e-6)
    for query in (0, np.int64(0), embedding, embedding.astype(np.float64)):
        np.testing.assert_allclose(v.cosines(query), by_text, atol=1e-6)
    batch = v.cosines([0, 3, 0])
    assert batch.shape == (3, 2, 8)
    np.testing.assert_allclose(batch[2], by_text, atol=1e-6)
    np.testing.assert_allclose(batch[1], v.cosines(" France"), atol=1e-6)
    np.testing.assert_allclose(v.cosines(np.stack([embedding, embedding])), batch[[0, 2]], atol=1e-6)


def test_top_features_are_the_largest_cosines_in_order(built):
    v = vindex.open(built)
    scores, hits = v.cosines(" Berlin"), v.top_features(" Berlin", k=5)
    assert [hit.cosine for hit in hits] == sorted(scores.ravel(), reverse=True)[:5]
    for hit in hits:
        assert scores[hit.layer, hit.feature] == hit.cosine
        assert v.singular_values[0, hit.layer, hit.feature] == hit.gate_sigma


def test_nearest_features_leave_out_the_feature_itself(built):
    v = vindex.open(built)
    nearest = v.nearest_features(1, 2, k=3)
    every = v.nearest_features(1, 2, k=16)
    assert len(every) == 15 and every[:3] == nearest
    assert (1, 2) not in [(hit.layer, hit.feature) for hit in every]
    own = v.gate[1, 2].astype(np.float32)
    for hit in nearest:
        assert hit.cosine == pytest.approx(float(v.gate[hit.layer, hit.feature].astype(np.float32) @ own), abs=1e-3)


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda v: v.cosines(" Pari"), "' Pari' is not a single token of this model; try a shorter word"),
        (lambda v: v.cosines("Berlin"), r"'Berlin' is not .*, but ' Berlin' is one \(id 1\): leading spaces matter"),
        (lambda v: v.cosines(40), "token id 40 is out of range: this model has ids 0 to 39"),
        (lambda v: v.cosines([0, -1]), "token id -1 is out of range"),
        (lambda v: v.cosines(np.ones(15, np.float32)), r"expected a vector of 16 numbers, got shape \(15,\)"),
        (lambda v: v.top_features([1, 2]), "one token or vector at a time"),
        (lambda v: v.feature(2, 0), "layer 2 is out of range: tiny.vindex has layers 0 to 1"),
        (lambda v: v.nearest_features(0, 8), "feature 8 is out of range"),
        (lambda v: v.layer(-1), "layer -1 is out of range"),
        (lambda v: v.layer(True), "layer True: expected an integer, got bool"),
        (lambda v: v.layer(np.bool_(True)), "layer True: expected an integer, got bool"),
        (lambda v: v.layer(0.0), "layer 0.0: expected an integer, got float"),
        (lambda v: v.layer("0"), "layer 0: expected an integer, got str"),
        (lambda v: v.feature(0, -1), "feature -1 is out of range"),
        (lambda v: v.feature(0, 1.5), "feature 1.5: expected an integer, got float"),
        (lambda v: v.feature(np.uint64(2**64 - 1), 0), "layer 18446744073709551615 is out of range"),
        (lambda v: v.feature(0, 0, expert=0), "layer 0 of tiny.vindex is dense"),
        (lambda v: v.router(0.5), "layer 0.5: expected an integer"),
        (lambda v: v.top_features(0, k=0), "k 0: expected a positive integer"),
        (lambda v: v.top_features(0, k=-3), "k -3: expected a positive integer"),
        (lambda v: v.nearest_features(0, 0, k=2.0), "k 2.0: expected an integer, got float"),
        (lambda v: v.token_id(True), "token id True: expected an integer, got bool"),
        (lambda v: v.token_id(1.0), "token id 1.0: expected an integer, got float"),
        (lambda v: v.cosines(True), "token id True: expected an integer, got bool"),
        (lambda v: v.cosines([0, 1.0]), "token id 1.0: expected an integer, got float"),
        (lambda v: v.cosines(np.array([True, False])), "token id True: expected an integer, got bool"),
        (lambda v: v.cosines(np.array([[0, 1]])), r"expected a token, .*, got array of int64, shape \(1, 2\)"),
        (lambda v: v.cosines(np.ones(16, complex)), "token id .*: expected an integer, got complex128"),
        (
            lambda v: v.cosines(None),
            "expected a token, a token id, a list of them, or float vectors of 16 numbers, got None",
        ),
        (lambda v: v.cosines(np.float32(1)), "got float32"),
        (lambda v: v.score([]), "expected a token or more, got none"),
        (
            lambda v: v.norms["layers.0.input_layernrm"],
            r"no norm is called .*; there are \d+, such as 'layers.0.input",
        ),
        (lambda v: v.certificate(0, "up"), "tiny.vindex has no certificate of up of layer 0"),
        (lambda v: v.cosines(np.array(1.0)), r"expected a vector of 16 numbers, got shape \(\)"),
        (lambda v: v.cosines(np.full(16, np.nan)), "a vector of length nan has no cosine here"),
        (lambda v: v.cosines(np.full(16, np.inf, np.float16)), "a vector of length inf has no cosine here"),
        (lambda v: v.cosines(np.zeros(16)), "a vector of length 0 has no cosine here"),
        (lambda v: v.cosines(np.full(16, 1e30)), r"a vector of length 4e\+30 has no cosine here: .*; scale it"),
        (lambda v: v.cosines(np.eye(17, 16)), "a vector of length 0 has no cosine here"),
    ],
)
def test_questions_without_an_answer(built, ask, message):
    with pytest.raises(QueryError, match=message):
        ask(vindex.open(built))


def test_pieces_are_shown_as_text(built):
    words = vindex.open(built).vocabulary
    assert [words.piece(i) for i in (0, 2, 4, 5, 35)] == [" Paris", "Paris", "ä", "\n", "<|end|>"]
    assert words.piece(39) == "<id 39>"  # padding row
    assert words.find("<|end|>") == 35 and len(words) == 36


def test_sentencepiece_vocabularies_spell_the_space_differently(tmp_path):
    from vindex.tokens import load_vocabulary

    tokenizer = {"model": {"vocab": [["▁Paris", -1.0], ["Paris", -2.0]]}, "decoder": {"type": "Metaspace"}}
    (tmp_path / "tokenizer.json").write_bytes(orjson.dumps(tokenizer))
    words = load_vocabulary(tmp_path / "tokenizer.json")
    assert (words.find(" Paris"), words.find("Paris"), words.piece(0)) == (0, 1, " Paris")
    assert words.hint("Paris") and words.hint(" Paris")


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}', '{"model": {"vocab": 3}}'])
def test_what_is_not_a_tokenizer(tmp_path, text):
    from vindex.tokens import load_vocabulary

    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(FormatError, match=r"tokenizer.json: not a tokenizer.json with a vocabulary"):
        load_vocabulary(tmp_path / "tokenizer.json")
    with pytest.raises(FormatError, match=r"other.json: cannot be read"):
        load_vocabulary(tmp_path / "other.json")


def test_not_a_directory_or_not_a_vindex(tmp_path):
    with pytest.raises(FormatError, match="is not a directory; give the path of a vindex"):
        vindex.open(tmp_path / "nothing")
    with pytest.raises(FormatError, match="is not a directory; give the path of a vindex"):
        vindex.open("x" * 5000)
    with pytest.raises(FormatError, match="a directory without a readable SHA256SUMS is not a vindex"):
        vindex.open(tmp_path)


@pytest.mark.parametrize("spec", [spec for spec in FILES if spec.name != "SHA256SUMS"], ids=lambda spec: spec.name)
def test_a_missing_file_is_named(built_whole, tmp_path, spec):
    copy = shutil.copytree(built_whole, tmp_path / "copy.vindex")
    (copy / spec.name).unlink()
    with pytest.raises(FormatError, match=f"{spec.name}: (missing|cannot be read)"):
        vindex.open(copy)


@pytest.mark.parametrize("spec", [spec for spec in FILES if spec.byte_size], ids=lambda spec: spec.name)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_the_wrong_size_is_named(built_whole, tmp_path, spec, change):
    copy = shutil.copytree(built_whole, tmp_path / "copy.vindex")
    data = (copy / spec.name).read_bytes()
    (copy / spec.name).write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(FormatError, match=f"{spec.name}: expected {len(data)} bytes, got {len(data) + change}"):
        vindex.open(copy)


def test_all_problems_are_reported_at_once(copy):
    for name in ("gate_vectors.bin", "norms.bin"):
        (copy / name).write_bytes(b"")
    (copy / "gate_meta.bin").unlink()
    with pytest.raises(FormatError) as caught:
        vindex.open(copy)
    assert all(name in str(caught.value) for name in ("gate_vectors.bin", "norms.bin", "gate_meta.bin"))
    assert "\n" not in str(caught.value)


def test_a_meta_file_with_another_header(copy):
    data = bytearray((copy / "gate_meta.bin").read_bytes())
    data[0] ^= 1
    (copy / "gate_meta.bin").write_bytes(data)
    with pytest.raises(FormatError, match="gate_meta.bin: expected header"):
        vindex.open(copy).feature(0, 0)


def test_numpy_integers_are_integers(built):
    v = vindex.open(built)
    for kind in (np.int8, np.uint16, np.int64, np.uint64):
        assert v.feature(kind(1), kind(2)) == v.feature(1, 2)
        assert type(v.feature(kind(1), kind(2)).layer) is int
        assert v.top_features(kind(0), k=kind(2)) == v.top_features(0, k=2)
    np.testing.assert_array_equal(v.cosines(np.array([0, 3], np.uint8)), v.cosines([0, 3]))
    np.testing.assert_array_equal(v.cosines((0, 3)), v.cosines([0, 3]))


def test_a_token_of_the_tokenizer_without_an_embedding(copy):
    tokenizer = orjson.loads((copy / "tokenizer.json").read_bytes())
    tokenizer["added_tokens"].append({"content": "<pad>", "id": 40})
    (copy / "tokenizer.json").write_bytes(orjson.dumps(tokenizer))
    with pytest.raises(QueryError, match="token id 40 is out of range: this model has ids 0 to 39"):
        vindex.open(copy).score("<pad>")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t["model"].update(vocab={"a": -1}), "'a' has id -1, not an integer from 0"),
        (lambda t: t["model"].update(vocab={"a": 10**9}), "'a' has id 1000000000, not an integer from 0"),
        (lambda t: t["model"].update(vocab={"a": True}), "'a' has id True, not an integer"),
        (lambda t: t["model"].update(vocab={"a": 1.0}), "'a' has id 1.0, not an integer"),
        (lambda t: t["model"].update(vocab={"a": 1, "b": 1}), "two pieces have the same id"),
        (lambda t: t["model"].update(vocab=[["a", 0.5], ["a", 0.5]]), "'a' has two ids, 0 and 1"),
        (lambda t: t["model"].update(vocab=[["a"]]), "not enough values to unpack"),
        (lambda t: t["model"].update(vocab=[[1, 2.0]]), "a piece is '1', not a string"),
        (lambda t: t.update(added_tokens={"a": 1}), "added_tokens is a dict, not a list"),
        (lambda t: t.update(added_tokens=["a"]), "string indices must be integers"),
        (lambda t: t.update(added_tokens=[{"content": "a", "id": "1"}]), "'a' has id 1, not an integer"),
        (lambda t: t.update(added_tokens=[{"content": "a", "id": 1}, {"content": "a", "id": 2}]), "'a' has two ids"),
        (lambda t: t.update(added_tokens=[{"content": "a"}]), "no 'id'"),
    ],
)
def test_a_vocabulary_that_is_not_sound(copy, edit, message):
    tokenizer = orjson.loads((copy / "tokenizer.json").read_bytes())
    edit(tokenizer)
    (copy / "tokenizer.json").write_bytes(orjson.dumps(tokenizer))
    with pytest.raises(FormatError, match=rf"tokenizer.json: not a tokenizer.json with a vocabulary of .*{message}"):
        _ = vindex.open(copy).vocabulary


def test_a_piece_with_two_ids_as_json_allows_it(copy):
    (copy / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "a": 1}}}')
    with pytest.raises(FormatError, match="the key 'a' stands twice"):
        _ = vindex.open(copy).vocabulary


@pytest.mark.parametrize("name", ["norms.bin", "gate_meta.bin", "tokenizer.json", "README.md", "manifest.json"])
def test_a_fifo_in_a_vindex_is_named_at_once(copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(FormatError, match=f"{name}: cannot be read: it is a FIFO, and a regular file was expected"):
        vindex.open(copy)


def test_text_files_are_of_a_bounded_size(copy):
    os.truncate(copy / "README.md", 1 << 27)
    with pytest.raises(FormatError, match="README.md: expected at most 67108864 bytes, got 134217728"):
        vindex.open(copy)
