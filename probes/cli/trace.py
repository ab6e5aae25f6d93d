"""`vindex trace`: a prompt through a model, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.cli.model import Device, Dtype, Model, Revision, Texts, load_model
from vindex.cli import Json
from vindex.console import command, print_json, print_table, progress, say, stopped, styled, typed, visible
from vindex.errors import QueryError

if TYPE_CHECKING:
    from probes.tracing.result import Trace
    from vindex.reader import Vindex

POLE_SHOWN = 3
CHANGED = ("without", "with its value in the other prompt")  # by whether there is one
LONGEST_PIECE = 10


def trace(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model reads.")],
    vindex: Annotated[
        str | None, typer.Option(metavar="VINDEX", help="A vindex of the same model: what its FFNs read and write.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help='A token, quoted with its leading space: " Paris". Default: the model\'s answer.')
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="PROMPT", help="Trace the difference to this prompt of as many tokens.")
    ] = None,
    patch: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Before and after this patch (gate3 --save-patch).")
    ] = None,
    check: Annotated[
        int, typer.Option(metavar="N", help="Take the N strongest reads and writes out of the live model.")
    ] = 0,
    position: Annotated[int, typer.Option(help="Of the token, from 0; negative from the end.")] = -1,
    text: Texts = None,
    layer: Annotated[int | None, typer.Option(help="Show the reads and writes of this layer.")] = None,
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Directions to show.")] = 10,
    json: Json = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write a page (.html) or the record (.json).")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """Follow a prompt through a model, layer by layer.

    What the logit lens says at each layer, what each layer adds to the answer, and with a vindex which directions read
    and write.
    """
    import probes
    import vindex as artifact
    from probes.tracing.target import check_target

    if output:
        check_target(output)
    opened = artifact.open(vindex) if vindex else None
    if layer is not None:
        _check_layer(layer, opened)
    if text and opened is None:
        raise QueryError("--text is what reads are held against; give a --vindex of the model")
    with stopped(), progress() as stage:
        loaded = load_model(model, dtype=dtype, device=device, revision=revision, progress=stage)
        found = probes.trace(
            loaded,
            typed(prompt),
            vindex=opened,
            target=None if target is None else typed(target),
            against=None if against is None else typed(against),
            patch=patch,
            check=check,
            position=position,
            text=text,
            progress=stage,
        )
    if output:
        found.save(output)
    if json:
        print_json(found.record())
        return
    print_trace(found, layer, k)
    if output:
        say(f"wrote {output}{': open it in a browser' if output.suffix == '.html' else ''}")
    say(f"next: {_next(found, model, vindex, output)}")


def _check_layer(layer: int, vindex: Vindex | None) -> None:
    """Raise QueryError now if there is no such layer to show later."""
    if vindex is None:
        raise QueryError(f"--layer {layer} shows what the FFN there reads and writes; give a --vindex of the model")
    if not 0 <= layer < vindex.index.num_layers:
        raise QueryError(f"--layer {layer}: {vindex.name} has layers 0 to {vindex.index.num_layers - 1}")


def print_trace(found: Trace, layer: int | None, k: int) -> None:
    """The tokens, the trajectory, and what there is of reads, writes, checks and a patch's effect."""
    _print_tokens(found)
    _print_trajectory(found)
    if found.directions is not None:
        _print_reads(found, layer, k)
        _print_writes(found, layer, k)
        if found.directions.tested:
            _print_checks(found)
    if found.fate is not None:
        say(found.fate_in_words())


def _print_tokens(found: Trace) -> None:
    said = [f"{_piece(token.piece)} {token.id}{' (sink)' * token.sink}" for token in found.tokens]
    at = found.tokens[found.position]
    say(f"{found.model['name']}, {len(said)} tokens: {', '.join(said)}")
    say(f"at {_piece(at.piece)}, position {at.position}", styled(" (a sink)" * at.sink, "dim"))
    if found.against:
        say(f"less what it is in: {found.against}")


def _print_trajectory(found: Trace) -> None:
    rows, beside = found.rows(), "patched" if found.patch else "against"
    columns = ["stage", ">rank", ">log p", "top"]
    if found.other:
        columns += [f">rank\n{beside}", f">log p\n{beside}", f"top\n{beside}"]
    columns += [] if found.patch else [">adds"]
    cells = []
    for row in rows:
        sides = ["", f"_{beside}"] if found.other else [""]
        seen = [
            cell
            for side in sides
            for cell in (f"{row[f'rank{side}']:,}", f"{row[f'log_prob{side}']:.2f}", _piece(row[f"top{side}"]))
        ]
        name = row["after"].replace("attention", "attn").replace("embeddings", "start")
        stage = name if row["layer"] is None else f"{row['layer']} {name}"
        cells.append((stage, *seen, *([] if found.patch else [f"{row['adds']:+.3f}"])))
    sums = ", ".join(f"{what} {gap:.0e}" for what, gap in found.sums.items())
    whose = "the difference in the target's logit" if found.against else "the target's logit"
    adds = "" if found.patch else f"adds: to {whose}, the final norm's scale frozen. "
    print_table(
        f"Trajectory of {_piece(found.vocabulary.piece(found.target))}, id {found.target}, by the logit lens",
        columns,
        cells,
        f"{adds}The last row is the model's own logits, bit for bit. Largest differences of sums: {sums}.",
    )


