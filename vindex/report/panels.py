"""The panels that records fill: C1–C5, Gate 3, lambda gates; a trace is in traced.py. Each record is read whole, so
that a damaged one is one line and never half a page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vindex.errors import FormatError, LackingError
from vindex.format import MANIFEST
from vindex.manifest import Source
from vindex.measured import Constant, Gate3, GatesEvaluation, Probe, read_gate3, read_gates, read_probe, require_record
from vindex.reader import Vindex
from vindex.report.svg import Axis, Chart, Line, Mark, axis, chart

SETS = {  # of held-out prompts, in the record's words and in ours
    "paraphrases": "paraphrases",
    "reference": "the reference",
    "other_subjects": "other subjects",
    "same_subject": "its other facts",
    "same_answer": "facts with the answer",
}
FAMILIES = {
    "gates": "c0",
    "random": "quiet",
    "largest |h|": "c1",
    "smallest |h|": "c2",
    "|h| contrast": "c2",
    "|h| ratio": "c3",
}
ROW = 26


class Measured(NamedTuple):
    """One of C1–C5: its figures, where they lie on a line from 0 to 1, and its curve over layers."""

    constant: Constant
    places: dict[str, float]
    by_layer: Chart | None


class Constants(NamedTuple):
    probe: Probe
    rows: tuple[Measured, ...]
    norms: dict[str, list[float]] | None
    """‖W‖²_F of each layer's gate and down projection."""


class Attack(NamedTuple):
    """A criterion of a verdict. holds: None where there was nothing to measure it on."""

    name: str
    relation: str
    limit: float
    value: float | None
    holds: bool | None


class Deletion(NamedTuple):
    gate3: Gate3
    dots: Chart | None
    attacks: dict[str, tuple[Attack, ...]]
    written: tuple[str, str, str] | None
    """A question, and what the model wrote before and after."""


class Gates(NamedTuple):
    gates: GatesEvaluation
    curve: Chart


def source_of(path: Path, v: Vindex) -> Source:
    """What v was built from, which a record has to be of. Raises LackingError where v does not say."""
    if not v.has(MANIFEST):
        raise LackingError(
            f"{path}: is of weights by their SHA-256, and {v.name} does not say of which weights it is; leave the "
            "record out, or build a vindex of the model with `vindex build`"
        )
    return v.manifest.source


