"""A measured number with what it takes to judge it: unit, sample, interval and null."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from probes.suite.definition import BOOTSTRAP, CONFIDENCE, SEED


@dataclass(frozen=True)
class Measure:
    """One figure. `value` is the headline text's; `mean` and `interval` are over the `n` samples that are defined.

    What has no value is None: a layer whose weight is zero has no direction, and figures of it alone are no figures.
    """

    value: float | None
    unit: str
    over: str
    """What the samples are: "texts", or "layer pairs" where no text is involved."""
    n: int
    mean: float | None
    interval: tuple[float, float] | None
    """95 % bootstrap interval of the mean; None for less than two samples."""
    null: float | None
    """What the same procedure gives where there is nothing to find; None where there is no such case."""
    samples: tuple[float, ...]


def measure(samples: Sequence[float | None], unit: str, *, null: float | None = None, over: str = "texts") -> Measure:
    """A Measure whose value is the first sample's: the headline text, in a run over several texts."""
    found = mean_of([sample for sample in samples if sample is not None], unit, null=null, over=over)
    return replace(found, value=None if samples[0] is None else float(samples[0]))


def mean_of(samples: Sequence[float], unit: str, *, null: float | None = None, over: str) -> Measure:
    """A Measure whose value is the mean of the samples themselves; None where there are none."""
    values = tuple(float(sample) for sample in samples)
    mean = float(np.mean(values)) if values else None
    return Measure(mean, unit, over, len(values), mean, interval(values), null, values)


def interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean (Efron 1979), from a fixed seed; None for fewer than 2 samples."""
    if len(samples) < 2:
        return None
    values = np.asarray(samples, dtype=np.float64)
    drawn = np.random.default_rng(SEED).integers(0, len(values), size=(BOOTSTRAP, len(values)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[drawn].mean(axis=1), (tail, 1 - tail))
    return float(low), float(high)
