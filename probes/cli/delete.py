"""`vindex gate3`: delete a fact with a rank-1 patch, and prove it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.cli import delete_tables as gate3_tables
from probes.cli.model import load_model
from vindex.console import print_json, progress, say, typed
from vindex.demo import or_bundled
from vindex.errors import ProbeError

if TYPE_CHECKING:
    from probes.deletion.bench import Bench, Options
    from probes.deletion.experiment import FactResult
    from probes.facts import Panel
    from vindex.progress import Advance, Progress

KNOWN_FROM = 0.2
STDOUT = Path("-")


Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as stored).")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the record to this file (- for stdout).")]


def gate3(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hub id.")],
    fact: Annotated[
        str, typer.Option(help="SUBJECT/RELATION to delete; with --all the relation counts.")
    ] = "France/capital",
    all_facts: Annotated[bool, typer.Option("--all", help="Every fact of the relation that the model knows.")] = False,
    relation: Annotated[list[str] | None, typer.Option(help="Relation for --all (repeatable).")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="forward, geometric, rome, rome_plain, gradient, ultraedit or neurons (repeatable, or separated by "
            "commas), both (forward and geometric, the default) or all."
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Layer to patch; default: the method chooses.")] = None,
    vindex: Annotated[Path | None, typer.Option(help="Vindex whose gate directions `geometric` uses.")] = None,
    facts: Annotated[Path | None, typer.Option(help="JSON-lines file of your own facts.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the fit/held-out split and the controls.")] = 0,
    known_from: Annotated[float, typer.Option(help="With --all: smallest P of the answer before.")] = KNOWN_FROM,
    limit: Annotated[int | None, typer.Option(help="With --all: at most so many facts of each relation.")] = None,
    certificate: Annotated[
        bool, typer.Option("--certificate/--no-certificate", help="Attack what was deleted (verdict `robust`).")
    ] = True,
    dtype: Dtype = "float32",
    device: Device = "auto",
    save_patch: Annotated[Path | None, typer.Option(help="Write the forward patch to this file.")] = None,
    json_file: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (.png, .svg, .pdf).")] = None,
) -> None:
    """Delete a fact with a rank-1 patch, and prove it.

    ΔW changes one gate_proj; everything is measured on held-out prompts by real forward passes.
    """
    from probes.deletion.bench import DEFAULT
    from probes.deletion.experiment import run
    from probes.deletion.methods import named
    from probes.live.match import weights_sha256

    if all_facts and save_patch:
        raise ProbeError("--save-patch writes one patch; leave --all out")
    methods = named([name.strip() for names in method or ["both"] for name in names.split(",")])
    if save_patch and not set(methods) & set(DEFAULT):
        raise ProbeError(
            f"no patch to save: a patch is a rank-1 change of a gate_proj, which {' and '.join(methods)} make none of; "
            "add --method forward"
        )
    _check_targets(json_file, save_patch, plot)
    with progress() as stage:
        load = stage("loading", 1)
        bench = _bench(or_bundled(model), methods, layer, vindex, facts, chat, seed, certificate, dtype, device)
        load(1)
        digests = weights_sha256(bench.loaded, stage)
        if all_facts:
            names = [typed(name) for name in relation or [fact.rpartition("/")[2] or fact]]
            _all(bench, digests, names, known_from, limit, stage, json_file, plot)
            return
        result = _run_one(bench, bench.panel.find(typed(fact)), stage, run)
    _one(bench, digests, result, json_file, plot, save_patch)


def verify(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hub id: the weights without the patch.")],
    patch: Annotated[Path, typer.Argument(help="Patch file, from gate3 --save-patch.")],
    fact: Annotated[str | None, typer.Option(help="SUBJECT/RELATION; default: as the patch says.")] = None,
    facts: Annotated[Path | None, typer.Option(help="JSON-lines file of your own facts.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--plain", help="How to ask; default: as the patch says.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the split; default: as the patch says.")] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json_file: Json = None,
) -> None:
    """Measure a patch again from the base and the patch alone, and check the verdicts that it records.

    Exit status 1 where one is not confirmed.
    """
    from probes.deletion.bench import Options
    from probes.deletion.verify import claimed
    from probes.deletion.verify import verify as verified
    from probes.live.match import weights_sha256
    from probes.weights import patches

    _check_targets(json_file, None, None)
    found = patches.read(patch)
    said = claimed(found)
    name = said.fact if fact is None else typed(fact)
    if name is None:
        raise ProbeError(f"{patch}: does not say which fact it deletes; give --fact SUBJECT/RELATION")
    options = Options((), said.seed if seed is None else seed, said.chat if chat is None else chat)
    with progress() as stage:
        load = stage("loading", 1)
        bench = _on_bench(or_bundled(model), facts, options, dtype, device)
        load(1)
        digests = weights_sha256(bench.loaded, stage)
        work = lambda bench, fact: verified(bench, found, fact)  # noqa: E731
        result, claims = _run_one(bench, bench.panel.find(name), stage, work)
    _one(bench, digests, result, json_file, None, None, {"claims": [one._asdict() for one in claims]})
    if json_file != STDOUT:
        gate3_tables.claims(claims)
    wrong = [one for one in claims if not one.holds]
    if wrong:
        raise ProbeError(
            f"{patch}: {len(wrong)} recorded verdict(s) not confirmed, first {wrong[0].standard}: "
            f"{wrong[0].recorded} recorded, {wrong[0].measured} measured"
        )


def _one(
    bench: Bench,
    digests: Mapping[str, str],
    result: FactResult,
    json_file: Path | None,
    plot: Path | None,
    save_patch: Path | None,
    more: dict[str, Any] | None = None,
) -> None:
    """Print and write everything about one fact, and what more belongs in its record."""
    from probes.deletion import plot as drawing
    from probes.deletion import record as records

    record = records.one(bench, result, digests) | (more or {})
    if json_file == STDOUT:
        print_json(record)
    else:
        gate3_tables.fact(bench, result)
        _write_json(json_file, record)
    if plot:
        drawing.one(record, plot)
    if save_patch:
        _save(bench, result, save_patch)


def _all(
    bench: Bench,
    digests: Mapping[str, str],
    names: list[str],
    known_from: float,
    limit: int | None,
    stage: Progress,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Run every known fact of the relations. The record is written after each, so that a stopped run leaves one."""
    from probes.deletion import plot as drawing
    from probes.deletion import record as records
    from probes.deletion.experiment import run

    chosen = [fact for name in names for fact, _ in bench.known(name, known_from)[:limit]]
    if not chosen:
        raise ProbeError(f"{bench.loaded.name}: knows no fact of {', '.join(names)} with P ≥ {known_from}")
    advance = stage("facts", len(chosen))
    results: list[FactResult] = []
    record: dict[str, Any] = {}
    for fact in chosen:
        bench.tick = partial(_told, advance, fact.name)
        results.append(run(bench, fact))
        record = records.all_facts(bench, names, known_from, results, digests)
        advance(1)
        if json_file != STDOUT:
            _write_json(json_file, record)
            gate3_tables.short_lines(results[-1])
    if json_file == STDOUT:
        print_json(record)
    else:
        gate3_tables.rates(bench, results)
    if plot:
        drawing.all_facts(record, plot)


