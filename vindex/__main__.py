"""The `vindex` command: the one place where the artifact, the extractors and the probes meet."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vindex.commands import artifact, build, console, gate3, gates, patch, plan, probe
from vindex.errors import VindexError


class Commands(TyperGroup):
    """Commands of one word, or of two where the second asks for another one: `gate3 verify` beside `gate3`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As click does, the longer name first."""
        two = " ".join(args[:2])
        return super().resolve_command(ctx, [two, *args[2:]] if two in self.commands else args)


app = typer.Typer(
    name="vindex",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
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
app.command("gate3 verify")(gate3.verify)
app.add_typer(patch.app, name="patch")
app.add_typer(gates.app, name="gates")


def _show_version(wanted: bool) -> None:
    if wanted:
        import vindex

        typer.echo(f"vindex {vindex.__version__}")
        raise typer.Exit


@app.callback()
def vindex(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """What a model's FFN layers read, write and know: extract, score, probe, edit, and prove it."""


def main() -> None:
    """Run the command. An error is one line on stderr and exit status 1; Ctrl-C is exit status 130."""
    console.open_streams()
    sys.exit(console.close_stdout(_run()))


def _run() -> int:
    try:
        app()
    except SystemExit as done:
        return int(done.code or 0)
    except VindexError as error:
        console.warn(f"vindex: {error}")
    except KeyboardInterrupt:
        console.warn("vindex: interrupted")
        return 130
    except OSError as error:
        where = "reading or writing" if error.filename is None else error.filename
        console.warn(f"vindex: {where}: {error.strerror or error}")
    except UnicodeError as error:
        console.warn(f"vindex: {error}; text is expected in UTF-8, and names of files in the locale's encoding")
    return 1


if __name__ == "__main__":
    main()
