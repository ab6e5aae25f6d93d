"""A real Qwen2.5, from safetensors and from GGUF: `make test-qwen`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import vindex
from extract.checkpoint import open_checkpoint
from probes.gates import reasoning
from probes.gates.forced import answered, batches
from probes.gates.panels import Prompt
from probes.live.load import load
from tests.commands import run
from tests.conftest import build_quietly
from vindex.checks import verify
from vindex.differences import compare

pytestmark = pytest.mark.qwen


@pytest.fixture(scope="module")
def built(qwen_model, tmp_path_factory):
    target = tmp_path_factory.mktemp("qwen") / "qwen.vindex"
    build_quietly(qwen_model, target, features=128)
    return vindex.open(target)


def test_everything_that_can_be_checked_holds(qwen_model, built):
    assert all(check.holds for check in verify(built))
    assert run("verify", built.path, "--source", qwen_model).returncode == 0
    assert built.manifest.notes is None
    assert (built.index.projection.down_meta, built.index.projection.tied) == ("lm_head", False)


def test_the_logit_lens_is_of_the_models_own_head(qwen_model, built):
    checkpoint = open_checkpoint(str(qwen_model))
    head, norm = checkpoint.tensor("lm_head.weight"), checkpoint.tensor("model.norm.weight")
    for layer, feature in ((0, 0), (11, 5), (23, 127)):
        direction = torch.tensor(built.down[layer][feature].astype("float32"))
        expected = (head @ (norm * direction)).topk(10).indices.tolist()
        assert [token.token_id for token in built.feature(layer, feature).writes] == expected


def test_its_gguf_has_the_same_geometry(qwen_model, built, tmp_path):
    (gguf,) = (qwen_model / "gguf").glob("*.gguf")
    build_quietly(gguf, tmp_path / "g.vindex", features=128)
    found = vindex.open(tmp_path / "g.vindex")
    assert all(check.holds for check in verify(found))
    cosines = [side.mean_cosine for layer in compare(built, found) for side in (layer.gate, layer.down)]
    assert min(cosines) > 0.99  # the safetensors are the same numbers, rounded to bfloat16
    assert np.abs(built.embeddings - found.embeddings.astype("float32")).max() < 1e-2


def test_the_live_model_knows_its_capitals_and_is_probed(qwen_model, tmp_path):
    loaded = load(qwen_model, device="cpu", dtype="float32")
    assert loaded.head and not loaded.notes
    ids = torch.tensor([loaded.tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        said = loaded.model(ids).logits[0, -1].softmax(-1)
    assert float(said[loaded.tokenizer(" Paris").input_ids[0]]) > 0.8
    done = run("probe", qwen_model, "--text", "factual", "-o", tmp_path / "p.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "p.json").read_text())
    assert all(constant["value"] is not None for constant in record["constants"].values())


def test_answers_that_end_where_a_line_does_count(qwen_model):
    """Its `]` and the line break after it are one token."""
    kinds = ("code lists", "code reverse", "tags", "capitals")
    items = [item for kind in kinds for item in reasoning.some(kind, 8)]
    asked = [Prompt(item.question, (item.answer,), item.shots) for item in items]
    loaded = load(qwen_model, device="cpu", dtype="float32")
    assert sum(answered(loaded, asked, batches(loaded, asked, 32))) >= 26
