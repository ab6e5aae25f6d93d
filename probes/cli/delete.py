"""`vindex gate3`: delete a fact with a rank-1 patch, and prove it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.cli import delete_tables as tables
from probes.cli.model import load_model
from vindex.console import print_json, progress, say, typed, warn
from vindex.demo import or_bundled
from vindex.errors import PatchError, ProbeError, QueryError

if TYPE_CHECKING:
    from probes.deletion.results import Deletion, Deletions
    from probes.facts import Panel
    from probes.live.load import Loaded
    from vindex.progress import Progress

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or Hub id, or atlas.")]
Facts = Annotated[Path | None, typer.Option(metavar="FILE", help="JSON-lines file of your own facts.")]
Attacked = Annotated[
    bool, typer.Option("--certificate/--no-certificate", help="Attack what was deleted (verdict `robust`).")
]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="float32, bfloat16, float16 or auto (as stored).")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record instead of the tables.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the record (JSON) here.")]


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
    known_from: Annotated[float, typer.Option(help="With --all: smallest P of the answer before.")] = 0.2,
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

    Example: vindex gate3 atlas --fact France/capital --save-patch paris.safetensors
    """
    from probes.deletion.delete import delete, delete_all
    from probes.deletion.methods import named, require_patch
    from probes.deletion.results import Deletion

    methods = named(method or "both")
    if all_facts and save_patch:
        raise ProbeError("--save-patch writes one patch; leave --all out")
    if resume and not (all_facts and output):
        raise QueryError("--resume goes on with the record of --all; give --all and -o FILE")
    if save_patch:
        require_patch(methods)
    _check_targets(output, save_patch, plot)
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

        with progress() as stages, _stopped(lambda: _kept(finished, output)):
            loaded, panel = _load(model, facts, dtype, device, stages)
            found = delete_all(loaded, names, facts=panel, each=each, progress=stages, **choices)
    else:
        with progress() as stages, _stopped(lambda: "nothing was written"):
            loaded, panel = _load(model, facts, dtype, device, stages)
            found = delete(loaded, typed(fact), facts=panel, progress=stages, **choices)
    _show(found, json, output)
    if plot:
        found.plot(plot)
    if save_patch and isinstance(found, Deletion):
        found.save_patch(save_patch)
    if not json:
        _say_next(model, output, save_patch, all_facts)


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

    Example: vindex gate3 verify atlas paris.safetensors
    """
    from probes.deletion.delete import verify_patch
    from probes.weights import patches

    _check_targets(output, None, None)
    found = patches.read(patch)
    with progress() as stages, _stopped(lambda: "nothing was written"):
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
        say(f"next: vindex patch apply {model} {patch} -o DIR")


def _load(model: str, facts: Path | None, dtype: str, device: str, stages: Progress) -> tuple[Loaded, Panel]:
    """The model and its facts, which are read first."""
    from probes.deletion.bench import panel_for

    source = or_bundled(model)
    panel = panel_for(source, facts)
    return load_model(source, dtype=dtype, device=device, progress=stages), panel


def _show(found: Deletion | Deletions, json: bool, output: Path | None) -> None:
    """Print the record or the tables, and write the record."""
    from vindex.targets import write_json

    if output:
        write_json(output, found.record(), indent=True)
    if json:
        print_json(found.record())
    else:
        tables.show(found)


def _say_next(model: str, output: Path | None, save_patch: Path | None, all_facts: bool) -> None:
    if output:
        say(f"record written to {output}")
    if save_patch:
        say(f"patch written to {save_patch}")
        say(f"next: vindex gate3 verify {model} {save_patch}, or vindex patch apply {model} {save_patch} -o DIR")
    elif all_facts:
        say(f"next: vindex gate3 {model} --fact SUBJECT/RELATION shows one of them in full")
    else:
        say("next: the same with --save-patch FILE keeps the patch")


@contextmanager
def _stopped(kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C says what became of the work."""
    try:
        yield
    except KeyboardInterrupt:
        warn(f"stopped; {kept()}")
        raise typer.Exit(130) from None


def _kept(finished: Sequence[str], output: Path | None) -> str:
    if not finished:
        return "no fact is finished, nothing was written"
    several = f"{len(finished)} facts are finished" if len(finished) > 1 else "1 fact is finished"
    if output is None:
        return f"{several} and not kept, for want of -o FILE"
    return f"{several} and stand{'s' * (len(finished) == 1)} in {output}: repeat with --resume to go on"


def _check_targets(output: Path | None, save_patch: Path | None, plot: Path | None) -> None:
    """An hour of work must not end at a place that cannot be written to."""
    from vindex.charts import check_target
    from vindex.targets import check_file

    for path in (output, save_patch):
        if path is not None:
            check_file(path)
    if plot is not None:
        check_target(plot)
