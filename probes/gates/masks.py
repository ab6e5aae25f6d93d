"""Gates and masks as arrays. L = layers, I = neurons to a layer.

λ = sigmoid(logit), float32 always. A mask keeps or drops whole neurons: hard at threshold τ, those with λ < τ are off.
The controls for a trained mask drop the same number of neurons in every layer: at random, or by activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from vindex.errors import NumericError, PatchError, ProbeError

ScaleMode = Literal["none", "mean", "energy"]
SCALE_MODES: tuple[ScaleMode, ...] = ("none", "mean", "energy")
OFF_FRACTIONS = (0.05, 0.25, 0.50, 0.75, 0.95)  # of the selected thresholds
INDICES_THRESHOLD = 0.5  # of neuron_indices.json
DIGITS = 6  # of a threshold on disk and in records


@dataclass(frozen=True)
class Gates:
    """One logit per FFN neuron."""

    logits: Tensor  # (L, I) float32, finite

    def __post_init__(self) -> None:
        if self.logits.dtype != torch.float32 or self.logits.ndim != 2:
            raise PatchError(f"gate logits are {self.logits.dtype}, {self.logits.ndim}-D; expected float32 (L, I)")
        bad = (~torch.isfinite(self.logits)).nonzero()
        if len(bad):
            layer, neuron = bad[0].tolist()
            raise NumericError(
                f"gate logits: {len(bad)} not finite, first at layer {layer} neuron {neuron} "
                f"({float(self.logits[layer, neuron])}); train again or download the file again"
            )

    @property
    def values(self) -> Tensor:
        """λ, (L, I) float32 in 0..1."""
        return torch.sigmoid(self.logits)

    def keep(self, threshold: float) -> Tensor:
        """(L, I) bool: the neurons that stay on at `threshold`, those with λ >= threshold."""
        return self.values >= require_threshold(threshold)

    def threshold_at(self, off: float) -> float:
        """The λ quantile at off-fraction `off`, rounded as it is on disk."""
        if not 0 < off < 1:
            raise ProbeError(f"off-fraction {off:g}: expected a share between 0 and 1 (write 25% or 0.25)")
        return round(float(torch.quantile(self.values.flatten(), off)), DIGITS)

    def selected_thresholds(self) -> tuple[float, ...]:
        """The thresholds at OFF_FRACTIONS."""
        return tuple(self.threshold_at(off) for off in OFF_FRACTIONS)


class Point(NamedTuple):
    """An operating point of a set of gates."""

    threshold: float
    off_fraction: float  # share of neurons with λ < threshold, over all layers
    off: int


def point(gates: Gates, threshold: float) -> Point:
    """What a threshold turns off."""
    off = int((~gates.keep(threshold)).sum())
    return Point(threshold, off / gates.logits.numel(), off)


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
    if scale_mode not in SCALE_MODES:
        raise ProbeError(f"scale mode {scale_mode!r}: expected {', '.join(SCALE_MODES)}")
    size = values.mean(1, keepdim=True) if scale_mode == "mean" else values.square().mean(1, keepdim=True).sqrt()
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
