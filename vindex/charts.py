"""What the pictures of every capability share: suffixes, colours, the check before any work, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from vindex import targets
from vindex.errors import TargetError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SUFFIXES = (".html", ".png")
COLOURS = ("#2563a8", "#c2571a", "#2f8f5b", "#8b4a9c")
QUIET = "#888888"
PANEL_HEIGHT = 360  # pixels, of one of several panels on a page
STYLE = """\
body { margin: 1.2rem auto; max-width: 84rem; padding: 0 1rem; color: #2a3f5f }
body { font: 15px/1.4 "Open Sans", Verdana, sans-serif }
h1 { font-size: 1.2rem } h2 { font-size: .95rem; margin: 0 } h1, h2 { font-weight: 600; overflow-wrap: anywhere }
main { display: grid; gap: 1.5rem } section { min-width: 0 }"""


def check_target(path: Path) -> None:
    """Raise TargetError now if `path` cannot be drawn to later: no place for a file, another suffix, no matplotlib."""
    targets.check_file(path)
    if path.suffix not in SUFFIXES:
        raise TargetError(f"{path}: plots are written as {' or '.join(SUFFIXES)}")
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise TargetError(
                f"{path}: PNG needs matplotlib; pip install 'vindex-svd[plot]', or write .html"
            ) from error


def write_page(figures: Sequence[tuple[str, Figure]], title: str, file: BinaryIO, *, least: str = "100%") -> None:
    """Figures of plotly, each below its title, as one page that opens without a network.

    least: a width in CSS; where a window has room for several figures of it, they stand side by side.
    """
    parts: list[str] = []
    for heading, figure in figures:
        figure.update_layout(template="plotly_white", margin={"l": 60, "r": 20, "t": 30, "b": 50})
        figure.update_layout(legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"})
        drawn = figure.to_html(full_html=False, include_plotlyjs=not parts, config={"responsive": True})
        parts.append(f"<section>{f'<h2>{escape(heading)}</h2>' if heading else ''}{drawn}</section>")
    columns = f"main {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, {least}), 1fr)) }}"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}\n{columns}</style>"
    body = f"<h1>{escape(title)}</h1><main>{''.join(parts)}</main>"
    file.write(f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'.encode())


def whole_marks(*values: Sequence[float]) -> dict[str, int]:
    """What keeps an axis of plotly over these layers or steps from marks between two; over many it has none there."""
    low, high = (end(chain(*values), default=0) for end in (min, max))
    return {"dtick": 1} if high - low < 12 else {}


class Curve(NamedTuple):
    """Points joined by a line; where y is None it is broken."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str
    dashed: bool = False


def draw_curves(
    curves: Sequence[Curve], path: Path, title: str, x_label: str, y_label: str, *, log: bool = False
) -> None:
    """One panel of curves to `path`, .html (hover for values) or .png. Raises TargetError as `check_target`."""
    check_target(path)
    with targets.written(path) as file:
        (_html if path.suffix == ".html" else _png)(curves, file, title, x_label, y_label, log)


def _html(curves: Sequence[Curve], file: BinaryIO, title: str, x_label: str, y_label: str, log: bool) -> None:
    from plotly import graph_objects as go

    figure = go.Figure()
    for curve in curves:
        line = {"color": curve.colour, "dash": "dash" if curve.dashed else "solid", "width": 1.5}
        mode = "lines" if curve.dashed else "lines+markers"
        figure.add_scatter(x=list(curve.x), y=list(curve.y), mode=mode, line=line, name=curve.label)
    figure.update_xaxes(title_text=x_label, **whole_marks(*(curve.x for curve in curves)))
    figure.update_yaxes(title_text=y_label, type="log" if log else "linear", exponentformat="e")
    write_page([("", figure.update_layout(height=600))], title, file)


def _png(curves: Sequence[Curve], file: BinaryIO, title: str, x_label: str, y_label: str, log: bool) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for curve in curves:
        style = {"linestyle": "--"} if curve.dashed else {"marker": "o", "markersize": 3}
        values = [float("nan") if value is None else value for value in curve.y]
        axis.plot(curve.x, values, color=curve.colour, label=curve.label, linewidth=1.3, **style)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log" if log else "linear")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110, format="png")
