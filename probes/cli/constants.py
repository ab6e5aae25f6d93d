"""The command that measures C1–C5 on a live model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probes.cli.constants_tables import print_record
from probes.cli.model import Device, Dtype, Model, Revision, Texts, load_model
from vindex.cli import Json, Output
from vindex.console import check_places, command, progress, put, say, say_places, stopped


def probe(
    model: Model,
    vindex: Annotated[
        str | None,
        typer.Option(metavar="VINDEX", help="A vindex of the same model: directions and spectra come from it."),
    ] = None,
    text: Texts = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Annotated[str, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = "sdpa",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts to a forward pass; memory grows with it.")] = 1,
    revision: Revision = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print variants, routing, spectra and published values besides.")
    ] = False,
    json: Json = False,
    output: Output = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw curves, CKA and spectra to this .html or .png.")
    ] = None,
) -> None:
    """Measure the constants C1–C5 on a live model.

    Each comes with its interval, its null, and what it says of this model.

    The first text gives the values; means and intervals are over all texts.
    """
    import probes
    import vindex as artifact

    check_places(output, plot)
    with stopped(), progress() as stage:
        opened = artifact.open(vindex, progress=stage) if vindex else None
        loaded = load_model(model, dtype=dtype, device=device, attn=attn, revision=revision, head=False, progress=stage)
        found = probes.constants(loaded, opened, text, batch_size, stage)
    if plot:
        found.plot(plot)
    if put(found.record(), json, output):
        return
    print_record(found.record(), everything)
    say_places(plot=plot, record=output)
    if output:
        say(f"next: {command('card', vindex or 'VINDEX', '--probe', output)}")
    elif not everything:
        say("next: --all prints variants and spectra, -o FILE keeps the record, --plot FILE draws it")
