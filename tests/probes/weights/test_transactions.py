"""Checkpoints and gates are written whole, or not at all, at whatever step the work is stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from probes.gates.files import write_logits
from probes.weights import patches
from probes.weights import tensors as shards
from probes.weights.bake import bake
from probes.weights.delta import Delta
from tests.kills import each_way, steps_of, tree
from vindex import kinds, places, targets
from vindex.errors import PatchError, TargetError

ON = torch.ones(3, 48, dtype=torch.bool)


@pytest.fixture
def source(tiny_checkpoint, tmp_path) -> Path:
    """The tiny checkpoint without what is copied as its config.json is."""
    lean = tmp_path / "lean"
    lean.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_checkpoint / name, lean)
    return lean


class Work(NamedTuple):
    """A replacement: what lays the old state down, what is stopped, and what the next run does."""

    before: Callable[[], object]
    stopped: Callable[[], object]
    again: Callable[[], object]


def bake_over(source: Path, place: Path) -> Work:
    return Work(
        lambda: bake(source, ON, place, note={"old": 1}, force=True),
        lambda: bake(source, ~ON, place, note={"new": 1}, force=True),
        lambda: bake(source, ~ON, place, note={"new": 1}, force=True),
    )


def bake_anew(source: Path, place: Path) -> Work:
    def clear():
        shutil.rmtree(place, ignore_errors=True)

    return Work(clear, lambda: bake(source, ~ON, place), lambda: bake(source, ~ON, place, force=True))


def saved_patch(source: Path, place: Path) -> patches.Patch:
    rows, width = shards.locate(source, 1).shape
    torch.manual_seed(0)
    return patches.save(place, Delta(1, torch.randn(rows), torch.randn(width), "forward"), source, {})


def apply_patch(source: Path, place: Path) -> Work:
    patch = saved_patch(source, place.parent.parent / "p.safetensors")

    def clear():
        shutil.rmtree(place, ignore_errors=True)

    def again():
        if not place.exists():
            patches.apply(source, patch, place)

    return Work(clear, lambda: patches.apply(source, patch, place), again)


def revert_patch(source: Path, place: Path) -> Work:
    patch = saved_patch(source, place.parent.parent / "p.safetensors")

    def apply():
        shutil.rmtree(place, ignore_errors=True)
        patches.apply(source, patch, place)

    def again():
        try:
            patches.revert(place)
        except PatchError as error:
            assert "no vindex_patches/ with a patch in it" in str(error)  # it was reverted before it was stopped

    return Work(apply, lambda: patches.revert(place), again)


def revert_beside(source: Path, place: Path) -> Work:
    patch = saved_patch(source, place.parent.parent / "p.safetensors")
    patched = place.parent.parent / "patched"
    patches.apply(source, patch, patched)

    def clear():
        shutil.rmtree(place, ignore_errors=True)

    def again():
        if not place.exists():
            patches.revert(patched, place)

    return Work(clear, lambda: patches.revert(patched, place), again)


def train_over(source: Path, place: Path) -> Work:
    def write(value: float) -> None:
        files = [kinds.GATE_FILES[0], kinds.TRAINING]
        with places.new_directory(
            place, files, making="directory of gates", force=True, kinds=kinds.TRAINED_GATES
        ) as partial:
            for name in files:
                targets.write_json(partial / name, {name: value})

    return Work(lambda: write(0.0), lambda: write(1.0), lambda: write(1.0))


@pytest.mark.parametrize("make", [bake_over, bake_anew, apply_patch, revert_patch, revert_beside, train_over])
@pytest.mark.usefixtures("unsynced")
def test_old_or_new_stands_whole_and_the_next_run_works(source, tmp_path, monkeypatch, make):
    place = tmp_path / "in" / "place"
    place.parent.mkdir()
    before, stopped, again = make(source, place)
    before()
    old = state(place)
    count = len(steps_of(stopped, monkeypatch))
    new = state(place)
    assert old != new
    before()
    for what in each_way(count, stopped, monkeypatch):
        places.recover(place)  # the first thing that the next run does
        if make is revert_patch:  # the weights change in one step, and the patch goes after them or with the next run
            assert state(place)["model.safetensors"] in (old["model.safetensors"], new["model.safetensors"]), what
        else:
            assert state(place) in (old, new), what
        again()
        assert state(place) == new, what
        assert [path.name for path in place.parent.iterdir()] == ["place"], what
        before()


def state(place: Path) -> dict[str, bytes]:
    """The files of a checkpoint; of a patch without its header, in which safetensors writes the keys in any order."""
    files = tree(place) or {}
    return {name: data[-1000:] if name.startswith("vindex_patches/") else data for name, data in files.items()}


def test_what_is_not_of_this_tool_stays_beside_a_checkpoint(tiny_checkpoint, tmp_path):
    patch = saved_patch(tiny_checkpoint, tmp_path / "p.safetensors")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("thesis")
    for work in (
        lambda: bake(tiny_checkpoint, ON, tmp_path / "out", force=True),
        lambda: patches.apply(tiny_checkpoint, patch, tmp_path / "out"),
    ):
        with pytest.raises(TargetError, match="out.partial holds thesis.txt, which is of no stopped run"):
            work()
    assert tree(tmp_path / "out.partial") == {"thesis.txt": b"thesis"}


def test_neither_the_checkpoint_nor_the_gates_are_baked_over(tiny_checkpoint, tmp_path):
    bake(tiny_checkpoint, ON, tmp_path / "baked")
    write_logits(torch.zeros(3, 48), tmp_path / "baked" / "vindex_patches")
    with pytest.raises(TargetError, match="baked is, or holds, .*vindex_patches, which is being read"):
        bake(tiny_checkpoint, ON, tmp_path / "baked", force=True, reads=[tmp_path / "baked" / "vindex_patches"])


def test_a_pipe_in_a_checkpoint_is_not_copied(tiny_checkpoint, tmp_path):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    os.mkfifo(source / "pipe")
    patch = saved_patch(source, tmp_path / "p.safetensors")
    patches.apply(source, patch, tmp_path / "out")
    assert not (tmp_path / "out" / "pipe").exists()
    os.mkfifo(tmp_path / "out" / "vindex_patches" / "0001.safetensors")
    patches.revert(tmp_path / "out", tmp_path / "reverted")
    assert (tmp_path / "reverted" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
