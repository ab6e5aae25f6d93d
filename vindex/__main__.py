"""The `vindex` command: the one place where the artifact, the extractors and the probes meet."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, NamedTuple, get_args

import typer
from typer.core import TyperGroup

from extract.cli import audit, build, plan
from extract.cli import verify as verifying
from probes.cli import constants, delete, gates, gates_eval, gates_train, patch, plot, respond, trace
from vindex import cli, cli_hub, cli_report, cli_scores, console, streams
from vindex.demo import CHECKPOINT
from vindex.distribution import namesake
from vindex.errors import TargetError, VindexError

PROMPT = "The capital of France is"
EXAMPLES = {  # of each command, at the end of its help
    "build": "vindex build Qwen/Qwen3-0.6B -o qwen3-0.6b.vindex",
    "plan": "vindex plan Qwen/Qwen3-0.6B --measure",
    "info": "vindex info atlas.vindex",
    "verify": "vindex verify atlas.vindex --source atlas",
    "audit": "vindex audit atlas.vindex --source atlas",
    "score": 'vindex score atlas.vindex " Paris" " Berlin" -k 5',
    "search": "vindex search atlas.vindex Paris --reads",
    "feature": "vindex feature atlas.vindex 1 95",
    "compare": "vindex compare base.vindex tuned.vindex --plot angles.html",
    "card": "vindex card atlas.vindex --probe probe.json",
    "report": "vindex report atlas.vindex -o atlas.html --gate3 gate3.json --trace trace.json",
    "push": "vindex push qwen3-0.6b.vindex someone/qwen3-0.6b-vindex --private",
    "pull": "vindex pull someone/qwen3-0.6b-vindex qwen3-0.6b.vindex",
    "probe": "vindex probe atlas -o probe.json --plot probe.html",
    "trace": f'vindex trace atlas "{PROMPT}" --vindex atlas.vindex --target " Paris" --check 3',
    "respond": "vindex respond atlas atlas.vindex",
    "plot": "vindex plot probe.json -o probe.html",
    "gate3": "vindex gate3 atlas --vindex atlas.vindex --save-patch paris.safetensors",
    "gate3 verify": "vindex gate3 verify atlas paris.safetensors",
    "demo": "vindex demo -o atlas.vindex",
    "patch show": "vindex patch show paris.safetensors",
    "patch apply": "vindex patch apply atlas paris.safetensors -o atlas-without-paris",
    "patch revert": "vindex patch revert atlas-without-paris",
    "gates panel": "vindex gates panel Qwen/Qwen3-0.6B -o panel",
    "gates train": "vindex gates train atlas -o gates --learning-rate 0.05 --max-steps 240",
    "gates mask": "vindex gates mask atlas --by ratio -o ratio-gates",
    "gates eval": "vindex gates eval atlas gates -o eval.json --plot eval.html",
    "gates link": "vindex gates link atlas gates atlas.vindex --off 5%",
    "gates stats": "vindex gates stats gates",
    "gates apply": f'vindex gates apply atlas gates --off 25% --prompt "{PROMPT}"',
    "gates bake": "vindex gates bake atlas gates --off 25% -o atlas-gated",
    "gates compare": "vindex gates compare gates other-gates",
    "gates convert": "vindex gates convert lambda_logits.pt -o gates",
}


class Few(NamedTuple):
    """How long the demo's gates learn, and how many questions of each kind judge them."""

    steps: int
    questions: int


DEMO_GATES = Few(60, 40)
METAVARS = {Path: "FILE", int: "N", float: "X", str: "TEXT"}  # of what has none of its own


