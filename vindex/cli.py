"""Commands that look at a vindex: info, compare, card. None of them loads torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vindex.console import (
    bytes_of,
    check_places,
    command,
    print_json,
    print_table,
    progress,
    put,
    say,
    say_places,
    styled,
)

if TYPE_CHECKING:
    from vindex.differences import SideDifference
    from vindex.reader import Vindex

VindexPath = Annotated[str, typer.Argument(metavar="VINDEX", help="A vindex: a directory, or hf://OWNER/NAME[@REV].")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON instead of tables.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the record as JSON here.")]


@contextmanager
def opened(path: str, tokenizer: str | None = None) -> Iterator[Vindex]:
    """A vindex; of one on the Hub, what travels while it is asked is told."""
    from vindex.hub import on_the_hub
    from vindex.reader import open_vindex

    with progress(enabled=on_the_hub(path) is not None) as stage:
        yield open_vindex(path, tokenizer, progress=stage)


def info(path: VindexPath, json: Json = False, output: Output = None) -> None:
    """Shape, source, certificates, size."""
    from vindex.format import MANIFEST

    check_places(output)
    with opened(path) as v:
        facts = v.info()
    if put(facts, json, output):
        return
    lacks = facts.pop("lacks", [])
    shown = facts | {"size": bytes_of(facts.pop("size_bytes"))}
    if v.has(MANIFEST):
        shown["worst_certificate"] += f", limit {v.manifest.options.tolerance:.0e}"
        shown["built_at"] = datetime.fromisoformat(facts["built_at"]).strftime("%d %B %Y, %H:%M UTC").removeprefix("0")
    rows = [
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value)
        for name, value in shown.items()
        if value is not None
    ]
    print_table(path, ["", ""], rows)
    if lacks:
        ways: dict[str, list[str]] = {}
        for lack in lacks:
            ways.setdefault(lack["way_out"], []).append(lack["what"])
        print_table("", ["it lacks", "what would give it"], [(", ".join(what), way) for way, what in ways.items()])


def compare(
    a: Annotated[str, typer.Argument(metavar="VINDEX", help="A vindex.")],
    b: Annotated[
        str, typer.Argument(metavar="OTHER", help="Another, of a model with the same layers and hidden size.")
    ],
    json: Json = False,
    output: Output = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the angles by layer to this .html or .png.")
    ] = None,
) -> None:
    """How far apart two vindexes are, layer by layer.

    Principal angles between their subspaces, and the drift of their spectra.
    """
    import vindex
    from vindex.differences import by_layer

    check_places(output, plot)
    with progress() as stage:
        ours, theirs = vindex.open(a, progress=stage), vindex.open(b, progress=stage)
        found = vindex.compare(ours, theirs, progress=stage)
    if plot:
        found.plot(plot)
    if put(found.record(), json, output):
        return
    say(styled(found.summary, "bold"))
    for more in filter(None, (found.kept, found.without_angles)):
        say(more)
    columns = [">layer", *(f">{side}\n{what}" for side in ("gate", "down") for what in ("angle", "cos", "σ drift"))]
    layers = by_layer(found.differences)
    rows = [(d.layer, *(text for side in (d.gate, d.down) for text in _difference_cells(side))) for d in layers]
    caption = "angle: largest principal angle, rad; cos: mean cosine of all; σ drift: ‖σ_A − σ_B‖/max(‖σ_A‖, ‖σ_B‖)"
    if found.noise is not None:
        caption += f"; two builds of the same weights, by their certificates: angles up to {found.noise:.1e}"
    if any(value is None for one in found for side in (one.gate, one.down) for value in side[:3] if not side.spans):
        caption += "; –: a weight is zero, or a vindex lacks it"
    if len(found.differences) > len(rows):
        caption += "; of all experts the largest, mean and largest, each by itself in --json"
    print_table(f"{a} beside {b}", columns, rows, caption)
    say_places(plot=plot)


def card(
    path: VindexPath,
    probe: Annotated[Path | None, typer.Option(help="Record of `vindex probe -o`, for the constants.")] = None,
    gate3: Annotated[Path | None, typer.Option(help="Record of `vindex gate3 -o`, for the Gate 3 section.")] = None,
    gates: Annotated[Path | None, typer.Option(help="Record of `vindex gates eval -o`, for the λ gates.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="The licence, as the Hub names it: apache-2.0.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(metavar="OWNER/MODEL", help="The source model on the Hub.")] = None,
    repo: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Where the vindex itself is on the Hub.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a vindex's model card (README.md).

    From its own records, and its line in SHA256SUMS anew. What is not given stays as the card has it. A record of other
    weights is refused.
    """
    import vindex

    v = vindex.open(path)
    written = vindex.write_card(v, probe, gate3, gates, licence=licence, base_model=base_model, repo=repo)
    if json:
        print_json({"id": v.id, "card": str(written)})
        return
    say(f"wrote {written}")
    measured = {"probe": probe, "gate3": gate3, "gates eval": gates}
    missing = [f"vindex {command}" for command, record in measured.items() if record is None]
    say("next: " + (f"measure what it leaves open with {', '.join(missing)}" if missing else command("verify", path)))


def _difference_cells(side: SideDifference) -> tuple[str, ...]:
    cells = (side.largest_angle, ".1e"), (side.mean_cosine, ".4f"), (side.spectrum_drift, ".1e")
    return tuple("–" if value is None else format(value, form) for value, form in cells)
