"""What one forward pass over a probe text leaves behind: per-layer statistics, never the activations themselves.

1. Hooks see gate_proj(x), up_proj(x), h (what down_proj receives) and the block's output of a layer, in this order.
2. When the block's output arrives the layer's sinks are known, its statistics are taken in float32, and the three
   activations are dropped: one layer's activations are held at a time, besides the (n, n) Gram matrices that CKA needs.
3. After the pass the logits give the top-8 mass, and the Gram matrices become similarities of layers.

Texts in a batch are read row by row; positions that the attention mask hides are cut off before anything is counted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.cka import Similarity, compare, gram
from probes.definition import RELATIVE_THRESHOLDS, SINK_RATIO, SPARSITY_THRESHOLDS, TOP
from probes.hooks import capture
from probes.model import Site, sites
from vindex.errors import ProbeError


class Sparsity(NamedTuple):
    """Shares of |h| below thresholds, over one set of tokens and all I neurons of a layer."""

    rms: float
    below: tuple[float, ...]
    """At each of SPARSITY_THRESHOLDS."""
    below_relative: tuple[float, ...]
    """At each of RELATIVE_THRESHOLDS times `rms`."""


class Temperature(NamedTuple):
    """Unbiased variances over tokens of a layer's neurons; means over the I neurons unless named otherwise."""

    all_tokens: float
    no_sink: float
    median: float
    linear: float
    """Of gate_proj(x) · up_proj(x), without the SiLU."""
    shuffled: float
    """Expected when silu(gate) meets up from another token: the exact mean over all permutations."""


class LayerReading(NamedTuple):
    """One layer, one text."""

    sinks: tuple[int, ...]
    """Positions that no_sink drops, counted from the text's first token."""
    sparsity: Sparsity
    sparsity_no_sink: Sparsity
    temperature: Temperature


class Reading(NamedTuple):
    """One text; L = layers, n = tokens."""

    layers: tuple[LayerReading, ...]
    top_mass: tuple[float, ...]
    """Sum of the TOP largest next-token probabilities at each of the n positions."""
    similarity: Similarity
    """Of the residual stream after each block; no_sink drops what is a sink in any layer."""


def read(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Reading]:
    """One Reading for each row of `input_ids` (batch, tokens) on the model's device, 1 = counted in the mask.

    Raises ProbeError naming the layer where an activation is not finite.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    observer = _Observer(mask.bool())
    wanted = sites(model, "gate", "up", "hidden", "residual")
    with torch.inference_mode(), capture(model, wanted, observe=observer.see):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        masses = [top_mass(observer.counted(logits, row)) for row in range(len(logits))]
    return [observer.reading(row, mass) for row, mass in enumerate(masses)]


class _Observer:
    """Collects the statistics of every row as the hooks fire."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask  # (batch, tokens) bool
        self.whole = [bool(row.all()) for row in mask]
        self.pending: dict[str, Tensor] = {}  # the current layer's activations
        self.scratch = torch.empty(2, 0, 0)  # reused by every layer: fresh memory costs more than the arithmetic
        self.layers: list[list[LayerReading]] = [[] for _ in mask]
        self.grams: list[list[Tensor]] = [[] for _ in mask]

    def see(self, site: Site, value: Tensor) -> None:
        self.pending[site.role] = value
        if site.role != "residual":
            return
        for row in range(len(self.mask)):
            gate, up, hidden, residual = (
                self.counted(self.pending[role], row).float() for role in ("gate", "up", "hidden", "residual")
            )
            if self.scratch.shape[1:] != hidden.shape or self.scratch.device != hidden.device:
                self.scratch = torch.empty(2, *hidden.shape, device=hidden.device)
            sink = sink_tokens(residual, site.layer)
            self.layers[row].append(read_layer(gate, up, hidden, sink, site.layer, self.scratch))
            self.grams[row].append(gram(residual, about=residual[~sink].mean(0)))
        self.pending.clear()

    def counted(self, values: Tensor, row: int) -> Tensor:
        """The row's tokens that are no padding: (batch, tokens, width) → (n, width), without a copy where all are."""
        return values[row] if self.whole[row] else values[row][self.mask[row]]

    def reading(self, row: int, mass: tuple[float, ...]) -> Reading:
        layers = tuple(self.layers[row])
        sinks = {position for layer in layers for position in layer.sinks}
        kept = [position for position in range(len(mass)) if position not in sinks]
        return Reading(layers, mass, compare(self.grams[row], kept))


