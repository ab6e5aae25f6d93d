"""The command that says what a build will take before it is begun: plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vindex.cli import Json, Output
from vindex.console import bytes_of, check_places, duration, print_table, progress, put, say
from vindex.options import HELP

if TYPE_CHECKING:
    from extract.estimate import Plan

MODEL = "A checkpoint directory, its config.json alone, a GGUF file, a Hub id, or `atlas`, the bundled model."


def plan(
    checkpoint: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    features: Annotated[int | None, typer.Option(min=1, metavar="N", help=HELP["features"], show_default=False)] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time one block of each kind here; the time of all follows.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="CPU threads of a worker.")] = 1,
    json: Json = False,
    output: Output = None,
) -> None:
    """Say what a build will take: blocks, bytes, operations and, measured, the time by worker count."""
    import extract

    check_places(output)
    with progress() as stage:
        found = extract.plan(checkpoint, features=features, measure=measure, threads=threads, progress=stage)
    if put(found.record(), json, output):
        return
    _print_work(found)
    if found.hours:
        read = sum(kind.read for kind in found.work)
        rows = [(str(n), duration(3600 * time), f"{read / time / 3.6e9:,.0f} MB/s") for n, time in found.hours.items()]
        say(f"Wall time by workers, each {threads} thread{'s' * (threads > 1)} of a machine like this:")
        print_table("", [">workers", ">time", ">reading at"], rows)


def _print_work(found: Plan) -> None:
    columns = [">block", ">of", ">blocks", ">read", ">operations", ">written"]
    amounts = [(of.blocks, of.read, of.flop, of.written) for of in found.work]
    sides = [f"{of.shape[0]}×{of.shape[1]}" for of in found.work]
    rows = [[of.kind, side, *_shown(*each)] for of, side, each in zip(found.work, sides, amounts, strict=True)]
    rows.append(["all", "", *_shown(*map(sum, zip(*amounts, strict=True)))])
    if found.seconds:
        columns.append(">each")
        rows = [
            [*row, each] for row, each in zip(rows, [*(f"{each:.3g} s" for each in found.seconds), ""], strict=True)
        ]
    hint = None if found.seconds else "--measure times one block of each kind and gives the time by worker count"
    print_table(f"plan of {Path(found.checkpoint).name}", columns, rows, hint)


def _shown(blocks: float, read: float, flop: float, written: float) -> list[str]:
    return [f"{blocks:,}", bytes_of(read), f"{flop:.1e}", bytes_of(written)]
