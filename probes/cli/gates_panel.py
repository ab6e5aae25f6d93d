"""`vindex gates panel`: what a model knows and can work out, as files to train gates on and to ask gated models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.cli.gates_options import Force, with_options
from probes.cli.model import Device, Dtype, Model, Revision, load_model
from probes.gates.options import OWN, PanelOptions
from vindex.cli import Json
from vindex.console import command, print_table, progress, put, say, stopped

if TYPE_CHECKING:
    from probes.gates.known import GatesPanel

COUNTS = ("tried", "right", "trained", "asked")


@with_options(PanelOptions)
def panel(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory to write the panel to.")],
    force: Force = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    json: Json = False,
    **options: Any,
) -> None:
    """Find what a model knows and can work out: facts to forget, and questions to keep, for train and eval.

    Facts are the bundled ones, questions are generated. What the model gets wrong is left out.
    """
    from probes.gates.known import make_panel
    from vindex.kinds import PANEL
    from vindex.places import check_directory

    given = {name: value for name, value in options.items() if value is not None}
    PanelOptions(**given)  # what is out of range is told before the model is loaded
    check_directory(output, force=force, kinds=(PANEL,))
    with stopped("nothing is kept"), progress() as stages:
        loaded = load_model(model, device=device, dtype=dtype, revision=revision, progress=stages)
        found = make_panel(loaded, output, force=force, progress=stages, **given)
    if put(found.record(), json, None):
        return
    print_panel(found)
    following = command("gates", "train", model, "--panel", output, "--preset", OWN, "-o", "gates")
    say(f"wrote {output}; next: {following}")


def print_panel(found: GatesPanel) -> None:
    """What was tried, what the model got right, what is trained on and what is asked, by relation and kind."""
    for of, what in (("facts", "relation"), ("reasoning", "kind")):
        rows = [
            (row["kind"] + (" *" if row["held_out"] else ""), *(f"{row[name]}" for name in COUNTS))
            for row in found.counts
            if row["of"] == of
        ]
        rows.append(("all", *(f"{found.total(of, name)}" for name in COUNTS)))
        print_table(f"{of}: {found.about['model']['name']}", [what, *(f">{name}" for name in COUNTS)], rows)
    say("* held out: asked only, never trained on")
