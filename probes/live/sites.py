"""The places in a live model that the probes read.

1. `layers` finds the decoder blocks and the gated FFN of each: Qwen3, Qwen2, Llama, Mistral and whatever else has
   `mlp.gate_proj`, `mlp.up_proj` and `mlp.down_proj` linear layers. It refuses mixtures of experts: transformers fuses
   their experts into 3-D parameters, so that a hook on a single expert would silently never fire.
2. `ffns` takes mixtures too, as a `Mixture`; what their experts compute is recomputed by `probes.live.experts`.
3. A `Site` names a tensor of the forward pass by role and layer; `locate` says which module's input or output it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from torch import nn

from probes.live.load import DTYPES
from vindex.errors import ProbeError

Side = Literal["input", "output"]


class Site(NamedTuple):
    """A tensor of the forward pass, (batch, tokens, width). A plain `("hidden", 3)` means the same."""

    role: str
    """One of ROLES, or in a mixture one of EXPERT_ROLES."""
    layer: int


# role -> (attribute of Layer, or else of its block; which side of that module)
ROLES: dict[str, tuple[str, Side]] = {
    "stream": ("block", "input"),  # residual stream before the block, width H
    "attended": ("post_attention_layernorm", "input"),  # residual stream after attention, width H
    "residual": ("block", "output"),  # residual stream after the block, width H
    "mlp_in": ("mlp", "input"),  # the normed residual stream that gate_proj and up_proj read, width H
    "mlp_out": ("mlp", "output"),  # what the FFN adds to the residual stream, width H
    "gate": ("gate_proj", "output"),  # gate_proj(x), before the activation, width I
    "up": ("up_proj", "output"),  # up_proj(x), width I
    "hidden": ("down_proj", "input"),  # h = act(gate_proj(x)) · up_proj(x), what down_proj receives, width I
}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# role -> which argument of a mixture's fused experts; the tokens of a batch are one after the other there
EXPERT_ROLES = {
    "routed": 0,  # the normed residual stream, (batch · tokens, H)
    "chosen": 1,  # the experts that the router chose for each token, (batch · tokens, k)
    "router_weight": 2,  # what their outputs are multiplied by, (batch · tokens, k)
}


class Layer(NamedTuple):
    """One decoder block and its gated FFN; H = hidden size, I = intermediate size."""

    number: int
    block: nn.Module
    mlp: nn.Module
    gate_proj: nn.Linear
    """Weight (I, H)."""
    up_proj: nn.Linear
    """Weight (I, H)."""
    down_proj: nn.Linear
    """Weight (H, I)."""


class Mixture(NamedTuple):
    """One decoder block whose FFN is a mixture of E experts with I neurons each."""

    number: int
    block: nn.Module
    mlp: nn.Module
    experts: Any
    """Fused: gate_up_proj (E, 2I, H), an expert's gate rows before its up rows, and down_proj (E, H, I)."""
    shared: Any
    """The gated FFN of the shared expert, which always fires, or None."""


def layers(model: nn.Module) -> tuple[Layer, ...]:
    """The model's decoder blocks with their FFN projections, in order.

    Raises ProbeError naming the first block that has no dense gated FFN.
    """
    return tuple(_layer(index, block) for index, block in enumerate(_blocks(model)))


def ffns(model: nn.Module) -> tuple[Layer | Mixture, ...]:
    """The model's decoder blocks with their FFN, dense or a mixture of experts, in order.

    Raises ProbeError naming the first block that has neither.
    """
    return tuple(_ffn(index, block) for index, block in enumerate(_blocks(model)))


