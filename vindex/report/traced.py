"""The panel that a trace's record fills: the target by stage, what each FFN reads and writes, what was taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vindex.measured import require_record
from vindex.reader import Vindex
from vindex.report.panels import known, source_of, whole
from vindex.report.svg import Axis, Chart, Line, Mark, axis, chart

LONGEST_HEADING = 120  # characters
ADDS = {
    "": "What each stage adds to the target's logit",
    "patched": "What each stage adds to the target's logit before the patch",
    "against": "What each stage adds to the difference of the two prompts in the target's logit",
}
"""What the bars are, alone and beside a patch or another prompt."""


class Stage(NamedTuple):
    """What the lens says of the target after a stage, and what the stage adds to its logit."""

    name: str
    rank: int
    log_prob: float
    top: str
    adds: float
    other: tuple[int, float, str] | None
    """Rank, log-probability and top token with the patch, or of the other prompt."""


class Direction(NamedTuple):
    """A row of what an FFN reads or writes. value: z of what is read, or what is added to the target's logit.

    response: what usually goes with such a read. causal: what taking it out of the live model did. None: not measured.
    """

    feature: int | None
    what: str
    value: float | None
    tokens: tuple[str, ...]
    response: float | None
    causal: float | None


class Layer(NamedTuple):
    """usual: what the largest |z| of what is read stays below at 95 % of the tokens of generic text, where known."""

    number: int
    usual: float | None
    read_share: float | None
    write_share: float | None
    inside: float
    outside: float
    reads: tuple[Direction, ...]
    writes: tuple[Direction, ...]


class Check(NamedTuple):
    """A direction that was taken out of the live model."""

    side: str
    layer: int
    feature: int
    read: float | None
    written: float
    causal: float
    log_prob: float
    tokens: tuple[str, ...]


class Traced(NamedTuple):
    """A trace, as the panel shows it. What a record of an earlier version lacks is "–" or not shown."""

    prompt: str
    """As a heading has it; `tokens` are the whole of it."""
    beside: str
    """"patched", "against" or nothing; and in words."""
    beside_words: str
    target: str
    model: str
    vindex: str | None
    created: str
    tokens: tuple[tuple[str, bool, bool], ...]
    """Piece, whether it is the traced position, whether it is a sink."""
    probability: Chart
    adds: Chart
    stages: tuple[Stage, ...]
    gap: float | None
    """The largest difference of what must add up, in units of the logit."""
    fate: str
    """What a patch did to the target, in words."""
    layers: tuple[Layer, ...]
    checks: tuple[Check, ...]
    responses: bool
    """Whether the vindex had responses."""
    generic: int | None
    """Tokens of generic text."""
    chance: float | None
    """F / H."""
    own: bool
    """Whether its features are those of the vindex beside it."""


def trace(path: Path, v: Vindex) -> Traced:
    """One prompt's way through the model, and what each FFN read and wrote where a vindex was traced with."""
    command = "vindex trace MODEL PROMPT --vindex VINDEX -o FILE.json"
    record = require_record(path, "vindex-trace/1", command, source_of(path, v))
    with whole(path, "vindex-trace"):
        return traced(record, v.id)


def traced(record: Mapping[str, Any], vindex: str | None) -> Traced:
    """A record's panel beside the vindex of this id. Raises what reading a damaged one does: see `whole`."""
    rows = record["trajectory"]
    beside = next((name for name in ("patched", "against") if f"log_prob_{name}" in rows[0]), "")
    words = {"against": f"against “{record['against']}”", "patched": f"patched with {record['patch']}"}
    stages = tuple(_stage(row, beside) for row in rows)
    every = range(len(record["layers"] or ()))
    layers = tuple(_layer(record["layers"][at], record["reads"][at], record["writes"][at]) for at in every)
    probability, adds = _charts(stages, [row["layer"] for row in rows], beside)
    return Traced(
        prompt=_heading(str(record["prompt"])),
        beside=beside,
        beside_words=words.get(beside, ""),
        target=str(record["target"]["piece"]),
        model=f"{record['model']['name']}, {record['model']['dtype']}",
        vindex=record["vindex"],
        created=str(record.get("created", "")),
        tokens=tuple(
            (one["piece"], one["position"] == record["position"], bool(one["sink"])) for one in record["tokens"]
        ),
        probability=probability,
        adds=adds,
        stages=stages,
        gap=max(map(float, (record.get("sums") or {}).values()), default=None),
        fate=str((record.get("fate") or {}).get("words", "")),
        layers=layers,
        checks=tuple(map(_check, record.get("checks") or ())),
        responses=any(row.response is not None for layer in layers for row in layer.reads),
        generic=(record.get("generic") or {}).get("tokens"),
        chance=known(record.get("chance")),
        own=record["vindex"] == vindex,
    )