@contextmanager
def whole(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"[:80]
        raise FormatError(f"{path}: is not a whole {kind} record ({what}); write it again with -o") from error


def constants(path: Path, v: Vindex) -> Constants:
    """C1–C5. Raises FormatError and QueryError as `read_probe`."""
    probe = read_probe(path, source_of(path, v))
    record = require_record(path, "vindex-probe/1", "vindex probe MODEL -o FILE", source_of(path, v))
    with whole(path, "vindex-probe"):
        every = record["constants"]
        rows = tuple(
            _measured(one, every[one.symbol].get("per_layer") or [], v.index.num_layers) for one in probe.constants
        )
        spectra = record.get("spectra") or {}
        norms = {
            side: [float(n) for n in spectra[f"{side}_proj"]["squared_norm"]] for side in ("gate", "down") if spectra
        }
        usable = norms and all(len(each) == v.index.num_layers for each in norms.values())
        return Constants(probe, rows, norms if usable else None)


def _measured(one: Constant, by_layer: list[float | None], layers: int) -> Measured:
    figures = {"mean": one.mean, "low": one.low, "high": one.high, "null": one.null}
    known = {name: value for name, value in figures.items() if value is not None}
    scale = axis("", known.values())
    places = {name: round(scale.place(value), 4) for name, value in known.items()}
    if not by_layer:
        return Measured(one, places, None)
    shift = (layers - len(by_layer)) / 2  # a figure of layers l and l + 1 stands between them
    line = Line(one.symbol, "c0", [at + shift for at in range(len(by_layer))], by_layer)
    bare = Axis("", 0.0, max(layers - 1.0, 1.0), ())
    y = axis("", by_layer)._replace(ticks=())
    return Measured(one, places, chart(f"{one.symbol} by layer", bare, y, lines=[line], left=4, size=(150, 78)))


def deletion(path: Path, v: Vindex) -> Deletion:
    """Gate 3 of one fact, by the record's headline method."""
    gate3 = read_gate3(path, source_of(path, v))
    record = require_record(path, "vindex-gate3/1", "vindex gate3 MODEL -o FILE", source_of(path, v))
    if gate3.method is None:
        return Deletion(gate3, None, {}, None)
    with whole(path, "vindex-gate3"):
        found = record["methods"][gate3.method]
        certificate = found.get("certificate") or {}
        sets = {"the fact": [found["headline"]]}
        sets |= {name: found["sets"][key]["prompts"] for key, name in SETS.items() if key in found["sets"]}
        families = certificate.get("families", {})
        sets |= {f"attack: {name.replace('_', ' ')}": group["prompts"] for name, group in families.items()}
        for key, name in (("four_bit", "attack: in 4 bits"), ("relearned", "attack: relearned")):
            sets[name] = certificate.get(key, {"prompts": []})["prompts"]
        attacks = {
            standard: tuple(_attack(one) for one in verdict["criteria"])
            for standard, verdict in record["verdicts"].items()
        }
        texts = certificate.get("texts") or []
        written = texts and (texts[0]["question"], texts[0]["before"]["text"], texts[0]["after"]["text"])
        return Deletion(gate3, _dots({name: some for name, some in sets.items() if some}), attacks, written or None)


def _dots(sets: Mapping[str, list[Mapping[str, Any]]]) -> Chart:
    """P(answer) of each prompt and their mean, before and after, a row for each set."""
    dots = []
    for row, (name, prompts) in enumerate(sets.items()):
        for side, kind, shift in (("before", "quiet", -0.16), ("after", "c1", 0.16)):
            values = [float(prompt[side]) for prompt in prompts]
            y = -row - shift
            dots += [
                Mark(value, y, kind + " faint", f"{prompt['name']}, {side}: {value:.3f}", 2.2)
                for value, prompt in zip(values, prompts, strict=True)
            ]
            mean = sum(values) / len(values)
            dots.append(Mark(mean, y, kind, f"{name}, mean {side}: {mean:.3f}", 5.0))
    rows = Axis("", -len(sets) + 0.4, 0.6, [(-float(row), name) for row, name in enumerate(sets)])
    across = axis("P(answer)", [0.0, 1.0])
    size = 680, 44 + ROW * len(sets)
    legend = [("quiet", "before"), ("c1", "after; large: the mean")]
    return chart("P(answer) before and after the deletion", across, rows, dots=dots, legend=legend, left=150, size=size)


def gates(path: Path, v: Vindex) -> Gates:
    """Knowledge against reasoning retained, one curve for each family of masks and seed."""
    found = read_gates(path, source_of(path, v))
    command = "vindex gates eval MODEL DIR -o FILE"
    record = require_record(path, "vindex-gates-evaluation/1", command, source_of(path, v))
    with whole(path, "vindex-gates-evaluation"):
        met = {str(one["family"]) for one in record["entries"]}
        families = {
            name: FAMILIES.get(name, "quiet") for name in (*FAMILIES, *sorted(met - FAMILIES.keys())) if name in met
        }
        lines = [
            _curve(family, [one for one in record["entries"] if (one["family"], one["seed"]) == (family, seed)])
            for family in reversed(families)
            for seed in sorted({one["seed"] for one in record["entries"] if one["family"] == family}, key=str)
        ]
        x, y = axis("knowledge retained", [0.0, 1.0]), axis("reasoning retained", [0.0, 1.0])
        drawn = chart("Knowledge against reasoning retained", x, y, lines=lines, size=(560, 380))
        return Gates(found, drawn._replace(legend=[(kind, family) for family, kind in families.items()]))


def _curve(family: str, entries: list[Mapping[str, Any]]) -> Line:
    """From nothing off at (1, 1) to all off at (0, 0). What cannot be said, since nothing was known, is left out."""
    entries = sorted(entries, key=lambda one: one["off_fraction"])
    known = [one for one in entries if None not in (one["knowledge_retained"], one["reasoning_retained"])]
    x, y = ([min(max(one[key], 0.0), 1.0) for one in known] for key in ("knowledge_retained", "reasoning_retained"))
    notes = [
        f"{one['off_fraction']:.0%} off: {one['knowledge_retained']:.2f}, {one['reasoning_retained']:.2f}"
        for one in known
    ]
    strong = " strong" if family == "gates" else ""
    return Line(family, FAMILIES.get(family, "quiet") + strong, [1.0, *x, 0.0], [1.0, *y, 0.0], ["", *notes, ""])


def known(value: Any) -> float | None:
    """A number; None for what was not measured."""
    return None if value is None else float(value)


def _attack(one: Mapping[str, Any]) -> Attack:
    held = None if one["holds"] is None else bool(one["holds"])
    return Attack(one["name"], one["relation"], float(one["limit"]), known(one["value"]), held)
