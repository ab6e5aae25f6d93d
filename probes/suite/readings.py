"""What one forward pass over a probe text leaves behind: per-layer statistics, never the activations themselves.

1. Hooks see gate_proj(x), up_proj(x), h (what down_proj receives) and the block's output of a layer, in this order; of
   a mixture of experts the FFN's input, the router's choice and weights, and the FFN's output (`probes.live.experts`).
2. When the block's output arrives the layer's sinks are known, its statistics are taken in float32, and the
   activations are dropped: one layer's activations are held at a time, besides the (n, n) Gram matrices that CKA needs.
3. After the pass the logits give the top-8 mass, and the Gram matrices become similarities of layers.

Texts in a batch have as many tokens each, and are read row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.live import activation
from probes.live.activation import Activation
from probes.live.hooks import capture
from probes.live.sites import EXPERT_ROLES, Layer, Mixture, Site, ffns, sites
from probes.suite.activity import Activations, LayerReading, read_layer, sink_tokens
from probes.suite.cka import Similarity, compare, gram
from probes.suite.definition import TOP
from probes.suite.mixture import read_mixture
from vindex.errors import ProbeError
from vindex.progress import unseen

DENSE = ("gate", "up", "hidden")
MIXTURE = (*EXPERT_ROLES, "mlp_out")


class Reading(NamedTuple):
    """One text; L = layers, n = tokens."""

    layers: tuple[LayerReading, ...]
    activation: Activation
    """Of the FFNs; where they differ, of the first."""
    top_mass: tuple[float | None, ...]
    """Sum of the TOP largest next-token probabilities at each of the n positions; None where there is no head."""
    similarity: Similarity
    """Of the residual stream after each block; no_sink drops what is a sink in any layer."""


def read(
    model: Any,
    input_ids: Tensor,
    *,
    head: bool = True,
    advance: Callable[[int], object] = unseen,
) -> list[Reading]:
    """One Reading for each row of `input_ids` (batch, tokens) on the model's device.

    head: whether the model has one; the logits of one drawn at random say nothing. advance: told of every layer of
    every row as the hooks fire.
    Raises ProbeError naming the layer where an activation is not finite, or the FFN is none that the probes know.
    """
    found = ffns(model)
    mixtures = {ffn.number: ffn for ffn in found if isinstance(ffn, Mixture)}
    observer = _Observer(input_ids.shape, mixtures, [own_activations(model, ffn) for ffn in found], advance)
    dense = [ffn.number for ffn in found if isinstance(ffn, Layer)]
    wanted = (
        *sites(model, *DENSE, only=dense),
        *sites(model, *MIXTURE, only=mixtures),
        *sites(model, "residual"),
    )
    with torch.inference_mode(), capture(model, wanted, observe=observer.see):
        logits = model(input_ids=input_ids, use_cache=False).logits
        masses = [top_mass(each) if head else (None,) * len(each) for each in logits]
    return [observer.reading(row, mass) for row, mass in enumerate(masses)]


def own_activations(model: Any, ffn: Layer | Mixture) -> tuple[Activation, ...]:
    """Of a dense layer one; of a mixture that of the routed experts, then that of the shared one."""
    place = f"layers.{ffn.number}.mlp"
    if isinstance(ffn, Layer):
        return (activation.of(model, ffn.mlp, place),)
    shared = () if ffn.shared is None else (activation.of(model, ffn.shared, f"{place}.shared_expert"),)
    return (activation.of(model, ffn.experts, f"{place}.experts"), *shared)


class _Observer:
    """Collects the statistics of every row as the hooks fire."""

    def __init__(
        self,
        shape: torch.Size,
        mixtures: Mapping[int, Mixture],
        activations: Sequence[tuple[Activation, ...]],
        advance: Callable[[int], object],
    ) -> None:
        self.shape = shape  # (batch, tokens)
        self.mixtures = mixtures
        self.activations = activations  # of each layer
        self.advance = advance
        self.pending: dict[str, Tensor] = {}  # the current layer's activations
        self.scratch = torch.empty(2, 0, 0)  # reused by every layer: fresh memory costs more than the arithmetic
        self.layers: list[list[LayerReading]] = [[] for _ in range(shape[0])]
        self.grams: list[list[Tensor]] = [[] for _ in range(shape[0])]

    def see(self, site: Site, value: Tensor) -> None:
        self.pending[site.role] = value
        if site.role != "residual":
            return
        for row, residual in enumerate(value.float()):
            sink = sink_tokens(residual, site.layer)
            self.layers[row].append(self.layer(site.layer, row, sink))
            self.grams[row].append(gram(residual, about=residual[~sink].mean(0)))
            self.advance(1)
        self.pending.clear()

    def layer(self, number: int, row: int, sink: Tensor) -> LayerReading:
        if number in self.mixtures:
            routed, chosen, weight, output = (self.pending[role].reshape(*self.shape, -1)[row] for role in MIXTURE)
            own = self.activations[number]
            return read_mixture(self.mixtures[number], own, routed, chosen, weight, output, sink)
        gate, up, hidden = (self.pending[role][row].float() for role in DENSE)
        if self.scratch.shape[1:] != hidden.shape or self.scratch.device != hidden.device:
            self.scratch = torch.empty(2, *hidden.shape, device=hidden.device)
        found = Activations(gate, up, hidden, self.pending["hidden"].dtype, self.activations[number][0])
        return read_layer(found, sink, number, self.scratch)

    def reading(self, row: int, mass: tuple[float | None, ...]) -> Reading:
        layers = tuple(self.layers[row])
        sinks = {position for layer in layers for position in layer.sinks}
        kept = [position for position in range(len(mass)) if position not in sinks]
        return Reading(layers, self.activations[0][0], mass, compare(self.grams[row], kept))


def top_mass(logits: Tensor) -> tuple[float, ...]:
    """Sum of the TOP largest softmax probabilities at each position, in float32: logits (n, V) → n numbers."""
    masses: list[float] = []
    for part in logits.split(max(1, 2**19 // logits.shape[-1])):  # small enough for the processor's cache
        scores = part.float()
        largest = scores.topk(min(TOP, scores.shape[-1]), sorted=False).values
        masses.extend((largest - scores.logsumexp(-1, keepdim=True)).exp().sum(-1).tolist())
    if not all(map(math.isfinite, masses)):
        raise ProbeError(f"logits: NaN or infinite in {logits.dtype}; try --dtype float32")
    return tuple(masses)
