"""The command that says what a build will take before it is begun: plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vindex.console import print_json, print_table, say
from vindex.demo import or_bundled
from vindex.errors import CheckpointError
from vindex.files import Kind, read_json
from vindex.options import HELP

if TYPE_CHECKING:
    from extract.estimate import Work

CONFIG = Kind(CheckpointError, "give a checkpoint or its config.json")
WORKERS = (1, 2, 4, 8, 16, 32, 64)


def plan(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory, its config.json alone, or a Hub id.")],
    features: Annotated[int | None, typer.Option(min=1, help=HELP["features"], show_default=False)] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time one block of each kind here; hours follow from that.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a worker.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Say what a build will take: blocks, bytes, operations and, measured, hours by worker count."""
    from extract.estimate import hours, seconds_of, shapes_of, work_of

    work = work_of(shapes_of(_config(or_bundled(checkpoint)), checkpoint), features)
    seconds = [seconds_of(kind, threads) for kind in work] if measure else None
    by_workers = {workers: hours(work, seconds, workers) for workers in WORKERS} if seconds else {}
    if as_json:
        kinds: list[dict[str, Any]] = [kind._asdict() for kind in work]
        for kind, each in zip(kinds, seconds or [], strict=False):
            kind["seconds_per_block"] = each
        print_json({"threads": threads, "work": kinds, "hours": {str(n): time for n, time in by_workers.items()}})
        return
    _print_work(checkpoint, work, seconds)
    if by_workers:
        read = sum(kind.read for kind in work)
        rows = [(str(n), f"{time:.2f}", f"{read / time / 3.6e9:,.0f} MB/s") for n, time in by_workers.items()]
        say(f"Wall time by workers, each {threads} thread{'s' * (threads > 1)} of a machine like this:")
        print_table("", [">workers", ">hours", ">reading at"], rows)


def _print_work(checkpoint: str, work: list[Work], seconds: list[float] | None) -> None:
    columns = [">block", ">of", ">blocks", ">read", ">operations", ">written"]
    amounts = [(of.blocks, of.read, of.flop, of.written) for of in work]
    rows = [[of.kind, f"{of.shape[0]}×{of.shape[1]}", *_shown(*each)] for of, each in zip(work, amounts, strict=True)]
    rows.append(["all", "", *_shown(*map(sum, zip(*amounts, strict=True)))])
    if seconds:
        columns.append(">s each")
        rows = [[*row, each] for row, each in zip(rows, [*(f"{each:.3g}" for each in seconds), ""], strict=True)]
    hint = None if seconds else "--measure times one block of each kind and gives hours by worker count"
    print_table(f"plan of {Path(checkpoint).name}", columns, rows, hint)


def _shown(blocks: float, read: float, flop: float, written: float) -> list[str]:
    return [f"{blocks:,}", _bytes(read), f"{flop:.1e}", _bytes(written)]


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _config(name: str) -> dict[str, Any]:
    """config.json of a directory, of itself, or of a Hub repository."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    elif not os.path.lexists(path):
        path = _download(name)
    config = read_json(path, CONFIG)
    if not isinstance(config, dict):
        raise CONFIG.refusal(path, "does not hold a JSON object")
    return config


def _download(repo: str) -> Path:
    from huggingface_hub import hf_hub_download, logging
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    logging.set_verbosity_error()
    try:
        return Path(hf_hub_download(repo.removeprefix("hf://"), "config.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{repo}: no such directory or file here, and no config.json of that name can be had from the Hub"
        ) from error
