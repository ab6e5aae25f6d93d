"""Commands that look at a vindex: info, verify, score, feature, compare, card. None of them loads torch."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vindex.console import bytes_of, check_places, print_json, print_table, progress, put, say, styled, typed

if TYPE_CHECKING:
    from vindex.differences import SideDifference
    from vindex.reader import Vindex
    from vindex.records import FeatureHit, TokenScore

VindexPath = Annotated[Path, typer.Argument(metavar="VINDEX", help="A vindex directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON instead of tables.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the record as JSON here.")]
POLE_SHOWN = 4


def info(path: VindexPath, json: Json = False, output: Output = None) -> None:
    """Shape, source, certificates, size."""
    from vindex.reader import open_vindex

    check_places(output)
    v = open_vindex(path)
    facts = v.info()
    if put(facts, json, output):
        return
    shown = facts | {
        "worst_certificate": f"{facts['worst_certificate']}, limit {v.manifest.options.tolerance:.0e}",
        "size": bytes_of(facts.pop("size_bytes")),
        "built_at": datetime.fromisoformat(facts["built_at"]).strftime("%d %B %Y, %H:%M UTC").removeprefix("0"),
    }
    rows = [
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value)
        for name, value in shown.items()
        if value is not None
    ]
    print_table(str(path), ["", ""], rows)


def score(
    path: VindexPath,
    tokens: Annotated[list[str], typer.Argument(help='Tokens to score, quoted with their leading space: " Paris".')],
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Features to show for each token.")] = 10,
    json: Json = False,
    output: Output = None,
) -> None:
    """Which features read a token.

    The score is the cosine of the token's embedding with every gate direction.
    """
    from vindex.reader import open_vindex

    check_places(output)
    v = open_vindex(path)
    results = []
    for text in map(typed, tokens):
        token_id = v.token_id(text)
        results.append((text, token_id, v.top_features(token_id, k)))
    if put([_score_record(v, *result) for result in results], json, output):
        return
    for text, token_id, hits in results:
        other = v.vocabulary.hint(text)
        hint = f" ({other.removeprefix(', but ')})" if other else ""
        say(f"token {text!r}, id {token_id}", styled(hint, "dim"))
        _print_hits(v, hits)


def feature(
    path: VindexPath,
    layer: Annotated[int, typer.Argument(help="Layer, from 0.")],
    number: Annotated[int, typer.Argument(metavar="FEATURE", help="Feature, from 0: rank in the spectrum.")],
    expert: Annotated[
        int | None, typer.Option(help="Expert, from 0, where the layer has them; the shared one comes last.")
    ] = None,
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Nearest features to show.")] = 5,
    json: Json = False,
    output: Output = None,
) -> None:
    """What one feature reads and writes, and its neighbours."""
    from vindex.reader import open_vindex
    from vindex.records import to_json

    check_places(output)
    v = open_vindex(path)
    found = v.feature(layer, number, expert=expert)
    nearest = v.nearest_features(layer, number, k, expert=expert)
    if put(to_json(found) | {"nearest": to_json(nearest)}, json, output):
        return
    poles = (
        ("reads +", found.reads),
        ("reads −", found.reads_against),
        ("writes +", found.writes),
        ("writes −", found.writes_against),
    )
    place = f"layer {layer}" + ("" if expert is None else f", expert {_expert_name(v, layer, expert)}")
    title = f"{place}, feature {number}: gate σ {found.gate_sigma:.3f}, down σ {found.down_sigma:.3f}"
    caption = "reads: cosine of embedding and gate direction; writes: logit lens of the down direction; ␣ is a space"
    print_table(title, ["pole", "tokens (score)"], [(name, _scored(tokens)) for name, tokens in poles], caption)
    say("nearest gate directions")
    _print_hits(v, nearest)


def compare(
    a: Annotated[Path, typer.Argument(metavar="VINDEX", help="A vindex.")],
    b: Annotated[
        Path, typer.Argument(metavar="OTHER", help="Another, of a model with the same layers and hidden size.")
    ],
    json: Json = False,
    output: Output = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the angles by layer to this .html or .png.")
    ] = None,
) -> None:
    """How far apart two vindexes are, layer by layer.

    Principal angles between their subspaces, and the drift of their spectra.
    """
    import vindex
    from vindex.differences import by_layer

    check_places(output, plot)
    ours, theirs = vindex.open(a), vindex.open(b)
    with progress() as stage:
        found = vindex.compare(ours, theirs, progress=stage)
    if plot:
        found.plot(plot)
    if put(found.record(), json, output):
        return
    say(styled(found.summary, "bold"))
    if found.kept:
        say(found.kept)
    columns = [">layer", *(f">{side}\n{what}" for side in ("gate", "down") for what in ("angle", "cos", "σ drift"))]
    layers = by_layer(found.differences)
    rows = [(d.layer, *(text for side in (d.gate, d.down) for text in _difference_cells(side))) for d in layers]
    caption = (
        "angle: largest principal angle, rad; cos: mean cosine of all; σ drift: ‖σ_A − σ_B‖/‖σ_A‖; two builds of the "
        f"same weights, by their certificates: angles up to {found.noise:.1e}"
    )
    if any(value is None for one in found for side in (one.gate, one.down) for value in side):
        caption += "; –: a weight is zero, without a direction"
    if len(found.differences) > len(rows):
        caption += "; of all experts the largest, mean and largest, each by itself in --json"
    print_table(f"{a} beside {b}", columns, rows, caption)
    if plot:
        say(f"plot: {plot}")


def card(
    path: VindexPath,
    probe: Annotated[Path | None, typer.Option(help="Record of `vindex probe -o`, for the constants.")] = None,
    gate3: Annotated[Path | None, typer.Option(help="Record of `vindex gate3 -o`, for the Gate 3 section.")] = None,
    gates: Annotated[Path | None, typer.Option(help="Record of `vindex gates eval -o`, for the λ gates.")] = None,
    json: Json = False,
) -> None:
    """Write a vindex's model card (README.md).

    From its own records, and its line in SHA256SUMS anew. A record of other weights is refused.
    """
    import vindex

    v = vindex.open(path)
    written = vindex.write_card(v, probe, gate3, gates)
    if json:
        print_json({"id": v.id, "card": str(written)})
        return
    say(f"wrote {written}")
    measured = {"probe": probe, "gate3": gate3, "gates eval": gates}
    missing = [f"vindex {command}" for command, record in measured.items() if record is None]
    say("next: " + (f"measure what it leaves open with {', '.join(missing)}" if missing else f"vindex verify {path}"))


def _print_hits(v: Vindex, hits: list[FeatureHit]) -> None:
    rows = []
    mixture = bool(v.index.num_experts)
    for hit in hits:
        found = v.feature(hit.layer, hit.feature, expert=hit.expert)
        reads = found.reads if hit.cosine >= 0 else found.reads_against
        cells = (f"{hit.cosine:+.3f}", f"{hit.gate_sigma:.2f}", _pieces(reads), _pieces(found.writes))
        expert = (_expert_name(v, hit.layer, hit.expert),) if mixture else ()
        rows.append((hit.layer, *expert, hit.feature, *cells))
    columns = [">layer", *([">expert"] if mixture else []), ">feature", ">cosine", ">σ"]
    print_table("", [*columns, "what it reads", "what it writes"], rows, "␣ is a space")


def _expert_name(v: Vindex, layer: int, expert: int | None) -> str:
    if expert is None:
        return "dense"
    return "shared" if expert >= (v.index.layers[layer].num_experts or 0) else str(expert)


def _score_record(v: Vindex, text: str, token_id: int, hits: list[FeatureHit]) -> dict:
    from vindex.records import to_json

    features = [to_json(v.feature(hit.layer, hit.feature, expert=hit.expert)) | {"cosine": hit.cosine} for hit in hits]
    return {"token": text, "token_id": token_id, "piece": v.vocabulary.piece(token_id), "features": features}


def _pieces(tokens: list[TokenScore]) -> str:
    return "  ".join(_visible(token) for token in tokens[:POLE_SHOWN])


def _scored(tokens: list[TokenScore]) -> str:
    return "  ".join(f"{_visible(token)}\u00a0{token.score:+.2f}" for token in tokens)


def _visible(token: TokenScore) -> str:
    """The piece with its spaces made visible, so that a table neither hides them nor breaks there."""
    return repr(token.piece)[1:-1].replace(" ", "␣")


def _difference_cells(side: SideDifference) -> tuple[str, ...]:
    cells = (side.largest_angle, ".1e"), (side.mean_cosine, ".4f"), (side.spectrum_drift, ".1e")
    return tuple("–" if value is None else format(value, form) for value, form in cells)
