"""What a direction does to the target's logit, measured: it is taken out of the live model, and the model is run.

- A down direction d of a layer: what the FFN writes at the position becomes y − c d, with c = d · y.
- A gate direction v of a layer: what its gate_proj reads at the position becomes x − e v, where e is what of v · x is
  not generic; up_proj reads x as it is.
Of two prompts c and e are the differences, so that the direction becomes what it is in the other one.

CAUSAL is the logit with the direction less the logit without. WRITTEN is what of it reaches the logit directly, with the
final norm's scale frozen: (d · y)(u · d), or for a gate direction u · (y − y'), with y' what the FFN writes without it.
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
    own, at = float(stream.logits[-1, frozen.target]), stream.position
    reads, writes = list(largest(found.z, count)), list(largest(found.adds, count))
    advance = progress("checking directions", len(reads) + len(writes))
    tested = []
    for layer, feature in reads:
        v = torch.from_numpy(vindex.gate[layer, feature].astype(np.float32)).to(model.device)
        change = (weight(model, "gate_proj", layer).float() @ v) * float(found.excess[layer, feature])
        logit, y = _without(model, ids, frozen.target, Site("gate", layer), at, change)
        written = float(frozen.u @ (stream.y[layer] - y))
        tested.append(Tested("reads", layer, feature, float(found.z[layer, feature]), written, own - logit))
        advance(1)
    for layer, feature in writes:
        d = torch.from_numpy(vindex.down[layer, feature].astype(np.float32)).to(model.device)
        change = d * float(found.coefficient[layer, feature])
        logit, _ = _without(model, ids, frozen.target, Site("mlp_out", layer), at, change)
        tested.append(Tested("writes", layer, feature, None, float(found.adds[layer, feature]), own - logit))
        advance(1)
    return tuple(tested)


def _without(
    model: Any, ids: Sequence[int], target: int, site: Site, position: int, change: Tensor
) -> tuple[float, np.ndarray]:
    """The target's logit at the position, and what the layer's FFN writes there (H,), with the change taken off."""
    with torch.inference_mode(), edited(model, {site: _less(change, position)}):
        with capture(model, [("mlp_out", site.layer)]) as seen:
            logit = float(logits(model, ids)[position, target])
    return logit, seen[Site("mlp_out", site.layer)][0, position].double().cpu().numpy()


def _less(change: Tensor, position: int) -> Edit:
    def edit(value: Tensor) -> Tensor:
        new = value.clone()
        new[:, position] = (new[:, position].float() - change).to(value.dtype)
        return new

    return edit
