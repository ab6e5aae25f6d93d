"""A trace's record as one page that needs nothing else: tables, and two charts drawn as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from vindex.charts import COLOURS, QUIET
from vindex.console import visible

WIDTH, HEIGHT, LEFT, FOOT = 720, 180, 64, 22


class Chart(NamedTuple):
    """Places in a picture of WIDTH × HEIGHT."""

    ticks: tuple[tuple[float, str], ...]
    """Height and words of each line across."""
    zero: float
    columns: tuple[tuple[float, str], ...]
    """Place along and name of each stage."""
    curves: tuple[tuple[str, str, str], ...]
    """Name, colour and points of each curve."""
    bars: tuple[tuple[float, float, float, float, str, str], ...]
    """x, y, width, height, colour and words of each bar."""


def page(record: Mapping[str, Any]) -> str:
    """The page of a record of `Trace.record`."""
    environment = Environment(
        loader=PackageLoader("probes.tracing", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"visible": visible, "number": number, "stage": stage}
    beside = next((name for name in ("patched", "against") if f"log_prob_{name}" in record["trajectory"][0]), None)
    return environment.get_template("page.html").render(
        record=record, beside=beside, charts=charts(record, beside), size=(WIDTH, HEIGHT), left=LEFT, quiet=QUIET
    )


def charts(record: Mapping[str, Any], beside: str | None) -> dict[str, Chart]:
    """Log-probability of the target by stage, and what each stage adds to its logit."""
    rows = record["trajectory"]
    curves = {"the prompt" if beside == "against" else "log-probability": [row["log_prob"] for row in rows]}
    if beside:
        curves[beside] = [row[f"log_prob_{beside}"] for row in rows]
    names = [stage(row) for row in rows]
    return {
        "Log-probability of the target by the lens": _chart(names, curves, ()),
        "What each stage adds to the target's logit": _chart(names, {}, [row["adds"] for row in rows]),
    }


def _chart(names: Sequence[str], curves: Mapping[str, Sequence[float]], bars: Sequence[float]) -> Chart:
    values = [0.0, *(value for curve in curves.values() for value in curve), *bars]
    low, high = min(values), max(values)
    high = high if high > low else low + 1.0
    step = (WIDTH - LEFT) / len(names)

    def along(place: float) -> float:
        return round(LEFT + (place + 0.5) * step, 1)

    def up(value: float) -> float:
        return round(8 + (high - value) / (high - low) * (HEIGHT - 8 - FOOT), 1)

    return Chart(
        tuple((up(value), f"{value:.3g}") for value in sorted({low, 0.0, high})),
        up(0.0),
        tuple((along(place), name) for place, name in enumerate(names)),
        tuple(
            (name, colour, " ".join(f"{along(place)},{up(value)}" for place, value in enumerate(curve)))
            for (name, curve), colour in zip(curves.items(), COLOURS, strict=False)
        ),
        tuple(
            (round(along(place) - 0.4 * step, 1), min(up(value), up(0.0)), round(0.8 * step, 1),
             round(abs(up(value) - up(0.0)), 1), COLOURS[place % 2], f"{names[place]}: {value:+.3f}")
            for place, value in enumerate(bars)
        ),
    )  # fmt: skip


def stage(row: Mapping[str, Any]) -> str:
    """A row of the trajectory by name: `12 FFN`."""
    return row["after"] if row["layer"] is None else f"{row['layer']} {row['after']}"


def number(value: float | None, form: str = "+.3f") -> str:
    """A number; – for what was not measured."""
    return "–" if value is None or value != value else format(value, form)
