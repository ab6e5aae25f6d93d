"""The experts of a mixture that fire, recomputed from what transformers hands to its fused experts.

transformers keeps the experts of a layer in two 3-D parameters and runs them by a loop or by grouped multiplications,
as its `experts_implementation` says; no module sees the activations of one expert. Yet each of these ways is called
with the same three tensors: the input of the FFN, the experts chosen for each token, and the weights of the choice.

1. Hooks take these three (`probes.live.sites.EXPERT_ROLES`).
2. `fire` sorts the (token, expert) pairs by expert and computes gate x, up x and h = act(gate x) · (up x) of each
   expert at its own tokens, in the model's dtype: the experts that fire, and nothing of those that do not.
3. `outputs` sends h through the down projections and the router's weights. What comes out must add up to what the
   module gave out (`require_sum`); a family that computes otherwise is refused then, not measured wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from probes.live.activation import AGREEMENT
from probes.live.sites import Layer, Mixture
from vindex.errors import ProbeError


class Fired(NamedTuple):
    """P = (token, expert) pairs that fire, sorted by expert; I = neurons of an expert."""

    expert: Tensor
    """(P,); E for the shared expert."""
    token: Tensor
    """(P,) positions."""
    weight: Tensor
    """(P,) float32: what the router multiplies the expert's output by."""
    gate: Tensor
    """(P, I)."""
    up: Tensor
    """(P, I)."""
    hidden: Tensor
    """(P, I): h, what down_proj of the expert receives, not yet weighted."""

    def float(self) -> Fired:
        """The same in float32."""
        return self._replace(gate=self.gate.float(), up=self.up.float(), hidden=self.hidden.float())


class Added(NamedTuple):
    """What one expert adds to the residual stream; P = the tokens at which it fires."""

    expert: int
    token: Tensor
    """(P,) positions."""
    output: Tensor
    """(P, H) float32, the router's weight in it."""


def fire(mixture: Mixture, routed: Tensor, chosen: Tensor, weight: Tensor) -> tuple[Fired, ...]:
    """The routed experts that fire, then the shared expert where there is one.

    From the FFN's input (n, H), the experts chosen for each token (n, k) and their weights (n, k).
    """
    experts = _routed(mixture, routed, chosen, weight)
    return (experts,) if mixture.shared is None else (experts, _shared(mixture, routed))


def outputs(mixture: Mixture, fired: Sequence[Fired]) -> Iterator[Added]:
    """What each expert that fires adds to the residual stream."""
    for part in fired:
        for expert, rows in spans(part.expert):
            output = linear(part.hidden[rows], down_weight(mixture, expert)).float() * part.weight[rows, None]
            yield Added(expert, part.token[rows], output)


def recombine(added: Sequence[Added], tokens: int) -> Tensor:
    """The sum of what the experts add, (tokens, H) float32."""
    total = torch.zeros(tokens, added[0].output.shape[1], device=added[0].output.device)
    for one in added:
        total.index_add_(0, one.token, one.output)
    return total


def require_sum(mixture: Mixture, added: Sequence[Added], output: Tensor) -> float:
    """How far what the experts add is from what the FFN gave out, (n, H), as a share of its norm.

    Raises ProbeError past AGREEMENT.
    """
    norm = float(torch.linalg.vector_norm(output.float()))
    mismatch = float(torch.linalg.vector_norm(recombine(added, len(output)) - output.float())) / (norm or 1.0)
    if not mismatch <= AGREEMENT[output.dtype]:
        raise ProbeError(
            f"layers.{mixture.number}.mlp: {type(mixture.mlp).__name__} gives out something else than its experts, "
            f"recomputed, add up to (relative difference {mismatch:.1e}, at most {AGREEMENT[output.dtype]:.0e} "
            f"expected in {output.dtype}); the probes do not know this mixture"
        )
    return mismatch


def spans(sorted_experts: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert of a sorted (P,) with the rows that are its own."""
    start = 0
    numbers, counts = sorted_experts.unique_consecutive(return_counts=True)
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        yield number, slice(start, start + count)
        start += count


def count(mixture: Mixture) -> int:
    """E: the routed experts of a layer."""
    return mixture.experts.gate_up_proj.shape[0]


def gate_weights(ffn: Layer | Mixture) -> Iterator[Tensor]:
    """gate_proj (I, H) of a dense layer, or of every routed expert, then of the shared one."""
    if isinstance(ffn, Layer):
        yield ffn.gate_proj.weight
        return
    for gate_up in ffn.experts.gate_up_proj:
        yield gate_up.chunk(2)[0]
    if ffn.shared is not None:
        yield ffn.shared.gate_proj.weight


def down_weights(ffn: Layer | Mixture) -> Iterator[Tensor]:
    """down_proj (H, I) of a dense layer, or of every routed expert, then of the shared one."""
    if isinstance(ffn, Layer):
        yield ffn.down_proj.weight
        return
    for expert in range(count(ffn) + (ffn.shared is not None)):
        yield down_weight(ffn, expert)


def down_weight(mixture: Mixture, expert: int) -> Tensor:
    """down_proj (H, I) of one expert; E is the shared one."""
    return mixture.shared.down_proj.weight if expert == count(mixture) else mixture.experts.down_proj[expert]


def _routed(mixture: Mixture, routed: Tensor, chosen: Tensor, weight: Tensor) -> Fired:
    order = chosen.flatten().argsort(stable=True)
    expert, token = chosen.flatten()[order], order // chosen.shape[1]
    parts = []
    for number, rows in spans(expert):
        gate, up = linear(routed[token[rows]], mixture.experts.gate_up_proj[number]).chunk(2, dim=-1)
        parts.append((gate, up, mixture.experts.act_fn(gate) * up))
    return Fired(expert, token, weight.flatten()[order].float(), *map(torch.cat, zip(*parts, strict=True)))


def _shared(mixture: Mixture, routed: Tensor) -> Fired:
    shared, tokens = mixture.shared, torch.arange(len(routed), device=routed.device)
    scale = getattr(mixture.mlp, "shared_expert_gate", None)
    weight = torch.ones(len(routed), device=routed.device) if scale is None else scale(routed).sigmoid()[:, 0].float()
    gate, up = shared.gate_proj(routed), shared.up_proj(routed)
    return Fired(torch.full_like(tokens, count(mixture)), tokens, weight, gate, up, shared.act_fn(gate) * up)