def _print_reads(found: Trace, layer: int | None, k: int) -> None:
    shares = found.layers()
    every = range(len(shares)) if layer is None else (layer,)
    rows = [row for at in every for row in found.reads(at, 1 if layer is None else k)]
    assert found.directions is not None
    at_sink = found.tokens[found.position].sink
    count, generic = found.directions.vindex.gate.shape[1], found.directions.generic
    responses = found.directions.responses is not None
    print_table(
        "Reads: the strongest gate direction of each layer" if layer is None else f"Reads of layer {layer}",
        [
            ">layer",
            ">x inside",
            ">feature",
            ">READ",
            *([] if found.against else [">95%"]),
            *([">RESPONSE"] * responses),
            "tokens",
        ],
        [
            (
                row["layer"],
                _number(shares[row["layer"]]["read_share"], ".0%"),
                row["feature"],
                _number(row["z"], "+.1f"),
                *([] if found.against else [_number(shares[row["layer"]]["usual_z"], ".1f")]),
                *([_number(row["response"])] * responses),
                _pole(row),
            )
            for row in rows
        ],
        f"READ: z of v·x{' of the difference' * bool(found.against)} against {generic.tokens} tokens of generic text"
        + ("; 95%: there the layer's largest |z| stays below this at 95 % of the tokens" * (not found.against))
        + ", sinks left out: – at a sink" * (at_sink and not found.against)
        + "; RESPONSE: what usually goes with such a read, as it reaches the logit, by vindex respond" * responses
        + f". x inside: share of ‖x‖² in the {count} directions; by chance {found.chance:.0%}",
    )


def _print_writes(found: Trace, layer: int | None, k: int) -> None:
    rows = found.writes(layer, k)
    cells = [
        (
            "" if row["layer"] is None else row["layer"],
            row["what"] if row["feature"] is None else f"feature {row['feature']}",
            f"{row['adds']:+.3f}",
            _number(row["causal"]),
            _pole(row),
        )
        for row in rows
    ]
    total = (styled(text, "bold") for text in ("", "all", f"{sum(row['adds'] for row in rows):+.3f}", "", ""))
    print_table(
        "Writes: what the FFNs add to the target's logit" if layer is None else f"Writes of layer {layer}",
        [">layer", "down direction", ">WRITTEN", ">CAUSAL", "tokens"],
        [*cells, tuple(total)],
        "WRITTEN: directly, the final norm's scale frozen. –: not tested (--check)",
    )


def _print_checks(found: Trace) -> None:
    print_table(
        "Given the other prompt's value, one by one" if found.against else "Taken out of the live model, one by one",
        ["side", ">layer", ">feature", ">READ", ">WRITTEN", ">CAUSAL", ">log p", "tokens"],
        [
            (
                row["side"],
                row["layer"],
                row["feature"],
                _number(row["read"], "+.1f"),
                *(_number(row[name]) for name in ("written", "causal", "log_prob")),
                _pole(row, 1),
            )
            for row in found.checks()
        ],
        f"CAUSAL: the target's logit with the direction less that {CHANGED[bool(found.against)]}, measured; "
        "log p: the same of its log-probability. A down direction reads nothing: –",
    )


def _next(found: Trace, model: str, vindex: str | None, output: Path | None) -> str:
    if found.directions is None:
        return (
            f"{command('build', model, '-o', 'own.vindex')}, then --vindex own.vindex: which directions read and write"
        )
    if not found.directions.tested:
        return "--check 5: what the strongest directions do when they are taken out of the live model"
    if output is None:
        return "-o trace.html: every layer's directions on one page"
    strongest = found.writes(k=1)[0]
    return command("feature", vindex, strongest["layer"], strongest["feature"], "--down")


def _pole(row: dict[str, Any], count: int = POLE_SHOWN) -> str:
    return " ".join(map(_piece, row["tokens"][:count]))


def _piece(piece: str) -> str:
    found = visible(piece)
    return found if len(found) <= LONGEST_PIECE else f"{found[: LONGEST_PIECE - 1]}…"


def _number(value: float | None, form: str = "+.3f") -> str:
    """A number; – for what was not measured."""
    return "–" if value is None or value != value else format(value, form)
