"""The command that makes a vindex: build."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vindex.cli import Json
from vindex.console import bytes_of, command, print_table, progress, put, say, stopped, warn
from vindex.options import DEFAULTS, HELP

if TYPE_CHECKING:
    from vindex.reader import Vindex

SOURCE = "A checkpoint directory, a GGUF file, a Hub id, hf://ID to stream it, or `atlas`, the bundled model."


class EngineName(StrEnum):
    """What computes the blocks of a build."""

    IN_PROCESS = "in-process"
    DASK = "dask"


def build(
    checkpoint: Annotated[str, typer.Argument(metavar="MODEL", help=SOURCE)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory to write, e.g. qwen3-0.6b.vindex.")
    ],
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
    json: Json = False,
) -> None:
    """Build a vindex from a checkpoint, one tensor at a time."""
    import extract

    with stopped(lambda: kept(output)), progress() as stage:
        v = extract.build(
            checkpoint,
            output,
            features=features,
            device=device,
            threads=threads,
            tolerance=tolerance,
            embeddings=embeddings,
            revision=revision,
            tokenizer=tokenizer,
            resume=resume,
            force=force,
            engine=engine,
            scheduler=scheduler,
            workers=workers,
            progress=stage,
            note=warn,
        )
    if not put(v.info(), json, None):
        print_built(v, output)
        say(f'next: {command("verify", output, "--source", checkpoint)}, or {command("score", output)} " Paris"')


def kept(output: Path, again: str = "repeat") -> str:
    """What a build that was stopped leaves, and how one goes on."""
    from vindex.places import partial_of

    if partial_of(output).exists():
        return f"what is finished is kept in {partial_of(output)}: {again} with --resume to go on"
    return "nothing was written yet"


def print_built(v: Vindex, output: Path) -> None:
    """Size, time, certificate and what else is worth knowing."""
    from extract.provenance import peak_memory

    manifest = v.manifest
    facts = [
        ("size", bytes_of(v.size_bytes)),
        ("time", f"{manifest.wall_seconds:.1f} s" if manifest.wall_seconds is not None else "not recorded"),
        ("peak memory", bytes_of(peak_memory())),
        ("worst certificate", f"{manifest.worst}, limit {manifest.options.tolerance:.0e}"),
        *([("zero weights", manifest.zero_weights)] if manifest.zero_weights else []),
        *(("note", note) for note in manifest.notes or ()),
        *(("dequantised", f"{of.tensors} tensors stored as {of.dtype} ({of.method})") for of in manifest.dequantised),
        ("flushed to zero", f"{sum(cast.flushed_to_zero for cast in manifest.casts):,} values in the float16 cast"),
    ]
    print_table(f"built {output}", ["", ""], facts)
