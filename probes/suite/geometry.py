"""What the weights alone say: leading gate directions and spectra, from a vindex or by exact eigendecompositions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.live.experts import count, down_weights, gate_weights
from probes.live.sites import Layer, Mixture
from probes.suite.definition import DIRECTIONS, SPECTRUM_RANKS
from probes.suite.spectrum import Spectrum, given, leading, leading_read
from vindex.errors import ProbeError
from vindex.progress import Progress, silent

if TYPE_CHECKING:
    from vindex.reader import Vindex


class Geometry(NamedTuple):
    """Of L layers; F = directions, H = hidden size."""

    source: str
    """"weights", or "vindex ID"."""
    directions: tuple[np.ndarray, ...]
    """Per layer (F, H), leading right singular vectors of gate_proj."""
    mean_rows: np.ndarray
    """(L, H): mean over neurons of gate_proj's rows."""
    gate: tuple[Spectrum, ...]
    down: tuple[Spectrum, ...]
    experts: tuple[np.ndarray | None, ...]
    """Per layer (E, H), the leading direction of every routed expert's gate_proj; None for a dense layer."""


def geometry(found: Sequence[Layer | Mixture], vindex: Vindex | None = None, progress: Progress = silent) -> Geometry:
    """From `vindex` as far as it goes. A mixture's knows the experts one by one, not what they are together.

    Raises ProbeError where it keeps fewer directions than C3 and the spectra need.
    """
    dense = [ffn for ffn in found if isinstance(ffn, Layer)]
    if vindex is None or len(dense) < len(found):
        return _from_weights(found, vindex, progress)
    needed = min(max(SPECTRUM_RANKS), *dense[0].gate_proj.weight.shape)
    if vindex.index.num_feats < needed:
        raise ProbeError(
            f"the vindex keeps {vindex.index.num_feats} directions per layer, C3 and var@{max(SPECTRUM_RANKS)} need "
            f"{needed}; leave --vindex out, or build it with --features {needed}"
        )
    return _from_vindex(dense, vindex, progress)


def _from_weights(found: Sequence[Layer | Mixture], vindex: Vindex | None, progress: Progress) -> Geometry:
    """By each weight's residual-side Gram matrix; a mixture's experts count as one weight.

    Their own leading directions come from `vindex` when it is given.
    """
    own = sum(count(ffn) for ffn in found if isinstance(ffn, Mixture) and vindex is None)
    advance = progress("weights", 2 * len(found) + own)
    directions, gate, down, experts = [], [], [], []
    for ffn in found:
        spectrum, reads = leading(gate_weights(ffn), DIRECTIONS, side=1)
        gate.append(spectrum)
        directions.append(reads.astype(np.float32))
        advance(1)
        down.append(leading(down_weights(ffn), DIRECTIONS, side=0)[0])
        advance(1)
        experts.append(_experts(ffn, vindex, advance) if isinstance(ffn, Mixture) else None)
    source = "weights" if vindex is None else f"weights; each expert's leading direction from vindex {vindex.id}"
    return Geometry(source, tuple(directions), _mean_rows(found), tuple(gate), tuple(down), tuple(experts))


def _from_vindex(found: Sequence[Layer], vindex: Vindex, progress: Progress) -> Geometry:
    """Only each weight's norm is taken from the weights."""
    advance = progress("weights", len(found))
    gate, down = [], []
    for layer in found:
        gate.append(given(layer.gate_proj.weight, vindex.singular_values[0, layer.number]))
        down.append(given(layer.down_proj.weight, vindex.singular_values[1, layer.number]))
        advance(1)
    directions = tuple(np.asarray(vindex.gate[layer.number], dtype=np.float32) for layer in found)
    none = (None,) * len(found)
    return Geometry(f"vindex {vindex.id}", directions, _mean_rows(found), tuple(gate), tuple(down), none)


def _experts(mixture: Mixture, vindex: Vindex | None, advance: Callable[[int], object]) -> np.ndarray:
    """(E, H): the leading direction of every routed expert."""
    if vindex is not None:
        return np.asarray(vindex.layer(mixture.number).gate[: count(mixture), 0], dtype=np.float32)
    directions = []
    for weight in islice(gate_weights(mixture), count(mixture)):
        directions.append(leading_read(weight))
        advance(1)
    return np.stack(directions)


def _mean_rows(found: Sequence[Layer | Mixture]) -> np.ndarray:
    return np.stack([_mean_row(ffn).cpu().numpy() for ffn in found])


def _mean_row(ffn: Layer | Mixture) -> Tensor:
    sums = [(weight.double().mean(0), len(weight)) for weight in gate_weights(ffn)]
    return torch.stack([mean * rows for mean, rows in sums]).sum(0) / sum(rows for _, rows in sums)
