"""What gates do beside what chance does.

1. The plain model and soft gates are scored on the panels.
2. At each operating point (the selected thresholds) the mask of the gates is scored beside masks that turn off as many
   neurons of every layer: at random (5 seeds), and by mean |h| where an entity is about to be said: those that fire the
   most, those that fire the least, and those that fire the most there compared with reasoning text. These come from
   the atlas's training rows, or, where files are given, from the files' own rows, which favours these controls.
3. Retained is the accuracy over the plain model's. A family of masks draws a curve from (1, 1), nothing off, through
   its operating points to (0, 0), all off: knowledge retained to the right, reasoning retained upwards. Its area is
   ∫ y dx along it (clipped to 0..1): 1 if facts go first, 0.5 if both go together, 0 if reasoning goes first.
   The one-number summary is the area of the gates minus the mean area of the random masks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.gates.activations import mean_magnitude
from probes.gates.apply import require_fit, soft
from probes.gates.data import Forget, Retain
from probes.gates.encode import forget_example, retain_example
from probes.gates.masks import Gates, Point, ScaleMode, lowest_keep, point, random_keep, rescaled
from probes.gates.options import TrainOptions
from probes.gates.panels import Panels
from probes.gates.score import Scores, Settings, score
from probes.live.load import Loaded

RANDOM_SEEDS = 5


class Magnitudes(NamedTuple):
    """Mean |h| of every neuron (L, I): before entity tokens of forget text, and in retain text."""

    forget: Tensor
    retain: Tensor


class Entry(NamedTuple):
    """One mask at one operating point."""

    family: str
    """gates, random, largest |h|, smallest |h|, |h| ratio."""
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


class Evaluation(NamedTuple):
    base: Scores
    soft: Scores
    entries: tuple[Entry, ...]
    areas: dict[str, Area]
    counts: dict[str, int]
    """Prompts or texts in each panel."""

    @property
    def soft_retained(self) -> tuple[float, float]:
        """Knowledge and reasoning that soft gates retain."""
        return retained(self.soft.forget, self.base.forget), retained(self.soft.reasoning, self.base.reasoning)

    @property
    def advantage(self) -> float:
        """Area between the curves of the gates and of random masks."""
        return self.areas["gates"].value - self.areas["random"].value

    def of(self, family: str, seed: int | None = None) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if (entry.family, entry.seed) == (family, seed))


def evaluate(
    loaded: Loaded,
    gates: Gates,
    panels: Panels,
    magnitudes: Magnitudes | None = None,
    *,
    scale_mode: ScaleMode = "none",
    mask_scale: ScaleMode = "none",
    thresholds: Sequence[float] | None = None,
    settings: Settings = Settings(),
    on_mask: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """Score gates, soft and at their operating points, beside their controls. `on_mask` hears how many were scored."""
    require_fit(gates.logits.shape, loaded.model)
    base = score(loaded, panels, None, settings)
    softly = score(loaded, panels, soft(gates, scale_mode), settings)
    on_mask(2)
    entries = []
    for threshold in thresholds or gates.selected_thresholds():
        at = point(gates, threshold)
        for family, seed, keep in masks(gates, threshold, magnitudes):
            scores = score(loaded, panels, rescaled(keep.float(), mask_scale), settings)
            kept = retained(scores.forget, base.forget), retained(scores.reasoning, base.reasoning)
            entries.append(Entry(family, seed, at, scores, *kept))
            on_mask(1)
    counts = {name: len(getattr(panels, name)) for name in ("forget", "oracle", "conflict", "reasoning", "neutral")}
    return Evaluation(base, softly, tuple(entries), _areas(entries), counts)


def magnitudes(
    loaded: Loaded, forget: Sequence[Forget], retain: Sequence[Retain], *, chat: bool, count: int = 400, seed: int = 0
) -> Magnitudes:
    """Mean |h| over at most `count` rows of each kind, drawn with `seed`."""
    rng = random.Random(seed)
    facts = rng.sample(list(forget), min(count, len(forget)))
    sums = rng.sample(list(retain), min(count, len(retain)))
    settings: dict[str, Any] = {"chat": chat, "max_tokens": TrainOptions().max_tokens}
    said = [forget_example(row, loaded.tokenizer, **settings) for row in facts]
    worked = [retain_example(row, loaded.tokenizer, **settings) for row in sums]
    return Magnitudes(mean_magnitude(loaded, said, entity=True), mean_magnitude(loaded, worked, entity=False))


def masks(gates: Gates, threshold: float, magnitudes: Magnitudes | None) -> Iterator[tuple[str, int | None, Tensor]]:
    """(family, seed, keep) of the gates' mask and of every control of its size."""
    keep = gates.keep(threshold)
    yield "gates", None, keep
    for seed in range(RANDOM_SEEDS):
        yield "random", seed, random_keep(keep, seed)
    if magnitudes:
        yield "largest |h|", None, lowest_keep(-magnitudes.forget, keep)
        yield "smallest |h|", None, lowest_keep(magnitudes.forget, keep)
        tiny = torch.finfo(torch.float32).tiny
        yield "|h| ratio", None, lowest_keep(-magnitudes.forget / magnitudes.retain.clamp_min(tiny), keep)


