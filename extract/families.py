"""The families that are read: what sets each apart, and attention as config.json describes it.

Where config.json says nothing of attention, the family's default holds.
The defaults are those of transformers' configuration classes, which the model that runs would have; a test compares
them with the installed version.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vindex.errors import CheckpointError
from vindex.model_config import positive
from vindex.schema import is_number


class Attention(NamedTuple):
    """Heads of one text tower, its rotary base, and in a mixture the experts that each token is sent to.

    In the table below None is a number that follows from another: kv_heads is heads, head_dim is hidden_size // heads.
    """

    heads: int
    kv_heads: int | None
    head_dim: int | None
    rope_base: float = 10_000.0
    experts_per_token: int | None = None


FAMILIES = {
    "qwen3": Attention(32, 32, 128),
    "qwen2": Attention(32, 32, None),
    "llama": Attention(32, None, None),
    "mistral": Attention(32, 8, None),
    "qwen2_vl": Attention(64, 8, None, 1_000_000.0),
    "qwen2_5_vl": Attention(64, 8, None, 1_000_000.0),
    "qwen2_5_omni": Attention(28, 4, None, 1_000_000.0),
    "qwen3_vl": Attention(32, 32, 128, 500_000.0),
    "qwen3_5": Attention(16, 4, 256),
    "qwen2_moe": Attention(16, 16, None, 10_000.0, 4),
    "qwen3_moe": Attention(32, 4, None, 10_000.0, 8),
    "qwen3_vl_moe": Attention(16, 16, None, 500_000.0, 4),
    "qwen3_omni_moe": Attention(28, 4, None, 1_000_000.0, 8),
    "qwen3_next": Attention(16, 2, 256, 10_000.0, 10),
    "qwen3_5_moe": Attention(16, 2, 256, 10_000.0, 8),
}
MIXTURES = tuple(family for family, attention in FAMILIES.items() if attention.experts_per_token)
ZERO_CENTRED = ("qwen3_next", "qwen3_5", "qwen3_5_moe")  # norms of scale 1 + weight; layers with linear attention
QK_NORMED = tuple(family for family in FAMILIES if family.startswith("qwen3"))  # every layer but linear


def find_attention(model: str, family: str, config: dict[str, Any], hidden_size: int) -> Attention:
    """What `config`, the text tower's part of config.json, says of attention; only experts_per_token may be None.

    Raises CheckpointError naming `model`, the key and what was found where a value is no positive number.
    """
    default = FAMILIES[family]

    def number(key: str, otherwise: int | None) -> int | None:
        given = config.get(key, otherwise)  # null is given, and follows from another
        return positive(config, model, key) if key in config and given is not None else given

    heads = number("num_attention_heads", default.heads) or default.heads
    return Attention(
        heads,
        number("num_key_value_heads", default.kv_heads) or heads,
        number("head_dim", default.head_dim) or hidden_size // heads,
        _rope_base(model, config, default.rope_base),
        number("num_experts_per_tok", default.experts_per_token) or default.experts_per_token,
    )


def _rope_base(model: str, config: dict[str, Any], otherwise: float) -> float:
    """The rotary base, in either generation of config.json: beside the other keys, or among the rotary parameters."""
    for where in (config.get("rope_scaling"), config.get("rope_parameters"), config):
        value = where.get("rope_theta") if isinstance(where, dict) else None
        if value is not None:
            if not is_number(value) or value <= 0:
                raise CheckpointError(f"{model}: config.json rope_theta: expected a positive number, got {value!r}")
            return value
    return otherwise
