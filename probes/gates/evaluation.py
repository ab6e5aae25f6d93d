"""What an evaluation found: scores of every mask at every operating point, and the area of each family.

Retained is the accuracy over the plain model's. A family of masks draws a curve from (1, 1), nothing off, through its
operating points to (0, 0), all off: knowledge retained to the right, reasoning retained upwards. Its area is ∫ y dx
along it (clipped to 0..1): 1 if facts go first, 0.5 if both go together, 0 if reasoning goes first. The one-number
summary is the area of the gates minus the mean area of the random masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from probes.gates.masks import Point
from probes.gates.plot import draw
from probes.gates.score import Scores
from probes.records import Result, plain


class Entry(NamedTuple):
    """One mask at one operating point."""

    family: str
    """gates, random, largest |h|, |h| contrast or |h| ratio."""
    seed: int | None
    point: Point
    scores: Scores
    knowledge: float
    """Retained: forget accuracy over the plain model's."""
    reasoning: float


class Area(NamedTuple):
    """∫ reasoning d(knowledge) of a family; of random masks the mean over seeds, with their extremes."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Result):
    """Gates, soft and at their operating points, beside masks of the same size."""

    about: dict[str, Any]
    """The head of the record: model, gates, panels, choices."""
    base: Scores
    soft: Scores
    entries: tuple[Entry, ...]
    reused: int = 0
    """Masks whose scores a run found that was stopped before."""

    @property
    def areas(self) -> dict[str, Area]:
        """By family, the gates first."""
        curves: dict[str, dict[int | None, list[Entry]]] = {}
        for entry in self.entries:
            curves.setdefault(entry.family, {}).setdefault(entry.seed, []).append(entry)
        found = {}
        for family, by_seed in curves.items():
            ordered = (sorted(entries, key=lambda e: -e.point.off_fraction) for entries in by_seed.values())
            values = [area([(e.knowledge, e.reasoning) for e in entries]) for entries in ordered]
            found[family] = Area(fmean(values), min(values), max(values))
        return found

    @property
    def area(self) -> float:
        """Of the gates: 1 when facts go first, 0.5 when both go together, 0 when reasoning goes first."""
        return self.areas["gates"].value

    @property
    def advantage(self) -> float:
        """Area between the curves of the gates and of random masks."""
        return self.area - self.areas["random"].value

    @property
    def soft_retained(self) -> tuple[float, float]:
        """Knowledge and reasoning that soft gates retain."""
        return kept_of(self.soft, self.base)

    def families(self) -> Iterator[tuple[Point | None, str, Scores, tuple[float | None, float | None]]]:
        """The plain model, soft gates, and every family at every point, the random masks as their mean.

        (operating point, name, scores, (knowledge retained, reasoning retained)) of each.
        """
        yield None, "plain model", self.base, (None, None)
        yield None, "soft gates", self.soft, self.soft_retained
        for at in sorted({entry.point for entry in self.entries}, key=lambda point: point.off_fraction):
            for family in self.areas:
                found = mean_of([e for e in self.entries if (e.family, e.point) == (family, at)])
                yield at, family, found.scores, (found.knowledge, found.reasoning)

    def rows(self) -> list[dict[str, Any]]:
        """What `families` gives, a row each."""
        return plain([_row(at, name, scores, *kept) for at, name, scores, kept in self.families()])

    def record(self) -> dict[str, Any]:
        kept = dict(zip(("knowledge_retained", "reasoning_retained"), self.soft_retained, strict=True))
        found = {
            "base": self.base.record(),
            "soft": self.soft.record() | kept,
            "entries": [
                {"family": e.family, "seed": e.seed, **e.point._asdict(), **e.scores.record()}
                | {"knowledge_retained": e.knowledge, "reasoning_retained": e.reasoning}
                for e in self.entries
            ],
            "areas": {name: found._asdict() for name, found in self.areas.items()},
            "advantage": self.advantage,
        }
        return plain(self.about | found)

    def plot(self, path: str | Path) -> None:
        """Draw the curves to an .html or .png file. Raises TargetError for another suffix."""
        draw(self.record(), Path(path))

    def __repr__(self) -> str:
        gates, model = self.about["gates"], self.about["model"]["name"]
        return f"<{gates} on {model}: area {self.area:.3f}, {self.advantage:+.3f} over random masks>"


def _row(
    at: Point | None, mask: str, scores: Scores, knowledge: float | None, reasoning: float | None
) -> dict[str, Any]:
    kept = {"knowledge_retained": knowledge, "reasoning_retained": reasoning}
    apart = {f"{name}_held_out": scores.share(name, held_out=True).value for name in ("forget", "reasoning")}
    return {"off_fraction": at and at.off_fraction, "mask": mask, **scores.figures(), **kept, **apart}


def mean_of(entries: Sequence[Entry]) -> Entry:
    """One entry with the mean of every figure, for the random masks of one operating point."""
    alike = zip(*(entry.scores.cells for entry in entries), strict=True)
    cells = tuple(same[0]._replace(right=fmean(cell.right for cell in same)) for same in alike)
    texts = (fmean(getattr(entry.scores, name) for entry in entries) for name in ("neutral_kl", "perplexity"))
    scores = Scores(cells, *texts)
    kept = fmean(e.knowledge for e in entries), fmean(e.reasoning for e in entries)
    return Entry(entries[0].family, None, entries[0].point, scores, *kept)


def kept_of(scores: Scores, base: Scores) -> tuple[float, float]:
    """Knowledge and reasoning retained, of the plain model's."""
    found = (retained(scores.share(name).value, base.share(name).value) for name in ("forget", "reasoning"))
    knowledge, reasoning = found
    return knowledge, reasoning


def retained(value: float, base: float) -> float:
    """value / base; nan where the plain model knows nothing, so that there is nothing to retain."""
    return value / base if base > 0 else math.nan


def area(points: Sequence[tuple[float, float]]) -> float:
    """∫ y dx of the curve (0, 0) … points in order of falling off-fraction … (1, 1), clipped to 0..1."""
    clipped = [(min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)) for x, y in points]
    curve = [(0.0, 0.0), *clipped, (1.0, 1.0)]
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(curve))