def mask_count(points: int, magnitudes: bool) -> int:
    """How many times `evaluate` scores, for a progress bar."""
    return 2 + points * (1 + RANDOM_SEEDS + 3 * magnitudes)


def mean_of(entries: Sequence[Entry]) -> Entry:
    """One entry with the mean of every figure, for the random masks of one operating point."""
    scores = Scores(*(fmean(values) for values in zip(*(entry.scores for entry in entries), strict=True)))
    kept = fmean(e.knowledge for e in entries), fmean(e.reasoning for e in entries)
    return Entry(entries[0].family, None, entries[0].point, scores, *kept)


def record(
    loaded: Loaded,
    gates: str,
    result: Evaluation,
    panels: Panels,
    scales: tuple[ScaleMode, ScaleMode],
    generate: int,
    weights_sha256: Mapping[str, str],
) -> dict[str, Any]:
    """The JSON record of an evaluation: every figure, and the choices it depends on."""
    from datetime import UTC, datetime

    from probes.records import libraries

    made = {
        "record": "vindex-gates-evaluation/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"name": loaded.name, "revision": loaded.revision, "weights_sha256": dict(weights_sha256)},
        "gates": gates,
        "panels": {"source": panels.source, "counts": result.counts},
        "choices": {
            "soft_scale_mode": scales[0],
            "mask_scale_mode": scales[1],
            "scoring": f"written, {generate} tokens" if generate else "teacher-forced",
            "random_seeds": RANDOM_SEEDS,
        },
        "base": result.base._asdict(),
        "soft": result.soft._asdict()
        | dict(zip(("knowledge_retained", "reasoning_retained"), result.soft_retained, strict=True)),
        "entries": [
            {"family": e.family, "seed": e.seed, **e.point._asdict(), **e.scores._asdict()}
            | {"knowledge_retained": e.knowledge, "reasoning_retained": e.reasoning}
            for e in result.entries
        ],
        "areas": {name: found._asdict() for name, found in result.areas.items()},
        "advantage": result.advantage,
        "libraries": libraries(),
    }
    return rounded(made)


def rounded(value: Any) -> Any:
    """Floats to 6 significant digits, nan as None."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def retained(value: float, base: float) -> float:
    """value / base; nan where the plain model knows nothing, so that there is nothing to retain."""
    return value / base if base > 0 else math.nan


def area(points: Sequence[tuple[float, float]]) -> float:
    """∫ y dx of the curve (0, 0) … points in order of falling off-fraction … (1, 1), clipped to 0..1."""
    clipped = [(min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)) for x, y in points]
    curve = [(0.0, 0.0), *clipped, (1.0, 1.0)]
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(curve))


def _areas(entries: Sequence[Entry]) -> dict[str, Area]:
    curves: dict[str, dict[int | None, list[Entry]]] = {}
    for entry in entries:
        curves.setdefault(entry.family, {}).setdefault(entry.seed, []).append(entry)
    areas = {}
    for family, by_seed in curves.items():
        ordered = (sorted(found, key=lambda e: -e.point.off_fraction) for found in by_seed.values())
        values = [area([(e.knowledge, e.reasoning) for e in found]) for found in ordered]
        areas[family] = Area(sum(values) / len(values), min(values), max(values))
    return areas
