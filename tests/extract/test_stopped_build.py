"""A build that was stopped goes on to the same bytes, and never on what is not its own."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import vindex
from tests.checkpoints import write_checkpoint
from tests.conftest import build_quietly
from tests.extract.test_build import contents
from tests.kills import die_at, steps_of
from vindex.checks import verify
from vindex.errors import TargetError


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
