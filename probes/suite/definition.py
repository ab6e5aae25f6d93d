"""Definition set v1: every free choice behind C1–C5, in one place. The record carries all of it.

Changing any of these makes another definition and needs another VERSION.
"""

from __future__ import annotations

VERSION = "v1"

TOKENS = 256
"""Length of a probe text in tokens."""

SINK_RATIO = 10.0
"""`no_sink` drops token 0 and every token whose residual norm exceeds this multiple of the layer's median norm."""

SPARSITY_THRESHOLDS = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""C1: |h| below which an activation counts as zero; the headline is SPARSITY_HEADLINE."""
SPARSITY_HEADLINE = 1e-2
RELATIVE_THRESHOLDS = (0.01, 0.05)
"""C1, relative variants: thresholds as a fraction of the layer's root mean square of h over the same tokens."""

TOP = 8
"""C2: how many of the largest next-token probabilities are summed."""

DIRECTIONS = 128
"""C3 and spectra without a vindex: leading directions per layer (fewer where the matrix has fewer)."""
FRAME_DRAWS = 8
"""C3: pairs of random orthonormal frames behind the null of the subspace variant."""

STAGE_THRESHOLD = 0.9
"""C5: an adjacent pair of layers whose CKA is below this is a transition."""
STAGE_THRESHOLDS = (0.80, 0.85, 0.90, 0.95, 0.98, 0.99)
PERMUTATIONS = 5
"""C5: token permutations behind the null."""

SPECTRUM_RANKS = (64, 128)
"""var@k: the share of a weight's squared Frobenius norm in its k largest singular values."""

BOOTSTRAP = 10_000
"""Resamples behind every 95 % interval (percentile bootstrap, seed 0)."""


def choices() -> dict[str, object]:
    """All of the above by lower-case name, for the record."""
    return {name.lower(): value for name, value in globals().items() if name.isupper() and name != "VERSION"}
