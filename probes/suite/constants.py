"""C1–C5, definition set v1: one function each, from readings of live activations or from weights to a Constant.

With several texts every figure is a Measure whose value is the first text's and whose interval is over all of them. The
names follow the published cards; the definitions are ours, stated, since theirs are not published.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from probes.suite.activity import LayerReading, Sparsity
from probes.suite.chance import gaussian_below, mean_abs_cosine, nearest_cosine, random_frame_cosine
from probes.suite.definition import (
    RELATIVE_THRESHOLDS,
    SPARSITY_HEADLINE,
    SPARSITY_THRESHOLDS,
    STAGE_THRESHOLD,
    STAGE_THRESHOLDS,
    TOP,
)
from probes.suite.measures import Measure, mean_of, measure
from probes.suite.readings import Reading
from probes.suite.segments import segment

FIRING = "; in a mixture over the neurons of the experts that fire"
WIDE = " as one wide layer"


@dataclass(frozen=True)
class Constant:
    """One of C1–C5."""

    symbol: str
    name: str
    definition: str
    headline: Measure
    per_layer: tuple[float | None, ...]
    """The headline's curve for the first text: L values, or L − 1 where it is about adjacent layers.

    None where a layer has no direction.
    """
    variants: dict[str, Measure]

    @property
    def value(self) -> float | None:
        """Of the headline text; None where it is undefined."""
        return self.headline.value

    @property
    def mean(self) -> float | None:
        """Over texts; C3's over adjacent layers."""
        return self.headline.mean

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean."""
        return self.headline.interval

    @property
    def null(self) -> float | None:
        """What the same procedure gives where there is nothing to find."""
        return self.headline.null

    def __repr__(self) -> str:
        value, null = ("undefined" if it is None else f"{it:.3g}" for it in (self.value, self.null))
        return f"<{self.symbol} {self.name}: {value}, null {null}>"


def ffn_sparsity(readings: Sequence[Reading]) -> Constant:
    """C1: share of |h| below 0.01. Null: entries from N(0, rms²) with each layer's own rms."""
    unit = "fraction of h"
    variants = {}
    for field, suffix in (("sparsity", ""), ("sparsity_no_sink", " no_sink")):
        found: list[list[Sparsity]] = [[getattr(layer, field) for layer in reading.layers] for reading in readings]
        for index, threshold in enumerate(SPARSITY_THRESHOLDS):
            samples = [_mean(layer.below[index] for layer in text) for text in found]
            null = _mean(gaussian_below(threshold, layer.rms) for layer in found[0])
            variants[f"|h| < {threshold:g}{suffix}"] = measure(samples, unit, null=null)
        for index, part in enumerate(RELATIVE_THRESHOLDS):
            shares = [_mean_defined(layer.below_relative[index] for layer in text) for text in found]
            variants[f"|h| < {part:.0%} rms{suffix}"] = measure(shares, unit, null=gaussian_below(part, 1.0))
    headline = SPARSITY_THRESHOLDS.index(SPARSITY_HEADLINE)
    if _mixed(readings):
        for wide in (False, True):
            samples = [_mean(_weighted_below(layer, wide=wide) for layer in reading.layers) for reading in readings]
            null = _mean(_weighted_below(layer, wide=wide, null=True) for layer in readings[0].layers)
            variants[f"|w·h| < {SPARSITY_HEADLINE:g}{WIDE if wide else ''}"] = measure(samples, unit, null=null)
    return Constant(
        "C1",
        "FFN sparsity",
        f"fraction of |h| < {SPARSITY_HEADLINE:g} over layers, neurons and tokens; "
        f"h = {readings[0].activation.name}(gate_proj x) · (up_proj x), float32; "
        "null: normal entries of each layer's rms" + (FIRING if _mixed(readings) else ""),
        variants.pop(f"|h| < {SPARSITY_HEADLINE:g}"),
        tuple(layer.sparsity.below[headline] for layer in readings[0].layers),
        variants,
    )


def top_mass(readings: Sequence[Reading], vocabulary: int) -> Constant:
    """C2: mean over positions of the sum of the 8 largest next-token probabilities. Null: a uniform distribution.

    No value where the model has no head.
    """
    null = min(1.0, TOP / vocabulary)
    masses = [[mass for mass in reading.top_mass if mass is not None] for reading in readings]
    return Constant(
        "C2",
        f"top-{TOP} probability mass",
        f"mean over positions of the sum of the {TOP} largest next-token probabilities, float32 softmax; "
        "null: uniform over the vocabulary",
        measure([float(np.mean(text)) if text else None for text in masses], "probability", null=null),
        (),
        {"last position": measure([text[-1] if text else None for text in masses], "probability", null=null)},
    )


