"""Build a vindex from whatever a user names: open it, choose what computes the blocks, build, open the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from extract.checkpoint import open_checkpoint
from extract.engines import Engine, in_process
from extract.layouts import find_layout
from extract.pipeline import build as build_from
from vindex.demo import or_bundled
from vindex.errors import EngineError, QueryError
from vindex.options import DEFAULTS, BuildOptions
from vindex.progress import Progress, silent
from vindex.reader import Vindex, open_vindex
from vindex.writer import refuse_taken

ENGINES = ("in-process", "dask")


def build(
    checkpoint: str | Path,
    target: str | Path,
    *,
    features: int | None = DEFAULTS.features,
    device: str = DEFAULTS.device,
    threads: int | None = None,
    tolerance: float = DEFAULTS.tolerance,
    embeddings: bool = DEFAULTS.embeddings,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    engine: str = ENGINES[0],
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Progress = silent,
    note: Callable[[str], object] = lambda text: None,
) -> Vindex:
    """Build the vindex `target` from a checkpoint and open it.

    checkpoint: a directory, a GGUF file, a Hub id, hf://ID, or "atlas", the bundled model. features, device, threads,
    tolerance, embeddings: see BuildOptions; threads: None for all cores, or 1 of each worker. engine: "in-process" or
    "dask", with a running `scheduler` or so many local `workers`. note: is told, before the work, a sentence on each
    thing worth knowing of how the checkpoint is read. Interrupted, what is finished stays for resume=True.
    Raises CheckpointError, NumericError, TargetError, EngineError or QueryError.
    """
    name, output = or_bundled(str(checkpoint)), Path(target)
    _require_one_choice(name, revision, engine, scheduler, workers)
    cores = torch.get_num_threads()
    threads = threads or (cores if engine == ENGINES[0] else 1)
    options = BuildOptions(features, device, threads, tolerance, embeddings)
    refuse_taken(output, resume=resume, force=force)  # before a model is downloaded
    with _engine(name, revision, engine, scheduler, workers or max(1, cores // threads)) as running:
        opened = open_checkpoint(name, revision, Path(tokenizer) if tokenizer else None)
        layout = find_layout(opened)
        for text in (*opened.notes, *layout.notes):
            note(f"note: {text}")
        if layout.ignored:
            parts = ", ".join(f"{part} ({count} tensors)" for part, count in layout.ignored.items())
            note(f"text tower only; ignored: {parts}")
        with _threads_kept():
            build_from(opened, output, options, progress, resume=resume, force=force, engine=running)
    return open_vindex(output)


def _require_one_choice(
    name: str, revision: str | None, engine: str, scheduler: str | None, workers: int | None
) -> None:
    if revision and name.startswith("hf://") and "@" in name:
        raise QueryError(f"--revision {revision}: {name} names one as well; give one of the two")
    if engine not in ENGINES:
        raise QueryError(f"--engine {engine[:40]}: expected {' or '.join(ENGINES)}")
    if engine == ENGINES[0] and (scheduler or workers):
        raise QueryError(f"--{'scheduler' if scheduler else 'workers'} needs --engine dask")
    if scheduler and workers:
        raise QueryError("--workers: the running cluster of --scheduler has its own; leave one of the two out")


def _engine(
    name: str, revision: str | None, engine: str, scheduler: str | None, workers: int
) -> AbstractContextManager[Engine]:
    if engine == ENGINES[0]:
        return nullcontext(in_process)
    try:
        from extract.cluster import dask_engine
    except ModuleNotFoundError as error:
        raise EngineError(f"--engine dask: {error.name} is not installed; pip install 'vindex-svd[dask]'") from error
    return dask_engine(name, revision, scheduler=scheduler, workers=workers)


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Leave torch's number of threads, which belongs to the caller's process, as it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
