"""`vindex verify`: everything that can be checked in a vindex, and with its source, against the weights."""

from __future__ import annotations

from typing import Annotated

import typer

from vindex.cli import Json, Output, VindexPath
from vindex.console import check_places, print_table, progress, put, say, styled
from vindex.errors import FormatError


def verify(
    path: VindexPath,
    source: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Checkpoint it was built from: re-derive a sample from it.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers in that sample, evenly spread.")] = 3,
    experts: Annotated[int, typer.Option(min=1, help="Experts of each of them, where there are experts.")] = 4,
    json: Json = False,
    output: Output = None,
) -> None:
    """Check sizes, checksums, numbers and directions.

    With --source MODEL a sample of the directions is derived again from the weights.
    """
    import vindex

    check_places(output)
    with progress() as stage:
        v = vindex.open(path, progress=stage)
        if source is None:
            found = vindex.verify(v, progress=stage)
        else:
            import extract

            found = extract.verify(v, source, layers=layers, experts=experts, progress=stage)
    if not put(found.record(), json, output):
        said = {True: styled("ok", "green"), False: styled("FAILED", "red")}
        rows = [(check.what, said[check.holds], check.detail) for check in found]
        print_table(f"{path} ({v.id})", ["check", "", "detail"], rows)
    if not found.holds:
        raise FormatError(f"{path} {found.verdict}")
    if not json:
        weights = "" if source is None else f", and it is of the weights of {source}"
        say(styled(f"{path} {found.verdict}{weights}", "bold"))
