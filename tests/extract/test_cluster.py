"""A build on dask workers gives the bytes of a build in one process, whatever happens to the workers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from distributed import Client
from typer.testing import CliRunner

import extract
from extract import cluster
from extract.blocks import DIRECTIONS
from extract.checkpoint import open_checkpoint
from extract.cluster import DaskEngine, Errand, dask_engine, run_block
from extract.layouts import find_layout
from extract.planning import direction_blocks, plan_index
from extract.provenance import library_versions
from tests.checkpoints import write_checkpoint
from tests.commands import start
from tests.conftest import build_quietly
from tests.extract.test_build import contents, poison
from vindex.__main__ import app
from vindex.claims import Claim
from vindex.errors import CheckpointError, EngineError, NumericError, QueryError, TargetError
from vindex.format import GATE, SIGMA
from vindex.options import BuildOptions
from vindex.writer import open_writer

OPTIONS = BuildOptions(features=8)


@pytest.fixture(scope="module")
def client():
    """Two local workers that the tests of this module share."""
    with cluster.local_cluster(2) as client:
        yield client


def on(client: Client, checkpoint: Path) -> DaskEngine:
    return DaskEngine(client, str(checkpoint), None)


def worker_processes() -> list[psutil.Process]:
    """The workers that are alive, without the scheduler, which runs in this process."""
    alive = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "--multiprocessing-fork" in process.cmdline():
                alive.append(process)
    return alive


def test_any_number_of_workers_gives_the_same_bytes(client, tmp_path):
    source = write_checkpoint(tmp_path / "m", layers=4, hidden=48, neurons=96)
    build_quietly(source, tmp_path / "0.vindex")
    build_quietly(source, tmp_path / "2.vindex", engine=on(client, source))
    with dask_engine(str(source), None, scheduler=None, workers=1) as engine:
        build_quietly(source, tmp_path / "1.vindex", engine=engine)
    for workers in (1, 2):
        assert contents(tmp_path / f"{workers}.vindex") == contents(tmp_path / "0.vindex")


def test_the_records_do_not_depend_on_who_finished_first(client, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    build_quietly(checkpoint, tmp_path / "a" / "v")
    build_quietly(checkpoint, tmp_path / "b" / "v", engine=on(client, checkpoint))
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name / "v").iterdir()} for name in ("a", "b"))
    assert first == second


def test_finished_blocks_are_not_done_again_by_another_engine(client, checkpoint, built, tmp_path):
    target, finished = tmp_path / "out.vindex", []

    def stop_at_two(name, total):
        def advance(steps):
            finished.append(steps)
            if name == "directions" and sum(finished) >= 2:
                raise KeyboardInterrupt

        finished.clear()
        return advance

    with pytest.raises(KeyboardInterrupt):
        build_quietly(checkpoint, target, stages=stop_at_two, engine=on(client, checkpoint))
    left = []

    def recording(job, method, blocks, advance):
        left.append([block.name for block in blocks])
        on(client, checkpoint)(job, method, blocks, advance)

    build_quietly(checkpoint, target, resume=True, engine=recording)
    assert [len(blocks) for blocks in left] == [2, 2]  # of four weights, and of the tokens of either side
    assert contents(target) == contents(built)


@pytest.mark.parametrize("kills", [2])
def test_killed_workers_change_nothing(tmp_path, kills):
    kill_workers_during_builds(tmp_path, kills)


def kill_workers_during_builds(where: Path, kills: int) -> tuple[int, int]:
    """SIGKILL so many workers at random moments of builds; (workers killed, builds it took)."""
    source = write_checkpoint(where / "m", layers=40, hidden=64, neurons=160)
    build_quietly(source, where / "whole.vindex")
    dice, done, builds = random.Random(5), 0, 0
    spared = worker_processes()  # of the cluster that other tests share
    while done < kills:
        with dask_engine(str(source), None, scheduler=None, workers=2) as engine:
            stopped = threading.Event()
            victims: list[int] = []

            def murder(stopped=stopped, victims=victims, most=kills - done):
                while len(victims) < most and not stopped.wait(dice.uniform(0.05, 0.6)):
                    if alive := [one for one in worker_processes() if one not in spared]:  # both may be dead at once
                        victim = dice.choice(alive)
                        victim.send_signal(signal.SIGKILL)
                        victims.append(victim.pid)

            def started(name, total, murder=murder):
                if name == "directions":
                    threading.Thread(target=murder).start()
                return lambda steps: None

            build_quietly(source, where / "killed.vindex", stages=started, engine=engine)
            stopped.set()
        assert contents(where / "killed.vindex") == contents(where / "whole.vindex")
        shutil.rmtree(where / "killed.vindex")
        done, builds = done + len(victims), builds + 1
    return done, builds


def test_an_error_in_a_worker_is_the_error_in_process(client, tmp_path):
    edit = poison("model.layers.1.mlp.gate_proj.weight", torch.nan)
    source = write_checkpoint(tmp_path / "m", edit=edit)
    with pytest.raises(NumericError) as in_process:
        build_quietly(source, tmp_path / "a.vindex")
    with pytest.raises(NumericError) as remote:
        build_quietly(source, tmp_path / "b.vindex", engine=on(client, source))
    assert str(remote.value) == str(in_process.value)
    assert not (tmp_path / "b.vindex").exists()


def test_a_worker_that_cannot_open_the_checkpoint_says_so(client, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        build_quietly(checkpoint, tmp_path / "a.vindex", engine=DaskEngine(client, "/nowhere/at/all", None))


def test_a_running_cluster(client, checkpoint, built, tmp_path):
    address = client.scheduler.address
    with dask_engine(str(checkpoint), None, scheduler=address, workers=1) as engine:
        build_quietly(checkpoint, tmp_path / "out.vindex", engine=engine)
    assert contents(tmp_path / "out.vindex") == contents(built)
    assert len(client.nthreads()) == 2  # the workers were not ours to end


def test_what_is_wrong_with_a_scheduler_is_said(monkeypatch):
    def connect(address):
        with dask_engine("m", None, scheduler=address, workers=1):
            pass

    with pytest.raises(EngineError, match=r"--scheduler nonsense: expected an address such as tcp://host:8786"):
        connect("nonsense")
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(EngineError, match=r"no dask scheduler answers at tcp://127.0.0.1:9; start one with"):
        connect("tcp://127.0.0.1:9")
    monkeypatch.setattr(cluster, "WORKER_SECONDS", 0.2)
    with cluster.local_cluster(0) as empty:
        address = empty.scheduler.address
        with pytest.raises(EngineError, match=rf"{address} has no workers; start some with `dask worker {address}"):
            connect(address)


def test_a_block_that_takes_its_workers_down_is_named(monkeypatch):
    monkeypatch.setattr(cluster, "DEATHS", 1)
    with cluster.local_cluster(1) as lone:
        deadly = lone.submit(os._exit, 1)
        with pytest.raises(EngineError, match=r"block gate.0: 1 workers died of it, most likely for want"):
            cluster.result_of(deadly, "gate.0")


def first_block(checkpoint: Path):
    opened = open_checkpoint(str(checkpoint))
    layout = find_layout(opened)
    return direction_blocks(layout, plan_index(opened, layout, OPTIONS))[0]


def test_only_the_build_that_gave_the_claim_is_written_to(checkpoint, tmp_path):
    block, job = first_block(checkpoint), {"versions": library_versions()}
    with open_writer(tmp_path / "v", job, 10, resume=False, force=False) as writer:
        writer.allocate(GATE, 512)
        writer.allocate(SIGMA, 128)
        errand = Errand(str(checkpoint), None, OPTIONS, writer.claim)
        assert run_block(errand, DIRECTIONS, block).record["rank"] == 8
        assert any((tmp_path / "v.partial" / "gate_vectors.bin").read_bytes())
    with open_writer(tmp_path / "v", job | {"other": 1}, 10, resume=False, force=True) as writer:
        writer.allocate(GATE, 512)
        with pytest.raises(TargetError, match="belongs to another build by now"):
            run_block(errand, DIRECTIONS, block)
        assert not any((tmp_path / "v.partial" / "gate_vectors.bin").read_bytes())
    unseen = errand._replace(claim=Claim(str(tmp_path / "elsewhere"), b""))
    with pytest.raises(TargetError, match=r"elsewhere is not seen by the worker on .*No such file.*every worker sees"):
        run_block(unseen, DIRECTIONS, block)


def test_a_worker_with_other_libraries_is_refused(checkpoint, tmp_path):
    job = {"versions": library_versions() | {"torch": "1.0"}}
    with open_writer(tmp_path / "v", job, 10, resume=False, force=False) as writer:
        errand = Errand(str(checkpoint), None, OPTIONS, writer.claim)
        with pytest.raises(EngineError, match=r"a worker has torch \d.* and this process 1.0: .* install the same"):
            run_block(errand, DIRECTIONS, first_block(checkpoint))


def test_names_mean_the_same_to_every_worker(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    assert cluster.same_everywhere(checkpoint.name) == str(checkpoint)
    assert cluster.same_everywhere("hf://Qwen/Qwen3-8B@main") == "hf://Qwen/Qwen3-8B"  # the commit goes beside it
    assert cluster.same_everywhere("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


def test_usage_of_the_options(checkpoint, tmp_path, monkeypatch):
    def build(*options):
        return CliRunner().invoke(app, ["build", str(checkpoint), "-o", str(tmp_path / "v"), *options])

    assert "--workers needs --engine dask" in str(build("--workers", "2").exception)
    assert "--scheduler needs --engine dask" in str(build("--scheduler", "tcp://a:1").exception)
    both = build("--engine", "dask", "--workers", "2", "--scheduler", "tcp://a:1")
    assert "leave one of the two out" in str(both.exception)
    with pytest.raises(QueryError, match="--engine spark: expected in-process or dask"):
        extract.build(checkpoint, tmp_path / "v", engine="spark")
    monkeypatch.delitem(sys.modules, "extract.cluster")
    monkeypatch.setitem(sys.modules, "distributed", None)
    missing = build("--engine", "dask").exception
    assert isinstance(missing, EngineError)
    assert str(missing) == "--engine dask: distributed is not installed; pip install 'vindex-svd[dask]'"


SLOW_BUILD = """
import time
from vindex import writer
from vindex.__main__ import main

finish = writer.Writer.finish_block

def slowly(*arguments):
    finish(*arguments)
    time.sleep(0.2)  # the journal is written behind: without this the build may be over before it shows

writer.Writer.finish_block = slowly
main()
"""


def test_ctrl_c_is_one_line_and_can_be_resumed(tmp_path):
    """The terminal sends SIGINT to every process of the group: workers must not answer."""
    source, target = write_checkpoint(tmp_path / "m", layers=12), tmp_path / "v"
    command = [sys.executable, "-c", SLOW_BUILD, "build", str(source), "-o", str(target), "--features", "8"]
    running = start([*command, "--engine", "dask", "--workers", "1"], start_new_session=True)
    journal = tmp_path / "v.partial" / "journal.jsonl"
    while running.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)
    said = running.communicate(timeout=30)[1]
    assert running.returncode == 130
    assert "Traceback" not in said and "distributed" not in said
    assert said.strip().splitlines()[-1].startswith("stopped; what is finished is kept in")
    build_quietly(source, target, resume=True)
    build_quietly(source, tmp_path / "whole")
    assert contents(target) == contents(tmp_path / "whole")
