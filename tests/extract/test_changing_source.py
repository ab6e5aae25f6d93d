"""A source that changes under a build is found, and another one is told by its hashes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import vindex
from extract.checkpoint import open_checkpoint
from extract.rederive import require_same_weights
from tests.checkpoints import write_checkpoint
from tests.conftest import build_quietly
from tests.extract.test_build import contents
from vindex.errors import CheckpointError, QueryError, TargetError


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
