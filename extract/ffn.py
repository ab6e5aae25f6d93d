"""Where the gated FFN of each layer lies on disk: one pair of matrices, or many, one for each expert.

Experts come under two kinds of name. Separate (released Qwen3-MoE, -Next and -Omni, and what transformers saves):
`mlp.experts.{e}.gate_proj.weight`. Fused (released Qwen3.5-MoE and Qwen3-VL-MoE): `mlp.experts.gate_up_proj` with the
experts along its first dimension and gate before up, or `mlp.experts.gate_proj` by itself, beside
`mlp.experts.down_proj`; each expert is (out, in) or, in Qwen3-VL-MoE, (in, out). Which of the two it is shows in the
shapes: gate_up_proj or down_proj can be square, never both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from extract.checkpoint import Checkpoint
from vindex.errors import CheckpointError


class Weight(NamedTuple):
    """One gate_proj or down_proj, as plain data that travels.

    tensor: its name on disk. neurons: I. expert: its place in a fused tensor, or None where the tensor is all of it.
    transposed: stored (in, out) rather than (out, in).
    """

    tensor: str
    side: str
    neurons: int
    expert: int | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """What messages and certificates call it."""
        return self.tensor if self.expert is None else f"{self.tensor}[{self.expert}]"

    def by_neuron(self, checkpoint: Checkpoint) -> torch.Tensor:
        """(I, H) float32: a row for each neuron. Laid out in memory the same way however it is stored."""
        name, expert = self.tensor, self.expert
        stored = checkpoint.tensor(name) if expert is None else checkpoint.expert(name, expert)
        as_linear = stored.T.contiguous() if self.transposed else stored  # (out, in), as nn.Linear has it
        return as_linear[: self.neurons] if self.side == "gate" else as_linear.T


class Ffn(NamedTuple):
    """The FFN of one layer. gate, down: a weight for each expert in order, then the shared expert's; one if dense.

    router, shared_gate: tensor names, None where there is none.
    """

    gate: tuple[Weight, ...]
    down: tuple[Weight, ...]
    num_experts: int | None = None
    router: str | None = None
    shared_gate: str | None = None


class Mixture(NamedTuple):
    """What config.json says of the experts. shared_neurons: I of the shared expert, 0 where none is named."""

    num_experts: int
    neurons: int
    shared_neurons: int
    dense_layers: frozenset[int]


def dense_ffn(checkpoint: Checkpoint, at: str, hidden: int, neurons: int) -> Ffn:
    """The pair of matrices under `at`, e.g. "model.layers.0.mlp"."""
    require_shape(checkpoint, f"{at}.gate_proj.weight", (neurons, hidden))
    require_shape(checkpoint, f"{at}.down_proj.weight", (hidden, neurons))
    gate, down = (Weight(f"{at}.{side}_proj.weight", side, neurons) for side in ("gate", "down"))
    return Ffn((gate,), (down,))


def mixture_ffn(checkpoint: Checkpoint, at: str, hidden: int, mixture: Mixture) -> Ffn:
    """The experts, shared expert and router under `at`. Raises CheckpointError when they go by no known name."""
    gate, down = _experts(checkpoint, f"{at}.experts", hidden, mixture)
    router, shared_gate = f"{at}.gate.weight", f"{at}.shared_expert_gate.weight"
    require_shape(checkpoint, router, (mixture.num_experts, hidden))
    if not mixture.shared_neurons and f"{at}.shared_expert.gate_proj.weight" not in checkpoint.tensors:
        return Ffn(gate, down, mixture.num_experts, router)
    shared = dense_ffn(checkpoint, f"{at}.shared_expert", hidden, mixture.shared_neurons)
    require_shape(checkpoint, shared_gate, (1, hidden))
    return Ffn(gate + shared.gate, down + shared.down, mixture.num_experts, router, shared_gate)


def require_shape(checkpoint: Checkpoint, name: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The tensor's shape, which is one of `shapes`. Raises CheckpointError when it is missing or another."""
    found = checkpoint.info(name).shape
    if found not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise CheckpointError(
            f"{name} has shape {found}, and config.json says {expected}; the two do not belong together"
        )
    return found


def _experts(checkpoint: Checkpoint, at: str, hidden: int, mixture: Mixture) -> tuple[tuple[Weight, ...], ...]:
    """(gate, down) weights of the routed experts."""
    if f"{at}.0.gate_proj.weight" in checkpoint.tensors:
        ffns = [dense_ffn(checkpoint, f"{at}.{e}", hidden, mixture.neurons) for e in range(mixture.num_experts)]
        return tuple(ffn.gate[0] for ffn in ffns), tuple(ffn.down[0] for ffn in ffns)
    for gate_name, parts in ((f"{at}.gate_up_proj", 2), (f"{at}.gate_proj", 1)):
        if gate_name in checkpoint.tensors:
            return _fused(checkpoint, gate_name, parts, f"{at}.down_proj", hidden, mixture)
    found = sorted(name.removeprefix(f"{at}.") for name in checkpoint.tensors if name.startswith(f"{at}."))
    raise CheckpointError(
        f"{at}: found {', '.join(found[:3]) or 'no tensors'}; supported are N.gate_proj.weight with N.down_proj.weight "
        "for each expert N, and gate_up_proj (or gate_proj) with down_proj for all experts in one tensor"
    )


def _fused(
    checkpoint: Checkpoint, gate_name: str, parts: int, down_name: str, hidden: int, mixture: Mixture
) -> tuple[tuple[Weight, ...], ...]:
    """The weights in a pair of fused tensors. parts: how many matrices of I rows gate_name holds for each expert."""
    experts, neurons = mixture.num_experts, mixture.neurons
    as_linear = ((experts, parts * neurons, hidden), (experts, hidden, neurons))
    swapped = ((experts, hidden, parts * neurons), (experts, neurons, hidden))
    require_shape(checkpoint, gate_name, as_linear[0], swapped[0])
    down_shape = require_shape(checkpoint, down_name, as_linear[1], swapped[1])
    found = (checkpoint.info(gate_name).shape, down_shape)
    if found not in (as_linear, swapped):
        raise CheckpointError(
            f"{gate_name} {found[0]} and {down_name} {found[1]} differ in orientation; supported are both "
            "as (expert, out, in) or both as (expert, in, out)"
        )
    transposed = found != as_linear
    return tuple(
        tuple(Weight(name, side, neurons, expert, transposed) for expert in range(experts))
        for side, name in (("gate", gate_name), ("down", down_name))
    )
