"""`vindex gates`: load, apply, bake, train, evaluate and compare lambda gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probes.cli import gates_eval, gates_train
from probes.cli.gates_options import (
    Device,
    Directory,
    Dtype,
    Indices,
    Json,
    Model,
    Off,
    Revision,
    Scale,
    Threshold,
    gates_in,
    mask_of,
    scale_of,
)
from probes.cli.model import load_model
from vindex.console import print_json, print_table, progress, say, typed
from vindex.demo import or_bundled
from vindex.errors import ProbeError

app = typer.Typer(
    help="Lambda gates: separate recall from reasoning.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command()(gates_train.train)
app.command("eval")(gates_eval.evaluate)


@app.command()
def stats(directory: Directory, json: Json = False) -> None:
    """Recompute a directory's figures, and check those that its files state."""
    from probes.gates.stats import read_stats

    found = read_stats(directory)
    if json:
        print_json(found._asdict() | {"points": [p._asdict() for p in found.points]} | {
            "claims": [claim._asdict() | {"holds": claim.holds} for claim in found.claims]})  # fmt: skip
    else:
        rows = [("gates", f"{found.gates:,} ({found.layers} layers × {found.neurons})")]
        rows += [(name, f"{getattr(found, name):.3f}") for name in ("mean", "std", "min", "max")]
        listed = {"neither": "neither those below nor those above 0.5", "missing": "no such file"}
        rows.append(("neuron_indices.json", listed.get(found.indices, f"the neurons {found.indices} 0.5")))
        print_table(f"λ of {directory.name}", ["", ""], rows)
        points = [(f"{p.threshold:.6g}", f"{p.off_fraction:.1%}", f"{p.off:,}") for p in found.points]
        print_table("thresholds", [">threshold", ">neurons off", ">number"], points)
        if found.claims:
            checks = [
                (c.name, f"{c.stated:.6g}", f"{c.recomputed:.6g}", "yes" if c.holds else "NO") for c in found.claims
            ]
            print_table("gate_stats.json", ["stated", ">value", ">recomputed", ">agree to 0.001"], checks)
    wrong = [claim for claim in found.claims if not claim.holds]
    if wrong:
        claim = wrong[0]
        raise ProbeError(
            f"{directory}: {len(wrong)} stated figure(s) do not hold, first {claim.name} in {claim.file}: "
            f"stated {claim.stated:g}, recomputed {claim.recomputed:.6g}"
        )


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A directory of gates, or a .pt or .safetensors file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write, with every file of the layout.")],
) -> None:
    """Write gates again in the published layout, as .pt and as .safetensors."""
    from probes.gates.files import read_gates, write_gates
    from vindex.kinds import GATE_FILES
    from vindex.places import new_directory

    gates = read_gates(source)
    with new_directory(output, GATE_FILES, making="directory of gates", reads=[source]) as partial:
        write_gates(gates, partial)
    say(f"wrote {output}")


@app.command()
def apply(
    model: Model,
    directory: Directory,
    prompt: Annotated[list[str], typer.Option(help="What the model goes on from; repeatable.")],
    threshold: Threshold = None,
    off: Off = None,
    indices: Indices = False,
    soft: Annotated[bool, typer.Option("--soft", help="Multiply by λ instead of masking.")] = False,
    scale: Scale = "none",
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the chat template, thinking off.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens to write.")] = 24,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Write on from a prompt, with and without gates."""
    from probes.gates.apply import require_fit
    from probes.gates.masks import rescaled
    from probes.gates.score import write
    from probes.live.chat import ask, render

    gates = gates_in(directory)
    values, what = (gates.values, "soft") if soft else mask_of(gates, directory, threshold, off, indices, or_soft=True)
    if soft and (threshold is not None or off is not None or indices):
        raise ProbeError("--soft with a mask: choose one of --soft, --threshold, --off, --indices")
    factors = rescaled(values.float(), scale_of(scale))
    loaded = load_model(model, device=device, dtype=dtype, revision=revision)
    require_fit(factors.shape, loaded.model)
    prompt = [typed(text) for text in prompt]
    asked = [render(loaded.tokenizer, ask(text), prompt=True).text if chat else text for text in prompt]
    written = [(write(loaded, [text], None, tokens)[0], write(loaded, [text], factors, tokens)[0]) for text in asked]
    if json:
        kinds = ({"prompt": p, "base": base, "gated": gated} for p, (base, gated) in zip(prompt, written, strict=True))
        print_json({"gates": directory.name, "applied": what, "scale_mode": scale, "outputs": list(kinds)})
        return
    for text, (base, gated) in zip(prompt, written, strict=True):
        rows = [("without", base.strip()), (f"with ({what}, scale {scale})", gated.strip())]
        print_table(text, ["gates", "the model goes on"], rows)


@app.command()
def bake(
    model: Model,
    directory: Directory,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the new checkpoint.")],
    threshold: Threshold = None,
    off: Off = None,
    indices: Indices = False,
    revision: Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing target.")] = False,
) -> None:
    """Write an ordinary checkpoint in which the masked neurons are zero."""
    from probes.live.load import find
    from probes.weights.bake import bake as bake_checkpoint
    from vindex.places import check_directory

    check_directory(output, force=force, reads=[directory])
    gates = gates_in(directory)
    keep, what = mask_of(gates, directory, threshold, off, indices)
    source = find(or_bundled(model), revision)
    checkpoint, size = source.directory, sum(source.sizes.values())
    note = {"checkpoint": source.name, "gates": directory.name, "mask": what, "neurons_off": int((~keep).sum())}
    with progress() as stage:
        count = bake_checkpoint(
            checkpoint, keep, output, note=note, force=force, reads=[directory],
            advance=stage("copying", size),
        )  # fmt: skip
    say(f"wrote {output}: {count:,} of {keep.numel():,} neurons off ({what}); gate_proj and up_proj rows are zero")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A directory of gates.")],
    second: Annotated[Path, typer.Argument(help="Another, of the same model.")],
    json: Json = False,
) -> None:
    """Do two sets of gates mark the same neurons? Beside what chance gives."""
    from probes.gates.compare import compare as run
    from probes.gates.files import read_gates

    found = run(read_gates(first), read_gates(second))
    if json:
        print_json(found._asdict() | {"overlaps": [overlap._asdict() for overlap in found.overlaps]})
        return
    rows = [
        (
            f"{o.off_fraction:.0%}",
            f"{o.first_off:,}",
            f"{o.second_off:,}",
            f"{o.both:,}",
            f"{o.jaccard:.3f}",
            f"{o.chance:.3f}",
        )
        for o in found.overlaps
    ]
    columns = [">off", f">in {first.name}", f">in {second.name}", ">in both", ">Jaccard", ">by chance"]
    print_table("neurons off", columns, rows, caption=f"correlation of λ over all neurons: {found.correlation:.3f}")
    within = [(str(layer), f"{value:.3f}") for layer, value in enumerate(found.layers)]
    print_table("", [">layer", ">correlation of λ"], within)
