"""Attention sinks: tokens whose residual stream is so large that it says little of the text."""

from __future__ import annotations

from torch import Tensor

SINK_RATIO = 10.0
"""A sink is token 0, and every token whose residual norm exceeds this multiple of the layer's median norm."""


def sinks(norms: Tensor) -> Tensor:
    """Which tokens of a text are sinks in a layer: (n,) norms of its residual stream → (n,) bool."""
    found = norms > SINK_RATIO * norms.float().quantile(0.5)
    found[0] = True
    return found
