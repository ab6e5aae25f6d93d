"""`vindex gate3`: delete a fact with a rank-1 patch, and prove it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vindex.commands.console import print_json, print_table, progress, say, stage
from vindex.errors import ProbeError, TargetError

if TYPE_CHECKING:
    from probes.delete.experiment import Bench, FactResult, MethodResult
    from probes.delete.measure import SetChange
    from probes.facts import Panel

KNOWN_FROM = 0.2
COLOURS = {"pass": "green", "fail": "red", "not_applicable": "yellow"}
SET_TITLES = {
    "paraphrases": "paraphrases of the fact",
    "reference": "reference",
    "other_subjects": "other subjects",
    "same_subject": "other facts of the subject",
    "same_answer": "other facts with the answer",
}


class Method(StrEnum):
    """Which way to compute the patch."""

    both = "both"
    forward = "forward"
    geometric = "geometric"


def gate3(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hub id.")],
    fact: Annotated[
        str, typer.Option(help="SUBJECT/RELATION to delete; with --all the relation counts.")
    ] = "France/capital",
    all_facts: Annotated[bool, typer.Option("--all", help="Every fact of the relation that the model knows.")] = False,
    relation: Annotated[list[str] | None, typer.Option(help="Relation for --all (repeatable).")] = None,
    method: Annotated[Method, typer.Option(help="Method; both are reported side by side.")] = Method.both,
    layer: Annotated[int | None, typer.Option(help="Layer to patch; default: the method chooses.")] = None,
    vindex: Annotated[Path | None, typer.Option(help="Vindex whose gate directions `geometric` uses.")] = None,
    facts: Annotated[Path | None, typer.Option(help="JSON-lines file of your own facts.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the fit/held-out split and the controls.")] = 0,
    known_from: Annotated[float, typer.Option(help="With --all: smallest P of the answer before.")] = KNOWN_FROM,
    limit: Annotated[int | None, typer.Option(help="With --all: at most so many facts of each relation.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as stored).")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    save_patch: Annotated[Path | None, typer.Option(help="Write the forward patch to this file.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the record to this file (- for stdout).")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (.png, .svg, .pdf).")] = None,
) -> None:
    """Delete a fact with a rank-1 change of one gate_proj; measure it on held-out prompts."""
    from probes.delete import record as records

    if all_facts and save_patch:
        raise ProbeError("--save-patch writes one patch; leave --all out")
    quiet = json_file == Path("-")
    _check_targets(json_file, save_patch, plot)
    with progress() as display:
        load = stage(display, "loading", 1)
        bench = _bench(model, method, layer, vindex, facts, chat, seed, dtype, device)
        load(1)
        if all_facts:
            names = relation or [fact.rpartition("/")[2] or fact]
            results = _run_all(bench, names, known_from, limit, display, quiet)
            record = records.all_facts(bench, names, known_from, results)
        else:
            results = [_run_one(bench, bench.panel.find(fact), display)]
            record = records.one(bench, results[0])
    if not quiet and all_facts:
        _print_rates(bench, results)
    elif not quiet:
        _print_fact(bench, results[0])
    if json_file:
        print_json(record) if quiet else _write_json(json_file, record)
    if plot:
        from probes.delete import plot as drawing

        (drawing.all_facts if all_facts else drawing.one)(record, plot)
    if save_patch:
        _save(bench, results[0], save_patch)


def _bench(
    model: str, method: Method, layer: int | None, vindex: Path | None, facts: Path | None, chat: bool, seed: int,
    dtype: str, device: str,
) -> Bench:  # fmt: skip
    from probes import patches
    from probes.delete.experiment import METHODS, Bench, Options
    from probes.model import layers, load

    panel = _panel(model, facts)
    loaded = load(model, dtype=dtype, device=device)
    layers(loaded.model)  # refuses a mixture of experts before any work
    checkpoint = patches.checkpoint_directory(loaded)
    methods = METHODS if method is Method.both else (method.value,)
    options = Options(methods=methods, seed=seed, chat=chat, layer=layer)
    gate = None
    if vindex is not None:
        from vindex import open as open_vindex

        gate = open_vindex(vindex).gate
    return Bench(loaded, panel, options, stored=patches.stored_dtype(checkpoint, 0), gate=gate)


def _panel(model: str, facts: Path | None) -> Panel:
    """The bundled facts, with the user's on top; for the bundled checkpoint the facts it was taught."""
    from probes.facts import atlas, bundled, read
    from vindex.demo.facts import CHECKPOINT

    base = atlas.panel() if Path(model).resolve() == CHECKPOINT.resolve() else bundled()
    return base if facts is None else read(facts, base=base)


