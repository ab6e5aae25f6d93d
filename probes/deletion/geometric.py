"""The geometric method: no forward pass, only weights.

1. Take the leading F right singular vectors of every layer's gate_proj: what the gate reads. They come from a vindex,
   or from an exact eigendecomposition of each layer's Gram matrix WᵀW.
2. v: the one with the largest |cos| to the embedding of the answer's first token, over all layers.
3. ΔW = −(W v) vᵀ: the layer no longer reads v at all.

This is the published method ("top Paris→capital feature layer"), kept because its failure is part of the finding. Its
choice of layer belongs to it: it alone has no trial (`layer`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.deletion.layer import Found
from probes.live.sites import layers, null_layers, weight
from probes.weights.delta import Delta
from vindex.errors import ProbeError

FEATURES = 128
RANK_TOLERANCE = 1e-5
"""σ/σ₁ up to which a direction is rounding: what the gate does not read is no direction of it."""


class Alignment(NamedTuple):
    """The best-aligned gate direction of one layer."""

    layer: int
    feature: int
    """Index by singular value, 0 = largest."""
    cosine: float


def geometric(
    model: nn.Module, token: int, *, layer: int | None = None, gate: Any = None, features: int = FEATURES
) -> Found:
    """ΔW that closes the gate direction most aligned with `token`; `gate` is a vindex's (L, F, H) array, if given.

    Layers whose FFN writes nothing are left out. Raises ProbeError when `gate` has another shape than the model, or
    when no layer is left.
    """
    causal: Any = model
    count = len(layers(model))
    embedding = causal.get_input_embeddings().weight[token].detach().float()
    if gate is not None and (gate.shape[0], gate.shape[2]) != (count, embedding.numel()):
        raise ProbeError(
            f"vindex gate directions have shape {tuple(gate.shape)}; "
            f"the model has {count} layers of width {embedding.numel()}"
        )

    def read(index: int) -> Tensor:
        if gate is None:
            return gate_directions(weight(model, "gate_proj", index), features)
        return torch.as_tensor(gate[index].astype("float32")).to(embedding.device)

    nothing = null_layers(model)
    chosen = [index for index in ([layer] if layer is not None else range(count)) if index not in nothing]
    if not chosen:
        raise ProbeError("no layer writes anything: a projection of each is zero; there is no direction to close")
    scan = tuple(_best(index, read(index), embedding) for index in chosen)
    best = max(scan, key=lambda found: abs(found.cosine))
    direction = read(best.layer)[best.feature]
    direction = direction / direction.norm()
    removed = weight(model, "gate_proj", best.layer).detach().float() @ direction
    return Found(Delta(best.layer, -removed.cpu(), direction.cpu(), "geometric"), scan)


def gate_directions(gate: Tensor, features: int) -> Tensor:
    """(F, H) unit right singular vectors of a gate_proj weight (I, H), leading first; zero past its rank."""
    full = gate.detach().float()
    _, vectors = torch.linalg.eigh(full.T @ full)
    directions = vectors.flip(1).T[:features].contiguous()
    sizes = (directions @ full.T).norm(dim=1, keepdim=True)
    return directions.where(sizes > RANK_TOLERANCE * sizes[0], 0.0)


def _best(index: int, directions: Tensor, embedding: Tensor) -> Alignment:
    cosines = directions @ embedding / (directions.norm(dim=1) * embedding.norm()).clamp(min=1e-12)
    feature = int(cosines.abs().argmax())
    return Alignment(index, feature, float(cosines[feature]))
