"""A probe record as one picture: per-layer curves, CKA heatmap with the stages marked, spectra beside their floor.

The panels are described once, from the record alone, and drawn by plotly into a self-contained HTML page (hover for
values) or by matplotlib into a PNG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vindex import targets
from vindex.charts import COLOURS, PANEL_HEIGHT, QUIET, check_target, whole_marks, write_page

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Line:
    """One curve, or one level across the panel when `level` is set."""

    label: str
    y: tuple[float | None, ...]
    """None where a figure is undefined: the curve is broken there."""
    x: tuple[float, ...] = ()
    colour: str = COLOURS[0]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over layers, or over ranks."""

    title: str
    x_label: str
    lines: tuple[Line, ...]
    log: bool = False


@dataclass(frozen=True)
class Heatmap:
    """A matrix (L, L) with the first layers of its stages."""

    title: str
    values: Sequence[Sequence[float]]
    starts: tuple[int, ...]
    segments: tuple[int, ...]


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw `record` (of `probes.suite.record.build`) to `path`, .html or .png."""
    check_target(path)
    panels, heatmap = describe(record)
    with targets.written(path) as file:
        (_draw_html if path.suffix == ".html" else _draw_png)(panels, heatmap, title_of(record), file)


def title_of(record: Mapping[str, Any]) -> str:
    """C1–C5 with the headline values, on one line."""
    figures = ", ".join(
        f"{symbol} = {'–' if entry['value'] is None else format(entry['value'], '.3g')}"
        for symbol, entry in record["constants"].items()
    )
    text = record["texts"][0]["name"]
    return f"{record['model']['name']}: {figures} (definition {record['definition']}, text: {text})"


def describe(record: Mapping[str, Any]) -> tuple[tuple[Panel, ...], Heatmap]:
    """The five panels and the heatmap of a record."""
    first, constants, cka = record["layers"][0], record["constants"], record["cka"]
    thresholds = record["choices"]["sparsity_thresholds"]
    shown = [index for index, value in enumerate(thresholds) if value in (1e-3, 1e-2, 1e-1)]
    sparsity = tuple(
        _curve(f"|h| < {thresholds[index]:g}", [row[index] for row in first["sparsity"]["below"]], COLOURS[place])
        for place, index in enumerate(shown)
    )
    heat = first["temperature"]
    logarithmic = {name: [value or None for value in values] for name, values in heat.items()}  # 0 has no place there
    temperature = (
        _curve("all tokens", logarithmic["all_tokens"], COLOURS[0]),
        _curve("no_sink", logarithmic["no_sink"], COLOURS[1]),
        _curve("null: gate and up from different tokens", logarithmic["shuffled"], QUIET, dashed=True),
    )
    coherence = (
        _curve("leading direction", constants["C3"]["per_layer"], COLOURS[0], shift=0.5),
        _level("null", constants["C3"]["null"], len(heat["median"])),
    )
    adjacent = (
        _curve("debiased, no_sink", constants["C5"]["per_layer"], COLOURS[0], shift=0.5),
        _curve("debiased, with sinks", cka["with_sink_adjacent"], COLOURS[1], shift=0.5),
        _level("transition below", record["choices"]["stage_threshold"], len(heat["median"])),
    )
    panels = (
        Panel("C1: share of |h| below a threshold", "layer", sparsity),
        Panel("C4: variance of h over tokens", "layer", temperature, log=True),
        Panel("C3: |cos| of adjacent layers' leading gate directions", "layer", coherence),
        Panel("C5: CKA of adjacent layers", "layer", adjacent),
        Panel("spectra: var@64, dashed: Marchenko–Pastur floor", "layer", _spectra(record["spectra"])),
    )
    return panels, Heatmap(
        "C5: debiased CKA; solid: stages; dotted: segmentation",
        cka["debiased"],
        tuple(cka["stage_starts"]),
        tuple(cka["segmentation"]["starts"]),
    )


def _spectra(spectra: Mapping[str, Any]) -> tuple[Line, ...]:
    lines: list[Line] = []
    for colour, projection in zip(COLOURS, ("gate_proj", "down_proj"), strict=False):
        entry = spectra[projection]
        lines.append(_curve(projection, entry["var"]["64"], colour))
        if projection == "gate_proj":  # the floor is the same for a shape and its transpose
            lines.append(_floor(entry["marchenko_pastur"]["64"], len(entry["squared_norm"])))
    return tuple(lines)


def _curve(label: str, y: Sequence[float | None], colour: str, *, shift: float = 0.0, dashed: bool = False) -> Line:
    """Over layers; a figure of layers l and l + 1 is drawn between them, at l + 0.5."""
    return Line(label, tuple(y), tuple(index + shift for index in range(len(y))), colour, dashed)


def _level(label: str, value: float, count: int) -> Line:
    return Line(f"{label} {value:.3g}", (value, value), (0, count - 1), QUIET, dashed=True)


def _floor(level: float | Sequence[float], count: int) -> Line:
    """One level, or a curve where dense layers and mixtures have weights of different shapes."""
    return _level("floor", level, count) if isinstance(level, float) else _curve("floor", level, QUIET, dashed=True)


def _draw_png(panels: Sequence[Panel], heatmap: Heatmap, title: str, file: BinaryIO) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(14, 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flatten()
    figure.suptitle(title, fontsize=12)
    for axis, panel in zip(axes, panels, strict=False):
        for line in panel.lines:
            marks = {"linestyle": "--", "linewidth": 1.2} if line.dashed else {"marker": "o", "markersize": 3}
            axis.plot(
                line.x, [math.nan if y is None else y for y in line.y], color=line.colour, label=line.label, **marks
            )
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.x_label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_yscale("log" if panel.log else "linear")
        if not panel.log:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    axis = axes[-1]
    image = axis.imshow(heatmap.values, origin="lower", cmap="viridis", vmin=0, vmax=1)
    for starts, dash in ((heatmap.starts, "-"), (heatmap.segments, ":")):
        for start in starts[1:]:
            axis.axhline(start - 0.5, color="white", linestyle=dash, linewidth=1)
            axis.axvline(start - 0.5, color="white", linestyle=dash, linewidth=1)
    axis.set_title(heatmap.title, fontsize=10)
    axis.set_xlabel("layer")
    axis.set_ylabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axis, shrink=0.85)
    figure.savefig(file, dpi=110, format="png")


def _draw_html(panels: Sequence[Panel], heatmap: Heatmap, title: str, file: BinaryIO) -> None:
    figures = [*((panel.title, _curves(panel)) for panel in panels), (heatmap.title, _heatmap(heatmap))]
    write_page(figures, title, file, least="24rem")


def _curves(panel: Panel) -> Figure:
    from plotly import graph_objects as go

    figure = go.Figure()
    for line in panel.lines:
        style = {"color": line.colour, "dash": "dash" if line.dashed else "solid", "width": 1.5}
        mode = "lines" if line.dashed else "lines+markers"
        hover = f"{panel.x_label} %{{x}}: %{{y:.4g}}<extra>{line.label}</extra>"
        figure.add_scatter(x=line.x, y=line.y, mode=mode, line=style, name=line.label, hovertemplate=hover)
    figure.update_xaxes(title_text=panel.x_label, **whole_marks(*(line.x for line in panel.lines)))
    figure.update_yaxes(type="log" if panel.log else "linear", rangemode="normal" if panel.log else "tozero")
    return figure.update_layout(height=PANEL_HEIGHT, showlegend=True)


def _heatmap(heatmap: Heatmap) -> Figure:
    from plotly import graph_objects as go

    hover = "layers %{x}, %{y}: %{z:.4f}<extra></extra>"
    figure = go.Figure(go.Heatmap(z=heatmap.values, zmin=0, zmax=1, colorscale="Viridis", hovertemplate=hover))
    for starts, dash in ((heatmap.starts, "solid"), (heatmap.segments, "dot")):
        for start in starts[1:]:
            figure.add_hline(start - 0.5, line={"color": "white", "width": 1, "dash": dash})
            figure.add_vline(start - 0.5, line={"color": "white", "width": 1, "dash": dash})
    marks = whole_marks(range(len(heatmap.values)))
    figure.update_xaxes(title_text="layer", **marks)
    figure.update_yaxes(title_text="layer", **marks)
    return figure.update_layout(height=PANEL_HEIGHT)
