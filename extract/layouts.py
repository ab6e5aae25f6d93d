"""Where each model family keeps the tensors a vindex is made from.

1. The text tower: config.json itself, or the `text_config` (and `thinker_config`) nested in it for checkpoints that
   also see or hear. Its tensors share a prefix; the rest of the checkpoint is left alone.
2. Qwen3, Qwen2/2.5, Llama and Mistral agree on the names under that prefix, mixtures of experts included
   (extract/ffn.py). Exports of the bare model (Qwen3-Embedding and -Reranker) lack the leading `model.` and have no
   head.
3. Qwen3-Next and Qwen3.5 store the weight of their RMS norms zero-centred: the scale is 1 + weight.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from extract.checkpoint import Checkpoint
from extract.ffn import Ffn, Mixture, dense_ffn, mixture_ffn, require_shape
from vindex.errors import CheckpointError

ZERO_CENTRED = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
MIXTURES = ("qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "qwen3_omni_moe", "qwen3_next", "qwen3_5_moe")
DENSE = ("qwen3", "qwen2", "llama", "mistral", "qwen3_vl", "qwen3_5", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni")
FAMILIES = DENSE + MIXTURES
NESTED = ("thinker_config", "text_config")
SUFFIXES = ("_text", "_thinker")  # of the model_type of a tower that was saved by itself
HEADS = {  # prefix of the text tower: the head that goes with it
    "model.language_model.": "lm_head.weight",
    "language_model.model.": "language_model.lm_head.weight",
    "thinker.model.": "thinker.lm_head.weight",
    "model.": "lm_head.weight",
    "language_model.": None,
    "": None,
}
LAYER_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "linear_attn_norm": "linear_attn.norm",
}
ONE_CENTRED = ("linear_attn_norm",)  # in every family: it is a norm of another kind


class Norm(NamedTuple):
    """A norm: its name in the vindex, its tensor, and whether the scale is 1 + weight."""

    name: str
    tensor: str
    zero_centred: bool

    def scale(self, checkpoint: Checkpoint) -> torch.Tensor:
        """(H,) float32: what the normalised vector is multiplied by."""
        weight = checkpoint.tensor(self.tensor)
        return 1.0 + weight if self.zero_centred else weight


@dataclass(frozen=True)
class Layout:
    """Shapes and tensor names of one checkpoint's text tower. H hidden_size, V vocab_size.

    intermediate_size: I, of a routed expert in a mixture. config: the text tower's part of config.json.
    ignored: {part of the checkpoint: tensors in it} for what is not the text tower.
    """

    family: str
    prefix: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    unembedding: str
    norms: tuple[Norm, ...]
    ffns: tuple[Ffn, ...]
    mixture: Mixture | None
    config: dict[str, Any]
    ignored: dict[str, int]

    @property
    def embeddings(self) -> str:
        return f"{self.prefix}embed_tokens.weight"

    @property
    def final_norm(self) -> Norm:
        return self.norms[-1]


def find_layout(checkpoint: Checkpoint) -> Layout:
    """Read config and tensor names, and check that every needed tensor is there with the shape the config says.

    Raises CheckpointError on an unknown model_type, a missing tensor or a shape that differs.
    """
    family, config = _text_tower(checkpoint)
    prefix = _prefix(checkpoint)
    num_layers, hidden = (_positive(checkpoint, config, key) for key in ("num_hidden_layers", "hidden_size"))
    mixture = _mixture(checkpoint, config, num_layers) if family in MIXTURES else None
    dense = mixture is None or bool(mixture.dense_layers)
    neurons = _positive(checkpoint, config, "intermediate_size") if dense else 0
    vocabulary = _positive(checkpoint, config, "vocab_size")
    tied, unembedding = _unembedding(checkpoint, prefix)
    for name in (f"{prefix}embed_tokens.weight", unembedding):
        require_shape(checkpoint, name, (vocabulary, hidden))
    layout = Layout(
        family=family,
        prefix=prefix,
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=mixture.neurons if mixture else neurons,
        vocab_size=vocabulary,
        tied=tied,
        unembedding=unembedding,
        norms=tuple(_norms(checkpoint, prefix, num_layers, family in ZERO_CENTRED)),
        ffns=tuple(
            mixture_ffn(checkpoint, f"{prefix}layers.{layer}.mlp", hidden, mixture)
            if mixture and layer not in mixture.dense_layers
            else dense_ffn(checkpoint, f"{prefix}layers.{layer}.mlp", hidden, neurons)
            for layer in range(num_layers)
        ),
        mixture=mixture,
        config=config,
        ignored=_ignored(checkpoint, prefix),
    )
    _check_norms(checkpoint, layout)
    return layout


def _text_tower(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """(family, config) of the innermost text tower that config.json describes."""
    family = checkpoint.config.get("model_type")
    config = _towers(checkpoint)[-1]
    nested = config.get("model_type") or family
    for suffix in SUFFIXES:
        nested = nested.removesuffix(suffix) if isinstance(nested, str) else nested
    if nested not in FAMILIES:
        named = f"model_type {family!r}" + (f" (text tower {nested!r})" if nested != family else "")
        raise CheckpointError(f"{checkpoint.model}: {named} is not supported; known: {', '.join(FAMILIES)}")
    return nested, config


def _towers(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The config and those nested in it on the way to the text tower, outermost first."""
    towers = [checkpoint.config]
    for key in NESTED:
        if isinstance(towers[-1].get(key), dict):
            towers.append(towers[-1][key])
    return towers


