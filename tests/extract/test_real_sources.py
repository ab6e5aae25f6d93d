"""GGUF forms of a real model: `make test-real`."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import vindex
from tests.conftest import build_quietly
from tests.extract.test_build import contents
from tests.gguf_files import write_gguf, write_plain
from vindex.differences import compare
from vindex.tokens import load_vocabulary

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def original(real_model, tmp_path_factory):
    target = tmp_path_factory.mktemp("real") / "original.vindex"
    build_quietly(real_model, target, features=32)
    return vindex.open(target)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
def test_gguf_and_its_dequantised_weights_give_the_same_bytes(real_model, original, kind, tmp_path):
    (tmp_path / "gguf").mkdir()
    numbers = write_gguf(real_model, tmp_path / "gguf" / "m.gguf", lambda name: kind, architecture="llama")
    (tmp_path / "gguf" / "tokenizer.json").write_bytes((real_model / "tokenizer.json").read_bytes())
    build_quietly(tmp_path / "gguf" / "m.gguf", tmp_path / "g.vindex", features=32)
    build_quietly(write_plain(real_model, tmp_path / "plain", numbers), tmp_path / "p.vindex", features=32)
    assert contents(tmp_path / "g.vindex") == contents(tmp_path / "p.vindex")
    moved = [layer.gate.mean_cosine for layer in compare(original, vindex.open(tmp_path / "g.vindex"))]
    assert np.median(moved) > (0.98 if kind == Kind.Q4_0 else 0.9999)


def test_the_tokenizer_made_of_the_metadata_is_the_models_own(real_model, tmp_path):
    write_gguf(real_model, tmp_path / "m.gguf", lambda name: Kind.Q8_0, architecture="llama")
    build_quietly(tmp_path / "m.gguf", tmp_path / "g.vindex", features=2, embeddings=False)
    made, theirs = vindex.open(tmp_path / "g.vindex").vocabulary, load_vocabulary(real_model / "tokenizer.json")
    assert len(made) == len(theirs) and all(made.piece(at) == theirs.piece(at) for at in range(len(theirs)))
