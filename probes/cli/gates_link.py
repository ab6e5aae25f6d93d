"""`vindex gates link`: what the neurons that are off read, along the gate directions of a vindex."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probes.cli.gates_options import Directory, Indices, Off, Threshold, mask_of
from probes.cli.model import Device, Dtype, Model, Revision, load_model
from vindex.cli import Json, Output
from vindex.console import check_places, command, print_table, progress, put, say, visible

if TYPE_CHECKING:
    from probes.gates.link import Link


def link(
    model: Model,
    directory: Directory,
    vindex: Annotated[Path, typer.Argument(metavar="VINDEX", help="A vindex of the same model.")],
    threshold: Threshold = None,
    off: Off = None,
    indices: Indices = False,
    k: Annotated[int, typer.Option("-k", min=1, help="Directions to show.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the random sets of neurons.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    json: Json = False,
    output: Output = None,
) -> None:
    """What the neurons that are off read: the gate directions their rows load on, beside random sets of neurons.

    The rows of gate_proj come from the model, the directions and what they read from the vindex.
    """
    import vindex as artifact
    from probes.gates.gates import Gates
    from probes.gates.link import link_gates

    check_places(output)
    mask = mask_of(Gates.read(directory), directory, threshold, off, indices)
    opened = artifact.open(vindex)
    with progress() as stages:
        loaded = load_model(model, device=device, dtype=dtype, revision=revision, head=False, progress=stages)
        found = link_gates(loaded, mask, opened, count=k, seed=seed, progress=stages)
    if put(found.record(), json, output):
        return
    print_link(found)
    if found.loadings:
        first = found.loadings[0]
        say(f"next: {command('feature', vindex, first.layer, first.feature)}")


def print_link(found: Link) -> None:
    """The directions that stand out, by z."""
    rows = [
        (f"{one.layer}", f"{one.feature}", f"{one.loading:.4f}", f"{one.chance:.4f}", f"{one.highest:.4f}",
         f"{one.z:.1f}", " ".join(map(visible, one.tokens))) for one in found.loadings
    ]  # fmt: skip
    columns = [">layer", ">direction", ">loading", ">by chance", ">at most", ">z", "reads"]
    caption = f"mean cos² of the rows of gate_proj; by chance: of {found.about['random_sets']} random sets of as many"
    print_table(f"{found.about['gates']}: {found.about['mask']}", columns, rows, caption=caption)
    say(
        f"{found.beyond:,} of {found.directions:,} directions are loaded more than by every random set; "
        f"{found.expected:.0f} would be by chance"
    )
