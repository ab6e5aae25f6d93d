"""Definition set v1: every free choice behind C1–C5, in one place. The record carries all of it.

Changing any of these makes another definition and needs another VERSION.
"""

from __future__ import annotations

from probes.live import sinks

VERSION = "v1"

TOKENS = 256
"""Length of a probe text in tokens."""
SINK_RATIO = sinks.SINK_RATIO
"""`no_sink` drops token 0 and every token whose residual norm exceeds this multiple of the layer's median norm."""

SPARSITY_HEADLINE = 1e-2
"""C1: what an activation's absolute value has to be below to count as zero."""
SPARSITY_THRESHOLDS = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""C1: all the limits that are measured, the headline's among them."""
RELATIVE_THRESHOLDS = (0.01, 0.05)
"""C1: limits as a share of the layer's root mean square of h over the same tokens."""

TOP = 8
"""C2: how many of the largest next-token probabilities are summed."""

DIRECTIONS = 128
"""C3 and spectra without a vindex: leading directions of each layer (fewer where the matrix has fewer)."""
RANK_TOLERANCE = 1e-6
"""C3 and spectra without a vindex: singular values up to this share of the largest count as zero."""
FRAME_DRAWS = 8
"""C3: pairs of random orthonormal frames behind the null of the subspace variant."""

STAGE_THRESHOLD = 0.9
"""C5: adjacent layers whose CKA is below this are of two stages; it also sets the penalty of the segmentation."""
STAGE_THRESHOLDS = (0.80, 0.85, 0.90, 0.95, 0.98, 0.99)
"""C5: all the limits that are measured, the headline's among them."""
PERMUTATIONS = 5
"""C5: permutations of the tokens of one layer behind the null."""

SPECTRUM_RANKS = (64, 128)
"""Spectra: for each of these k, var@k is the share of ‖W‖² in the k largest singular values."""

BOOTSTRAP = 10_000
"""Resamples behind every interval, a percentile bootstrap."""
CONFIDENCE = 0.95
"""Share of the resampled means that an interval holds."""
SEED = 0
"""Of resamples, permutations and random frames alike."""


def choices() -> dict[str, object]:
    """All of the above by lower-case name, for the record."""
    return {name.lower(): value for name, value in globals().items() if name.isupper() and name != "VERSION"}
