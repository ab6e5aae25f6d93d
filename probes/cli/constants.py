"""The command that measures C1–C5 on a live model."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from probes.cli.constants_tables import print_record
from probes.cli.model import load_model
from vindex.console import check_places, progress, put, say, warn


def probe(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint directory, a Hub id, or `atlas`, the bundled model.")
    ],
    vindex: Annotated[
        str | None,
        typer.Option(metavar="VINDEX", help="A vindex of the same model: directions and spectra come from it."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="A UTF-8 file, or the name of a bundled text; repeatable. Default: the eight bundled."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16.")] = "auto",
    attn: Annotated[str, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = "sdpa",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts to a forward pass; memory grows with it.")] = 1,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print variants, routing, spectra and published values besides.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record instead of tables.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the record, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw curves, CKA and spectra to this .html or .png.")
    ] = None,
) -> None:
    """Measure the constants C1–C5 on a live model.

    Each comes with its interval, its null, and what it says of this model.

    The first text gives the values; means and intervals are over all texts.

    Example: vindex probe atlas -o probe.json --plot probe.html
    """
    import probes
    import vindex as artifact

    check_places(output, plot)
    try:
        opened = artifact.open(vindex) if vindex else None
        with progress() as stage:
            loaded = load_model(
                model, dtype=dtype, device=device, attn=attn, revision=revision, head=False, progress=stage
            )
            found = probes.constants(loaded, opened, text, batch_size, stage)
    except KeyboardInterrupt:
        warn("stopped; nothing was written")
        raise typer.Exit(130) from None
    if plot:
        found.plot(plot)
    if put(found.record(), json, output):
        return
    print_record(found.record(), everything)
    for what, place in (("plot", plot), ("record", output)):
        if place:
            say(f"{what}: {place}")
    if output:
        say(f"next: vindex card {quote(str(vindex or 'VINDEX'))} --probe {quote(str(output))}")
    elif not everything:
        say("next: --all prints variants and spectra, -o FILE keeps the record, --plot FILE draws it")
