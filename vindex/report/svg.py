"""Charts as places in a picture; page.html draws them. Colours are classes of page.css: c0 … c3, quiet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

FOOT, HEAD, RIGHT = 34, 10, 14


class Axis(NamedTuple):
    """What lies along a side: its words, its ends, and where it is marked."""

    name: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, value: float) -> float:
        """From 0 at the low end to 1 at the high end."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = math.log(max(value, self.low)) if self.log else value
        return (value - low) / (high - low)


class Line(NamedTuple):
    """Points joined; where y is None the line is broken. kind: classes of the style sheet."""

    label: str
    kind: str
    x: Sequence[float]
    y: Sequence[float | None]
    notes: Sequence[str] = ()
    """Words of each point; with them the points are drawn."""


class Mark(NamedTuple):
    """A point, or a bar from zero to it."""

    x: float
    y: float
    kind: str
    words: str
    size: float = 3.0


class Chart(NamedTuple):
    """A picture of width × height with everything in its place."""

    title: str
    width: int
    height: int
    left: int
    x: str
    y: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    paths: list[tuple[str, str]]
    """Kind and points."""
    dots: list[tuple[float, float, float, str, str]]
    """x, y, size, kind, words."""
    bars: list[tuple[float, float, float, float, str, str]]
    """x, y, width, height, kind, words."""
    legend: list[tuple[str, str]]


def chart(
    title: str,
    x: Axis,
    y: Axis,
    *,
    lines: Sequence[Line] = (),
    dots: Iterable[Mark] = (),
    bars: Sequence[Mark] = (),
    legend: Sequence[tuple[str, str]] = (),
    left: int = 52,
    size: tuple[int, int] = (680, 220),
) -> Chart:
    """Everything in its place. legend: kind and words; by default those of the lines, each once."""
    width, height = size

    def along(value: float) -> float:
        return round(left + x.place(value) * (width - left - RIGHT), 1)

    def up(value: float) -> float:
        return round(HEAD + (1 - y.place(value)) * (height - HEAD - FOOT), 1)

    marks = [Mark(*at, line.kind, f"{line.label}, {note}") for line in lines for at, note in _noted(line)]
    step = 0.7 * (width - left - RIGHT) / max(len(bars), 1)
    return Chart(
        title,
        width,
        height,
        left,
        x.name,
        y.name,
        [(along(value), words) for value, words in x.ticks],
        [(up(value), words) for value, words in y.ticks],
        [
            (line.kind, " ".join(f"{along(a)},{up(b)}" for a, b in piece))
            for line in lines
            for piece in _pieces(line.x, line.y)
        ],
        [(along(dot.x), up(dot.y), dot.size, dot.kind, dot.words) for dot in [*marks, *dots]],
        [
            (
                round(along(bar.x) - step / 2, 1),
                min(up(bar.y), up(0.0)),
                round(step, 1),
                round(abs(up(bar.y) - up(0.0)), 1),
                bar.kind,
                bar.words,
            )
            for bar in bars
        ],
        list(legend) or list(dict.fromkeys((line.kind, line.label) for line in lines)),
    )


def _noted(line: Line) -> Iterable[tuple[tuple[float, float], str]]:
    if line.notes:
        for x, y, note in zip(line.x, line.y, line.notes, strict=True):
            if y is not None and note:
                yield (x, y), note


def _pieces(x: Sequence[float], y: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    """The points between the breaks."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(x, y, strict=True):
        if b is None:
            pieces.append([])
        else:
            pieces[-1].append((a, b))
    return [piece for piece in pieces if piece]


def axis(name: str, values: Iterable[float | None], *, log: bool = False) -> Axis:
    """An axis that holds these values, and 0 unless it is logarithmic, marked at round ones."""
    found = [value for value in values if value is not None and (value > 0 or not log)] or [1.0]
    low, high = min(found), max(found)
    if log:
        ends = math.floor(math.log10(low)), math.ceil(math.log10(high))
        ends = ends if ends[1] > ends[0] else (ends[0], ends[0] + 1)
        every = (ends[1] - ends[0]) // 4 + 1
        marks = [(10.0**power, f"{10.0**power:g}") for power in range(ends[0], ends[1] + 1, every)]
        return Axis(name, 10.0 ** ends[0], 10.0 ** ends[1], marks, True)
    low, high = min(low, 0.0), max(high, 0.0)
    high = high if high > low else low + 1.0
    step = _round((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = [(number * step, f"{number * step:.6g}".replace("-", "−")) for number in range(first, last + 1)]
    return Axis(name, first * step, last * step, marks)


def layers_axis(count: int) -> Axis:
    """Over layers 0 … count − 1."""
    every = max(1, math.ceil(count / 12))
    return Axis("layer", -0.5, count - 0.5, [(float(at), str(at)) for at in range(0, count, every)])


def _round(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= step * (1 - 1e-9))
