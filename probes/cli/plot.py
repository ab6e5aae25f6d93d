"""`vindex plot`: draw a saved record again, whatever made it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from vindex.cli import Json
from vindex.console import check_places, command, put, say

DRAWN_BY = {  # record, without its version: the module whose draw(record, path) makes its picture
    "vindex-probe": "probes.suite.plot",
    "vindex-gate3": "probes.deletion.plot",
    "vindex-gate3-all": "probes.deletion.plot",
    "vindex-gates-evaluation": "probes.gates.plot",
    "vindex-responses": "probes.responses.result",
    "vindex-gates-training": "probes.gates.curves",
    "vindex-comparison": "vindex.differences",
    "vindex-audit": "vindex.audits",
}


def plot(
    record: Annotated[
        Path,
        typer.Argument(
            metavar="RECORD",
            help="A record as probe, respond, gate3, gates eval, compare and audit write with -o, or a training.json.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The picture: .html or .png. Default: RECORD.html."),
    ] = None,
    json: Json = False,
) -> None:
    """Draw a saved record again."""
    from vindex.errors import ProbeError
    from vindex.schema import load_record

    target = output or record.with_suffix(".html")
    check_places(None, target)
    found = load_record(record)
    kind = str(found.get("record"))
    module = DRAWN_BY.get(kind.partition("/")[0])
    if module is None:
        other = f"known: {', '.join(DRAWN_BY)}"
        if kind.startswith("vindex-trace/"):
            other = f"{command('report', 'VINDEX', '--trace', record)} shows it"
        raise ProbeError(f"{record}: its record is {kind[:40]!r}, of which there is no picture; {other}")
    try:
        import_module(module).draw(found, target)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"[:80]
        raise ProbeError(f"{record}: is not a whole {kind} record ({what}); write it again with -o") from error
    if not put({"record": kind, "plot": str(target)}, json, None):
        say(f"wrote {target}" + (": open it in a browser" if target.suffix == ".html" else ""))