def _told(advance: Advance, who: str, what: str) -> None:
    advance(0, f"{who}: {what}")


def _bench(
    model: str, methods: tuple[str, ...], layer: int | None, vindex: Path | None, facts: Path | None, chat: bool,
    seed: int, certificate: bool, dtype: str, device: str,
) -> Bench:  # fmt: skip
    from probes.deletion.bench import Options

    gate = None
    if vindex is not None:
        from vindex import open as open_vindex

        gate = open_vindex(vindex).gate
    options = Options(methods=methods, seed=seed, chat=chat, layer=layer, certificate=certificate)
    return _on_bench(model, facts, options, dtype, device, gate=gate)


def _on_bench(model: str, facts: Path | None, options: Options, dtype: str, device: str, **more: Any) -> Bench:
    """Load the model and put it on the bench with its facts."""
    from probes.deletion.bench import Bench
    from probes.live.sites import layers
    from probes.weights import patches

    panel = _panel(model, facts)
    loaded = load_model(model, dtype=dtype, device=device)
    layers(loaded.model)  # refuses a mixture of experts before any work
    return Bench(loaded, panel, options, stored=patches.stored_dtype(loaded.path, 0), **more)


def _panel(model: str, facts: Path | None) -> Panel:
    """The bundled facts, with the user's on top; for the bundled checkpoint the facts it was taught."""
    from probes.atlas import panel as atlas
    from probes.facts import bundled, read
    from vindex.demo import CHECKPOINT

    base = atlas.panel() if Path(model).resolve() == CHECKPOINT.resolve() else bundled()
    return base if facts is None else read(facts, base=base)


def _run_one(bench: Bench, fact: Any, stage: Progress, work: Callable[[Bench, Any], Any]) -> Any:
    """Do the work on one fact, telling its stages."""
    from probes.deletion.experiment import ticks

    advance = stage(fact.name, ticks(bench))
    bench.tick = lambda name: advance(1, name)
    return work(bench, fact)


def _check_targets(json_file: Path | None, save_patch: Path | None, plot: Path | None) -> None:
    """An hour of work must not end at a place that cannot be written to."""
    from probes.deletion.plot import check_target
    from vindex.targets import check_file

    if json_file is not None and json_file != STDOUT:
        check_file(json_file, or_stdout=True)
    if save_patch is not None:
        check_file(save_patch)
    if plot is not None:
        check_target(plot)


def _write_json(path: Path | None, record: Any) -> None:
    from vindex.targets import write_json

    if path is not None:
        write_json(path, record, indent=True)


def _save(bench: Bench, result: FactResult, path: Path) -> None:
    from probes.live.sites import weight
    from probes.weights import patches
    from probes.weights.delta import Delta

    if not result.methods:
        raise ProbeError(f"{result.sets.fact.name}: no patch to save, the model does not know this fact")
    found, delta = next(
        (found, found.delta) for found in result.methods.values() if isinstance(found.delta, Delta)
    )  # `gate3` has refused methods that make none
    provenance = {
        "model": bench.loaded.name,
        "revision": bench.loaded.revision,
        "fact": result.sets.fact.name,
        "answer": result.sets.fact.answer,
        "seed": result.sets.seed,
        "chat": bench.options.chat,
        "suppression": found.effect.headline.loss,
        "verdicts": {name: verdict.result for name, verdict in found.verdicts.items()},
    }
    unpatched = weight(bench.loaded.model, "gate_proj", delta.layer)
    patches.save(path, delta, bench.loaded.path, provenance, unpatched)
    say(f"{delta.method} patch written to {path}")
    say(f"next: vindex gate3 verify MODEL {path}, or vindex patch apply MODEL {path} -o DIR")
