"""Commands that look at a vindex: info, compare, card. None of them loads torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vindex.console import print_json, print_table, progress, say

if TYPE_CHECKING:
    from vindex.index import Index, Projection

VindexPath = Annotated[Path, typer.Argument(metavar="VINDEX", help="A vindex directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def info(path: VindexPath, json: Json = False) -> None:
    """Shape, source, certificates, size."""
    from vindex.reader import open_vindex

    v = open_vindex(path)
    i, m = v.index, v.manifest
    facts = {
        "id": v.id,
        "model": i.model,
        "revision": m.source.revision,
        "licence": m.source.licence,
        "layers": i.num_layers,
        "features_per_layer": i.num_feats,
        **_experts_of(i),
        "hidden_size": i.hidden_size,
        "intermediate_size": i.intermediate_size,
        "vocab_size": i.vocab_size,
        "down_meta_projection": _projection(i.projection),
        **({"notes": "; ".join(m.notes)} if m.notes else {}),
        "worst_certificate": m.worst,
        **({"zero_weights": m.zero_weights} if m.zero_weights else {}),
        "size_bytes": v.size_bytes,
        "built_at": m.finished_at,
        "built_with": ", ".join(f"{name} {version}" for name, version in m.versions.items()),
    }
    if json:
        print_json(facts)
    else:
        print_table(str(path), ["", ""], [(name.replace("_", " "), value) for name, value in facts.items()])


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A vindex.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, of a model with the same layers and hidden size.")],
    json: Json = False,
) -> None:
    """How far apart two vindexes are, layer by layer.

    Principal angles between their subspaces, and the drift of their spectra.
    """
    from vindex.compare import by_layer
    from vindex.compare import compare as differences_between
    from vindex.reader import open_vindex
    from vindex.records import to_json

    ours, theirs = open_vindex(a), open_vindex(b)
    with progress() as stage:
        differences = differences_between(ours, theirs, stage("compare", ours.index.num_layers))
    if json:
        print_json(to_json(differences))
        return
    columns = [">layer", *(f">{side}\n{what}" for side in ("gate", "down") for what in ("angle", "cos", "σ drift"))]
    rows = [
        (d.layer, *(text for side in (d.gate, d.down) for text in _difference_cells(side)))
        for d in by_layer(differences)
    ]
    caption = "angle: largest principal angle, rad; cos: mean cosine of all; σ drift: ‖σ_A − σ_B‖/‖σ_A‖"
    if any(value is None for one in differences for side in (one.gate, one.down) for value in side):
        caption += "; –: a weight is zero, without a direction"
    if len(differences) > len(rows):
        caption += "; of all experts the largest, mean and largest, each by itself in --json"
    print_table(f"{a} beside {b}", columns, rows, caption)


def card(
    path: VindexPath,
    probe: Annotated[Path | None, typer.Option(help="Record of `vindex probe --json`, for the constants.")] = None,
    gate3: Annotated[Path | None, typer.Option(help="Record of `vindex gate3 --json`, for the Gate 3 section.")] = None,
    gates: Annotated[Path | None, typer.Option(help="Record of `vindex gates eval --json`, for the λ gates.")] = None,
) -> None:
    """Write a vindex's model card (README.md).

    From its own records, and its line in SHA256SUMS anew. A record of other weights is refused.
    """
    from vindex.card import rewrite_card
    from vindex.reader import open_vindex

    rewrite_card(open_vindex(path), probe, gate3, gates)
    say(f"wrote {path / 'README.md'}")


def _projection(projection: Projection) -> str:
    """The matrix that unembeds down directions, and whether it is the model's head."""
    if projection.down_meta != "embed_tokens":
        return projection.down_meta
    return "embed_tokens (tied)" if projection.tied else "embed_tokens (the model has no head)"


def _experts_of(index: Index) -> dict[str, str | int]:
    """What `info` says of a mixture; nothing for a dense model."""
    if not index.num_experts:
        return {}
    dense = [str(entry.layer) for entry in index.layers if not entry.num_experts]
    return {
        "experts_per_layer": index.num_experts,
        "shared_experts_per_layer": index.num_shared_experts or 0,
        "features_per_expert": index.num_features_per_expert or 0,
        "dense_layers": ", ".join(dense) or "none",
    }


def _difference_cells(side) -> tuple[str, ...]:
    cells = (side.largest_angle, ".1e"), (side.mean_cosine, ".4f"), (side.spectrum_drift, ".1e")
    return tuple("–" if value is None else format(value, form) for value, form in cells)