def _run_one(bench: Bench, fact: Any, display: Any) -> FactResult:
    from probes.delete.experiment import run, ticks

    task = display.add_task(fact.name, total=ticks(bench))

    def tick(name: str) -> None:
        display.update(task, advance=1, description=f"{fact.name}: {name}")

    bench.tick = tick
    result = run(bench, fact)
    display.update(task, total=1, completed=1, description=fact.name)
    return result


def _run_all(
    bench: Bench, names: list[str], known_from: float, limit: int | None, display: Any, quiet: bool
) -> list[FactResult]:
    from probes.delete.experiment import run

    chosen = [fact for name in names for fact, _ in bench.known(name, known_from)[:limit]]
    if not chosen:
        raise ProbeError(f"{bench.loaded.name}: knows no fact of {', '.join(names)} with P ≥ {known_from}")
    task = display.add_task("facts", total=len(chosen))
    results = []
    for fact in chosen:
        bench.tick = lambda name, who=fact.name: display.update(task, description=f"{who}: {name}")  # type: ignore[misc]
        result = run(bench, fact)
        results.append(result)
        display.advance(task)
        if not quiet:
            for line in _short_lines(result):
                display.console.print(line) if display.console.is_terminal else say(line)
    display.update(task, description="facts")
    return results


def _short_lines(result: FactResult) -> list[str]:
    """One line for each method as a fact of --all is done."""
    lines = []
    for name, found in result.methods.items():
        effect = found.effect
        verdicts = " ".join(f"{v.standard} {_coloured(v.result)}" for v in (found.seed, found.strict))
        lines.append(
            f"{result.sets.fact.name:24} {name:9} layer {found.delta.layer:2}  suppression {effect.headline.loss:6.3f}"
            f"  others {_signed(effect.other_subjects.mean)}  {verdicts}"
        )
    return lines


def _print_fact(bench: Bench, result: FactResult) -> None:
    fact, before = result.sets.fact, result.before
    decode = bench.loaded.tokenizer.decode
    title = f"{fact.name} → {fact.answer}   P = {before.probability:.3f}, rank {before.rank}"
    if not result.known:
        say(f"[bold]{title}[/]")
        say("[yellow]not_applicable[/]: the model does not know this fact (P ≥ 0.1 is needed)")
        say("It says: " + _tops(before.top, decode))
        return
    for name, found in result.methods.items():
        _print_method(bench, result, name, found)
    print_table(
        "Controls at equal ‖ΔW‖",
        ["control", "of", ">suppression", ">reference"],
        [
            (kind, name, _span([c.suppression for c in some]), _span([c.reference_loss for c in some]))
            for name, found in result.methods.items()
            for kind in dict.fromkeys(c.kind for c in found.controls)
            for some in [[c for c in found.controls if c.kind == kind]]
        ],
    )
    say(f"{result.seconds:.0f} s for this fact")