def _heading(text: str) -> str:
    return text if len(text) <= LONGEST_HEADING else f"{text[: LONGEST_HEADING - 1]}…"


def _charts(stages: Sequence[Stage], layers: Sequence[int | None], beside: str) -> tuple[Chart, Chart]:
    """The target's log-probability by stage, and what each stage adds to its logit."""
    curves = {"the prompt": [stage.log_prob for stage in stages]}
    if beside:
        curves[beside] = [stage.other[1] for stage in stages if stage.other]
    lines = []
    for place, (label, curve) in enumerate(curves.items()):
        notes = [f"{stage.name}: {value:.2f}" for stage, value in zip(stages, curve, strict=True)]
        lines.append(Line(label, f"c{place}", range(len(stages)), curve, notes))
    kinds = ["c2", *(f"c{at % 2}" for at in range(1, len(stages)))]
    added = [Mark(at, stage.adds, kinds[at], f"{stage.name}: {stage.adds:+.3f}") for at, stage in enumerate(stages)]
    every = 2 * (len(stages) // 32 + 1)
    first = 2 if every <= 4 else 2 + every  # of a deep model layer 0 stands too near to the start for a mark
    ticks = [(float(at), str(layers[at])) for at in range(first, len(stages), every)]
    x = Axis("the start, then attention and FFN of each layer", -0.5, len(stages) - 0.5, [(0.0, "start"), *ticks])
    nats, logit = axis("nats", [value for line in lines for value in line.y]), axis("logit", [mark.y for mark in added])
    legend = [("c2", "embedding"), ("c1", "attention"), ("c0", "FFN")]
    return (
        chart("Log-probability of the target by the logit lens", x, nats, lines=lines),
        chart(ADDS[beside], x, logit, bars=added, legend=legend),
    )


def _stage(row: Mapping[str, Any], beside: str) -> Stage:
    name = row["after"] if row["layer"] is None else f"{int(row['layer'])} {row['after']}"
    other = (
        (int(row[f"rank_{beside}"]), float(row[f"log_prob_{beside}"]), str(row[f"top_{beside}"])) if beside else None
    )
    return Stage(name, int(row["rank"]), float(row["log_prob"]), str(row["top"]), float(row["adds"]), other)


def _layer(one: Mapping[str, Any], reads: list[Mapping[str, Any]], writes: list[Mapping[str, Any]]) -> Layer:
    return Layer(
        int(one["layer"]),
        usual=known(one.get("usual_z")),
        read_share=known(one["read_share"]),
        write_share=known(one["write_share"]),
        inside=float(one["adds_inside"]),
        outside=float(one["adds_outside"]),
        reads=tuple(_direction(row, "z") for row in reads),
        writes=tuple(_direction(row, "adds") for row in writes),
    )


def _direction(row: Mapping[str, Any], value: str) -> Direction:
    feature = None if row["feature"] is None else int(row["feature"])
    measured = known(row.get("response")), known(row.get("causal"))
    return Direction(feature, str(row.get("what", "")), known(row[value]), _texts(row["tokens"]), *measured)


def _check(row: Mapping[str, Any]) -> Check:
    place = str(row["side"]), int(row["layer"]), int(row["feature"])
    figures = float(row["written"]), float(row["causal"]), float(row["log_prob"])
    return Check(*place, known(row["read"]), *figures, _texts(row["tokens"]))


def _texts(pieces: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(piece) for piece in pieces)
