"""A family that has no tokenizer takes its model's, and no other."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

import vindex
from tests.foreign import ATLAS_TOKENIZER, weights, write_published
from vindex.__main__ import app
from vindex.errors import QueryError, VindexError


def test_the_bundled_models_tokenizer_is_named_as_the_model_is(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert vindex.open(published, "atlas").token_id(" Paris") == 997


def test_words_are_found_with_the_models_tokenizer(published, tmp_path):
    by_file, by_directory = (vindex.open(published, place) for place in (ATLAS_TOKENIZER, ATLAS_TOKENIZER.parent))
    word = by_file.vocabulary.piece(500)
    np.testing.assert_array_equal(by_directory.cosines(word), vindex.open(published).cosines(500))
    words = ["score", str(published), word, "--tokenizer", str(ATLAS_TOKENIZER.parent), "-k", "2"]
    assert "id 500" in CliRunner().invoke(app, words).output


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


def test_a_tokenizer_comes_from_the_hub_by_itself(published, tmp_path, monkeypatch):
    """Nothing else of its model travels, and without a network there is one answer, soon."""
    asked = []

    def snapshot_download(repo, *, allow_patterns, **_):
        asked.append((repo, allow_patterns))
        return str(ATLAS_TOKENIZER.parent if repo == "someone/atlas" else tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert vindex.open(published, "someone/atlas").token_id(" Paris") == 997
    assert asked == [("someone/atlas", ["tokenizer.json"])]
    with pytest.raises(VindexError, match=r"someone/else has no tokenizer.json; name a model that has one"):
        vindex.open(published, "someone/else").token_id(" Paris")


def test_a_tokenizer_of_another_model_is_refused(browse, tmp_path):
    small = write_published(tmp_path / "p", weights(1, 2, 4), weights(1, 2, 4), weights(9, 4))
    with pytest.raises(
        QueryError, match=r"has token ids up to \d+, and p only 9 tokens: give the tokenizer of its own"
    ):
        vindex.open(small, ATLAS_TOKENIZER).token_id(" Paris")
    with pytest.raises(QueryError, match=r"browse has a tokenizer.json of its own; leave out --tokenizer"):
        vindex.open(browse, ATLAS_TOKENIZER).token_id(" Paris")
