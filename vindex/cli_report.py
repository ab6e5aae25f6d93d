"""`vindex report`: a vindex as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vindex.cli import Json, VindexPath, opened
from vindex.cli_scores import Tokenizer
from vindex.console import bytes_of, print_json, progress, say


def report(
    path: VindexPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page, .html.")] = Path(
        "report.html"
    ),
    probe: Annotated[
        Path | None, typer.Option(metavar="RECORD", help="Record of `vindex probe -o`: the constants.")
    ] = None,
    gate3: Annotated[
        Path | None, typer.Option(metavar="RECORD", help="Record of `vindex gate3 -o`: a fact deleted.")
    ] = None,
    gates: Annotated[
        Path | None, typer.Option(metavar="RECORD", help="Record of `vindex gates eval -o`: lambda gates.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="RECORD", help="Record of `vindex trace -o FILE.json`: a prompt.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="VINDEX", help="Another vindex: what differs from it, and what moved most.")
    ] = None,
    tokenizer: Tokenizer = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no report.")] = False,
    json: Json = False,
) -> None:
    """A vindex as one page for a browser: search, directions, spectra.

    With what was measured, where records are given. The page needs no network and no server. An older report is
    replaced.
    """
    import vindex
    from vindex.format import MANIFEST
    from vindex.report.page import check_target

    check_target(output, force=force)
    records = {"probe": probe, "gate3": gate3, "gates": gates, "trace": trace}
    other = vindex.open(against) if against else None
    if other and tokenizer and not other.family.can_spell:
        other = vindex.open(other.path, tokenizer)
    with opened(path, tokenizer) as v, progress(not json) as stage:
        if tokenizer:
            _ = v.vocabulary  # refused now, whether the page has tokens or not
        vindex.write_report(v, output, **records, against=other, force=force, progress=stage)
    size = output.stat().st_size
    if json:
        print_json({"id": v.id, "report": str(output), "bytes": size})
        return
    say(f"wrote {output}, {bytes_of(size)}")
    absent = [f"--{name}" for name, given in records.items() if given is None and v.has(MANIFEST)]
    say(f"next: open {output} in a browser" + (f"; {', '.join(absent)} would fill more of it" if absent else ""))
