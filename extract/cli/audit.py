"""`vindex audit`: every direction of a vindex beside the weights that it is said to be of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from extract.cli.build import SOURCE, kept
from vindex.cli import Json, Output, VindexPath
from vindex.console import check_places, command, print_table, progress, put, say, say_places, stopped, styled
from vindex.errors import FormatError, QueryError

if TYPE_CHECKING:
    from vindex.audits import Audit

CAPTION = (
    "residual: median ‖WᵀWv − σ²v‖/σ²; cos: median |cosine| with the best match; angle: largest principal angle, rad; "
    "held: share of ‖W‖² held, of what the leading directions hold"
)


def audit(
    path: VindexPath,
    source: Annotated[str, typer.Option(metavar="MODEL", help=SOURCE)],
    layers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only so many layers, evenly spread.", show_default="all")
    ] = None,
    repair: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Then build a certified vindex of the same shape here.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a repair that was stopped.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the vindex there, or start a stopped repair over.")
    ] = False,
    json: Json = False,
    output: Output = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the residuals by rank to this .html or .png.")
    ] = None,
) -> None:
    """Hold every direction against the weights.

    What is wrong with them in a word, how far they are off and what they miss; embeddings, tokens and norms as well.
    """
    import extract
    import vindex
    from vindex.audits import require_directions
    from vindex.writer import refuse_taken

    check_places(output, plot)
    if repair:
        refuse_taken(repair, resume=resume, force=force)
    elif resume or force:
        raise QueryError("--resume and --force are for a repair: give --repair DIR, or leave them out")
    with progress() as stage:
        v = vindex.open(path, progress=stage)
        if repair or plot:
            require_directions(v.name, not v.family.neurons)
        found = extract.audit(v, source, layers=layers, progress=stage)
    if plot:
        found.plot(plot)
    if not put(found.record(), json, output):
        _print(found, plot)
    if repair:
        with stopped(lambda: kept(repair)), progress() as stage:
            extract.repair(found, repair, resume=resume, force=force, progress=stage)
        if not json:
            say(f"next: {command('audit', repair, '--source', source)}")
    elif not found.holds:
        way_out = "give the source that it is of" + (
            ", or write one of the same shape with --repair DIR" if found.weights else ""
        )
        raise FormatError(f"{path}: {found.summary}; {way_out}")


def _print(found: Audit, plot: Path | None) -> None:
    title = f"{found.name} beside {found.model}"
    columns = [">layer", "side", ">residual", ">cos", ">angle", ">held", "verdict"]
    if found.weights:
        print_table(title, columns, [_cells(row) for row in found.rows()], CAPTION)
    said = {True: styled("ok", "green"), False: styled("FAILED", "red")}
    if found.contents:
        print_table(
            "" if found.weights else title,
            ["", "", ""],
            [(check.what, said[check.holds], check.detail) for check in found.contents],
        )
    say_places(plot=plot)
    say(styled(found.summary, "bold"))


def _cells(row: dict[str, Any]) -> list[str]:
    figures = ((row["residual"], ".1e"), (row["cosine"], ".4f"), (row["angle"], ".3f"))
    shown = ["–" if value is None else format(value, form) for value, form in figures]
    held = f"{row['held'] / row['best']:.1%}" if row["best"] else "–"
    verdict = row["verdict"] + (f": {row['detail']}" if row["detail"] else "")
    return [str(row["layer"]), row["side"], *shown, held, verdict]
