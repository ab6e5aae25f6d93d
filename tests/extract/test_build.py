"""A build is reproducible, survives being killed at any moment, and never shows anything half-made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import vindex
from extract.checkpoint import open_checkpoint
from extract.rederive import compare_embeddings, rederive, sample_blocks
from tests.checkpoints import write_checkpoint
from tests.conftest import build_quietly
from vindex.checks import verify
from vindex.differences import principal_angles
from vindex.errors import CheckpointError, NumericError, QueryError


def contents(directory: Path) -> dict[str, bytes]:
    """What two equal builds have in common: everything but the records of times and memory."""
    timed = {"manifest.json", "index.json", "README.md", "SHA256SUMS"}
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.name not in timed}


def test_binaries_hold_what_the_format_says(built, checkpoint):
    v, source = vindex.open(built), open_checkpoint(str(checkpoint))
    for layer in range(2):
        weight = source.tensor(f"model.layers.{layer}.mlp.gate_proj.weight").double().numpy()
        _, sigma, directions = np.linalg.svd(weight, full_matrices=False)
        assert principal_angles(v.gate[layer], directions[:8]).max() < 2e-3
        np.testing.assert_allclose(v.singular_values[0, layer], sigma[:8], rtol=1e-5)
        weight = source.tensor(f"model.layers.{layer}.mlp.down_proj.weight").double().numpy()
        directions, sigma, _ = np.linalg.svd(weight, full_matrices=False)
        assert principal_angles(v.down[layer], directions.T[:8]).max() < 2e-3
        np.testing.assert_allclose(v.singular_values[1, layer], sigma[:8], rtol=1e-5)
    embeddings = source.tensor("model.embed_tokens.weight")
    np.testing.assert_array_equal(v.embeddings, embeddings.to(torch.float16).numpy())
    norm = source.tensor("model.layers.1.self_attn.q_norm.weight")
    np.testing.assert_array_equal(v.norms["layers.1.q_norm"], norm.to(torch.float16).numpy())
    assert list(v.norms)[-1] == "norm"


@pytest.mark.parametrize("tied", [True, False])
def test_meta_files_hold_the_logit_lens_and_cosines(tmp_path, tied):
    source = write_checkpoint(tmp_path / "m", tied=tied)
    build_quietly(source, tmp_path / "out.vindex")
    v, opened = vindex.open(tmp_path / "out.vindex"), open_checkpoint(str(source))
    embeddings = opened.tensor("model.embed_tokens.weight").numpy()[:36]  # the last four rows are padding
    unembedding = embeddings if tied else opened.tensor("lm_head.weight").numpy()[:36]
    gamma = opened.tensor("model.norm.weight").numpy()
    for layer, number in ((0, 0), (1, 7)):
        found = v.feature(layer, number)
        lens = unembedding @ (gamma * v.down[layer, number].astype(np.float32))
        assert [t.token_id for t in found.writes] == np.argsort(-lens)[:10].tolist()
        assert [t.token_id for t in found.writes_against] == np.argsort(lens)[:10].tolist()
        np.testing.assert_allclose([t.score for t in found.writes], np.sort(lens)[::-1][:10], rtol=1e-4)
        direction = v.gate[layer, number].astype(np.float32)
        cosines = embeddings @ direction / np.linalg.norm(embeddings, axis=1) / np.linalg.norm(direction)
        assert [t.token_id for t in found.reads] == np.argsort(-cosines)[:10].tolist()
        np.testing.assert_allclose([t.score for t in found.reads_against], np.sort(cosines)[:10], rtol=1e-4)
    assert v.index.projection.down_meta == ("embed_tokens" if tied else "lm_head")


def test_two_builds_give_the_same_bytes(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for name in ("a", "b"):
        build_quietly(checkpoint, tmp_path / name / "tiny.vindex")
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / name / "tiny.vindex").iterdir()} for name in ("a", "b")
    )
    assert first == second
    assert b'"finished_at": "2023-11-14T22:13:20Z"' in first["manifest.json"]


def test_no_record_holds_a_path_or_a_host(checkpoint, built):
    for name in ("index.json", "manifest.json", "README.md"):
        text = (built / name).read_text()
        assert str(checkpoint.parent) not in text and os.uname().nodename not in text


def test_directories_of_the_same_weights_in_other_shards_agree(tmp_path):
    for shards in (1, 3):
        write_checkpoint(tmp_path / str(shards), shards=shards)
        build_quietly(tmp_path / str(shards), tmp_path / f"{shards}.vindex")
    assert contents(tmp_path / "1.vindex") == contents(tmp_path / "3.vindex")


def poison(name: str, value: float):
    def edit(tensors):
        tensors[name] = tensors[name].float()
        tensors[name].view(-1)[5] = value

    return edit


@pytest.mark.parametrize(
    "tensor, value, message",
    [
        ("model.layers.1.mlp.gate_proj.weight", torch.nan, r"gate_proj.weight .*\[0, 5\] is nan: not a finite"),
        ("model.layers.1.mlp.down_proj.weight", torch.inf, r"down_proj.weight .*\[5, 0\] is inf: not a finite"),
        ("model.embed_tokens.weight", torch.nan, r"embed_tokens.weight\[0, 5\] is nan"),
        ("model.embed_tokens.weight", 1e6, r"embed_tokens.weight\[0, 5\] is 1e\+06: too large for float16"),
        ("model.norm.weight", 1e5, r"model.norm.weight\[5\] is 100000: too large for float16"),
        ("lm_head.weight", torch.inf, r"lm_head.weight\[0, 5\] is inf: not a finite number"),
    ],
)
def test_bad_numbers_stop_the_build_and_are_named(tmp_path, tensor, value, message):
    source = write_checkpoint(tmp_path / "m", tied=False, edit=poison(tensor, value))
    with pytest.raises(NumericError, match=message):
        build_quietly(source, tmp_path / "out.vindex")
    assert not (tmp_path / "out.vindex").exists()


def test_embeddings_that_are_not_kept_are_still_checked(tmp_path):
    source = write_checkpoint(tmp_path / "m", edit=poison("model.embed_tokens.weight", torch.nan))
    with pytest.raises(NumericError, match=r"embed_tokens.weight\[0, 5\] is nan"):
        build_quietly(source, tmp_path / "out.vindex", embeddings=False)


def test_a_low_rank_weight_keeps_its_zero_rows(tmp_path):
    def edit(tensors):
        tensors["model.layers.0.mlp.gate_proj.weight"][3:] = 0
        tensors["model.layers.1.mlp.down_proj.weight"].zero_()

    build_quietly(write_checkpoint(tmp_path / "m", edit=edit), tmp_path / "out.vindex")
    v = vindex.open(tmp_path / "out.vindex")
    assert v.index.layers[0].effective_rank.gate == 3 and v.index.layers[1].effective_rank.down == 0
    assert not v.gate[0, 3:].any() and not v.singular_values[0, 0, 3:].any() and not v.down[1].any()
    assert all(check.holds for check in verify(v))


def test_too_many_features_and_no_tokenizer(tmp_path):
    source = write_checkpoint(tmp_path / "m")
    with pytest.raises(NumericError, match=r"gate_proj.weight is 24×16: it has at most 16 directions"):
        build_quietly(source, tmp_path / "out.vindex", features=17)
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        build_quietly(source, tmp_path / "out.vindex")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device, so asking for it is no error")
def test_cuda_without_a_device(checkpoint, tmp_path):
    with pytest.raises(QueryError, match="no CUDA device that torch can use"):
        build_quietly(checkpoint, tmp_path / "out.vindex", device="cuda")


def test_without_embeddings(checkpoint, tmp_path):
    build_quietly(checkpoint, tmp_path / "out.vindex", embeddings=False)
    v = vindex.open(tmp_path / "out.vindex")
    assert not (v.path / "embeddings.bin").exists()
    assert v.cosines(np.ones(16, np.float32)).shape == (2, 8)
    with pytest.raises(QueryError, match="was built with --no-embeddings: pass a vector of 16 numbers"):
        v.score(" Paris")


def rederived(v, checkpoint: Path | str, layers: list[int]) -> list:
    source = open_checkpoint(str(checkpoint))
    return list(rederive(v, source, sample_blocks(v, source, layers, experts=2)))


def test_rederived_directions_agree_with_their_source_only(built, checkpoint, tmp_path):
    v = vindex.open(built)
    assert all(found.holds for found in rederived(v, checkpoint, [0, 1]))
    other = write_checkpoint(tmp_path / "m", seed=1)
    assert not any(found.holds for found in rederived(v, other, [0]))
    smaller = write_checkpoint(tmp_path / "s", layers=1)
    with pytest.raises(QueryError, match="give the checkpoint it was built from"):
        rederived(v, smaller, [0])


def test_added_tokens_without_an_embedding_are_no_candidates_and_are_told(tmp_path):
    """A fine-tune that added a token and did not resize; other ids past the rows are of another model."""
    directory = write_checkpoint(tmp_path / "m")
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    plain = json.loads(path.read_text())
    tokenizer["added_tokens"].append({"id": 41, "content": "<|pad|>", "special": True})
    path.write_text(json.dumps(tokenizer))
    build_quietly(directory, tmp_path / "v.vindex")
    v = vindex.open(tmp_path / "v.vindex")
    assert v.manifest.notes == ("added tokens with ids from 40 to 41 have no embedding",)
    assert all(check.holds for check in verify(v))
    with pytest.raises(QueryError, match="token id 41 is out of range"):
        v.score("<|pad|>")
    plain["model"]["vocab"]["other"] = 40
    path.write_text(json.dumps(plain))
    with pytest.raises(
        CheckpointError, match="has ids up to 40 and the embeddings have 40 rows; .* none but added tokens"
    ):
        build_quietly(directory, tmp_path / "w.vindex")


def test_embeddings_are_compared_with_their_source(built, checkpoint, tmp_path):
    copy = shutil.copytree(built, tmp_path / "v")
    source = open_checkpoint(str(checkpoint))
    assert compare_embeddings(vindex.open(copy), source) == (40, None)
    values = np.fromfile(copy / "embeddings.bin", "<f2")
    values[16 * 37 + 3] += 1
    values.tofile(copy / "embeddings.bin")
    assert compare_embeddings(vindex.open(copy), source).first_other == 37
