"""The `vindex` command: the one place where the artifact, the extractors and the probes meet."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vindex.commands import artifact, build, gate3, gates, patch, plan, probe
from vindex.errors import VindexError

app = typer.Typer(
    name="vindex",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
for handler in (
    build.build,
    plan.plan,
    artifact.info,
    artifact.verify,
    artifact.score,
    artifact.feature,
    artifact.compare,
    artifact.card,
    probe.probe,
    gate3.gate3,
    build.demo,
):
    app.command()(handler)
app.add_typer(patch.app, name="patch")
app.add_typer(gates.app, name="gates")


@app.callback()
def vindex(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    """What a model's FFN layers read, write and know: extract, score, probe, edit, and prove it."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"vindex {installed('vindex')}")
        raise typer.Exit


def main() -> None:
    """Run the command. A VindexError is one line on stderr and exit status 1; Ctrl-C is exit status 130."""
    try:
        app()
    except VindexError as error:
        sys.stderr.write(f"vindex: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("vindex: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
