"""C1 and C4 of a mixture of experts: the statistics of `probes.suite.activity` over the experts that fire.

A (token, expert) pair that fires is to the expert's neurons what a token is to those of a dense layer. Shares run over
these pairs and the neurons of their experts. A variance is that of a neuron over the n_e tokens at which its expert
fires; neurons are averaged with weight n_e - 1 (the pooled variance within experts). An expert that alone always fires
thus has the figures of a dense layer. h is what the expert's down_proj receives, not yet multiplied by the router.

Two other readings stand beside this one. `weighted`: of w·h, with the router's weight w. `wide`: of w·h in the layer
seen as one wide FFN whose neurons are zero where their expert does not fire, literally the dense definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.live.activation import Activation
from probes.live.experts import Fired, count, fire, outputs, require_sum, spans
from probes.live.sites import Mixture
from probes.suite.activity import (
    LayerReading,
    MixtureReading,
    Moments,
    Sparsity,
    Temperature,
    finite,
    shuffled_variance,
)
from probes.suite.definition import RELATIVE_THRESHOLDS, SPARSITY_HEADLINE, SPARSITY_THRESHOLDS


def read_mixture(
    mixture: Mixture,
    activations: Sequence[Activation],
    routed: Tensor,
    chosen: Tensor,
    weight: Tensor,
    output: Tensor,
    sink: Tensor,
) -> LayerReading:
    """One layer on one text.

    From the activations of the routed experts and of the shared one, the FFN's input and output (n, H), the experts
    chosen for each token and their weights (n, k), and which tokens are sinks (n,). Raises ProbeError where an
    activation is not finite, or where the experts that fire do not add up to the output.
    """
    fired = fire(mixture, routed, chosen, weight)
    finite(sum_of_squares(fired, len(sink)), mixture.number)
    mismatch = require_sum(mixture, tuple(outputs(mixture, fired)), output)
    fired = tuple(part.float() for part in fired)
    weighted = tuple(part._replace(hidden=part.hidden * part.weight[:, None]) for part in fired)
    none = torch.zeros_like(sink)
    scaled = sparsity(weighted, none)
    neurons = count(mixture) * fired[0].hidden.shape[1] + sum(part.hidden.shape[1] for part in fired[1:])
    return LayerReading(
        tuple(sink.nonzero().flatten().tolist()),
        sparsity(fired, none),
        sparsity(fired, sink),
        temperature(fired, activations, sink),
        MixtureReading(
            load=tuple(fired[0].expert.bincount(minlength=count(mixture)).tolist()),
            top_k=chosen.shape[1],
            active=sum(part.hidden.numel() for part in fired) / (len(sink) * neurons),
            rms=scaled.rms,
            below=scaled.below[SPARSITY_THRESHOLDS.index(SPARSITY_HEADLINE)],
            weighted=pooled([spread(part.hidden, part.expert) for part in weighted]),
            wide=wide_variance([spread(part.hidden, part.expert) for part in weighted], len(sink), neurons),
            mismatch=mismatch,
        ),
    )


def sum_of_squares(fired: Sequence[Fired], tokens: int) -> Tensor:
    """Of every h that fires at each token: (tokens,)."""
    total = torch.zeros(tokens, device=fired[0].token.device)
    for part in fired:
        total.index_add_(0, part.token, torch.linalg.vector_norm(part.hidden.float(), dim=1).square())
    return total


def sparsity(fired: Sequence[Fired], dropped: Tensor) -> Sparsity:
    """Over the pairs that fire, without those at the tokens `dropped` (n,) bool."""
    sizes = [part.hidden[~dropped[part.token]].abs() for part in fired]
    entries = sum(size.numel() for size in sizes)
    rms = float(sum(torch.linalg.vector_norm(size, dtype=torch.float64).square() for size in sizes) / entries) ** 0.5

    def below(threshold: float) -> float:
        return sum(int((size < threshold).sum()) for size in sizes) / entries

    relative = tuple(below(part * rms) if rms else None for part in RELATIVE_THRESHOLDS)
    return Sparsity(rms, tuple(map(below, SPARSITY_THRESHOLDS)), relative)


class Spread(NamedTuple):
    """Of the neurons of G experts over the pairs at which each fires."""

    times: Tensor
    """(G, 1) float: n_e."""
    mean: Tensor
    """(G, I)."""
    squares: Tensor
    """(G, I): summed squared deviations from the mean."""

    def varying(self) -> Spread:
        """Without the experts that fire at one token only."""
        several = self.times[:, 0] > 1
        return Spread(self.times[several], self.mean[several], self.squares[several])

    @property
    def variance(self) -> Tensor:
        """(G, I), unbiased."""
        return self.squares / (self.times - 1)


def spread(values: Tensor, expert: Tensor) -> Spread:
    """Of values (P, I) in rows sorted by expert (P,)."""
    parts = [values[rows] for _, rows in spans(expert)]
    means = [part.mean(0) for part in parts]
    squares = [(part - mean).square_().sum(0) for part, mean in zip(parts, means, strict=True)]
    counts = torch.tensor([[float(len(part))] for part in parts], device=values.device)
    return Spread(counts, torch.stack(means), torch.stack(squares))


def temperature(fired: Sequence[Fired], activations: Sequence[Activation], sink: Tensor) -> Temperature:
    """Pooled variances of h, gate and up (see above), and the median over neurons of experts that fire twice."""
    hidden = [spread(part.hidden, part.expert) for part in fired]
    kept = [spread(part.hidden[rows], part.expert[rows]) for part in fired for rows in (~sink[part.token],)]
    linear = [spread(part.gate * part.up, part.expert) for part in fired]
    activated = [
        spread(activation.function(part.gate), part.expert).varying()
        for part, activation in zip(fired, activations, strict=True)
    ]
    up = [spread(part.up, part.expert).varying() for part in fired]
    shuffled = [
        one._replace(
            squares=(one.times - 1)
            * shuffled_variance(Moments(one.mean, one.variance), Moments(other.mean, other.variance), one.times)
        )
        for one, other in zip(activated, up, strict=True)
    ]
    median = torch.cat([part.varying().variance.flatten() for part in hidden]).quantile(0.5)
    return Temperature(pooled(hidden), pooled(kept), float(median), pooled(linear), pooled(shuffled))


def pooled(spreads: Sequence[Spread]) -> float:
    """Variance within experts: every neuron with weight n_e - 1."""
    squares = sum(float(part.squares.double().sum()) for part in spreads)
    return squares / sum(float((part.times - 1).sum()) * part.mean.shape[1] for part in spreads)


def wide_variance(spreads: Sequence[Spread], tokens: int, neurons: int) -> float:
    """Mean over all the layer's neurons of the unbiased variance over all tokens, zero where a neuron does not fire."""
    squares = (part.squares + part.times * (1 - part.times / tokens) * part.mean.square() for part in spreads)
    return sum(float(part.double().sum()) for part in squares) / (tokens - 1) / neurons
