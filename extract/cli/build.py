"""Commands that make a vindex: build, and demo on the bundled checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vindex.console import print_table, progress, say, warn
from vindex.demo import or_bundled
from vindex.errors import EngineError
from vindex.options import DEFAULTS, HELP, BuildOptions

if TYPE_CHECKING:
    from extract.engines import Engine

SOURCE = "A checkpoint directory, a GGUF file, a Hub id, hf://ID to stream it, or `atlas`, the bundled model."


class EngineName(StrEnum):
    """What computes the blocks of a build."""

    IN_PROCESS = "in-process"
    DASK = "dask"


def build(
    checkpoint: Annotated[str, typer.Argument(help=SOURCE)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write, e.g. qwen3-0.6b.vindex.")],
    features: Annotated[int | None, typer.Option(min=1, help=HELP["features"], show_default=False)] = DEFAULTS.features,
    device: Annotated[str, typer.Option(help=HELP["device"])] = DEFAULTS.device,
    threads: Annotated[int | None, typer.Option(min=1, help=HELP["threads"], show_default="all cores")] = None,
    tolerance: Annotated[float, typer.Option(help=HELP["tolerance"])] = DEFAULTS.tolerance,
    embeddings: Annotated[bool, typer.Option(help=HELP["embeddings"])] = DEFAULTS.embeddings,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub checkpoint.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json to use, for a GGUF without one.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a build that was stopped.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing target, or start a stopped build over.")
    ] = False,
    engine: Annotated[
        EngineName, typer.Option(help="Where blocks are computed: in this process, or by dask workers.")
    ] = EngineName.IN_PROCESS,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a running dask scheduler, e.g. tcp://host:8786.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Local dask workers.", show_default="cores / threads")
    ] = None,
) -> None:
    """Build a vindex from a checkpoint, one tensor at a time."""
    import torch

    checkpoint = or_bundled(checkpoint)
    if revision and checkpoint.startswith("hf://") and "@" in checkpoint:
        raise typer.BadParameter(f"{checkpoint} names one as well; give one of the two", param_hint="--revision")
    in_process = engine is EngineName.IN_PROCESS
    if in_process and (scheduler or workers):
        raise typer.BadParameter("needs --engine dask", param_hint="--scheduler" if scheduler else "--workers")
    if scheduler and workers:
        raise typer.BadParameter("a running cluster has its own; leave one of the two out", param_hint="--workers")
    cores = torch.get_num_threads()
    threads = threads or (cores if in_process else 1)
    options = BuildOptions(features, device, threads, tolerance, embeddings)
    running = (
        nullcontext()
        if in_process
        else _dask_engine(checkpoint, revision, scheduler, workers or max(1, cores // threads))
    )
    with running as blocks_engine:
        run_build(
            checkpoint,
            output,
            options,
            revision=revision,
            tokenizer=tokenizer,
            resume=resume,
            force=force,
            engine=blocks_engine,
        )


def _dask_engine(checkpoint: str, revision: str | None, scheduler: str | None, workers: int):
    try:
        from extract.cluster import dask_engine
    except ModuleNotFoundError as error:
        raise EngineError(f"--engine dask: {error.name} is not installed; pip install 'vindex[dask]'") from error
    return dask_engine(checkpoint, revision, scheduler=scheduler, workers=workers)


def run_build(
    name: str,
    target: Path,
    options: BuildOptions,
    *,
    revision: str | None = None,
    tokenizer: Path | None = None,
    resume: bool,
    force: bool,
    engine: Engine | None = None,
) -> None:
    """Build with a progress bar for each stage, then say what was made; Ctrl-C keeps what is finished."""
    from extract.build import build as build_vindex
    from extract.checkpoint import open_checkpoint
    from extract.engines import in_process
    from extract.layouts import find_layout
    from extract.provenance import peak_memory
    from vindex.writer import refuse_taken

    refuse_taken(target, resume=resume, force=force)  # before a model is downloaded
    opened = open_checkpoint(name, revision, tokenizer)
    layout = find_layout(opened)
    ignored = layout.ignored
    said = (*opened.notes, *layout.notes)
    for note in said:
        warn(f"note: {note}")
    if ignored:
        say(f"text tower only; ignored: {', '.join(f'{part} ({count} tensors)' for part, count in ignored.items())}")
    try:
        with progress() as stages:
            manifest = build_vindex(
                opened,
                target,
                options,
                stages,
                resume=resume,
                force=force,
                engine=engine or in_process,
            )
    except KeyboardInterrupt:
        kept = f"what is finished is kept in {target}.partial: repeat with --resume to go on"
        warn(f"stopped; {kept if Path(f'{target}.partial').exists() else 'nothing was written yet'}")
        raise typer.Exit(130) from None
    size = sum(file.stat().st_size for file in target.iterdir())
    worst, limit = manifest.worst_certificate, f"{options.tolerance:.0e}"
    facts = [
        ("size", f"{size / 1e6:.1f} MB"),
        ("time", f"{manifest.wall_seconds:.1f} s" if manifest.wall_seconds is not None else "not recorded"),
        ("peak memory", f"{peak_memory() / 1e6:.0f} MB"),
        ("worst certificate", f"{worst.max_residual:.1e} ({worst.tensor}; limit {limit})" if worst else "none"),
        *([("zero weights", manifest.zero_weights)] if manifest.zero_weights else []),
        *(("note", note) for note in manifest.notes or () if note not in said),
        *(("dequantised", f"{of.tensors} tensors stored as {of.dtype} ({of.method})") for of in manifest.dequantised),
        ("flushed to zero", f"{sum(cast.flushed_to_zero for cast in manifest.casts):,} values in the float16 cast"),
    ]
    print_table(f"built {target}", ["", ""], facts)
