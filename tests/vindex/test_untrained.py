"""Tokens that training never met."""

from itertools import islice

import numpy as np
import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer

from probes.atlas.corpus import documents
from probes.atlas.spans import text
from vindex.demo import CHECKPOINT
from vindex.tokens import load_vocabulary
from vindex.untrained import untrained


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    return load_file(CHECKPOINT / "model.safetensors")["model.embed_tokens.weight"].float().numpy()


def told(embeddings: np.ndarray, in_no_text: list[int]) -> np.ndarray:
    centre = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).mean(axis=0)
    return untrained(np.arange(len(embeddings)), embeddings, centre, in_no_text)


def test_they_are_those_of_the_atlas_that_its_documents_do_not_have(embeddings):
    """All but the token that parts two documents are either seen in training or told to be untrained, none is both."""
    vocabulary = load_vocabulary(CHECKPOINT / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    seen = np.zeros(len(embeddings), bool)
    for coded in tokenizer.encode_batch([text(document) for document in islice(documents(0), 3_000)]):
        seen[coded.ids] = True
    found = told(embeddings, vocabulary.in_no_text(len(embeddings)))
    assert not (found & seen).any()
    assert [vocabulary.piece(at) for at in np.flatnonzero(~found & ~seen)] == ["<|endoftext|>"]


def test_nothing_is_told_where_the_tokens_of_no_text_lie_apart_or_there_are_none(embeddings):
    assert not told(embeddings, []).any()
    assert not told(np.random.default_rng(0).standard_normal((500, 64)), list(range(400, 413))).any()


def test_tokens_of_no_text_are_the_bytes_that_utf8_never_uses_and_rows_without_a_piece(tmp_path):
    bytes_ = load_vocabulary(CHECKPOINT / "tokenizer.json").in_no_text(1_940)
    assert len(bytes_) == 13 + 2 and bytes_[-2:] == [1_938, 1_939]
    (tmp_path / "t.json").write_text('{"model": {"vocab": {"<0xC1>": 0, "<0x41>": 1, "a": 2}}}')
    assert load_vocabulary(tmp_path / "t.json").in_no_text(4) == [0, 3]