def null_layers(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """The layers whose FFN writes nothing, since a projection is zero, and which are: LLaMA-Pro's, wholly baked gates.

    No change of gate_proj can do anything there.
    """
    found = {
        layer.number: tuple(name for name in PROJECTIONS if _zero(getattr(layer, name))) for layer in layers(model)
    }
    return {number: names for number, names in found.items() if names}


def _zero(projection: nn.Linear) -> bool:
    weight = projection.weight.detach()
    return not (weight[:1].any() or weight.any())  # nearly always a look at one row


def sites(model: nn.Module, *roles: str, only: Iterable[int] | None = None) -> tuple[Site, ...]:
    """The sites of these roles in every layer (or in the layers `only`), role by role."""
    indices = range(len(_blocks(model))) if only is None else tuple(only)
    return tuple(Site(role, index) for role in roles for index in indices)


def locate(model: nn.Module, site: tuple[str, int]) -> tuple[nn.Module, Side]:
    """The module that `site` belongs to, and whether the site is its input or its output."""
    role, index = site
    if role not in ROLES and role not in EXPERT_ROLES:
        raise ProbeError(f"site {role!r}: expected one of {', '.join(ROLES)}; in a mixture {', '.join(EXPERT_ROLES)}")
    attribute, side = ROLES.get(role, ("experts", "input"))
    ffn = _ffn(index, _block(model, index))
    if isinstance(ffn, Layer) and role in EXPERT_ROLES:
        raise ProbeError(f"site {role!r}: layers.{index} is dense, it has no experts")
    module = getattr(ffn, attribute, getattr(ffn.block, attribute, None))
    if module is None and isinstance(ffn, Mixture):
        raise _refused(index, ffn.mlp)
    if module is None:
        raise ProbeError(f"layers.{index}: {type(ffn.block).__name__} has no {attribute}, where {role} is read")
    return module, side


def weight(model: nn.Module, projection: str, layer: int) -> nn.Parameter:
    """The weight of gate_proj (I, H), up_proj (I, H) or down_proj (H, I) in `layer`."""
    if projection not in PROJECTIONS:
        raise ProbeError(f"projection {projection!r}: expected one of {', '.join(PROJECTIONS)}")
    return getattr(_layer(layer, _block(model, layer)), projection).weight


def _blocks(model: nn.Module) -> nn.ModuleList:
    causal: Any = model
    decoder = causal.get_decoder() if hasattr(model, "get_decoder") else model
    blocks = getattr(decoder, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise ProbeError(f"{type(model).__name__}: no decoder layers found; expected a causal language model's .layers")
    return blocks


def _block(model: nn.Module, index: int) -> nn.Module:
    blocks = _blocks(model)
    if not 0 <= index < len(blocks):
        raise ProbeError(f"layer {index}: the model has layers 0 to {len(blocks) - 1}")
    return blocks[index]


def _ffn(index: int, block: nn.Module) -> Layer | Mixture:
    mlp: Any = getattr(block, "mlp", None)
    return _mixture(index, block, mlp) if hasattr(mlp, "experts") else _layer(index, block)


def _mixture(index: int, block: nn.Module, mlp: Any) -> Mixture:
    experts, shared = mlp.experts, getattr(mlp, "shared_expert", None)
    gate_up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter):
        raise ProbeError(
            f"layers.{index}.mlp.experts: {type(experts).__name__} has no fused gate_up_proj and down_proj; "
            "expected a mixture as transformers 5 loads it (Qwen3-MoE, Qwen2-MoE, Qwen3-Next, Qwen3.5-MoE)"
        )
    expected = (gate_up.shape[0], gate_up.shape[2], gate_up.shape[1] // 2) if gate_up.ndim == 3 else None
    if tuple(down.shape) != expected or gate_up.dtype not in DTYPES.values():
        raise ProbeError(
            f"layers.{index}.mlp.experts: gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)} in "
            f"{gate_up.dtype}; expected (E, 2I, H) and (E, H, I) in {', '.join(DTYPES)}"
        )
    return Mixture(index, block, mlp, experts, shared)


def _refused(index: int, mlp: nn.Module) -> ProbeError:
    return ProbeError(
        f"layers.{index}.mlp: {type(mlp).__name__} is a mixture of experts, whose fused experts a hook cannot see; "
        "only vindex probe measures them, all else takes dense FFN layers"
    )


def _layer(index: int, block: nn.Module) -> Layer:
    mlp: Any = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise ProbeError(f"layers.{index}: {type(block).__name__} has no mlp; expected a dense gated FFN")
    if hasattr(mlp, "experts"):
        raise _refused(index, mlp)
    for projection in PROJECTIONS:
        if not isinstance(getattr(mlp, projection, None), nn.Module):
            raise ProbeError(
                f"layers.{index}.mlp: {type(mlp).__name__} has no {projection}; "
                "expected a gated FFN with gate_proj, up_proj and down_proj (Qwen3, Qwen2, Llama, Mistral)"
            )
    gate_proj, up_proj, down_proj = (getattr(mlp, projection) for projection in PROJECTIONS)
    return Layer(index, block, mlp, gate_proj, up_proj, down_proj)
