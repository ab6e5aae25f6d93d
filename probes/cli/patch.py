"""`vindex patch`: rank-1 patches as files: show one, write a checkpoint with it, take it out again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vindex.console import print_json, print_table, say
from vindex.demo import or_bundled

app = typer.Typer(help="Rank-1 patches as files.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def show(
    patch: Annotated[Path, typer.Argument(help="Patch file, from gate3 --save-patch.")],
    json_out: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a patch changes and where it came from."""
    from probes.weights import patches

    found = patches.read(patch)
    about: dict[str, Any] = {
        "tensor": found.tensor,
        "shape": list(found.shape),
        "dtype": found.dtype,
        "layer": found.delta.layer,
        "method": found.delta.method,
        "norm": found.delta.norm,
        "base_sha256": found.base_sha256,
    }
    about |= {key: value for key, value in found.provenance.items() if key not in about}
    if json_out:
        print_json(about)
    else:
        print_table(patch.name, ["", ""], [(key, value) for key, value in about.items()])


@app.command()
def apply(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory; it is not changed.")],
    patch: Annotated[Path, typer.Argument(help="Patch file made for these weights.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write, new or empty.")],
) -> None:
    """Write an ordinary checkpoint with the patch in it."""
    from probes.weights import patches

    found = patches.read(patch)
    patches.apply(Path(or_bundled(str(checkpoint))), found, out)
    say(f"{out}: {found.tensor} patched, everything else as in {checkpoint}; undo with: vindex patch revert {out}")


@app.command()
def revert(
    checkpoint: Annotated[Path, typer.Argument(help="Directory written by `vindex patch apply`.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write here instead of changing it in place.")] = None,
) -> None:
    """Put the original bytes back and check their hash."""
    from probes.weights import patches

    done = patches.revert(checkpoint, out)
    say(f"{done}: original weights restored, SHA-256 verified")
