"""config.json at the border: what each key that is read may hold, and the sizes in it, checked before anything is done.

A key that is absent or null is left to whoever needs it. A size past what any model has is damage, not a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vindex.errors import CheckpointError
from vindex.format import MOST_COLUMNS, MOST_EXPERTS, MOST_LAYERS, MOST_NEURONS, MOST_TOKENS
from vindex.schema import is_number

NESTED = ("thinker_config", "text_config")
MOST = {
    "num_hidden_layers": MOST_LAYERS,
    "hidden_size": MOST_COLUMNS,
    "intermediate_size": MOST_NEURONS,
    "vocab_size": MOST_TOKENS,
    "num_attention_heads": MOST_COLUMNS,
    "num_key_value_heads": MOST_COLUMNS,
    "head_dim": MOST_COLUMNS,
    "num_experts": MOST_EXPERTS,
    "num_local_experts": MOST_EXPERTS,
    "num_experts_per_tok": MOST_EXPERTS,
    "moe_intermediate_size": MOST_NEURONS,
    "shared_expert_intermediate_size": MOST_NEURONS,
    "decoder_sparse_step": MOST_LAYERS,
    "full_attention_interval": MOST_LAYERS,
    "num_labels": MOST_EXPERTS,  # of a classifier; transformers names each of them before it is asked for any
}


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_rope(value: Any) -> bool:
    return isinstance(value, dict) and (value.get("rope_theta") is None or is_number(value["rope_theta"]))


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{key: (lambda value: type(value) is int and value >= 0, "a positive integer") for key in MOST},
    **dict.fromkeys((*NESTED, "quantization_config", "compression_config"), (_is_object, "an object")),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), (_is_rope, "an object with a number as rope_theta")),
    **dict.fromkeys(("model_type", "dtype", "torch_dtype"), (lambda value: isinstance(value, str), "a string")),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
    "rope_theta": (is_number, "a number"),
    "mlp_only_layers": (_list_of(int), "a list of layers"),
    "layer_types": (_list_of(str), "a list of names"),
}


class Mixture(NamedTuple):
    """What config.json says of the experts. shared_neurons: I of the shared expert, 0 where none is named."""

    num_experts: int
    neurons: int
    shared_neurons: int
    dense_layers: frozenset[int]


def checked(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The config itself, all of whose keys that are read hold what they should, in every tower on the way to the text.

    Raises CheckpointError naming the first that does not; name: of the checkpoint, for messages.
    """
    for key, (fits, expected) in KINDS.items():
        for tower in towers(config):
            value = tower.get(key)
            if value is not None and not fits(value):
                raise CheckpointError(f"{name}: config.json {key}: expected {expected}, got {_shown(value)}")
            if value is not None and key in MOST and value > MOST[key]:
                raise CheckpointError(f"{name}: config.json {key}: expected at most {MOST[key]}, got {_shown(value)}")
    return config


def towers(config: Mapping[str, Any]) -> list[Any]:
    """The config and those nested in it on the way to the text tower, outermost first."""
    found: list[Any] = [config]
    for key in NESTED:
        if isinstance(found[-1].get(key), dict):
            found.append(found[-1][key])
    return found


def positive(config: Mapping[str, Any], name: str, *keys: str) -> int:
    """The first of the keys that the config has, as a positive integer."""
    key = next((key for key in keys if key in config), keys[0])
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{name}: config.json {key}: expected a positive integer, got {_shown(value)}")
    return value


def mixture_of(config: Mapping[str, Any], name: str) -> Mixture:
    """The experts, and the layers that have none: those listed, and those that a sparse step leaves out.

    Raises CheckpointError when no layer has experts, or a token goes to more experts than there are.
    """
    layers = range(positive(config, name, "num_hidden_layers"))
    listed, step = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step") or 1
    dense = frozenset(layer for layer in layers if layer in listed or (layer + 1) % step)
    if len(dense) == len(layers):
        raise CheckpointError(
            f"{name}: config.json mlp_only_layers and decoder_sparse_step leave no layer with experts"
        )
    experts = positive(config, name, "num_experts", "num_local_experts")
    per_token = config.get("num_experts_per_tok")
    if per_token is not None and not 1 <= per_token <= experts:
        raise CheckpointError(f"{name}: config.json num_experts_per_tok: expected 1 to {experts}, got {per_token}")
    return Mixture(
        num_experts=experts,
        neurons=positive(config, name, "moe_intermediate_size"),
        shared_neurons=config.get("shared_expert_intermediate_size") or 0,
        dense_layers=dense,
    )


def _shown(value: Any) -> str:
    return repr(value)[:60]
