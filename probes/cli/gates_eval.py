"""`vindex gates eval`: what gates do beside what chance does, as a table, a record and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.cli.gates_options import Directory, ForgetFile, PanelDirectory, RetainFile, with_options
from probes.cli.model import Device, Dtype, Model, Revision, load_model
from probes.gates.options import EvalOptions
from vindex.cli import Json, Output
from vindex.console import check_places, command, print_json, print_table, progress, say, say_places, stopped, styled

if TYPE_CHECKING:
    from probes.gates.evaluation import Evaluation
    from probes.gates.score import Share

NAMES = {"random": "random ×5"}
QUESTIONS = ("forget", "oracle", "conflict", "reasoning")


@with_options(EvalOptions)
def evaluate(
    model: Model,
    directory: Directory,
    panel: PanelDirectory = None,
    forget: ForgetFile = None,
    retain: RetainFile = None,
    neutral: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Neutral text: .txt or .jsonl. Default: stories (atlas) or bundled texts."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    json: Json = False,
    output: Output = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw knowledge against reasoning to this .html or .png.")
    ] = None,
    **options: Any,
) -> None:
    """Score gates, soft and at five operating points, beside random and activation masks of the same size.

    Without files: the atlas's held-out facts and sums. With -o the scores of finished masks are kept; a run that was
    stopped goes on with the same command.
    """
    from probes.gates.evaluate import evaluate_gates
    from probes.gates.gates import Gates
    from probes.gates.options import to_evaluate

    check_places(output, plot)
    to_evaluate(**options)  # what is out of range is told before the model is loaded
    gates = Gates.read(directory)
    with stopped(lambda: _kept_of(output)), progress() as stages:
        loaded = load_model(model, device=device, dtype=dtype, revision=revision, progress=stages)
        found = evaluate_gates(
            loaded, gates, panel=panel, forget=forget, retain=retain, neutral=neutral, output=output,
            progress=stages, **options,
        )  # fmt: skip
    if plot:
        found.plot(plot)
    if json:
        print_json(found.record())
        return
    print_evaluation(found)
    made_on = gates.training.get("model") or {}
    if made_on.get("weights_sha256", found.about["model"]["weights_sha256"]) != found.about["model"]["weights_sha256"]:
        say(f"note: the gates were made on other weights, those of {made_on.get('name')}")
    if found.reused:
        say(f"{found.reused} of {len(found.entries) + 2} masks were kept from a run that was stopped")
    say_places(plot=plot, record=output)
    if output:
        say(f"next: {command('card', 'VINDEX', '--gates', output)}")


def _kept_of(output: Path | None) -> str:
    """What a run that was stopped leaves."""
    from probes.gates.journal import beside

    if output is None:
        return "nothing is kept; with -o FILE the finished masks are"
    if not beside(output).exists():
        return "no mask was finished"
    return f"finished masks are kept in {beside(output)}: go on with the same command"


def print_evaluation(found: Evaluation) -> None:
    """Every mask at every operating point, random masks as their mean, and the areas."""
    about, rows, apart, before = found.about, [], [], None
    for at, mask, scores, kept in found.families():
        first = "" if at in (None, before) else _off(at.off_fraction)
        before, name = at, NAMES.get(mask, mask)
        cells = [_percent(scores.share(panel)) for panel in QUESTIONS]
        rows.append((first, name, *cells, _number(scores.neutral_kl, ".2f"), _kept(*kept)))
        sides = [scores.share(panel, held_out) for panel in ("forget", "reasoning") for held_out in (False, True)]
        apart.append((first, name, *map(_percent, sides), _number(scores.perplexity, ".1f")))
    choices, panels = about["choices"], about["panels"]
    sizes = ", ".join(f"{name} {count}" for name, count in panels["counts"].items())
    print_table(
        f"{about['gates']} on {about['model']['name']} ({panels['source']})",
        [">off", "mask", ">param.", ">in-ctx", ">confl.", ">reason", ">KL", ">kept"],
        rows,
        caption=f"right in %, ± half of the 95 % interval: parametric (nothing but the question), in-context, "
        f"conflict, reasoning; {sizes} prompts or texts; kept: facts/reasoning in %; random: mean of "
        f"{choices['random_seeds']}; "
        f"scale: soft {choices['soft_scale_mode']}, masks {choices['mask_scale_mode']}",
    )
    if found.base.share("forget", held_out=True).asked:
        print_table(
            "trained on, and held out",
            [">off", "mask", ">facts", ">new facts", ">kinds", ">new kinds", ">perplexity"],
            apart,
            caption="new: no fact of the subject, and no question of the kind, was trained on",
        )
    areas = [
        (name, _number(a.value, ".3f"), f"{a.low:.3f} … {a.high:.3f}" if a.low < a.high else "")
        for name, a in found.areas.items()
    ]
    print_table("area under the curve", ["mask", ">area", ">over seeds"], areas)
    say(
        styled(f"gates minus random: {_number(found.advantage, '+.3f')}", "bold"),
        " (area 1: facts go first, 0.5: both, 0: reasoning)",
    )


def _off(share: float) -> str:
    return f"{share:.0%}" if share >= 0.02 else f"{share:.1%}"


def _percent(share: Share) -> str:
    """`82 ±5`; a dash of none."""
    low, high = share.interval
    return f"{share.value:.0%} ±{(high - low) / 2:.0%}".replace("%", "") if share.asked else "–"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or value != value else format(value, form)


def _kept(*shares: float | None) -> str:
    knowledge, reasoning = (_number(share, ".0%").removesuffix("%") for share in shares)
    return f"{knowledge}/{reasoning:>3}" if (knowledge, reasoning) != ("–", "–") else ""
