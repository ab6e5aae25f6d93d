"""Gates and masks as arrays. L = layers, I = neurons to a layer.

λ = sigmoid(logit), (L, I) float32 always. A mask keeps or drops whole neurons: at threshold τ, those with λ < τ are
off. The controls for a trained mask drop the same number of neurons in every layer: at random, or by activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from probes.gates.options import ScaleMode, scale_of
from vindex.errors import PatchError, ProbeError

OFF_FRACTIONS = (0.05, 0.25, 0.50, 0.75, 0.95)  # of the selected thresholds
INDICES_THRESHOLD = 0.5  # of neuron_indices.json
DIGITS = 6  # of a threshold on disk and in records


class Point(NamedTuple):
    """An operating point of a set of gates."""

    threshold: float
    off_fraction: float  # share of neurons with λ < threshold, over all layers
    off: int


def kept(values: Tensor, threshold: float) -> Tensor:
    """(L, I) bool: the neurons that stay on at `threshold`, those with λ >= threshold."""
    return values >= require_threshold(threshold)


def point(values: Tensor, threshold: float) -> Point:
    """What a threshold turns off."""
    off = int((~kept(values, threshold)).sum())
    return Point(threshold, off / values.numel(), off)


def threshold_at(values: Tensor, off: float) -> float:
    """The λ quantile at off-fraction `off`, rounded as it is on disk."""
    if not 0 < off < 1:
        raise ProbeError(f"off-fraction {off:g}: expected a share between 0 and 1 (write 25% or 0.25)")
    return round(float(torch.quantile(values.flatten(), off)), DIGITS)


def selected_thresholds(values: Tensor) -> tuple[float, ...]:
    """The thresholds at OFF_FRACTIONS."""
    return tuple(threshold_at(values, off) for off in OFF_FRACTIONS)


def require_threshold(threshold: float) -> float:
    """`threshold`, if it lies between 0 and 1, both excluded."""
    if not 0 < threshold < 1:
        raise ProbeError(
            f"threshold {threshold:g}: expected a λ between 0 and 1, both excluded; see `vindex gates stats`"
        )
    return threshold


def keep_from_indices(indices: dict[int, list[int]], shape: tuple[int, int]) -> Tensor:
    """(L, I) bool, False at the neurons {layer: [neuron, …]} lists."""
    keep = torch.ones(shape, dtype=torch.bool)
    for layer, neurons in indices.items():
        if not 0 <= layer < shape[0]:
            raise PatchError(f"neuron indices name layer {layer}; there are layers 0 to {shape[0] - 1}")
        wrong = [neuron for neuron in neurons if not 0 <= neuron < shape[1]]
        if wrong:
            raise PatchError(f"neuron indices of layer {layer} name neuron {wrong[0]}; there are 0 to {shape[1] - 1}")
        keep[layer, neurons] = False
    return keep


def indices_of(keep: Tensor) -> dict[int, list[int]]:
    """{layer: [neuron, …]} of the neurons that `keep` drops, every layer listed."""
    return {layer: (~row).nonzero().flatten().tolist() for layer, row in enumerate(keep)}


def rescaled(values: Tensor, scale_mode: ScaleMode) -> Tensor:
    """λ or a mask (L, I) as the factors that multiply h, after the rescaling of `scale_mode`.

    none: λ; mean: λ / mean(λ_l); energy: λ / sqrt(mean(λ_l²)), means over each layer's neurons. A layer that is wholly
    off stays off. Differentiable.
    """
    if scale_mode == "none":
        return values
    size = (
        values.mean(1, keepdim=True) if scale_of(scale_mode) == "mean" else values.square().mean(1, keepdim=True).sqrt()
    )
    return values / size.clamp_min(torch.finfo(values.dtype).tiny)


def random_keep(like: Tensor, seed: int) -> Tensor:
    """A mask that drops as many neurons of each layer as `like` (L, I) does, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return _drop_smallest(torch.rand(like.shape, generator=generator), _drops(like))


def lowest_keep(scores: Tensor, like: Tensor) -> Tensor:
    """A mask that drops the lowest `scores` (L, I) of each layer, as many as `like` does."""
    return _drop_smallest(scores, _drops(like))


def _drops(keep: Tensor) -> Sequence[int]:
    return cast(list[int], (~keep).sum(1).tolist())


def _drop_smallest(scores: Tensor, drops: Sequence[int]) -> Tensor:
    keep = torch.ones(scores.shape, dtype=torch.bool)
    for layer, drop in enumerate(drops):
        keep[layer, scores[layer].argsort(stable=True)[:drop]] = False
    return keep
