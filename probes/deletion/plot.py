"""Pictures of a Gate 3 record: each set before and after, and the layer trial, of one fact; or every fact of a run.

They read the JSON record, not the run, so that a saved record can be drawn again. What is to be seen is described once,
as points in rows, and drawn by plotly into a self-contained HTML page or by matplotlib into a PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from probes.deletion.record import ALL
from vindex import targets
from vindex.charts import COLOURS, QUIET, check_target, whole_marks, write_page
from vindex.errors import ProbeError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NAMES = {
    "paraphrases": "paraphrases",
    "reference": "the reference",
    "other_subjects": "other subjects",
    "same_subject": "its other facts",
    "same_answer": "facts with the answer",
}
SINGLE, MEAN = 4, 11
"""Sizes of the points of single prompts, and of means."""
PROBABILITY = (-0.03, 1.03)
"""From 0 to 1 with room for a point: the panels of two methods have one scale, so that a small effect looks small."""


class Points(NamedTuple):
    """Points of one kind."""

    label: str
    colour: str
    size: int
    x: Sequence[float]
    y: Sequence[float]
    joined: bool = False


class Panel(NamedTuple):
    """Points over a common x, in rows that have names (the first at the top) or over a y that has one."""

    title: str
    x_name: str
    points: list[Points]
    rows: list[str]
    y_name: str = ""
    x_range: tuple[float, float] | None = None
    """None: what holds the points."""
    whole: bool = False
    """Whether x are whole numbers, and so its marks."""


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw a record of `gate3` to `path`, .html or .png. Raises ProbeError where no fact in it is known."""
    check_target(path)
    model = record["model"]["name"]
    if record["record"] == ALL:
        panels, title = [_facts(record)], f"{model}: {len(record['facts'])} facts deleted"
    else:
        fact = record["fact"]
        panels = [_sets(record, name) for name in record["methods"]] + _trial(record)
        title = f"{model}: delete {fact['name']} → {fact['answer']}"
    if not any(each.y for panel in panels for each in panel.points):
        raise ProbeError("nothing to draw: the model knows no fact of this record")
    with targets.written(path) as file:
        (_draw_html if path.suffix == ".html" else _draw_png)(panels, title, file)


def _sets(record: dict[str, Any], method: str) -> Panel:
    """P of the answers in every held-out set that has known prompts, before and after."""
    found = record["methods"][method]
    sets = {"the fact": [found["headline"]]}
    sets |= {NAMES[key]: group["prompts"] for key, group in found["sets"].items() if group["prompts"]}
    points = []
    for side, colour in (("before", QUIET), ("after", COLOURS[1])):
        values = [[prompt[side] for prompt in prompts] for prompts in sets.values()]
        singles, rows = list(chain(*values)), [row for row, some in enumerate(values) for _ in some]
        points.append(Points(f"{side}, each prompt", colour, SINGLE, singles, rows))
        points.append(
            Points(f"{side}, mean", colour, MEAN, [sum(some) / len(some) for some in values], range(len(values)))
        )
    verdicts = ", ".join(f"{name} {verdict['result']}" for name, verdict in found["verdicts"].items())
    title = f"{method}, layer {found['layer']}: {verdicts}"
    return Panel(title, "P(answer)", points, list(sets), x_range=PROBABILITY)


def _trial(record: dict[str, Any]) -> list[Panel]:
    """The harm by which forward's layer was chosen, and what a short fit suppressed there; nothing without a trial."""
    found = record["methods"].get("forward", {"scan": []})
    layers = [tried["layer"] for tried in found["scan"]]
    if not layers:
        return []
    points = [
        Points(label, colour, MEAN, layers, [tried[key] for tried in found["scan"]], joined=True)
        for key, label, colour in (
            ("harm", "harm to what was withheld", COLOURS[1]),
            ("suppressed", "suppression of withheld phrasings", COLOURS[0]),
        )
    ]
    return [Panel(f"forward: layer {found['layer']} is chosen", "layer", points, [], "in the trial", whole=True)]


def _facts(record: dict[str, Any]) -> Panel:
    """What each fact, its paraphrases and other subjects lost, by the run's first method."""
    method = next(iter(record["rates"]))
    facts = [fact for fact in record["facts"] if method in fact["methods"]]
    points = []
    for label, colour, size, value in (
        ("other subjects, worst", COLOURS[0], SINGLE, lambda found: found["sets"]["other_subjects"]["max"]),
        ("other subjects, mean", COLOURS[0], MEAN - 3, lambda found: found["sets"]["other_subjects"]["mean"]),
        ("paraphrases, mean", COLOURS[2], MEAN - 3, lambda found: found["sets"]["paraphrases"]["mean"]),
        ("the fact", COLOURS[1], MEAN - 3, lambda found: found["suppression"]),
    ):
        values = [(value(fact["methods"][method]), row) for row, fact in enumerate(facts)]
        shown = [pair for pair in values if pair[0] is not None]
        points.append(Points(label, colour, size, [x for x, _ in shown], [row for _, row in shown]))
    rows = [
        f"{fact['subject']} → {fact['answer']} (strict {fact['methods'][method]['verdicts']['strict']['result']})"
        for fact in facts
    ]
    return Panel(f"by {method}", "share of P(answer) lost", points, rows)


def _height(panels: list[Panel]) -> float:
    """In inches."""
    return max(4.2, *(1.8 + 0.26 * len(panel.rows) for panel in panels))


def _draw_png(panels: list[Panel], title: str, file: BinaryIO) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4 * len(panels), _height(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for each in panel.points:
            line = "-" if each.joined else ""
            axis.plot(each.x, each.y, "o", linestyle=line, color=each.colour, markersize=each.size, label=each.label)
        if panel.rows:
            axis.set_yticks(range(len(panel.rows)), panel.rows)
            axis.set_ylim(len(panel.rows) - 0.5, -0.5)
        axis.set(title=panel.title, xlabel=panel.x_name, ylabel=panel.y_name, xlim=panel.x_range)
        if panel.whole:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.suptitle(title, fontsize=12)
    figure.savefig(file, dpi=110, format="png")


def _draw_html(panels: list[Panel], title: str, file: BinaryIO) -> None:
    write_page([(panel.title, _figure(panel)) for panel in panels], title, file)


def _figure(panel: Panel) -> Figure:
    """A panel by itself, as wide as the page."""
    from plotly import graph_objects as go

    figure = go.Figure()
    for each in panel.points:
        figure.add_scatter(
            x=each.x, y=[panel.rows[int(y)] for y in each.y] if panel.rows else each.y, name=each.label,
            mode="lines+markers" if each.joined else "markers", marker={"color": each.colour, "size": each.size},
        )  # fmt: skip
    marks = whole_marks(*(each.x for each in panel.points)) if panel.whole else {}
    figure.update_xaxes(title_text=panel.x_name, range=panel.x_range, **marks)
    rows = {"categoryorder": "array", "categoryarray": panel.rows[::-1]} if panel.rows else {}
    figure.update_yaxes(title_text=panel.y_name, **rows)
    return figure.update_layout(height=180 + 36 * (len(panel.rows) or 5))
