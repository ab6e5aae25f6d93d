"""`vindex gate3`: delete a fact with a rank-1 patch, and prove it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.cli import delete_tables as tables
from probes.cli.model import Device, Dtype, Model, load_model
from probes.deletion.options import KNOWN_FROM
from vindex.cli import Json, Output
from vindex.console import check_places, command, progress, put, say, say_places, stopped, typed
from vindex.demo import or_bundled
from vindex.errors import PatchError, ProbeError, QueryError

if TYPE_CHECKING:
    from probes.deletion.results import Deletion, Deletions
    from probes.facts import Panel
    from probes.live.load import Loaded
    from vindex.progress import Progress

Facts = Annotated[Path | None, typer.Option(metavar="FILE", help="JSON-lines file of your own facts.")]
Attacked = Annotated[
    bool, typer.Option("--certificate/--no-certificate", help="Attack what was deleted (verdict `robust`).")
]


def gate3(
    model: Model,
    fact: Annotated[
        str, typer.Option(metavar="NAME", help="SUBJECT/RELATION to delete; with --all the relation counts.")
    ] = "France/capital",
    all_facts: Annotated[bool, typer.Option("--all", help="Every fact of the relation that the model knows.")] = False,
    relation: Annotated[list[str] | None, typer.Option(metavar="NAME", help="With --all: repeatable.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="forward, geometric, rome, rome_plain, gradient, ultraedit or neurons (repeatable, or separated by "
            "commas), both (forward and geometric, the default) or all.",
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Layer to patch; default: the method chooses.")] = None,
    vindex: Annotated[
        str | None, typer.Option(metavar="VINDEX", help="Vindex whose gate directions `geometric` uses.")
    ] = None,
    facts: Facts = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the fit/held-out split and the controls.")] = 0,
    known_from: Annotated[
        float | None, typer.Option(help="With --all: smallest P of the answer before.", show_default=str(KNOWN_FROM))
    ] = None,
    limit: Annotated[int | None, typer.Option(help="With --all: at most so many facts of each relation.")] = None,
    certificate: Attacked = True,
    dtype: Dtype = "float32",
    device: Device = "auto",
    save_patch: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the patch here (of forward, where it runs).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With --all: skip the facts that -o already has.")] = False,
    json: Json = False,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the record to this .html or .png.")] = None,
) -> None:
    """Delete a fact with a rank-1 patch, and prove it.

    ΔW changes one gate_proj; everything is measured on held-out prompts by real forward passes.
    """
    from probes.deletion.delete import delete, delete_all
    from probes.deletion.experiment import named, require_patch
    from probes.deletion.results import Deletion
    from vindex.targets import check_file

    methods = named(method or "both")
    of_all = {"--relation": relation, "--known-from": known_from, "--limit": limit}
    _require_sense(all_facts, of_all, resume, output, save_patch)
    if save_patch:
        require_patch(methods)
        check_file(save_patch)
    check_places(output, plot)
    choices: dict[str, Any] = {"method": methods, "layer": layer, "vindex": vindex, "chat": chat, "seed": seed}
    choices["certificate"] = certificate
    found: Deletion | Deletions
    if all_facts:
        names = [typed(name) for name in relation or [fact.rpartition("/")[2] or fact]]
        choices |= {"known_from": known_from, "limit": limit, "output": output, "resume": resume}
        finished: list[str] = []

        def each(one: Deletion) -> None:
            finished.append(one.fact.name)
            if not json:
                tables.short_lines(one)

        with progress() as stages, stopped(lambda: _kept(finished, output)):
            loaded, panel = _load(model, facts, dtype, device, stages)
            found = delete_all(loaded, names, facts=panel, each=each, progress=stages, **choices)
    else:
        with progress() as stages, stopped():
            loaded, panel = _load(model, facts, dtype, device, stages)
            found = delete(loaded, typed(fact), facts=panel, progress=stages, **choices)
    _show(found, json, output)
    if plot:
        found.plot(plot)
    if save_patch and isinstance(found, Deletion):
        found.save_patch(save_patch)
    if not json:
        say_places(record=output, patch=save_patch, plot=plot)
        say(f"next: {_next(model, save_patch, all_facts)}")


def verify(
    model: Model,
    patch: Annotated[Path, typer.Argument(metavar="FILE", help="Patch file, from gate3 --save-patch.")],
    fact: Annotated[
        str | None, typer.Option(metavar="NAME", help="SUBJECT/RELATION; default: as the patch says.")
    ] = None,
    facts: Facts = None,
    chat: Annotated[bool | None, typer.Option("--chat/--plain", help="How to ask; default: as the patch says.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the split; default: as the patch says.")] = None,
    certificate: Attacked = True,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json: Json = False,
    output: Output = None,
) -> None:
    """Measure a patch again from the base and the patch alone, and check the verdicts that it records.

    Exit status 1 where one is not confirmed.
    """
    from probes.deletion.delete import verify_patch
    from probes.weights import patches

    check_places(output)
    found = patches.read(patch)
    with progress() as stages, stopped():
        loaded, panel = _load(model, facts, dtype, device, stages)
        name = None if fact is None else typed(fact)
        done = verify_patch(
            loaded, found, fact=name, facts=panel, chat=chat, seed=seed, certificate=certificate, progress=stages
        )
    _show(done, json, output)
    wrong = [one for one in done.claims or () if not one.holds]
    if wrong:
        raise PatchError(
            f"{patch}: {len(wrong)} recorded verdict(s) not confirmed, first {wrong[0].standard}: "
            f"{wrong[0].recorded} recorded, {wrong[0].measured} measured"
        )
    if not json:
        say(f"next: {command('patch', 'apply', model, patch, '-o', 'DIR')}")


def _require_sense(
    all_facts: bool, of_all: Mapping[str, Any], resume: bool, output: Path | None, save_patch: Path | None
) -> None:
    """Raise ProbeError or QueryError where options do not go together, as those of --all do not without it."""
    if all_facts and save_patch:
        raise ProbeError("--save-patch writes one patch; leave --all out")
    if resume and not (all_facts and output):
        raise QueryError("--resume goes on with the record of --all; give --all and -o FILE")
    alone = next((name for name, given in of_all.items() if given is not None), None)
    if alone and not all_facts:
        raise QueryError(f"{alone} chooses among the facts of --all; give --all, or name one fact with --fact")


def _load(model: str, facts: Path | None, dtype: str, device: str, stages: Progress) -> tuple[Loaded, Panel]:
    """The model and its facts, which are read first."""
    from probes.deletion.bench import panel_for

    source = or_bundled(model)
    panel = panel_for(source, facts)
    return load_model(source, dtype=dtype, device=device, progress=stages), panel


def _show(found: Deletion | Deletions, json: bool, output: Path | None) -> None:
    if not put(found.record(), json, output):
        tables.show(found)


def _next(model: str, save_patch: Path | None, all_facts: bool) -> str:
    if save_patch:
        apply = command("patch", "apply", model, save_patch, "-o", "DIR")
        return f"{command('gate3', 'verify', model, save_patch)}, or {apply}"
    if all_facts:
        return f"{command('gate3', model, '--fact', 'SUBJECT/RELATION')} shows one of them in full"
    return "the same with --save-patch FILE keeps the patch"


def _kept(finished: Sequence[str], output: Path | None) -> str:
    if not finished:
        return "no fact is finished, nothing was written"
    several = f"{len(finished)} facts are finished" if len(finished) > 1 else "1 fact is finished"
    if output is None:
        return f"{several} and not kept, for want of -o FILE"
    return f"{several} and stand{'s' * (len(finished) == 1)} in {output}: repeat with --resume to go on"