def _prefix(checkpoint: Checkpoint) -> str:
    """What the names of the text tower's tensors begin with."""
    for prefix in HEADS:
        if f"{prefix}embed_tokens.weight" in checkpoint.tensors:
            return prefix
    names = ", ".join(f"{prefix}embed_tokens.weight" for prefix in HEADS)
    raise CheckpointError(f"{checkpoint.model}: no token embeddings; expected one of {names}; it may be incomplete")


def _positive(checkpoint: Checkpoint, config: dict[str, Any], *keys: str) -> int:
    """The first of the keys that the config has, as a positive integer."""
    key = next((key for key in keys if key in config), keys[0])
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{checkpoint.model}: config.json {key}: expected a positive integer, got {value!r}")
    return value


def _mixture(checkpoint: Checkpoint, config: dict[str, Any], num_layers: int) -> Mixture:
    """The experts, and the layers that have none: those listed, and those that a sparse step leaves out."""
    listed = config.get("mlp_only_layers") or []
    if not isinstance(listed, list):
        raise CheckpointError(f"{checkpoint.model}: config.json mlp_only_layers: expected a list, got {listed!r}")
    step = _positive(checkpoint, config, "decoder_sparse_step") if config.get("decoder_sparse_step") else 1
    shared = "shared_expert_intermediate_size"
    dense = frozenset(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)
    return Mixture(
        num_experts=_positive(checkpoint, config, "num_experts", "num_local_experts"),
        neurons=_positive(checkpoint, config, "moe_intermediate_size"),
        shared_neurons=_positive(checkpoint, config, shared) if config.get(shared) else 0,
        dense_layers=dense,
    )


def _unembedding(checkpoint: Checkpoint, prefix: str) -> tuple[bool, str]:
    """(tied, tensor name) of the matrix that makes logits, by config and by what is there.

    transformers ties where the outermost config says so, whatever else is stored; the default is untied for all
    families here. An untied model without a head is only right when it is an export of the bare model.
    """
    embeddings, head = f"{prefix}embed_tokens.weight", HEADS[prefix]
    said = [tower["tie_word_embeddings"] for tower in _towers(checkpoint) if "tie_word_embeddings" in tower]
    if said and said[0]:
        return True, embeddings
    if head is None:
        return False, "lm_head.weight" if "lm_head.weight" in checkpoint.tensors else embeddings
    if head not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.model}: {head} is missing although config.json says tie_word_embeddings is false; "
            "the checkpoint is incomplete"
        )
    return False, head


def _norms(checkpoint: Checkpoint, prefix: str, num_layers: int, zero_centred: bool) -> list[Norm]:
    """Every norm in the vindex's order: per layer those of LAYER_NORMS that exist, and last the final norm."""
    found = [
        Norm(f"layers.{layer}.{short}", tensor, zero_centred and short not in ONE_CENTRED)
        for layer in range(num_layers)
        for short, long in LAYER_NORMS.items()
        if (tensor := f"{prefix}layers.{layer}.{long}.weight") in checkpoint.tensors
    ]
    return [*found, Norm("norm", f"{prefix}norm.weight", zero_centred)]


def _ignored(checkpoint: Checkpoint, prefix: str) -> dict[str, int]:
    """{part: number of tensors} of everything beside the text tower and its head, most tensors first."""
    others = [name for name in checkpoint.tensors if not name.startswith(prefix) and name != HEADS[prefix]]
    pieces = [name.split(".") for name in others]
    parts = Counter(".".join(piece[:2]) if piece[0] in ("model", "thinker") else piece[0] for piece in pieces)
    return dict(parts.most_common())


def _check_norms(checkpoint: Checkpoint, layout: Layout) -> None:
    hidden = layout.hidden_size
    for layer in range(layout.num_layers):
        for required in ("input_layernorm", "post_attention_layernorm"):
            require_shape(checkpoint, f"{layout.prefix}layers.{layer}.{required}.weight", (hidden,))
    require_shape(checkpoint, layout.final_norm.tensor, (hidden,))
