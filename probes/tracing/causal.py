"""What a direction does to the target's logit, measured: it is taken out of the live model, and the model is run.

- A down direction d of a layer: what the FFN writes at the position becomes y − c d, with c = d · y.
- A gate direction v of a layer: what its gate_proj reads at the position becomes x − e v, where e is what of v · x is
  not generic; up_proj reads x as it is.
Of two prompts c and e are the differences, so that the direction becomes what it is in the other one.

CAUSAL is the logit with the direction less the logit without; the same is measured of the log-probability. WRITTEN is
what of it reaches the logit directly, with the final norm's scale frozen: (d · y)(u · d), or for a gate direction
u · (y − y'), with y' what the FFN writes without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.live.hooks import Edit, capture, edited
from probes.live.sites import Site, weight
from probes.tracing.directions import Along, largest
from probes.tracing.stream import Frozen, Stream, logits
from vindex.progress import Progress, silent
from vindex.reader import Vindex


class Tested(NamedTuple):
    """One direction, taken out of the model."""

    side: str
    """reads: a gate direction; writes: a down direction."""
    layer: int
    feature: int
    read: float | None
    """z of what a gate direction reads; None for a down direction, which reads nothing."""
    written: float
    causal: float
    log_prob: float
    """As `causal`, of the target's log-probability: what all logits share is gone."""


def test(
    model: Any,
    ids: Sequence[int],
    stream: Stream,
    frozen: Frozen,
    vindex: Vindex,
    found: Along,
    count: int,
    progress: Progress = silent,
) -> tuple[Tested, ...]:
    """Take out the `count` gate directions of largest |z| and as many down directions of largest direct effect."""
    own, at = stream.logits[-1], stream.position
    reads, writes = list(largest(found.z, count)), list(largest(found.adds, count))
    advance = progress("checking directions", len(reads) + len(writes))
    tested = []
    for layer, feature in reads:
        v = torch.from_numpy(vindex.gate[layer, feature].astype(np.float32)).to(model.device)
        change = (weight(model, "gate_proj", layer).float() @ v) * float(found.excess[layer, feature])
        without, y = _without(model, ids, Site("gate", layer), at, change)
        written = float(frozen.u @ (stream.y[layer] - y))
        z = float(found.z[layer, feature])
        tested.append(Tested("reads", layer, feature, z, written, *_effect(own, without, frozen.target)))
        advance(1)
    for layer, feature in writes:
        d = torch.from_numpy(vindex.down[layer, feature].astype(np.float32)).to(model.device)
        change = d * float(found.coefficient[layer, feature])
        without, _ = _without(model, ids, Site("mlp_out", layer), at, change)
        written = float(found.adds[layer, feature])
        tested.append(Tested("writes", layer, feature, None, written, *_effect(own, without, frozen.target)))
        advance(1)
    return tuple(tested)


def _without(model: Any, ids: Sequence[int], site: Site, position: int, change: Tensor) -> tuple[Tensor, np.ndarray]:
    """The logits (V,) at the position, and what the layer's FFN writes there (H,), with the change taken off."""
    output = Site("mlp_out", site.layer)
    with torch.inference_mode(), edited(model, {site: _less(change, position)}), capture(model, [output]) as seen:
        found = logits(model, ids)[position].float().cpu()
    return found, seen[output][0, position].double().cpu().numpy()


def _effect(own: Tensor, without: Tensor, target: int) -> tuple[float, float]:
    """By how much the target's logit and log-probability are larger than without the direction."""
    both = torch.stack([own, without]).double()
    log_probs = both.log_softmax(1)
    return float(both[0, target] - both[1, target]), float(log_probs[0, target] - log_probs[1, target])


def _less(change: Tensor, position: int) -> Edit:
    def edit(value: Tensor) -> Tensor:
        new = value.clone()
        new[:, position] = (new[:, position].float() - change).to(value.dtype)
        return new

    return edit
