"""`vindex gates`: load, apply, bake, train, evaluate and compare lambda gates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probes.cli import gates_eval, gates_link, gates_mask, gates_panel, gates_train
from probes.cli.gates_options import Directory, Force, Indices, Off, Soft, Threshold, chosen_of
from probes.cli.model import Device, Dtype, Model, Revision, load_model
from vindex.cli import Json, Output
from vindex.console import check_places, command, print_table, progress, put, say, typed
from vindex.errors import ProbeError

if TYPE_CHECKING:
    from probes.gates.stats import Stats

app = typer.Typer(help="Lambda gates: separate recall from reasoning.", no_args_is_help=True, rich_markup_mode=None)


app.command()(gates_panel.panel)
app.command()(gates_train.train)
app.command()(gates_mask.mask)
app.command("eval")(gates_eval.evaluate)
app.command()(gates_link.link)


@app.command()
def stats(directory: Directory, json: Json = False, output: Output = None) -> None:
    """Recompute a directory's figures, and check those that its files state."""
    from probes.gates.stats import read_stats

    check_places(output)
    found = read_stats(directory)
    if not put(found.record(), json, output):
        print_stats(found)
    if found.wrong:
        claim = found.wrong[0]
        raise ProbeError(
            f"{directory}: {len(found.wrong)} stated figure(s) do not hold, first {claim.name} in {claim.file}: "
            f"stated {claim.stated:g}, recomputed {claim.recomputed:.6g}"
        )


def print_stats(found: Stats) -> None:
    """Figures, what the thresholds turn off, and every stated figure beside the recomputed one."""
    rows = [("gates", f"{found.gates:,} ({found.layers} layers × {found.neurons})")]
    rows += [(name, f"{getattr(found, name):.3f}") for name in ("mean", "std", "min", "max")]
    listed = {"neither": "neither those below nor those above 0.5", "missing": "no such file"}
    rows.append(("neuron_indices.json", listed.get(found.indices, f"the neurons {found.indices} 0.5")))
    print_table(f"λ of {found.name}", ["", ""], rows)
    points = [(f"{p.threshold:.6g}", f"{p.off_fraction:.1%}", f"{p.off:,}") for p in found.points]
    print_table("thresholds", [">threshold", ">neurons off", ">number"], points)
    if not found.claims:
        say("gate_stats.json: states none of these figures, so that there is nothing to check")
        return
    checks = [(c.name, f"{c.stated:.6g}", f"{c.recomputed:.6g}", "yes" if c.holds else "NO") for c in found.claims]
    print_table("gate_stats.json", ["stated", ">value", ">recomputed", ">agree to 0.001"], checks)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="GATES", help="A directory of gates, or a .pt or .safetensors file.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory to write, with every file of the layout.")
    ],
    force: Force = False,
    json: Json = False,
) -> None:
    """Write gates again in the published layout, as .pt and as .safetensors."""
    from probes.gates.gates import Gates

    gates = Gates.read(source)
    gates.save(output, force=force, reads=source)
    if not put(gates.record() | {"directory": str(output)}, json, None):
        say(f"wrote {output}; next: {command('gates', 'stats', output)}")


@app.command()
def apply(
    model: Model,
    directory: Directory,
    prompt: Annotated[list[str], typer.Option(help="What the model goes on from; repeatable.")],
    threshold: Threshold = None,
    off: Off = None,
    indices: Indices = False,
    soft: Soft = False,
    scale_mode: Annotated[
        str | None, typer.Option(help="Rescaling: none, mean, energy. Default: as trained for --soft, none for masks.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the chat template, thinking off.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens to write.")] = 24,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    json: Json = False,
    output: Output = None,
) -> None:
    """Write on from a prompt, with and without gates."""
    from probes.gates.gates import Gates
    from probes.gates.options import scale_of
    from probes.gates.score import beside

    check_places(output)
    gates = Gates.read(directory)
    chosen = chosen_of(gates, directory, threshold, off, indices, soft)
    scale = scale_of(scale_mode) if scale_mode else gates.scale_mode if soft else "none"
    loaded = load_model(model, device=device, dtype=dtype, revision=revision)
    written = beside(loaded, [typed(text) for text in prompt], chosen.factors(scale), tokens, chat=chat)
    outputs = [one._asdict() for one in written]
    record = {"gates": gates.name, "applied": chosen.what, "scale_mode": scale, "outputs": outputs}
    if put(record, json, output):
        return
    for one in written:
        rows = [("without", one.base.strip()), (f"with ({chosen.what}, scale {scale})", one.gated.strip())]
        print_table(one.prompt, ["gates", "the model goes on"], rows)


@app.command()
def bake(
    model: Model,
    directory: Directory,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of the new checkpoint.")],
    threshold: Threshold = None,
    off: Off = None,
    indices: Indices = False,
    soft: Soft = False,
    revision: Revision = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an ordinary checkpoint in which masked neurons are zero, or with --soft every one is scaled by its λ."""
    from probes.gates.gates import Gates
    from vindex.places import check_directory

    check_directory(output, force=force, reads=[directory])
    chosen = chosen_of(Gates.read(directory), directory, threshold, off, indices, soft)
    with progress() as stages:
        off_now = chosen.bake(model, output, revision=revision, force=force, reads=directory, progress=stages)
    made = chosen.made_of()
    if put(made | {"model": model, "checkpoint": str(output)}, json, None):
        return
    if soft:
        what = f"soft; up_proj rows are scaled by λ, rescaling {made['scale_mode']}"
    else:
        total = chosen.factors().numel()
        what = f"{off_now:,} of {total:,} neurons off ({chosen.what}); gate_proj and up_proj rows are zero"
    say(f"wrote {output}: {what}")
    say(f"next: load it as any checkpoint, or {command('probe', output)}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="GATES", help="A directory of gates.")],
    second: Annotated[Path, typer.Argument(metavar="GATES", help="Another, of the same model.")],
    json: Json = False,
    output: Output = None,
) -> None:
    """Do two sets of gates mark the same neurons? Beside what chance gives."""
    from probes.gates.compare import compare as run
    from probes.gates.gates import Gates

    check_places(output)
    found = run(Gates.read(first), Gates.read(second))
    if put(found.record(), json, output):
        return
    rows = [
        (f"{o.off_fraction:.0%}", *(f"{n:,}" for n in (o.first_off, o.second_off, o.both)), f"{o.jaccard:.3f}",
         f"{o.chance:.3f}") for o in found.overlaps
    ]  # fmt: skip
    columns = [">off", f">in {first.name}", f">in {second.name}", ">in both", ">Jaccard", ">by chance"]
    print_table("neurons off", columns, rows, caption=f"correlation of λ over all neurons: {found.correlation:.3f}")
    within = [(str(layer), f"{value:.3f}") for layer, value in enumerate(found.layers)]
    print_table("", [">layer", ">correlation of λ"], within)
