"""What a model card quotes of the records that probe, gate3 and gates eval write: read at the border, each of them.

1. A record is of the kind that is expected, and of the weights that the vindex was built from, by their SHA-256.
2. Every quoted field is there and of its type; what is wrong is told with its path, in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vindex.errors import QueryError
from vindex.manifest import Source
from vindex.schema import RECORD, Fields, Problems, load_record


class Constant(NamedTuple):
    """One of C1–C5: the mean over n samples (`over`: "texts", "layer pairs"), its 95 % interval and its null."""

    symbol: str
    name: str
    definition: str
    mean: float | None
    low: float | None
    high: float | None
    n: int
    over: str
    null: float | None


class Probe(NamedTuple):
    """A record of `vindex probe`: the dtype and definition set it was measured with, and the constants."""

    dtype: str
    definition: str
    constants: tuple[Constant, ...]


class Verdict(NamedTuple):
    """One standard's result (pass, fail, not_applicable) and why."""

    standard: str
    result: str
    reason: str


class Gate3(NamedTuple):
    """A record of `vindex gate3` for one fact. method, layer and what follows from a patch: None without one."""

    fact: str
    answer: str
    method: str | None
    layer: int | None
    before: float | None
    after: float | None
    suppression: float | None
    reference_loss: float | None
    verdicts: tuple[Verdict, ...]


class Area(NamedTuple):
    """Area under knowledge against reasoning retained, of one family of masks, with its extremes over seeds."""

    family: str
    value: float | None
    low: float | None
    high: float | None


class GatesEvaluation(NamedTuple):
    """A record of `vindex gates eval`: what was asked and how, the areas, and the gates' less that of random masks."""

    gates: str
    asked: str
    scoring: str
    areas: tuple[Area, ...]
    advantage: float | None


def read_probe(path: Path, source: Source) -> Probe:
    """Raises FormatError on a file that is no such record, QueryError on one of another kind or of other weights."""
    fields = _open(path, "vindex-probe/1", "vindex probe MODEL -o FILE", source)
    found = Probe(
        fields.record("model").text("dtype"),
        fields.text("definition"),
        tuple(_constant(symbol, entry) for symbol, entry in _entries(fields, "constants")),
    )
    fields.problems.refuse()
    return found


def read_gate3(path: Path, source: Source) -> Gate3:
    """Raises as `read_probe`."""
    fields = _open(path, "vindex-gate3/1", "vindex gate3 MODEL -o FILE", source)
    fact = fields.record("fact")
    found = Gate3(
        fact=fact.text("name"),
        answer=fact.text("answer"),
        method=fields.text_or_none("method"),
        layer=fields.integer_or_none("layer"),
        before=fields.number_or_none("before"),
        after=fields.number_or_none("after"),
        suppression=fields.number_or_none("suppression"),
        reference_loss=fields.number_or_none("reference_loss"),
        verdicts=tuple(
            Verdict(standard, entry.text("result"), entry.text("reason"))
            for standard, entry in _entries(fields, "verdicts")
        ),
    )
    fields.problems.refuse()
    return found


def read_gates(path: Path, source: Source) -> GatesEvaluation:
    """Raises as `read_probe`."""
    fields = _open(path, "vindex-gates-evaluation/1", "vindex gates eval MODEL DIR -o FILE", source)
    found = GatesEvaluation(
        fields.text("gates"),
        fields.record("panels").text("source"),
        fields.record("choices").text("scoring"),
        tuple(
            Area(family, *(entry.number_or_none(key) for key in ("value", "low", "high")))
            for family, entry in _entries(fields, "areas")
        ),
        fields.number_or_none("advantage"),
    )
    fields.problems.refuse()
    return found


def _constant(symbol: str, entry: Fields) -> Constant:
    low, high = entry.interval_or_none("interval") or (None, None)
    return Constant(
        symbol=symbol,
        name=entry.text("name"),
        definition=entry.text("definition"),
        mean=entry.number_or_none("mean"),
        low=low,
        high=high,
        n=entry.integer("n"),
        over=entry.text("over"),
        null=entry.number_or_none("null"),
    )


def _entries(fields: Fields, key: str) -> list[tuple[str, Fields]]:
    """An object of objects, by name."""
    return [(name, Fields(value, f"{key}.{name}", fields.problems)) for name, value in fields.mapping(key).items()]


def require_record(path: Path, kind: str, command: str, source: Source) -> dict[str, Any]:
    """The record at `path`, unread but for its kind and weights. command: what writes one. Raises as `read_probe`."""
    record = load_record(path)
    if record.get("record") != kind:
        raise QueryError(f"{path}: expected a record of kind {kind}, got {record.get('record')!r}")
    model = record.get("model")
    digests = model.get("weights_sha256") if isinstance(model, dict) else None
    if not isinstance(digests, dict) or not digests:
        raise QueryError(f"{path}: does not say by their SHA-256 which weights it is of; make it again: {command}")
    _require_weights(path, digests, source.weights)
    return record


def _open(path: Path, kind: str, command: str, source: Source) -> Fields:
    return Fields(require_record(path, kind, command, source), "", Problems(str(path), RECORD))


def _require_weights(path: Path, theirs: Mapping[str, object], ours: Mapping[str, str]) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise QueryError(
                f"{path}: of {name} with SHA-256 {_short(theirs.get(name))}, and this vindex was built from "
                f"{_short(ours.get(name))}; measure the checkpoint it was built from"
            )


def _short(digest: object) -> str:
    return "none (no such file)" if digest is None else f"{str(digest)[:12]}…"
