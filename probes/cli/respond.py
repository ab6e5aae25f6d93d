"""`vindex respond`: what a model writes when the gate directions of its vindex are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.cli.model import Device, Dtype, Model, Revision, Texts, load_model
from vindex.cli import Json, Output
from vindex.console import check_places, command, print_table, progress, put, say, say_places, stopped, styled, visible

if TYPE_CHECKING:
    from probes.responses.result import Responses

TOKENS_SHOWN = 3


def respond(
    model: Model,
    vindex: Annotated[
        Path, typer.Argument(metavar="VINDEX", help="A vindex of the same model, to which responses are added.")
    ],
    text: Texts = None,
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Of the strongest responses, how many to show.")] = 10,
    json: Json = False,
    output: Output = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw R² beside its nulls by layer to this .html or .png.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """Measure what the model writes when each gate direction is read, and add it to the vindex.

    The linear response of each FFN's output to each direction, over the probe texts, beside two nulls. Responses that
    the vindex has already are replaced. Definitions: docs/responses.md.
    """
    import probes
    import vindex as artifact
    from vindex.adding import check_place

    check_places(output, plot)
    opened = artifact.open(vindex)
    check_place(opened)
    with stopped(f"{vindex} is as it was"), progress() as stage:
        loaded = load_model(model, dtype=dtype, device=device, revision=revision, head=False, progress=stage)
        found = probes.respond(loaded, vindex=opened, texts=text, progress=stage)
        found.add()
    if plot:
        found.plot(plot)
    if put(found.record(), json, output):
        return
    print_responses(found, k)
    say_places(plot=plot, record=output)
    say(f"added {found.direction.shape[0]:,} responses to {vindex}")
    first = found.strongest(1)[0]
    expert = ("--expert", first["expert"]) if "expert" in first else ()
    say(f"next: {command('feature', vindex, first['layer'], first['feature'], *expert)}")


def print_responses(found: Responses, k: int) -> None:
    """A row for each layer, then the strongest."""
    measured = found.measured
    texts = f"{len(measured.texts)} text{'s' * (len(measured.texts) > 1)}"
    say(styled(f"{found.model['name']}, {texts} of {measured.tokens} tokens", "bold"))
    print_table(
        "R²: how much of what the FFN writes follows what one direction reads",
        [">layer", ">n", ">R²\nmean", ">R²\nbest", ">random\nmean", ">permuted\nmean", ">beyond"],
        [_layer(row) for row in found.rows()],
        "random: directions drawn at random that read the same; permuted: the readings permuted over the tokens. "
        "beyond: share of directions past 95 % of the random ones and past all 19 permutations; by chance 5 %",
    )
    mixture = bool(found.vindex.index.num_experts)
    print_table(
        f"The {k} of largest R²",
        [">layer", *([">expert"] * mixture), ">feature", ">R²", ">random", "reads → writes"],
        [
            (
                row["layer"],
                *([row.get("expert", "dense")] * mixture),
                row["feature"],
                _share(row["r2"]),
                _share(row["random"]),
                f"{_pieces(row['reads'])} → {_pieces(row['writes'])}",
            )
            for row in found.strongest(k)
        ],
        "random: what 95 % of random directions stay below. A regression over tokens: what goes with the reading, not "
        "what it causes (vindex trace --check)",
    )


def _layer(row: dict[str, Any]) -> tuple[Any, ...]:
    if row["tokens"] is None:
        return (row["layer"], *"–––––", "–")
    beyond = "–" if row["beyond"] is None else f"{row['beyond']:.0%}"
    return (row["layer"], row["tokens"], *(_share(row[name]) for name in ("r2", "best", "random", "permuted")), beyond)


def _share(value: float) -> str:
    return f"{value:.2%}"


def _pieces(pieces: list[str]) -> str:
    return " ".join(visible(piece) for piece in pieces[:TOKENS_SHOWN])
