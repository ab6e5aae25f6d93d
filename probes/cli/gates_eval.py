"""`vindex gates eval`: what gates do beside what chance does, as a table, a record and a plot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.cli.gates_options import (
    Device,
    Directory,
    Dtype,
    ForgetFile,
    Model,
    RetainFile,
    Revision,
    gates_in,
    scale_of,
)
from probes.cli.model import load_model
from vindex.console import print_json, print_table, progress, say, styled
from vindex.errors import ProbeError

if TYPE_CHECKING:
    from probes.gates.evaluate import Evaluation, Magnitudes
    from probes.gates.panels import Panels
    from probes.live.load import Loaded


def evaluate(
    model: Model,
    directory: Directory,
    forget: ForgetFile = None,
    retain: RetainFile = None,
    neutral: Annotated[
        Path | None, typer.Option(help="Neutral text: .txt or .jsonl. Default: stories (atlas) or the bundled texts.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the chat template, thinking off.")] = False,
    scale: Annotated[str | None, typer.Option(help="Rescaling of soft gates. Default: as trained, or none.")] = None,
    mask_scale: Annotated[str, typer.Option(help="Rescaling of hard masks: none, mean, energy.")] = "none",
    threshold: Annotated[
        list[float] | None, typer.Option(help="Evaluate here instead of at the five; repeatable.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts to a panel, at most.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts to a forward pass.")] = 64,
    generate: Annotated[
        int, typer.Option(min=0, help="Let the model write this many tokens and look for the answer; 0: forced.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the choice of prompts.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    json: Annotated[Path | None, typer.Option(help="Write the record here; - prints it instead of the tables.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw knowledge against reasoning to this .html or .png.")] = None,
) -> None:
    """Score gates, soft and at five operating points, beside random and activation masks of the same size.

    Without files: the atlas's held-out facts and sums.
    """
    from probes.charts import check_target
    from probes.gates import plot as drawing
    from probes.gates.apply import require_fit
    from probes.gates.evaluate import evaluate as run
    from probes.gates.evaluate import mask_count, record
    from probes.gates.score import Settings
    from probes.live.match import weights_sha256
    from vindex.targets import check_file, write_json

    to_stdout = json == Path("-")
    if json and not to_stdout:
        check_file(json, or_stdout=True)
    if plot:
        check_target(plot)
    if (forget is None) != (retain is None):
        raise ProbeError("--forget without --retain, or the reverse: give both files, or neither for the atlas")
    gates = gates_in(directory)
    thresholds = tuple(threshold) if threshold else gates.selected_thresholds()
    loaded = load_model(model, device=device, dtype=dtype, revision=revision)
    require_fit(gates.logits.shape, loaded.model)
    panels, magnitudes = _panels(loaded, (forget, retain, neutral), not generate, chat=chat, count=count, seed=seed)
    scales = scale_of(scale or _trained_scale(directory)), scale_of(mask_scale)
    with progress() as stage:
        result = run(
            loaded, gates, panels, magnitudes, scale_mode=scales[0], mask_scale=scales[1], thresholds=thresholds,
            settings=Settings(batch_size, generate), on_mask=stage("masks", mask_count(len(thresholds), True)),
        )  # fmt: skip
        digests = weights_sha256(loaded, stage)
    made = record(loaded, directory.name, result, panels, scales, generate, digests)
    if json and not to_stdout:
        write_json(json, made)
    if plot:
        drawing.draw(result, f"{loaded.name}, {directory.name}", plot)
    if to_stdout:
        print_json(made)
        return
    print_evaluation(result, f"{directory.name} on {loaded.name} ({panels.source})", scales)
    for what, place in (("record", json), ("plot", plot)):
        if place:
            say(f"{what}: {place}")


def print_evaluation(result: Evaluation, title: str, scales: tuple[str, str]) -> None:
    """Every mask at every operating point, random masks as their mean, and the areas."""
    from probes.gates.evaluate import mean_of

    rows = [("", "plain model", *_cells(result.base), "")]
    rows.append(("", "soft gates", *_cells(result.soft), _kept(*result.soft_retained)))
    points = sorted({entry.point for entry in result.entries}, key=lambda p: p.off_fraction)
    for at in points:
        for family in result.areas:
            found = mean_of([e for e in result.entries if e.family == family and e.point == at])
            name = "random ×5" if family == "random" else family
            first = f"{at.off_fraction:.0%}" if family == "gates" else ""
            rows.append((first, name, *_cells(found.scores), _kept(found.knowledge, found.reasoning)))
    columns = [">off", "mask", ">forget", ">oracle", ">confl.", ">reason", ">KL", ">kept"]
    sizes = ", ".join(f"{name} {count}" for name, count in result.counts.items())
    print_table(
        title,
        columns,
        rows,
        caption=f"{sizes} prompts or texts; kept: facts / reasoning; "
        f"random: mean of 5; scale: soft {scales[0]}, masks {scales[1]}",
    )
    areas = [
        (name, f"{a.value:.3f}", f"{a.low:.3f} … {a.high:.3f}" if a.low < a.high else "")
        for name, a in result.areas.items()
    ]
    print_table("area under the curve", ["mask", ">area", ">over seeds"], areas)
    say(
        styled(f"gates minus random: {result.advantage:+.3f}", "bold"),
        " (area 1: facts go first, 0.5: both, 0: reasoning)",
    )


def _cells(scores: Any) -> tuple[str, ...]:
    rates = (f"{value:.2f}" for value in (scores.forget, scores.oracle, scores.conflict, scores.reasoning))
    return (*rates, f"{scores.neutral_kl:.2f}")


def _kept(knowledge: float, reasoning: float) -> str:
    return f"{knowledge:.0%}".rjust(4) + " /" + f"{reasoning:.0%}".rjust(5)


def _panels(
    loaded: Loaded, files: tuple[Path | None, ...], worked: bool, *, chat: bool, count: int, seed: int
) -> tuple[Panels, Magnitudes]:
    """What is asked, and the mean |h| that the activation masks come from: rows of the files, or the atlas's."""
    from dataclasses import replace

    from probes.gates.data import read_forget, read_retain
    from probes.gates.evaluate import magnitudes
    from probes.gates.panels import atlas, from_rows, neutral_texts

    forget, retain, neutral = files
    facts, sums = read_forget(forget)[0], read_retain(retain)[0]
    if forget is None:
        panels = atlas(loaded.tokenizer, chat=chat, count=count, seed=seed)
        panels = replace(panels, neutral=neutral_texts(neutral)) if neutral else panels
    else:
        texts, tokenizer = neutral_texts(neutral), loaded.tokenizer
        panels = from_rows(facts, sums, texts, tokenizer, chat=chat, worked=worked, count=count, seed=seed)
    return panels, magnitudes(loaded, facts, sums, chat=chat, seed=seed)


def _trained_scale(directory: Path) -> str:
    """The scale mode that the run record beside the gates states, or none."""
    from vindex.kinds import TRAINING
    from vindex.schema import load_record

    path = directory / TRAINING
    options = load_record(path).get("options") if os.path.lexists(path) else None
    return str(options.get("scale_mode", "none")) if isinstance(options, dict) else "none"