def _print_method(bench: Bench, result: FactResult, name: str, found: MethodResult) -> None:
    from probes.delete.record import groups

    effect, decode = found.effect, bench.loaded.tokenizer.decode
    head = effect.headline
    rows = [
        ("the fact itself", "1/1", _p(head.before.probability), _p(head.after.probability), _signed(head.loss), "", "")
    ]
    for key, group in groups(effect).items():
        label = result.sets.held_out.reference[0].fact if key == "reference" else SET_TITLES[key]
        rows.append((label, *_group_row(group, least=key == "paraphrases")))
    print_table(
        f"{result.sets.fact.name} → {result.sets.fact.answer}, {name}: layer {found.delta.layer}, "
        f"‖ΔW‖/‖W‖ {found.relative_norm:.3f}, {found.seconds:.0f} s",
        ["held-out set", ">known", ">before", ">after", ">loss", ">extreme", "prompt"],
        rows,
        caption=f"loss = (P − P′)/P; extreme: largest loss (paraphrases: smallest). "
        f"Neutral text: KL {effect.neutral_kl:.2g} nats per token.",
    )
    say(f"before: {_tops(head.before.top, decode)}")
    say(f"after:  {_tops(head.after.top, decode)}")
    for verdict in (found.seed, found.strict):
        say(f"[bold]{verdict.standard}[/] {_coloured(verdict.result)}: {verdict.reason}")
        for one in verdict.criteria:
            mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[yellow]–[/]"}[one.holds]
            value = "not measured" if one.value is None else f"{one.value:.3g}"
            worst = f"  {one.worst}" if one.worst else ""
            sign = "≥" if one.relation == ">=" else "≤"
            say(f"  {mark} {one.name}: {value} (must be {sign} {one.limit:g}, n = {one.counted}){worst}")
    say("")


def _group_row(group: SetChange, least: bool) -> tuple[str, ...]:
    if not group.changes:
        return (f"0/{group.asked}", "", "", "", "", "the model knows none")
    count = len(group.changes)
    before = sum(change.before.probability for change in group.changes) / count
    after = sum(change.after.probability for change in group.changes) / count
    extreme = group.least if least else group.worst
    assert extreme is not None
    known = f"{count}/{group.asked}"
    return (known, _p(before), _p(after), _signed(group.mean), _signed(extreme.loss), extreme.name)


def _print_rates(bench: Bench, results: list[FactResult]) -> None:
    from probes.delete.record import rate

    rows = []
    for method in bench.options.methods:
        for standard in ("seed", "strict"):
            found = rate(results, method, standard)
            rows.append(
                (
                    method,
                    standard,
                    f"{found.passed}/{found.of}",
                    f"{found.share:.1%}",
                    f"{found.low:.1%} – {found.high:.1%}",
                )
            )
    print_table("Facts that pass", ["method", "verdict", ">passed", ">share", ">95 % Wilson interval"], rows)
    for result in results:
        found_forward = result.methods.get("forward")
        if found_forward and found_forward.strict.result == "fail":
            say(f"[red]✗[/] {result.sets.fact.name}: {found_forward.strict.reason}")
    seconds = sum(result.seconds for result in results)
    say(f"{len(results)} facts in {seconds:.0f} s, {seconds / len(results):.0f} s each")


def _check_targets(*files: Path | None) -> None:
    """An hour of work must not end at a directory that does not exist."""
    for file in files:
        if file is not None and file != Path("-") and not file.absolute().parent.is_dir():
            raise TargetError(f"{file}: the directory {file.parent} does not exist; make it first")


def _write_json(path: Path, record: Any) -> None:
    import orjson

    try:
        path.write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n")
    except OSError as error:
        raise TargetError(f"{path}: cannot be written: {error.strerror}") from error
    say(f"record written to {path}")


def _save(bench: Bench, result: FactResult, path: Path) -> None:
    from probes import patches

    if not result.methods:
        raise ProbeError(f"{result.sets.fact.name}: no patch to save, the model does not know this fact")
    name = "forward" if "forward" in result.methods else "geometric"
    found = result.methods[name]
    provenance = {
        "model": bench.loaded.name,
        "revision": bench.loaded.revision,
        "fact": result.sets.fact.name,
        "answer": result.sets.fact.answer,
        "seed": result.sets.seed,
        "chat": bench.options.chat,
        "suppression": found.effect.headline.loss,
        "verdicts": {"seed": found.seed.result, "strict": found.strict.result},
    }
    patches.save(path, found.delta, patches.checkpoint_directory(bench.loaded), provenance)
    say(f"{name} patch written to {path}")


def _coloured(result: str) -> str:
    return f"[{COLOURS[result]}]{result}[/]"


def _p(value: float) -> str:
    return f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _span(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    return f"{found[0]:+.3f}" if len(found) == 1 else f"{min(found):+.3f} … {max(found):+.3f}"


def _tops(top: Any, decode: Any) -> str:
    return "  ".join(f"{decode([token])!r} {share:.3f}" for token, share in top).replace("[", "\\[")