def gate_coherence(
    directions: Sequence[np.ndarray], mean_rows: np.ndarray, experts: Sequence[np.ndarray | None] = ()
) -> Constant:
    """C3: mean over adjacent layers of |cos| between their leading gate directions. Null: random orthonormal frames.

    `directions`: per layer (F, H), unit rows, leading first, rows past the weight's rank zero. `mean_rows`: (L, H),
    mean over neurons of each gate_proj's rows. `experts`: per layer (E, H), unit rows, the leading direction of every
    routed expert, None for a dense layer; `directions` of a mixture are those of all its experts' rows together.
    A layer whose gate_proj is zero has no direction: pairs with it are undefined, and left out of every mean.
    """
    frames = list(map(_rows, directions))
    width = directions[0].shape[1]
    pairs = [(one, other) for one, other in pairwise(frames) if len(one) and len(other)]
    leading = [float(abs(one[0] @ other[0])) if len(one) and len(other) else None for one, other in pairwise(frames)]
    sizes = np.linalg.norm(mean_rows, axis=1)
    means = mean_rows / np.where(sizes, sizes, 1.0)[:, None]
    mean_pairs = np.flatnonzero(sizes[:-1] * sizes[1:])
    count = min((len(frame) for frame in frames if len(frame)), default=len(directions[0]))
    chance = mean_abs_cosine(width)
    unit, over = "|cos|", "layer pairs"
    return Constant(
        "C3",
        "gate coherence",
        "mean over adjacent layers of |cos| between their leading right singular vectors of gate_proj; "
        "null: independent random directions"
        + ("; of a mixture: all its experts' rows together" if any(each is not None for each in experts) else ""),
        mean_of([cosine for cosine in leading if cosine is not None], unit, null=chance, over=over),
        tuple(leading),
        {
            f"same index, all {count}": mean_of(
                [_same_index(one, other) for one, other in pairs], unit, null=chance, over=over
            ),
            f"{count}-dim subspaces": mean_of(
                [_mean_principal_cosine(one, other) for one, other in pairs],
                "mean principal cosine",
                null=random_frame_cosine(width, count),
                over=over,
            ),
            "mean gate row": mean_of((means[:-1] * means[1:]).sum(1)[mean_pairs].tolist(), "cos", null=0.0, over=over),
            **_expert_coherence(experts),
        },
    )


def layer_temperature(readings: Sequence[Reading]) -> Constant:
    """C4: mean over layers and neurons of the variance of h over tokens. Null: gate and up from different tokens."""

    def over_texts(field: str, null: float | None = None) -> Measure:
        samples = [_mean(getattr(layer.temperature, field) for layer in reading.layers) for reading in readings]
        return measure(samples, "h²", null=null)

    null = _mean(layer.temperature.shuffled for layer in readings[0].layers)
    variants = {
        "no_sink": over_texts("no_sink"),
        "median over neurons": over_texts("median"),
        f"without the {readings[0].activation.label}": over_texts("linear"),
    }
    if _mixed(readings):
        for field, name in (("weighted", "of w·h"), ("wide", f"of w·h{WIDE}")):
            heats = [
                [
                    getattr(layer.mixture or layer.temperature, field if layer.mixture else "all_tokens")
                    for layer in reading.layers
                ]
                for reading in readings
            ]
            variants[name] = measure([_mean(text) for text in heats], "h²")
    return Constant(
        "C4",
        "layer temperature",
        "mean over layers and neurons of the unbiased variance of h over tokens; "
        f"null: its expectation when {readings[0].activation.name}(gate_proj x) and up_proj x "
        "come from different tokens"
        + (f"{FIRING}, each neuron over the tokens at which its expert does" if _mixed(readings) else ""),
        over_texts("all_tokens", null),
        tuple(layer.temperature.all_tokens for layer in readings[0].layers),
        variants,
    )