def read_layer(gate: Tensor, up: Tensor, hidden: Tensor, sink: Tensor, number: int, scratch: Tensor) -> LayerReading:
    """Statistics of layer `number` from gate, up, hidden (n, I), which tokens are sinks (n,), and scratch (2, n, I)."""
    everything, no_sink = sparsity(hidden, sink, number, scratch)
    heat = temperature(gate, up, hidden, sink, scratch)
    return LayerReading(tuple(sink.nonzero().flatten().tolist()), everything, no_sink, heat)


def sink_tokens(residual: Tensor, number: int) -> Tensor:
    """Which tokens no_sink drops, (n, H) → (n,) bool: the first, and those of norm above SINK_RATIO × the median."""
    norms = _finite(torch.linalg.vector_norm(residual, dim=1), number)
    sink = norms > SINK_RATIO * norms.quantile(0.5)
    sink[0] = True
    return sink


def sparsity(hidden: Tensor, sink: Tensor, number: int, scratch: Tensor) -> tuple[Sparsity, Sparsity]:
    """Over all tokens, and without the sinks: from h (n, I), which tokens are sinks (n,), and scratch (2, n, I)."""
    size = torch.abs(hidden, out=scratch[0])

    def below(threshold: float) -> Tensor:
        """Neurons below the threshold at each token, (n,); float sums of whole numbers are exact and fast."""
        return torch.lt(size, threshold, out=scratch[1]).sum(1)

    power = _finite(torch.linalg.vector_norm(hidden, dim=1).double().square(), number)
    absolute = torch.stack([below(threshold) for threshold in SPARSITY_THRESHOLDS])  # (thresholds, n)
    found = []
    for chosen in (torch.ones_like(sink), ~sink):
        rms = float(power[chosen].mean() / hidden.shape[1]) ** 0.5
        relative = torch.stack([below(part * rms) for part in RELATIVE_THRESHOLDS])
        shares = (torch.cat([absolute, relative])[:, chosen].double().mean(1) / hidden.shape[1]).tolist()
        count = len(SPARSITY_THRESHOLDS)
        found.append(Sparsity(rms, tuple(shares[:count]), tuple(shares[count:])))
    return found[0], found[1]


def temperature(gate: Tensor, up: Tensor, hidden: Tensor, sink: Tensor, scratch: Tensor) -> Temperature:
    """From gate_proj(x), up_proj(x), h (n, I), which tokens are sinks (n,), and scratch (2, n, I)."""
    every = torch.ones(len(sink), device=sink.device)
    variance = moments(hidden, every, scratch[0]).variance
    no_sink = moments(hidden, (~sink).float(), scratch[0]).variance
    linear = moments(torch.mul(gate, up, out=scratch[1]), every, scratch[0]).variance
    silu = torch.sigmoid(gate, out=scratch[1]).mul_(gate)
    shuffled = shuffled_variance(moments(silu, every, scratch[0]), moments(up, every, scratch[0]), len(sink))
    means = torch.stack([values.mean() for values in (variance, no_sink, linear, shuffled)]).tolist()
    return Temperature(means[0], means[1], float(variance.quantile(0.5)), means[2], means[3])


class Moments(NamedTuple):
    """Over tokens, for each of I neurons."""

    mean: Tensor
    variance: Tensor
    """Unbiased."""


def moments(values: Tensor, weights: Tensor, scratch: Tensor) -> Moments:
    """Mean and variance of (n, I) over the tokens whose weight (n,) is 1, the others' being 0; scratch (n, I)."""
    count = weights.sum()
    mean = weights @ values / count
    return Moments(mean, weights @ torch.sub(values, mean, out=scratch).square_() / (count - 1))


def shuffled_variance(one: Moments, other: Moments, n: int) -> Tensor:
    """Expected unbiased variance of one_t · other_π(t) over uniformly random permutations π of n tokens: (I,).

    From E (Σ_t one_t other_π(t))² of Hoeffding 1951: v₁v₂(n − 2)/n + m₁²v₂ + m₂²v₁, with means m and variances v.
    """
    both = one.variance * other.variance * (n - 2) / n
    return both + one.mean.square() * other.variance + other.mean.square() * one.variance


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


def _finite(norms: Tensor, number: int) -> Tensor:
    """The norms of tokens (n,) again, unless one of them is not finite."""
    if not norms.isfinite().all():
        token = int((~norms.isfinite()).nonzero()[0])
        raise ProbeError(
            f"layers.{number}: activations are NaN or infinite at token {token}; "
            "try --dtype float32, or check the checkpoint's files"
        )
    return norms