class Commands(TyperGroup):
    """Commands of one word, or of two where the second asks for another one: `gate3 verify` beside `gate3`.

    Help speaks one language: what is given stands in capitals, and an example comes last.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As click does, the longer name first."""
        two = " ".join(args[:2])
        return super().resolve_command(ctx, [two, *args[2:]] if two in self.commands else args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, its parameters named and with its example."""
        command = super().get_command(ctx, cmd_name)
        if command is None:
            return None
        inside = f"{ctx.info_name} " if ctx.parent else ""
        example = EXAMPLES.get(inside + cmd_name)
        if example:
            command.epilog = f"Example: {example}"
        for parameter in command.params:
            if not parameter.metavar and not getattr(parameter, "is_flag", False):
                kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", object)
                kind = (*get_args(kind), kind)[0]
                argument = parameter.param_type_name == "argument"
                parameter.metavar = (parameter.name or "").upper() if argument else METAVARS.get(kind)
        return command


app = typer.Typer(
    name="vindex",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the vindex.")] = Path("atlas.vindex"),
    json: cli.Json = False,
) -> None:
    """Build, verify, score, edit and gate the bundled checkpoint, and write a report of it all.

    Records and the report stand beside the vindex, under its name. With --json the records are printed, one after the
    other.
    """
    from probes.gates.learn import check_output
    from vindex.report.page import check_target

    atlas, model = str(CHECKPOINT), CHECKPOINT.name
    made = [output.with_suffix(end) for end in (".gate3.json", ".gates", ".gates.json", ".trace.json", ".html")]
    gate3, learnt, scored, traced, page = made
    v, g, t, e, tr, p = (quote(str(path)) for path in (output, *made))
    few = DEMO_GATES
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        (f"build {model} -o {v}", lambda: _build(atlas, output, json)),
        (f"verify {v} --source {model}", lambda: verifying.verify(str(output), source=atlas, json=json)),
        (f'score {v} " Paris" -k 8', lambda: cli_scores.score(str(output), [" Paris"], k=8, json=json)),
        (
            f"gate3 {model} --vindex {v} -o {g}",
            lambda: delete.gate3(atlas, vindex=str(output), output=gate3, json=json),
        ),
        (
            f"gates train {model} -o {t} --force --learning-rate 0.05 --max-steps {few.steps}",
            lambda: gates_train.train(atlas, learnt, force=True, learning_rate=0.05, max_steps=few.steps, json=json),
        ),
        (
            f"gates eval {model} {t} --count {few.questions} -o {e}",
            lambda: gates_eval.evaluate(atlas, learnt, output=scored, count=few.questions, json=json),
        ),
        (
            f'trace {model} "{PROMPT}" --vindex {v} -o {tr}',
            lambda: trace.trace(atlas, PROMPT, vindex=str(output), output=traced, json=json),
        ),
        (
            f"report {v} -o {p} --gate3 {g} --gates {e} --trace {tr}",
            lambda: cli_report.report(str(output), page, gate3=gate3, gates=scored, trace=traced, json=json),
        ),
    )
    _require_own(output)
    check_target(page, force=False)
    for record in (gate3, scored, traced):
        console.check_places(record)
    check_output(learnt, [], resume=False, force=True)
    for number, (command, run) in enumerate(steps, start=1):
        if number > 1 and not json:
            console.say()
        if not json:
            console.say(console.styled(f"{number}. vindex {command}", "bold"))
        run()
    if not json:
        console.say(f"next: open {page.absolute().as_uri()} in a browser, and search for Paris")


def _build(atlas: str, output: Path, json: bool) -> None:
    import extract

    with console.progress() as stage:
        v = extract.build(atlas, output, threads=1, force=True, progress=stage)
    if not console.put(v.info(), json, None):
        build.print_built(v, output)


def _require_own(output: Path) -> None:
    """Raise TargetError when the demo would replace something else than a vindex, begun or whole, of its own model."""
    from vindex.checksums import sha256_of
    from vindex.places import check_directory, unfinished
    from vindex.reader import open_vindex

    check_directory(output, force=True)
    own = {sha256_of(file) for file in CHECKPOINT.glob("*.safetensors")}
    begun = unfinished(output)
    if begun is not None and not all(digest in str(begun.get("fingerprint")) for digest in own):
        raise TargetError(f"{output}.partial is an unfinished build of another model; choose another place")
    there = open_vindex(output).manifest.source.files if output.is_dir() and any(output.iterdir()) else None
    if there is not None and not own <= {file.sha256 for file in there}:
        raise TargetError(f"{output} is a vindex of another model; choose another place")


HANDLERS = (
    build.build,
    plan.plan,
    cli.info,
    verifying.verify,
    audit.audit,
    cli_scores.score,
    cli_scores.search,
    cli_scores.feature,
    cli.compare,
    cli.card,
    cli_report.report,
    cli_hub.push,
    cli_hub.pull,
    constants.probe,
    plot.plot,
    trace.trace,
    respond.respond,
    delete.gate3,
    demo,
)
for handler in HANDLERS:
    app.command()(handler)
app.command("gate3 verify")(delete.verify)
app.add_typer(patch.app, name="patch", cls=Commands)
app.add_typer(gates.app, name="gates", cls=Commands)


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
    """Run the command. An error is one line on stderr and exit status 1; Ctrl-C is exit status 130.

    numpy's products are small here: its library, OpenBLAS, is kept to one thread, whose threads would wait for each
    other for most of their time. torch, which does the large ones, has threads of its own.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy is not loaded yet
    streams.open_streams()
    other = namesake()
    if other:
        console.warn(
            f"note: the distribution vindex {other} of somebody else is installed here too, and both keep files in "
            "vindex/; run `pip uninstall vindex`, then `pip install --force-reinstall --no-deps vindex-svd`"
        )
    sys.exit(streams.close_stdout(_run()))


def _run() -> int:
    try:
        app()
    except SystemExit as done:
        return int(done.code or 0)
    except VindexError as error:
        console.warn(f"vindex: {error}")
    except KeyboardInterrupt:
        console.warn("vindex: interrupted; nothing is left half-written")
        return 130
    except OSError as error:
        where = "reading or writing" if error.filename is None else error.filename
        console.warn(f"vindex: {where}: {error.strerror or error}")
    except UnicodeError as error:
        console.warn(f"vindex: {error}; text is expected in UTF-8, and names of files in the locale's encoding")
    return 1


if __name__ == "__main__":
    main()
