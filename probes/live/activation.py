"""The activation of a gated FFN, h = act(gate_proj x) · (up_proj x): the model's own, and what its config calls it.

What is computed with it (C4's null, the experts of a mixture, Gate 3's gradients) takes act as a function of each gate
alone. `of` refuses what is none, and `require_own` holds what a layer's down_proj received against act(gate) · up, so
that an FFN that computes otherwise is refused and not measured wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vindex.errors import ProbeError

AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""How far a recomputed activation may be from the module's own, as a share of its norm."""
LABELS = {"silu": "SiLU", "swish": "SiLU", "relu": "ReLU", "gelu": "GELU"}
SAMPLE = (4, 6)


class Activation(NamedTuple):
    """An element-wise function of the gate."""

    name: str
    """As the config has it (silu, gelu_pytorch_tanh), or the function's own where the config names another one."""
    function: Callable[[Tensor], Tensor]

    @property
    def label(self) -> str:
        """The name as prose has it."""
        return LABELS.get(self.name, self.name)


def of(model: nn.Module, ffn: nn.Module, place: str) -> Activation:
    """The activation of an FFN, or of the experts of a mixture; `place` names it in messages.

    Raises ProbeError where it has none (`act_fn`), or one that is no function of each gate alone.
    """
    function: Any = getattr(ffn, "act_fn", None)
    if not callable(function):
        raise ProbeError(
            f"{place}: {type(ffn).__name__} has no act_fn; expected a gated FFN, h = act_fn(gate_proj x) · (up_proj x)"
        )
    device = next((parameter.device for parameter in ffn.parameters()), torch.device("cpu"))
    sample = torch.linspace(-6, 6, SAMPLE[0] * SAMPLE[1], device=device).view(SAMPLE)
    with torch.no_grad():
        values = _values(function, sample)
        turned = _values(function, sample.flip(0, 1).flatten())
        alone = _values(function, sample[1:2, 2:3])
    if values is None or turned is None or alone is None or not _same(values, turned, alone):
        raise ProbeError(
            f"{place}: {_called(function)} is no function of each gate alone; "
            "expected an element-wise activation such as silu, gelu or relu"
        )
    return Activation(_name(model, function, sample, values), function)


def require_own(product: Tensor, hidden: Tensor, dtype: torch.dtype, place: str) -> None:
    """Raise ProbeError unless what down_proj received in `dtype` is act(gate) · up; both (n, I) float32."""
    gap = float(torch.dist(product, hidden))
    norm = float(torch.linalg.vector_norm(hidden))
    if not gap <= AGREEMENT[dtype] * norm:
        raise ProbeError(
            f"{place}: what down_proj receives is not act_fn(gate_proj x) · (up_proj x) (it differs by {gap:.1e}, at a "
            f"norm of {norm:.1e}); the probes do not know this FFN"
        )


def _values(function: Callable[[Tensor], Tensor], sample: Tensor) -> Tensor | None:
    """What the function makes of the sample, where that is one number for each."""
    try:
        values = function(sample)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    return values if isinstance(values, Tensor) and values.shape == sample.shape else None


def _same(values: Tensor, turned: Tensor, alone: Tensor) -> bool:
    """Whether a number's value does not depend on the others, on its place, or on their shape."""
    return _close(values.flatten(), turned.flip(0)) and _close(alone, values[1:2, 2:3])


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def _name(model: nn.Module, function: Callable[[Tensor], Tensor], sample: Tensor, values: Tensor) -> str:
    from transformers.activations import ACT2CLS, ACT2FN

    causal: Any = model
    config = causal.config.get_text_config()
    for key in ("hidden_activation", "hidden_act"):
        name = getattr(config, key, None)
        if isinstance(name, str) and name in ACT2CLS:
            stated = _values(ACT2FN[name].to(sample.device), sample)
            if stated is not None and _close(stated, values):
                return name
    return _called(function)


def _called(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
