"""A build is reproducible, survives being killed at any moment, and never shows anything half-made."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import vindex
from extract.checkpoint import open_checkpoint
from extract.rederive import compare_embeddings, rederive, require_same_weights, sample_blocks
from tests.checkpoints import write_checkpoint
from tests.conftest import build_quietly
from tests.kills import die_at, steps_of
from vindex.checks import verify
from vindex.differences import principal_angles
from vindex.errors import CheckpointError, NumericError, QueryError, TargetError


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


def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(tmp_path):
    """Twenty SIGKILLs spread over builds; at each, only what stands beside the target may be seen."""
    source = write_checkpoint(tmp_path / "m", layers=12)
    build_quietly(source, tmp_path / "whole.vindex")
    expected, target = contents(tmp_path / "whole.vindex"), tmp_path / "killed.vindex"
    dice, kills, finished_after_a_kill = random.Random(7), 0, 0
    while kills < 20 or not finished_after_a_kill:
        kills_before = kills
        while not target.exists():
            child = start_build(source, target)
            time.sleep(dice.uniform(0.0, 0.12))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status) and not target.exists():
                kills += 1
                beside = {"killed.vindex.partial", "killed.vindex.replacing"}
                assert {p.name for p in tmp_path.iterdir()} <= {"m", "whole.vindex", *beside}
                if kills - kills_before >= 15:  # make sure of an end
                    build_quietly(source, target, resume=True)
        assert contents(target) == expected
        vindex.open(target)
        finished_after_a_kill += kills > kills_before
        shutil.rmtree(target)


def start_build(source: Path, target: Path) -> int:
    """Build in a forked child and return its process id."""
    child = os.fork()
    if child == 0:
        try:
            build_quietly(source, target, resume=True)
        finally:
            os._exit(0)
    return child


def stop_after(monkeypatch, blocks: int, error: BaseException):
    """Make a build fail after some finished blocks."""
    from vindex.writer import Writer

    original, done = Writer.finish_block, []

    def finish_block(self, block, record):
        if len(done) == blocks:
            raise error
        done.append(block)
        original(self, block, record)

    monkeypatch.setattr(Writer, "finish_block", finish_block)
    return done


def test_finished_blocks_are_not_done_again(checkpoint, built, tmp_path, monkeypatch):
    target = tmp_path / "out.vindex"
    with monkeypatch.context() as patch:
        stop_after(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            build_quietly(checkpoint, target)
    assert not target.exists()
    again = stop_after(monkeypatch, 100, AssertionError())
    build_quietly(checkpoint, target, resume=True)
    assert len(again) == 7 - 3  # four weights, the norms, the tokens of either side
    assert contents(target) == contents(built)


def test_what_stands_in_the_way_is_named(checkpoint, tmp_path, monkeypatch):
    target = tmp_path / "out.vindex"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            build_quietly(checkpoint, target)
    with pytest.raises(TargetError, match=r"continue it with --resume \(resume=True\), or start over"):
        build_quietly(checkpoint, target)
    with pytest.raises(TargetError, match=r"begun with other inputs \(options.features: 8 then, 4 now\)"):
        build_quietly(checkpoint, target, features=4, resume=True)
    build_quietly(checkpoint, target, features=4, force=True)
    assert vindex.open(target).index.num_feats == 4
    with pytest.raises(
        TargetError, match=r"out.vindex already exists; choose another place, or replace it with --force"
    ):
        build_quietly(checkpoint, target)
    build_quietly(checkpoint, target, force=True)
    assert vindex.open(target).index.num_feats == 8
    assert [p.name for p in tmp_path.iterdir()] == ["out.vindex"]


def test_other_source_bytes_do_not_resume(tmp_path, monkeypatch):
    target = tmp_path / "out.vindex"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            build_quietly(write_checkpoint(tmp_path / "m"), target)
    write_checkpoint(tmp_path / "m", seed=1)
    with pytest.raises(TargetError, match="begun with other inputs"):
        build_quietly(tmp_path / "m", target, resume=True)


def test_an_existing_vindex_stays_when_its_replacement_fails(checkpoint, built, tmp_path, monkeypatch):
    target = tmp_path / "out.vindex"
    shutil.copytree(built, target)
    stop_after(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        build_quietly(checkpoint, target, force=True)
    assert contents(target) == contents(built)


def test_a_vindex_is_replaced_whole_at_whatever_step_its_build_is_stopped(checkpoint, built, tmp_path, monkeypatch):
    target, places = shutil.copytree(built, tmp_path / "v"), [tmp_path / "v"]

    def work():
        build_quietly(checkpoint, target, features=4, force=True)

    names, new = steps_of(work, monkeypatch), contents(target)
    last = names.index("make v.replacing")
    for number in [*range(0, last, 40), *range(last, len(names), 2)]:  # tests/vindex/test_targets.py has every step
        shutil.rmtree(target)
        shutil.copytree(built, target)
        assert die_at(number, work)
        assert contents(target) in (contents(built), new), names[number]
        assert all(check.holds for check in verify(vindex.open(target)))
        work()
        assert contents(target) == new and list(tmp_path.iterdir()) == places, names[number]


def stopped(monkeypatch, checkpoint: Path, target: Path, blocks: int = 5) -> Path:
    """A build that was stopped after some blocks: where it stands."""
    with monkeypatch.context() as patch:
        stop_after(patch, blocks, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            build_quietly(checkpoint, target)
    return Path(f"{target}.partial")


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_a_resumed_build_makes_lost_and_changed_bytes_again(checkpoint, built, tmp_path, monkeypatch, damage):
    for file in sorted(stopped(monkeypatch, checkpoint, tmp_path / "v").glob("*.bin")):
        whole = file.read_bytes()
        if damage == "flip":
            file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:])
        elif damage == "cut":
            file.write_bytes(whole[: len(whole) // 2])
        else:
            file.unlink()
    build_quietly(checkpoint, tmp_path / "v", resume=True)
    assert contents(tmp_path / "v") == contents(built)


def test_bytes_between_the_blocks_are_made_again_too(mixture, built_mixture, tmp_path, monkeypatch):
    """Zeros that stand for the routers' biases: nobody computes them, and a reader takes them for numbers."""
    with monkeypatch.context() as patch:
        stop_after(patch, 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            build_quietly(mixture, tmp_path / "v", features=4)
    routers = tmp_path / "v.partial" / "router_weights.bin"
    routers.write_bytes(b"\1" * routers.stat().st_size)
    build_quietly(mixture, tmp_path / "v", features=4, resume=True)
    assert contents(tmp_path / "v") == contents(built_mixture)


@pytest.mark.parametrize(
    "block, record, message",
    [
        ("gate.7", {"casts": []}, "gate.7: no such block"),
        ("norms", {"casts": [{"block": "norms", "values": "many"}]}, "norms.casts.0..values: expected an integer"),
        ("gate.0", {"casts": [], "rank": 8}, "gate.0.certificate: missing, expected an object"),
        ("gate.0", 7, "gate.0: expected an object, got 7"),
    ],
)
def test_blocks_and_records_that_are_not_the_plans_are_refused(
    checkpoint, tmp_path, monkeypatch, block, record, message
):
    from vindex.writer import Writer

    original = Writer.finish_block

    def finish_block(self, *arguments):
        original(self, block, record)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish_block", finish_block)
        with pytest.raises(KeyboardInterrupt):
            build_quietly(checkpoint, tmp_path / "v")
    with pytest.raises(TargetError, match=f"is not of this build .*{message}.*; start over with --force"):
        build_quietly(checkpoint, tmp_path / "v", resume=True)
    build_quietly(checkpoint, tmp_path / "v", force=True)


def change_while_building(monkeypatch, writes: int, change) -> None:
    """Call `change` when so many pieces are about to be written."""
    from vindex.writer import Writer

    original, done = Writer.write, []

    def write(self, *arguments):
        done.append(1)
        if len(done) == writes:
            change()
        original(self, *arguments)

    monkeypatch.setattr(Writer, "write", write)


def flip(file: Path) -> None:
    """Change the last byte of a file in place, and put its time back."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("writes", [1, 5, 9])
def test_a_source_that_changes_while_it_is_read_is_found(tmp_path, monkeypatch, writes):
    source = write_checkpoint(tmp_path / "m")
    with monkeypatch.context() as patch:
        change_while_building(patch, writes, lambda: flip(source / "model.safetensors"))
        with pytest.raises(
            CheckpointError, match=r"model.safetensors changed after it was hashed and read; build again"
        ):
            build_quietly(source, tmp_path / "v")
    flip(source / "model.safetensors")  # as it was: what was noted before the change is of these bytes
    build_quietly(source, tmp_path / "v", resume=True)
    build_quietly(source, tmp_path / "whole")
    assert contents(tmp_path / "v") == contents(tmp_path / "whole")


def test_a_source_that_is_only_touched_or_linked_is_no_other(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "m")
    weights = source / "model.safetensors"

    def touch():
        weights.touch()
        os.link(weights, tmp_path / "link")

    change_while_building(monkeypatch, 3, touch)
    build_quietly(source, tmp_path / "v")
    vindex.open(tmp_path / "v")


def test_a_source_that_goes_away_is_one_line(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "m")
    change_while_building(monkeypatch, 9, (source / "model.safetensors").unlink)
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        build_quietly(source, tmp_path / "v")


def test_a_source_that_changes_while_it_is_hashed_is_found(tmp_path):
    source = write_checkpoint(tmp_path / "m")

    def stages(what, total):
        if what == "hash source":
            (source / "config.json").write_text((source / "config.json").read_text() + " ")
        return lambda steps: None

    with pytest.raises(CheckpointError, match="m: config.json changed while it was being hashed; call this again"):
        build_quietly(source, tmp_path / "v", stages=stages)


def test_a_vindex_does_not_replace_what_it_is_built_from(tmp_path, built):
    target = shutil.copytree(built, tmp_path / "v")
    source = write_checkpoint(tmp_path / "m")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(target / "tokenizer.json")
    weights = target / "norms.bin"  # a name that a vindex may hold
    (source / "model.safetensors").rename(weights)
    (source / "model.safetensors").symlink_to(weights)
    with pytest.raises(TargetError, match="v is, or holds, .*model.safetensors, which is being read"):
        build_quietly(source, target, force=True)
    with pytest.raises(TargetError, match="m is, or holds, .*m, which is being read"):
        build_quietly(source, source, force=True)
    assert weights.exists()


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


def test_another_source_is_named_by_its_file(built, checkpoint, tmp_path):
    v = vindex.open(built)
    require_same_weights(v, open_checkpoint(str(checkpoint)))
    other = open_checkpoint(str(write_checkpoint(tmp_path / "m", shards=2, seed=1)))
    first = other.weight_files[0]
    said = f"m is not the checkpoint that tiny.vindex was built from: {first} has SHA-256 .*, and the vindex was built"
    with pytest.raises(QueryError, match=said):
        require_same_weights(v, other)
    whole = open_checkpoint(str(write_checkpoint(tmp_path / "w")))
    said = "there is model.safetensors, and the vindex was built from model-0000.-of-0000"
    with pytest.raises(QueryError, match=said):
        require_same_weights(v, whole)
    longer = open_checkpoint(str(write_checkpoint(tmp_path / "l", shards=2, layers=3)))
    with pytest.raises(QueryError, match=r"l is not .*: .* has [\d,]+ bytes, and .* from one of [\d,]+ bytes"):
        require_same_weights(v, longer)


def test_embeddings_are_compared_with_their_source(built, checkpoint, tmp_path):
    copy = shutil.copytree(built, tmp_path / "v")
    source = open_checkpoint(str(checkpoint))
    assert compare_embeddings(vindex.open(copy), source) == (40, None)
    values = np.fromfile(copy / "embeddings.bin", "<f2")
    values[16 * 37 + 3] += 1
    values.tofile(copy / "embeddings.bin")
    assert compare_embeddings(vindex.open(copy), source).first_other == 37
