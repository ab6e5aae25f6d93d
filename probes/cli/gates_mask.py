"""`vindex gates mask`: gates that need no training, by how strongly neurons fire, or at random."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probes.cli.gates_options import Force, ForgetFile, PanelDirectory, RetainFile
from probes.cli.model import Device, Dtype, Model, Revision, load_model
from vindex.cli import Json
from vindex.console import command, progress, put, say


def mask(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory to write the gates to.")],
    by: Annotated[str, typer.Option(help="ratio, contrast, largest or random.")] = "ratio",
    panel: PanelDirectory = None,
    forget: ForgetFile = None,
    retain: RetainFile = None,
    seed: Annotated[int, typer.Option(help="Of random masks, and of the rows that mean |h| is taken over.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Read the texts in the model's chat template.")] = False,
    force: Force = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Make gates without training: first off are neurons that fire where a name is about to be said.

    By the ratio of mean |h| there and in reasoning text, by the difference, by mean |h| alone, or at random.
    """
    from probes.gates.controls import mask_gates

    with progress() as stages:
        loaded = load_model(model, device=device, dtype=dtype, revision=revision, progress=stages)
        gates = mask_gates(
            loaded, by, panel=panel, forget=forget, retain=retain, seed=seed, chat=chat, output=output, force=force,
            progress=stages,
        )  # fmt: skip
    if put(gates.record() | {"directory": str(output)}, json, None):
        return
    layers, neurons = gates.logits.shape
    say(f"wrote {output}: {layers} × {neurons} neurons by {by}, the same share of every layer off")
    asked = ("--panel", panel) if panel else ()
    say(f"next: {command('gates', 'eval', model, output, *asked)}")