def circuit_stages(readings: Sequence[Reading]) -> Constant:
    """C5: 1 + adjacent-layer pairs whose debiased CKA, no_sink, is below 0.9. Null: tokens of one layer permuted."""
    unit = "stages"
    similarity = [reading.similarity for reading in readings]
    adjacent = [_adjacent(item.debiased.cpu().numpy()) for item in similarity]
    biased = [_adjacent(item.biased.cpu().numpy()) for item in similarity]
    with_sink = [item.with_sink.cpu().numpy() for item in similarity]
    permuted, permuted_biased = (
        getattr(similarity[0], field).cpu().numpy() for field in ("permuted", "permuted_biased")
    )

    def stages(curves: Sequence[np.ndarray], threshold: float, chance: np.ndarray) -> Measure:
        null = 1 + float((chance < threshold).sum(axis=1).mean())
        return measure([1 + int((curve < threshold).sum()) for curve in curves], unit, null=null)

    variants = {
        f"debiased CKA < {threshold:g}": stages(adjacent, threshold, permuted) for threshold in STAGE_THRESHOLDS
    }
    headline = variants.pop(f"debiased CKA < {STAGE_THRESHOLD:g}")
    variants[f"biased CKA < {STAGE_THRESHOLD:g}"] = stages(biased, STAGE_THRESHOLD, permuted_biased)
    variants["with the sinks"] = stages(with_sink, STAGE_THRESHOLD, permuted)
    variants["optimal segmentation"] = measure(
        [len(segment(item.debiased.cpu().numpy(), STAGE_THRESHOLD).starts) for item in similarity], unit
    )
    variants["mean adjacent CKA"] = measure(
        [float(curve.mean()) for curve in adjacent], "CKA", null=float(permuted.mean())
    )
    return Constant(
        "C5",
        "circuit stages",
        f"1 + adjacent-layer pairs whose debiased linear CKA of the residual stream, no_sink, is below "
        f"{STAGE_THRESHOLD:g}; null: the tokens of one layer permuted",
        headline,
        tuple(adjacent[0].tolist()),
        variants,
    )


def _expert_coherence(experts: Sequence[np.ndarray | None]) -> dict[str, Measure]:
    """C3 of single experts: their leading directions within a layer, and across adjacent layers that are mixtures."""
    found: dict[str, Measure] = {}
    mixtures = [frame for frame in experts if frame is not None]
    if not mixtures:
        return found
    number, width = mixtures[0].shape
    chance = mean_abs_cosine(width)
    frames = [None if frame is None else _rows(frame) for frame in experts]
    within = [_off_diagonal_mean(np.abs(frame @ frame.T)) for frame in frames if frame is not None and len(frame) > 1]
    pairs = [
        np.abs(one @ other.T)
        for one, other in pairwise(frames)
        if one is not None and other is not None and len(one) and len(other)
    ]
    if number > 1:
        found["experts of one layer"] = mean_of(within, "|cos|", null=chance, over="layers")
    if any(one is not None and other is not None for one, other in pairwise(frames)):
        over = "layer pairs"
        found["experts of adjacent layers"] = mean_of([float(p.mean()) for p in pairs], "|cos|", null=chance, over=over)
        found["nearest expert"] = mean_of(
            [float(p.max(1).mean()) for p in pairs], "|cos|", null=nearest_cosine(width, number), over=over
        )
    return found


def _rows(frame: np.ndarray) -> np.ndarray:
    """The directions of a frame (F, H) at length one: without the rows that are zero, past the weight's rank."""
    wide = frame.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    return wide[lengths > 0.5] / lengths[lengths > 0.5, None]


def _off_diagonal_mean(square: np.ndarray) -> float:
    return float(square[~np.eye(len(square), dtype=bool)].mean())


def _mixed(readings: Sequence[Reading]) -> bool:
    return any(layer.mixture for layer in readings[0].layers)


def _weighted_below(layer: LayerReading, *, wide: bool, null: bool = False) -> float:
    """Share of |w·h| below the headline's threshold, where it fires or in the wide layer; its null; dense: of |h|."""
    mixture = layer.mixture
    rms = mixture.rms if mixture else layer.sparsity.rms
    below = mixture.below if mixture else layer.sparsity.below[SPARSITY_THRESHOLDS.index(SPARSITY_HEADLINE)]
    share = gaussian_below(SPARSITY_HEADLINE, rms) if null else below
    return 1 - mixture.active * (1 - share) if mixture and wide else share


def _mean_principal_cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.svd(one @ other.T, compute_uv=False).clip(max=1.0).mean())


def _same_index(one: np.ndarray, other: np.ndarray) -> float:
    shared = min(len(one), len(other))
    return float(np.abs((one[:shared] * other[:shared]).sum(axis=1)).mean())


def _adjacent(similarity: np.ndarray) -> np.ndarray:
    return np.diagonal(similarity, offset=1)


def _mean_defined(values: Iterable[float | None]) -> float | None:
    """Of those that are defined; None where none is."""
    defined = [value for value in values if value is not None]
    return _mean(defined) if defined else None


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
