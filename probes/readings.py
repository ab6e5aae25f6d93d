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
from torch import Tensor, nn

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
        masses = [top_mass(row[keep]) for row, keep in zip(logits, observer.mask, strict=True)]
    return [observer.reading(row, mass) for row, mass in enumerate(masses)]


class _Observer:
    """Collects the statistics of every row as the hooks fire."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask  # (batch, tokens) bool
        self.pending: dict[str, Tensor] = {}  # the current layer's activations
        self.layers: list[list[LayerReading]] = [[] for _ in mask]
        self.grams: list[list[Tensor]] = [[] for _ in mask]

    def see(self, site: Site, value: Tensor) -> None:
        self.pending[site.role] = value
        if site.role != "residual":
            return
        for row, keep in enumerate(self.mask):
            gate, up, hidden, residual = (
                self.pending[role][row][keep].float() for role in ("gate", "up", "hidden", "residual")
            )
            if not (hidden.isfinite().all() and residual.isfinite().all()):
                raise ProbeError(
                    f"layers.{site.layer}: activations are NaN or infinite in {value.dtype}; "
                    "try --dtype float32, or check the checkpoint with `vindex verify`"
                )
            self.layers[row].append(read_layer(gate, up, hidden, residual))
            self.grams[row].append(gram(residual))
        self.pending.clear()

    def reading(self, row: int, mass: tuple[float, ...]) -> Reading:
        layers = tuple(self.layers[row])
        grams = torch.stack(self.grams[row])
        kept = torch.ones(grams.shape[-1], dtype=torch.bool, device=grams.device)
        kept[sorted({position for layer in layers for position in layer.sinks})] = False
        return Reading(layers, mass, compare(grams, kept))


def read_layer(gate: Tensor, up: Tensor, hidden: Tensor, residual: Tensor) -> LayerReading:
    """Statistics of one layer from gate, up, hidden (n, I) and residual (n, H), all float32."""
    sink = sink_tokens(residual)
    size = hidden.abs()
    return LayerReading(
        tuple(int(position) for position in sink.nonzero().flatten()),
        sparsity(size),
        sparsity(size[~sink]),
        temperature(gate, up, hidden, ~sink),
    )


def sink_tokens(residual: Tensor) -> Tensor:
    """Which tokens no_sink drops: the first, and those whose norm is above SINK_RATIO × the median: (n, H) → (n,) bool."""
    norms = residual.norm(dim=1)
    sink = norms > SINK_RATIO * norms.quantile(0.5)
    sink[0] = True
    return sink


def sparsity(size: Tensor) -> Sparsity:
    """From |h| (n, I)."""
    rms = float(size.double().square().mean().sqrt())
    shares = [
        torch.count_nonzero(size < threshold).item() / size.numel()
        for threshold in (*SPARSITY_THRESHOLDS, *(part * rms for part in RELATIVE_THRESHOLDS))
    ]
    return Sparsity(rms, tuple(shares[: len(SPARSITY_THRESHOLDS)]), tuple(shares[len(SPARSITY_THRESHOLDS) :]))


def temperature(gate: Tensor, up: Tensor, hidden: Tensor, kept: Tensor) -> Temperature:
    """From gate_proj(x), up_proj(x), h (n, I) and the tokens that no_sink keeps (n,)."""
    variance = hidden.var(0)
    return Temperature(
        float(variance.mean()),
        float(hidden[kept].var(0).mean()),
        float(variance.quantile(0.5)),
        float((gate * up).var(0).mean()),
        float(shuffled_variance(nn.functional.silu(gate), up).mean()),
    )


def shuffled_variance(one: Tensor, other: Tensor) -> Tensor:
    """Expected unbiased variance of one_t · other_π(t) over uniformly random permutations π of n tokens: (n, I) → (I,).

    With S = Σ_t one_t other_π(t): E Σ_t (one_t other_π(t))² = Σone² Σother² / n, and (Hoeffding 1951)
    E S² = (Σone Σother / n)² + SS_one SS_other / (n − 1), SS the sum of squares about the mean.
    """
    n = len(one)
    one, other = one.double(), other.double()
    squares = one.square().sum(0) * other.square().sum(0) / n
    scatter = one.var(0) * other.var(0) * (n - 1)  # SS_one · SS_other / (n − 1)
    total_squared = (one.sum(0) * other.sum(0) / n).square() + scatter
    return (squares - total_squared / n) / (n - 1)


def top_mass(logits: Tensor) -> tuple[float, ...]:
    """Sum of the TOP largest softmax probabilities at each position, in float32: logits (n, V) → n numbers."""
    count = min(TOP, logits.shape[-1])
    masses: list[float] = []
    for part in logits.split(max(1, 2**24 // logits.shape[-1])):  # at most 64 MB of float32 at a time
        scores = part.float()
        mass = (scores.topk(count, sorted=False).values - scores.logsumexp(-1, keepdim=True)).exp().sum(-1)
        masses.extend(mass.tolist())
    if not all(math.isfinite(mass) for mass in masses):
        raise ProbeError("logits: NaN or infinite; try --dtype float32")
    return tuple(masses)
