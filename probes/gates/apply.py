"""Factors on a live model: h, what down_proj receives, is multiplied neuron by neuron.

    with gated(model, factors):  # (L, I)
        model(ids)

Inside, `capture` sees h as down_proj receives it: gated where it is entered after `gated`, ungated where before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from probes.live.hooks import edited
from probes.live.sites import layers
from vindex.errors import PatchError


def gate_shape(model: nn.Module) -> tuple[int, int]:
    """(L, I): how many gates this model takes. Raises ProbeError where its FFNs are not dense or differ in width."""
    widths = [layer.gate_proj.out_features for layer in layers(model)]
    for number, width in enumerate(widths):
        if width != widths[0]:
            raise PatchError(f"layers.{number} has {width} neurons, layers.0 {widths[0]}; gates need equal layers")
    return len(widths), widths[0]


def require_fit(shape: tuple[int, ...], model: nn.Module) -> None:
    """Raise PatchError unless gates of this shape belong to a model of this size."""
    expected = gate_shape(model)
    if tuple(shape) != expected:
        found = " × ".join(map(str, shape))
        raise PatchError(
            f"the gates are {found} (layers × neurons), the model has {expected[0]} × {expected[1]}; "
            "give the model they were trained on"
        )


@contextmanager
def gated(model: nn.Module, factors: Tensor) -> Iterator[None]:
    """Multiply h of every layer by `factors` (L, I) float32 in the forward passes run inside the `with` block.

    The product is taken in float32 and rounded once to the model's dtype. Gradients flow to `factors`. Where every
    factor of a layer is 0 or 1, zeros are filled in, which gives the same sooner.
    Raises PatchError when the shape is not the model's.
    """
    require_fit(factors.shape, model)

    def multiply(row: Tensor) -> Callable[[Tensor], Tensor]:
        off = (row == 0).nonzero().flatten()
        if not row.requires_grad and len(off) + int((row == 1).sum()) == len(row):
            return lambda h: h.index_fill(-1, off.to(h.device), 0)
        return lambda h: (h * row.to(h.device)).to(h.dtype)  # bfloat16 · float32 is computed in float32

    rows = factors.to(device=layers(model)[0].down_proj.weight.device, dtype=torch.float32)
    with edited(model, {("hidden", number): multiply(row) for number, row in enumerate(rows)}):
        yield
