"""Pictures of a Gate 3 record: before/after bars and the layer scan of one fact; every fact of a relation.

They read the JSON record, not the run, so that a saved record can be drawn again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vindex import targets
from vindex.errors import ProbeError, TargetError

BEFORE, AFTER, OTHER, ACCENT = "#9aa5b1", "#c2410c", "#2563eb", "#15803d"
NAMES = {
    "paraphrases": "paraphrases",
    "reference": "reference",
    "other_subjects": "other subjects",
    "same_subject": "other facts\nof the subject",
    "same_answer": "other facts\nwith the answer",
}
HEADROOM = 1.15
SUFFIXES = (".png", ".svg", ".pdf")


def check_target(path: Path) -> None:
    """Raise TargetError now if `path` cannot be drawn to later, ProbeError without matplotlib."""
    targets.check_file(path)
    if path.suffix not in SUFFIXES:
        raise TargetError(f"{path}: pictures are written as {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    _pyplot()


def one(record: dict[str, Any], path: Path) -> None:
    """Draw the record of one fact: each set before and after, by method, and the scan that chose the layer."""
    if not record["methods"]:
        raise ProbeError(f"{record['fact']['name']}: nothing to draw, the model does not know this fact")
    plt = _pyplot()
    methods = record["methods"]
    scan = methods.get("forward", {}).get("scan", [])
    figure, axes = plt.subplots(1, len(methods) + bool(scan), figsize=(5.2 * (len(methods) + bool(scan)), 4.2))
    axes = [axes] if len(methods) + bool(scan) == 1 else list(axes)
    for axis, (name, found) in zip(axes, methods.items(), strict=False):
        _bars(axis, name, found, record)
    if scan:
        _scan(axes[-1], scan, methods["forward"]["layer"])
    fact = record["fact"]
    figure.suptitle(f"{record['model']['name']}: delete {fact['name']} → {fact['answer']}", fontsize=12)
    _save(figure, path)


def all_facts(record: dict[str, Any], path: Path) -> None:
    """Draw every fact's suppression, mean paraphrase suppression and worst loss of another subject, by forward."""
    method = next(iter(record["rates"]))
    facts = [fact for fact in record["facts"] if method in fact["methods"]]
    if not facts:
        raise ProbeError("nothing to draw: the record has no fact that the model knows")
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9, 0.24 * len(facts) + 1.6))
    for row, fact in enumerate(facts):
        found = fact["methods"][method]
        sets = found["sets"]
        for value, colour, marker, label in (
            (found["suppression"], AFTER, "o", "the fact"),
            (sets["paraphrases"]["mean"], ACCENT, "s", "its paraphrases (mean)"),
            (sets["other_subjects"]["mean"], OTHER, "|", "other subjects (mean)"),
            (sets["other_subjects"]["max"], OTHER, ">", "other subjects (worst)"),
        ):
            if value is not None:
                axis.plot(value, row, marker, color=colour, label=label if row == 0 else None, markersize=5)
        strict = found["verdicts"]["strict"]["result"]
        axis.get_yaxis()
        axis.text(1.03, row, strict, va="center", fontsize=7, color=ACCENT if strict == "pass" else AFTER)
    axis.set_yticks(range(len(facts)), [f"{f['subject']} → {f['answer']}" for f in facts], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color=BEFORE, linewidth=0.8)
    axis.set_xlim(-0.35, 1.15)
    axis.set_xlabel("share of P(answer) lost")
    axis.set_title(f"{record['model']['name']}: {len(record['facts'])} facts deleted by {method}", fontsize=10)
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -1.1 / (0.24 * len(facts) + 1.6)), ncols=4, fontsize=7, frameon=False
    )
    _save(figure, path)


def _bars(axis: Any, name: str, found: dict[str, Any], record: dict[str, Any]) -> None:
    """Mean P of every held-out set that has known prompts, before and after; dots are single prompts after."""
    bars = [(f"“{record['fact']['prompt'][-24:]}”", [found["headline"]])]
    bars += [(NAMES[key], group["prompts"]) for key, group in found["sets"].items() if group["prompts"]]
    for place, (_, prompts) in enumerate(bars):
        for key, offset, colour in (("before", -0.2, BEFORE), ("after", 0.2, AFTER if place < 2 else OTHER)):
            values = [prompt[key] for prompt in prompts]
            axis.bar(place + offset, sum(values) / len(values), 0.38, color=colour, alpha=0.85)
            if len(values) > 1:
                axis.plot([place + offset] * len(values), values, ".", color="black", markersize=2.5, alpha=0.5)
    axis.set_xticks(range(len(bars)), [label for label, _ in bars], fontsize=7, rotation=30, ha="right")
    axis.set_ylim(0, 1)
    axis.set_ylabel("P(answer): grey before, colour after", fontsize=8)
    verdicts = ", ".join(f"{key} {value['result']}" for key, value in found["verdicts"].items())
    axis.set_title(f"{name}, layer {found['layer']}: {verdicts}", fontsize=9)


def _scan(axis: Any, scan: list[dict[str, Any]], chosen: int) -> None:
    """The harm by which the layer is chosen, and how much of the withheld phrasings a short fit suppressed there."""
    layers = [tried["layer"] for tried in scan]
    axis.plot(layers, [tried["harm"] for tried in scan], "D-", color=AFTER, label="harm to what was withheld")
    axis.plot(layers, [tried["suppressed"] for tried in scan], "o-", color=BEFORE, label="suppression of phrasings")
    axis.axvline(chosen, color=ACCENT, linewidth=6, alpha=0.2)
    axis.set_xlabel("layer")
    axis.set_ylim(0, HEADROOM * max(1.0, *(tried["harm"] for tried in scan)))
    axis.set_xticks(layers)
    axis.legend(fontsize=7)
    axis.set_title(f"layer trial on the fit set: layer {chosen} chosen", fontsize=9)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ProbeError("pictures need matplotlib: pip install 'vindex[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    try:
        with targets.written(path) as file:
            figure.savefig(file, dpi=130, bbox_inches="tight", format=path.suffix[1:])
    finally:
        pyplot.close(figure)
