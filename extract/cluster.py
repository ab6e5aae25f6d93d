"""Blocks on a dask.distributed cluster: one that is running, or one of local processes for this build alone.

1. The coordinator (the process of `vindex build`) holds the unfinished vindex and its journal, and submits the blocks.
2. A worker opens the checkpoint by its name, once, extracts a block and writes it at its offset into the unfinished
   vindex, which it must see under the same path; it returns the block's record when the bytes are durable.
3. The coordinator notes the record in the journal. A block whose worker is lost runs again elsewhere and writes the
   same bytes to the same place, so that it does not matter how far the lost one came.
4. A worker first reads the journal's fingerprint: one that a stopped build left behind cannot write into the next
   build, nor one whose libraries would give other bytes.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import dask
import orjson
import torch
from distributed import Client, LocalCluster, as_completed
from distributed.scheduler import KilledWorker

from extract.blocks import Method
from extract.checkpoint import Checkpoint, open_checkpoint
from extract.job import Job
from extract.provenance import library_versions
from vindex.claims import Claim, ClaimedFiles, Written
from vindex.errors import EngineError
from vindex.options import BuildOptions

CONNECT_SECONDS = 10
WORKER_SECONDS = 30  # how long a running cluster may take to have a worker
DEATHS = 10  # a block under which this many local workers died is to blame itself


class Errand(NamedTuple):
    """What the blocks of one build have in common."""

    checkpoint: str
    revision: str | None
    options: BuildOptions
    claim: Claim


class Done(NamedTuple):
    """What a worker returns of a block: its record, and what it wrote."""

    record: dict[str, Any]
    written: list[Written]


def run_block(errand: Errand, method: Method, block: Any) -> Done:
    """On a worker: compute one block and write it."""
    with closing(ClaimedFiles(errand.claim)) as files:
        _refuse_other_versions(errand.claim)
        torch.set_num_threads(errand.options.threads)
        material = method.read(_opened(errand.checkpoint, errand.revision), block, errand.options)
        record = method.compute(block, material, errand.options, files, lambda steps: None)
        return Done(record, files.written)


@functools.lru_cache(maxsize=1)
def _opened(name: str, revision: str | None) -> Checkpoint:
    return open_checkpoint(name, revision)


def _refuse_other_versions(claim: Claim) -> None:
    wanted, here = orjson.loads(claim.fingerprint)["fingerprint"]["versions"], library_versions()
    for package in wanted:
        if here.get(package) != wanted[package]:
            raise EngineError(
                f"a worker has {package} {here.get(package)} and this process {wanted[package]}: their bytes could "
                "differ; install the same versions on every machine"
            )


class DaskEngine:
    """An engine (extract/engines.py) over the workers of a connected client."""

    def __init__(self, client: Client, name: str, revision: str | None) -> None:
        self._client, self._name, self._revision = client, name, revision

    def __call__(self, job: Job, method: Method, blocks: Sequence[Any], advance: Callable[[int], object]) -> None:
        revision = job.checkpoint.revision or self._revision  # the commit, though the user may have named a branch
        errand = Errand(same_everywhere(self._name), revision, job.options, job.writer.claim)
        job.writer.flush()  # what earlier blocks wrote, workers may read
        futures = {self._client.submit(run_block, errand, method, block, pure=False): block for block in blocks}
        try:
            for future in as_completed(futures, loop=self._client.loop):
                block = futures[future]
                job.finish(block.name, *result_of(future, block.name))
                advance(method.steps(block))
        finally:
            self._client.cancel(list(futures), force=True)


def same_everywhere(name: str) -> str:
    """A checkpoint's name without what only means something here: the working directory, or a branch after `@`."""
    if name.startswith("hf://"):
        return name.partition("@")[0]
    local = Path(name).expanduser()
    return str(local.resolve()) if local.exists() else name


def result_of(future: Any, block: str) -> Done:
    """What the worker returned, or raise what went wrong there."""
    try:
        return future.result()
    except KilledWorker as error:
        raise EngineError(
            f"block {block}: {error.allowed_failures + 1} workers died of it, most likely for want of memory; give "
            "each more memory (fewer workers on a machine), then repeat with --resume"
        ) from error
    except asyncio.CancelledError as error:
        raise EngineError("the connection to the dask scheduler was lost; repeat with --resume") from error


@contextmanager
def dask_engine(name: str, revision: str | None, *, scheduler: str | None, workers: int) -> Iterator[DaskEngine]:
    """An engine on the cluster of `scheduler`, or on that many local processes.

    name, revision: the checkpoint as the user named it, which every worker must be able to open.
    Raises EngineError when the scheduler cannot be reached or has no workers.
    """
    for library in ("distributed", "tornado", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    with _connected(scheduler) if scheduler else local_cluster(workers) as client:
        yield DaskEngine(client, name, revision)


@contextmanager
def _connected(scheduler: str) -> Iterator[Client]:
    if not re.fullmatch(r"((tcp|tls|ws|wss|ucx)://)?[^/\s]+:\d+", scheduler):
        raise EngineError(f"--scheduler {scheduler}: expected an address such as tcp://host:8786")
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except OSError as error:
        raise EngineError(
            f"no dask scheduler answers at {scheduler}; start one with `dask scheduler`, or leave --scheduler out"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=WORKER_SECONDS)
        except TimeoutError as error:
            raise EngineError(
                f"the dask scheduler at {scheduler} has no workers; start some with "
                f"`dask worker {scheduler} --nthreads 1`"
            ) from error
        yield client


@contextmanager
def local_cluster(workers: int) -> Iterator[Client]:
    """Processes of one thread each, replaced when they die and gone when this is left."""
    settings = {"distributed.scheduler.allowed-failures": DEATHS - 1}
    with ExitStack() as stack, dask.config.set(settings):
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        with _interrupts_for_this_thread_only():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                memory_limit=0,
                scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
                silence_logs=logging.CRITICAL,
                local_directory=scratch,
            )
            stack.callback(_end, cluster)
        yield stack.enter_context(Client(cluster, set_as_default=False))


def _end(cluster: LocalCluster) -> None:
    """Do not wait for the blocks that are being computed: nothing of them is kept."""

    async def close_workers() -> None:
        closing = [nanny.close(timeout=1) for nanny in cluster.workers.values()]
        await asyncio.gather(*closing, return_exceptions=True)  # on a crowded machine the kill is not seen in time

    cluster.sync(close_workers)
    cluster.close()


@contextmanager
def _interrupts_for_this_thread_only() -> Iterator[None]:
    """Threads and processes started meanwhile never see Ctrl-C, which the terminal sends to all of them."""
    resource_tracker.ensure_running()  # or the first process would start it, which unblocks the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
