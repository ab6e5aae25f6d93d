"""The layer strip: every layer's spectra beside the Marchenko–Pastur floor, the gap at the cut, clusters of equal σ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vindex.floor import floor_of
from vindex.format import SIGMA
from vindex.layout import Rows
from vindex.reader import Vindex

WIDTH, HEIGHT, RUG = 132, 64, 5
SIDES = ("gate", "down")


class Small(NamedTuple):
    """One layer. curves: kind, points. shaded: x, y, width, kind of a cluster. gaps: of gate and down, in words."""

    layer: int
    curves: list[tuple[str, str]]
    shaded: list[tuple[float, float, float, str]]
    gaps: tuple[str, ...]


class Strip(NamedTuple):
    """Every layer on one scale. floor: of which random matrix it is, in words. missing: why there are no spectra."""

    width: int
    height: int
    layers: list[Small]
    low: float
    high: float
    floor: str
    missing: str = ""


def strip(v: Vindex, clusters: Mapping[str, list[list[int]]], norms: Mapping[str, Sequence[float]] | None) -> Strip:
    """The strip of a vindex. norms: ‖W‖²_F of each layer's weight by side, where a probe measured it."""
    if lacking := v.family.lacking(SIGMA):
        bare = [Small(entry.layer, [], [], ()) for entry in v.index.layers]
        return Strip(WIDTH, 1, bare, 1.0, 1.0, "", str(lacking))
    spectra = [_spectra(v, entry, norms) for entry in v.index.layers]
    shown = np.concatenate([curve for curves in spectra for curve in curves.values()])
    low, high = (float(f(shown[shown > 0], initial=1.0)) for f in (np.min, np.max))
    low, high = low * 0.9, high * 1.1
    layers = [
        Small(
            entry.layer,
            [(kind, _points(curve, low, high)) for kind, curve in curves.items()],
            _shaded(v, entry, clusters),
            _gaps(v, entry),
        )
        for entry, curves in zip(v.index.layers, spectra, strict=True)
    ]
    floor = "of the same ‖W‖" if norms else "that meets the spectrum at the cut (‖W‖ is not known without --probe)"
    return Strip(WIDTH, HEIGHT + 2 * RUG, layers, low, high, floor)


def _spectra(v: Vindex, entry: Rows, norms: Mapping[str, Sequence[float]] | None) -> dict[str, np.ndarray]:
    """σ of gate and down and the floor of each, by kind; of a mixture's experts the median."""
    found: dict[str, np.ndarray] = {}
    for place, side in enumerate(SIDES):
        sigma = np.median(getattr(v.layer(entry.layer), f"{side}_sigma"), axis=0)
        neurons = v.index.model_config.get("moe_intermediate_size") if entry.num_experts else v.index.intermediate_size
        if isinstance(neurons, int) and neurons > 0 and sigma[-1] > 0:
            shape = (neurons, v.index.hidden_size)
            floor = floor_of(shape, len(sigma))
            dense = norms is not None and not entry.num_experts
            scale = (
                np.sqrt(norms[side][entry.layer] / min(shape)) if dense and norms else sigma[-1] / max(floor[-1], 1e-9)
            )
            found[f"floor c{place}"] = floor * scale
        found[f"c{place}"] = sigma
    return found


def _points(curve: np.ndarray, low: float, high: float) -> str:
    x = np.linspace(0, WIDTH, len(curve)) if len(curve) > 1 else np.zeros(1)
    y = HEIGHT * (1 - np.log(np.maximum(curve, low) / low) / np.log(high / low))
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _shaded(v: Vindex, entry: Rows, clusters: Mapping[str, list[list[int]]]) -> list[tuple[float, float, float, str]]:
    """Of the layer's first weight: two rugs, gate above down."""
    first, step = v.index.first_row(entry.layer), WIDTH / entry.features
    return [
        (round((a - first) * step, 1), HEIGHT + place * RUG, round((b - a + 1) * step, 1), f"c{place}")
        for place, side in enumerate(SIDES)
        for a, b in clusters[side]
        if first <= a < first + entry.features
    ]


def _gaps(v: Vindex, entry: Rows) -> tuple[str, ...]:
    """Of gate and down in words, of a mixture's experts the smallest; () where no direction was cut off."""
    experts = range(entry.groups) if entry.num_experts else (None,)
    found = []
    for side in SIDES:
        gaps = [v.certificate(entry.layer, side, expert).gap_at_cut for expert in experts]
        known = [gap for gap in gaps if gap is not None]
        found.append(f"{100 * min(known):.1f}\N{NO-BREAK SPACE}%" if known else "–")
    return tuple(found) if set(found) != {"–"} else ()
