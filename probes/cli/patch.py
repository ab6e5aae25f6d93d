"""`vindex patch`: rank-1 patches as files: show one, write a checkpoint with it, take it out again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vindex.cli import Json, Output
from vindex.console import check_places, command, print_table, put, say

PatchFile = Annotated[Path, typer.Argument(metavar="FILE", help="Patch file, from gate3 --save-patch.")]

app = typer.Typer(help="Rank-1 patches as files.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def show(
    patch: PatchFile,
    json: Json = False,
    output: Output = None,
) -> None:
    """Print what a patch changes and where it came from."""
    from probes.weights import patches

    check_places(output)
    about = patches.read(patch).record()
    if not put(about, json, output):
        told = [(name.replace("_", " "), _text(value)) for name, value in about.items() if value is not None]
        print_table(patch.name, ["", ""], told)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return " × ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@app.command()
def apply(
    checkpoint: Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint directory; it is not changed.")],
    patch: PatchFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory to write, new or empty.")],
    json: Json = False,
) -> None:
    """Write an ordinary checkpoint with the patch in it."""
    from probes.weights import patches

    found = patches.read(patch)
    patches.apply(checkpoint, found, output)
    if put(found.record() | {"checkpoint": str(output)}, json, None):
        return
    say(f"{output}: {found.tensor} patched, everything else as in {checkpoint}")
    say(f"next: load {output} like any checkpoint; {command('patch', 'revert', output)} takes the patch out again")


@app.command()
def revert(
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="Directory written by `vindex patch apply`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Write here instead of changing it in place.")
    ] = None,
    json: Json = False,
) -> None:
    """Put the original bytes back and check their hash."""
    from probes.weights import patches

    done = patches.revert(checkpoint, output)
    if not put({"checkpoint": str(done)}, json, None):
        say(f"{done}: original weights restored, SHA-256 verified")
        say("next: it loads like any checkpoint")
