"""The `vindex` command: the one place where the artifact, the extractors and the probes meet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from extract.cli import build, plan
from extract.cli import verify as verifying
from probes.cli import constants, delete, gates, patch
from vindex import cli, cli_scores, console
from vindex.demo import CHECKPOINT
from vindex.errors import TargetError, VindexError


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


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the vindex.")] = Path("atlas.vindex"),
) -> None:
    """Build, verify, score and edit the bundled checkpoint."""
    from vindex.options import BuildOptions

    atlas, model = str(CHECKPOINT), CHECKPOINT.name
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        (
            f"build {model} -o {output}",
            lambda: build.run_build(atlas, output, BuildOptions(threads=1), resume=False, force=True),
        ),
        (f"verify {output} --source {model}", lambda: verifying.verify(output, source=atlas)),
        (f'score {output} " Paris"', lambda: cli_scores.score(output, [" Paris"], k=8)),
        (f"gate3 {model} --vindex {output}", lambda: delete.gate3(atlas, vindex=output)),
    )
    _require_own(output)
    for number, (command, run) in enumerate(steps, start=1):
        if number > 1:
            console.say()
        console.say(console.styled(f"{number}. vindex {command}", "bold"))
        run()


def _require_own(output: Path) -> None:
    """Raise TargetError when the demo would replace something else than a vindex, begun or whole, of its own model."""
    from vindex.checksums import sha256_of
    from vindex.reader import open_vindex
    from vindex.targets import check_directory, unfinished

    check_directory(output, force=True)
    own = {sha256_of(file) for file in CHECKPOINT.glob("*.safetensors")}
    begun = unfinished(output)
    if begun is not None and not all(digest in str(begun.get("fingerprint")) for digest in own):
        raise TargetError(f"{output}.partial is an unfinished build of another model; choose another -o")
    there = open_vindex(output).manifest.source.files if output.is_dir() and any(output.iterdir()) else None
    if there is not None and not own <= {file.sha256 for file in there}:
        raise TargetError(f"{output} is a vindex of another model; choose another -o")


HANDLERS = (
    build.build,
    plan.plan,
    cli.info,
    verifying.verify,
    cli_scores.score,
    cli_scores.search,
    cli_scores.feature,
    cli.compare,
    cli.card,
    constants.probe,
    delete.gate3,
    demo,
)
for handler in HANDLERS:
    app.command()(handler)
app.command("gate3 verify")(delete.verify)
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
