"""The statistics of one dense FFN layer on one text, behind C1 and C4. Mixtures of experts: `probes.suite.mixture`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probes.live.activation import Activation, require_own
from probes.live.sinks import sinks
from probes.suite.definition import RELATIVE_THRESHOLDS, SPARSITY_THRESHOLDS
from vindex.errors import ProbeError


class Sparsity(NamedTuple):
    """Shares of |h| below thresholds, over one set of tokens and all I neurons of a layer."""

    rms: float
    below: tuple[float, ...]
    """At each of SPARSITY_THRESHOLDS."""
    below_relative: tuple[float | None, ...]
    """At each of RELATIVE_THRESHOLDS times `rms`; None where that is 0 and no threshold."""


class Temperature(NamedTuple):
    """Unbiased variances over tokens of a layer's neurons; means over the I neurons unless named otherwise."""

    all_tokens: float
    no_sink: float
    median: float
    linear: float
    """Of gate_proj(x) · up_proj(x), without the activation."""
    shuffled: float
    """Expected when act(gate) meets up from another token: the exact mean over all permutations."""


class MixtureReading(NamedTuple):
    """What a mixture of experts has besides; w = the router's weight. `probes.suite.mixture` states the readings."""

    load: tuple[int, ...]
    """(E,) tokens at which each routed expert fires."""
    top_k: int
    active: float
    """Share of the layer's neurons, those of the shared expert included, whose expert fires at a token."""
    rms: float
    """Of w·h where it fires."""
    below: float
    """Share of |w·h| < SPARSITY_HEADLINE where it fires."""
    weighted: float
    """Temperature of w·h where it fires."""
    wide: float
    """Temperature of w·h, zero where it does not fire, over all tokens and neurons."""
    mismatch: float
    """Norm of the recomputed FFN output minus the module's own, as a share of the latter's."""


class LayerReading(NamedTuple):
    """One layer, one text."""

    sinks: tuple[int, ...]
    """Positions that no_sink drops, counted from the text's first token."""
    sparsity: Sparsity
    sparsity_no_sink: Sparsity
    temperature: Temperature
    mixture: MixtureReading | None = None
    """None for a dense layer."""


class Activations(NamedTuple):
    """What one dense layer computes for n tokens, (n, I) float32, and how."""

    gate: Tensor
    up: Tensor
    hidden: Tensor
    dtype: torch.dtype
    """The model's, in which `hidden` was computed."""
    activation: Activation


def read_layer(found: Activations, sink: Tensor, number: int, scratch: Tensor) -> LayerReading:
    """Statistics of layer `number` from its activations, which tokens are sinks (n,), and scratch (2, n, I).

    Raises ProbeError where an activation is not finite, or where h is not act(gate) · up.
    """
    everything, no_sink = sparsity(found.hidden, sink, number, scratch)
    activated = found.activation.function(found.gate)
    require_own(torch.mul(activated, found.up, out=scratch[0]), found.hidden, found.dtype, f"layers.{number}.mlp")
    heat = temperature(found.gate, activated, found.up, found.hidden, sink, scratch)
    return LayerReading(tuple(sink.nonzero().flatten().tolist()), everything, no_sink, heat)


def sink_tokens(residual: Tensor, number: int) -> Tensor:
    """Which tokens no_sink drops, (n, H) → (n,) bool."""
    return sinks(finite(torch.linalg.vector_norm(residual, dim=1), number))


def sparsity(hidden: Tensor, sink: Tensor, number: int, scratch: Tensor) -> tuple[Sparsity, Sparsity]:
    """Over all tokens, and without the sinks: from h (n, I), which tokens are sinks (n,), and scratch (2, n, I)."""
    size = torch.abs(hidden, out=scratch[0])

    def below(threshold: float) -> Tensor:
        """Neurons below the threshold at each token, (n,); float sums of whole numbers are exact and fast."""
        return torch.lt(size, threshold, out=scratch[1]).sum(1)

    power = finite(torch.linalg.vector_norm(hidden, dim=1).double().square(), number)
    absolute = torch.stack([below(threshold) for threshold in SPARSITY_THRESHOLDS])  # (thresholds, n)
    found = []
    for chosen in (torch.ones_like(sink), ~sink):
        rms = float(power[chosen].mean() / hidden.shape[1]) ** 0.5
        relative = torch.stack([below(part * rms) for part in RELATIVE_THRESHOLDS])
        shares = (torch.cat([absolute, relative])[:, chosen].double().mean(1) / hidden.shape[1]).tolist()
        count = len(SPARSITY_THRESHOLDS)
        found.append(Sparsity(rms, tuple(shares[:count]), tuple(share if rms else None for share in shares[count:])))
    return found[0], found[1]


def temperature(
    gate: Tensor, activated: Tensor, up: Tensor, hidden: Tensor, sink: Tensor, scratch: Tensor
) -> Temperature:
    """From gate_proj(x), act of it, up_proj(x), h (n, I), which tokens are sinks (n,), and scratch (2, n, I)."""
    every = torch.ones(len(sink), device=sink.device)
    variance = moments(hidden, every, scratch[0]).variance
    no_sink = moments(hidden, (~sink).float(), scratch[0]).variance
    linear = moments(torch.mul(gate, up, out=scratch[1]), every, scratch[0]).variance
    shuffled = shuffled_variance(moments(activated, every, scratch[0]), moments(up, every, scratch[0]), len(sink))
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


def shuffled_variance(one: Moments, other: Moments, n: int | Tensor) -> Tensor:
    """Expected unbiased variance of one_t · other_π(t) over uniformly random permutations π of n tokens: (I,).

    From E (Σ_t one_t other_π(t))² of Hoeffding 1951: v₁v₂(n − 2)/n + m₁²v₂ + m₂²v₁, with means m and variances v.
    """
    both = one.variance * other.variance * (n - 2) / n
    return both + one.mean.square() * other.variance + other.mean.square() * one.variance


def finite(norms: Tensor, number: int) -> Tensor:
    """The norms of tokens (n,) again, unless one of them is not finite."""
    if not norms.isfinite().all():
        token = int((~norms.isfinite()).nonzero()[0])
        raise ProbeError(
            f"layers.{number}: activations are NaN or infinite at token {token}; "
            "try --dtype float32, or check the checkpoint's files"
        )
    return norms
