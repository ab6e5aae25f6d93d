"""What the pictures of every capability share: suffixes, colours, and the check before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vindex import targets
from vindex.errors import TargetError

SUFFIXES = (".html", ".png")
COLOURS = ("#2563a8", "#c2571a", "#2f8f5b", "#8b4a9c")
QUIET = "#888888"


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
    figure.update_layout(title=title, template="plotly_white", xaxis_title=x_label, yaxis_title=y_label)
    figure.update_yaxes(type="log" if log else "linear", exponentformat="e")
    file.write(figure.to_html(include_plotlyjs=True, full_html=True).encode())


def _png(curves: Sequence[Curve], file: BinaryIO, title: str, x_label: str, y_label: str, log: bool) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for curve in curves:
        style = {"linestyle": "--"} if curve.dashed else {"marker": "o", "markersize": 3}
        values = [float("nan") if value is None else value for value in curve.y]
        axis.plot(curve.x, values, color=curve.colour, label=curve.label, linewidth=1.3, **style)
    axis.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log" if log else "linear")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110, format="png")
