"""Knowledge against reasoning retained, one curve for each family of masks, as .html or .png."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vindex import targets
from vindex.charts import COLOURS, QUIET, check_target, write_page

FAMILIES = {  # family: (label, colour)
    "gates": ("trained gates", COLOURS[0]),
    "random": ("random masks", QUIET),
    "largest |h|": ("largest |h|", COLOURS[1]),
    "smallest |h|": ("smallest |h|", COLOURS[2]),  # of records made before
    "|h| contrast": ("|h| contrast", COLOURS[2]),
    "|h| ratio": ("|h| ratio", COLOURS[3]),
}
AXES = ("knowledge retained", "reasoning retained")
GOOD, BAD = "good: facts gone,\nreasoning kept", "bad: reasoning gone,\nfacts kept"


class Curve(NamedTuple):
    label: str
    colour: str
    x: list[float | None]
    y: list[float | None]
    notes: list[str]
    """What each point is; empty where it needs no label."""
    quiet: bool


def curves(record: Mapping[str, Any]) -> list[Curve]:
    """From nothing off at (1, 1) through the operating points to all off at (0, 0); the gates last, on top."""
    drawn = []
    for family, (label, colour) in reversed(FAMILIES.items()):
        seeds = {entry["seed"] for entry in record["entries"] if entry["family"] == family}
        for seed in sorted(seeds, key=str):
            points = [entry for entry in record["entries"] if (entry["family"], entry["seed"]) == (family, seed)]
            points.sort(key=lambda entry: entry["off_fraction"])
            area = record["areas"][family]["value"]
            shown = "–" if area is None else f"{area:.2f}"
            drawn.append(_curve(f"{label}, area {shown}", colour, points, quiet=family != "gates"))
    return drawn


def _curve(label: str, colour: str, points: list[Mapping[str, Any]], *, quiet: bool) -> Curve:
    notes = [f"{entry['off_fraction']:.0%} off" for entry in points]
    x, y = ([entry[name] for entry in points] for name in ("knowledge_retained", "reasoning_retained"))
    return Curve(label, colour, [1.0, *x, 0.0], [1.0, *y, 0.0], ["", *notes, ""], quiet)


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw a record of `gates eval` to `path`, .html or .png. Raises TargetError for another suffix."""
    check_target(path)
    title = f"{record['model']['name']}, {record['gates']}: area between gates and random masks "
    title += "–" if record["advantage"] is None else f"{record['advantage']:+.2f}"
    soft = [[record["soft"][f"{kind}_retained"]] for kind in ("knowledge", "reasoning")]
    with targets.written(path) as file:
        (_draw_html if path.suffix == ".html" else _draw_png)(curves(record), soft, title, file)


def _draw_png(drawn: list[Curve], soft: list[list[float | None]], title: str, file: BinaryIO) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis: Any = figure.subplots()
    seen: set[str] = set()
    for curve in drawn:
        style = {"linewidth": 1, "alpha": 0.6, "markersize": 3} if curve.quiet else {"linewidth": 2.2, "markersize": 6}
        label = None if curve.label in seen else curve.label
        seen.add(curve.label)
        axis.plot(curve.x, curve.y, marker="o", color=curve.colour, label=label, **style)
        if not curve.quiet:
            for x, y, note in _legible(curve):
                axis.annotate(note, (x, y), textcoords="offset points", xytext=(7, 7), fontsize=9, color=curve.colour)
    axis.plot(*soft, marker="*", markersize=15, color=FAMILIES["gates"][1], linestyle="", label="soft gates")
    axis.text(0.01, 1.11, GOOD, fontsize=9, va="top", weight="bold")
    axis.text(1.11, -0.03, BAD, fontsize=9, va="bottom", ha="right", color=QUIET)
    axis.set_xlabel(AXES[0])
    axis.set_ylabel(AXES[1])
    axis.set_title(title, fontsize=11)
    axis.set_xlim(-0.04, 1.12)
    axis.set_ylim(-0.04, 1.12)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, frameon=False, reverse=True, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(file, dpi=110, format="png")


def _legible(curve: Curve) -> list[tuple[float, float, str]]:
    """(x, y, note) with the notes of points that nearly coincide joined, so that none covers another."""
    labels: list[tuple[float, float, str]] = []
    for x, y, note in zip(curve.x, curve.y, curve.notes, strict=True):
        if x is None or y is None:  # nothing was known, so that nothing is retained
            continue
        if note and labels and abs(labels[-1][0] - x) < 0.05 and abs(labels[-1][1] - y) < 0.03:
            labels[-1] = (*labels[-1][:2], f"{labels[-1][2].removesuffix(' off')}, {note}")
        elif note:
            labels.append((x, y, note))
    return labels


def _draw_html(drawn: list[Curve], soft: list[list[float | None]], title: str, file: BinaryIO) -> None:
    from plotly import graph_objects as go

    figure, seen = go.Figure(), set()
    for curve in drawn:
        hover = "%{text}: knowledge %{x:.2f}, reasoning %{y:.2f}"
        line = {"color": curve.colour, "width": 1 if curve.quiet else 3}
        figure.add_scatter(
            x=curve.x, y=curve.y, text=curve.notes, mode="lines+markers", line=line, name=curve.label,
            legendgroup=curve.label, showlegend=curve.label not in seen, hovertemplate=hover,
        )  # fmt: skip
        seen.add(curve.label)
    star = {"symbol": "star", "size": 16, "color": FAMILIES["gates"][1]}
    figure.add_scatter(x=soft[0], y=soft[1], mode="markers", marker=star, name="soft gates")
    figure.update_layout(xaxis_title=AXES[0], yaxis_title=AXES[1], height=700, legend_traceorder="reversed")
    for x, y, side, text in ((0, 1.06, "left", GOOD), (1, 0, "right", BAD)):
        figure.add_annotation(x=x, y=y, text=text.replace("\n", " "), showarrow=False, xanchor=side)
    write_page([("", figure)], title, file)
