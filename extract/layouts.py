"""Where each model family keeps the tensors a vindex is made from.

1. The text tower: config.json itself, or the `text_config` (and `thinker_config`) nested in it for checkpoints that
   also see or hear. Its tensors share a prefix; the rest of the checkpoint is left alone.
2. Qwen3, Qwen2/2.5, Llama and Mistral agree on the names under that prefix, mixtures of experts included
   (extract/ffn.py). Exports of the bare model (Qwen3-Embedding and -Reranker) lack the leading `model.`; they, reward
   and classification models have no head, and their embeddings stand in for it.
3. Qwen3-Next and Qwen3.5 store the weight of their RMS norms zero-centred: the scale is 1 + weight. MLX adds the 1
   when it saves them, which shows in the shape of their convolutions.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from extract.checkpoint import Checkpoint
from extract.families import FAMILIES, MIXTURES, QK_NORMED, ZERO_CENTRED
from extract.ffn import Ffn, dense_ffn, mixture_ffn, require_shape
from vindex.errors import CheckpointError
from vindex.model_config import Mixture, mixture_of, positive, towers
from vindex.tower import TOWERS, stored_layers, text_prefix

SUFFIXES = ("_text", "_thinker")  # of the model_type of a tower that was saved by itself
BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")  # of every layer of every family, as long as H
LAYER_NORMS = {
    **{name: name for name in BLOCK_NORMS},
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "linear_attn_norm": "linear_attn.norm",
}
ONE_CENTRED = ("linear_attn_norm",)  # in every family: it is a norm of another kind
OF_MLX = "saved by MLX: the norms hold 1 + weight, and are read as they are stored"


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
    ignored: {part of the checkpoint: tensors in it} for what is not the text tower. tied: the head is the embeddings.
    notes: what a user should know of how the checkpoint is read, a sentence each.
    """

    family: str
    prefix: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    embeddings: str
    unembedding: str
    norms: tuple[Norm, ...]
    ffns: tuple[Ffn, ...]
    mixture: Mixture | None
    config: dict[str, Any]
    ignored: dict[str, int]
    notes: tuple[str, ...]

    @property
    def final_norm(self) -> Norm:
        return self.norms[-1]


def find_layout(checkpoint: Checkpoint) -> Layout:
    """Read config and tensor names, and check that every needed tensor is there with the shape the config says.

    Raises CheckpointError on an unknown model_type, a missing tensor or a shape that differs.
    """
    family, config = _text_tower(checkpoint)
    prefix = text_prefix(checkpoint.tensors, checkpoint.config, checkpoint.model)
    name = checkpoint.model
    num_layers, hidden = (positive(config, name, key) for key in ("num_hidden_layers", "hidden_size"))
    mixture = mixture_of(config, name) if family in MIXTURES else None
    dense = mixture is None or bool(mixture.dense_layers)
    neurons = positive(config, name, "intermediate_size") if dense else 0
    vocabulary = positive(config, name, "vocab_size")
    ends = _ends(checkpoint, prefix, (vocabulary, hidden))
    of_mlx = family in ZERO_CENTRED and _is_of_mlx(checkpoint, prefix)
    return Layout(
        family=family,
        prefix=prefix,
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=mixture.neurons if mixture else neurons,
        vocab_size=vocabulary,
        tied=ends.tied,
        embeddings=ends.embeddings,
        unembedding=ends.unembedding,
        ffns=tuple(
            mixture_ffn(checkpoint, f"{prefix}layers.{layer}.mlp", hidden, mixture)
            if mixture and layer not in mixture.dense_layers
            else dense_ffn(checkpoint, f"{prefix}layers.{layer}.mlp", hidden, neurons)
            for layer in range(num_layers)
        ),
        norms=_norms(checkpoint, prefix, family, config, num_layers, hidden, of_mlx),
        mixture=mixture,
        config=config,
        ignored=_ignored(checkpoint, prefix),
        notes=tuple(filter(None, (ends.note, OF_MLX if of_mlx else "", _left_out(checkpoint, prefix, num_layers)))),
    )


def _text_tower(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """(family, config) of the innermost text tower that config.json describes."""
    family = checkpoint.config.get("model_type")
    config = towers(checkpoint.config)[-1]
    nested = config.get("model_type") or family
    for suffix in SUFFIXES:
        nested = nested.removesuffix(suffix) if isinstance(nested, str) else nested
    if nested not in FAMILIES:
        named = f"model_type {family!r}" + (f" (text tower {nested!r})" if nested != family else "")
        raise CheckpointError(f"{checkpoint.model}: {named} is not supported; known: {', '.join(FAMILIES)}")
    return nested, config


class _Ends(NamedTuple):
    """The matrices at both ends of the text tower, by tensor name, and what a user should know of them."""

    embeddings: str
    unembedding: str
    tied: bool
    note: str | None = None


def _ends(checkpoint: Checkpoint, prefix: str, shape: tuple[int, int]) -> _Ends:
    """The matrices that transformers would use, by what is stored and what the outermost config says.

    1. A head that is stored is used, whatever the config says; transformers ties only one that equals the embeddings.
    2. Without one, a tied model's head is the embeddings. Where only the head is stored, it is both.
    3. An untied model without a head has none: transformers would draw one at random.
    """
    embeddings, head = f"{prefix}embed_tokens.weight", TOWERS[prefix]
    found = [name for name in (embeddings, head) if name in checkpoint.tensors]
    for name in found:
        require_shape(checkpoint, name, shape)
    said = [tower["tie_word_embeddings"] for tower in towers(checkpoint.config) if "tie_word_embeddings" in tower]
    tied = bool(said and said[0])
    if not tied and embeddings not in found:
        raise CheckpointError(f"{checkpoint.model}: {embeddings} is missing, and config.json does not tie it to {head}")
    if len(found) == 1 and tied:
        return _Ends(found[0], found[0], True)
    if head not in found:
        return _Ends(embeddings, embeddings, False, f"no head: {head} is not stored, the embeddings stand in for it")
    if not tied:
        return _Ends(embeddings, head, False)
    if _equal(checkpoint, embeddings, head):
        return _Ends(embeddings, embeddings, True)
    what = "config.json says tie_word_embeddings, and it differs from the embeddings; transformers does the same"
    return _Ends(embeddings, head, False, f"the stored {head} is the head: {what}")


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two matrices hold the same numbers; they are read as far as they agree."""
    pairs = zip(checkpoint.row_blocks(one), checkpoint.row_blocks(other), strict=True)
    return all(torch.equal(rows, others) for (_, rows), (_, others) in pairs)


def _norms(
    checkpoint: Checkpoint, prefix: str, family: str, config: dict[str, Any], num_layers: int, hidden: int, of_mlx: bool
) -> tuple[Norm, ...]:
    """Every norm in the vindex's order: those of each layer, and last the final norm.

    A norm that the family has, or any other layer of the same kind, is in every layer of that kind: where it is not,
    the checkpoint is damaged. Hybrids have layers of two kinds, with linear and with full attention.
    """
    linear = _linear_layers(checkpoint, prefix, family, config, num_layers)
    kinds = (frozenset(range(num_layers)) - linear, linear)
    found = {}
    for kind in kinds:
        required = {*BLOCK_NORMS, *(("linear_attn_norm",) if kind is linear else ())}
        required |= {"q_norm", "k_norm"} if family in QK_NORMED and kind is not linear else set()
        for short, long in LAYER_NORMS.items():
            names = {layer: f"{prefix}layers.{layer}.{long}.weight" for layer in sorted(kind)}
            if short in required or any(name in checkpoint.tensors for name in names.values()):
                _require_norms(checkpoint, list(names.values()), hidden if short in BLOCK_NORMS else None)
                found.update({(layer, short): name for layer, name in names.items()})
    final = f"{prefix}norm.weight"
    _require_norms(checkpoint, [final], hidden)
    zero_centred = family in ZERO_CENTRED and not of_mlx
    return (
        *(
            Norm(f"layers.{layer}.{short}", found[layer, short], zero_centred and short not in ONE_CENTRED)
            for layer in range(num_layers)
            for short in LAYER_NORMS
            if (layer, short) in found
        ),
        Norm("norm", final, zero_centred),
    )


def _is_of_mlx(checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether MLX saved a hybrid: linear attention's convolution is (C, K, 1), which others have as (C, 1, K)."""
    convolution = re.compile(rf"{re.escape(prefix)}layers\.[0-9]{{1,9}}\.linear_attn\.conv1d\.weight")
    shapes = [info.shape for name, info in checkpoint.tensors.items() if convolution.fullmatch(name)]
    return any(len(shape) == 3 and shape[1] > shape[2] == 1 for shape in shapes)


def _linear_layers(
    checkpoint: Checkpoint, prefix: str, family: str, config: dict[str, Any], num_layers: int
) -> frozenset[int]:
    """The layers of a hybrid that have linear attention: as config.json says, or else as the tensors there say."""
    if family not in ZERO_CENTRED:
        return frozenset()
    layers, kinds, interval = range(num_layers), config.get("layer_types"), config.get("full_attention_interval")
    if kinds is not None:
        if len(kinds) != num_layers:
            raise CheckpointError(
                f"{checkpoint.model}: config.json layer_types has {len(kinds)} entries and num_hidden_layers is "
                f"{num_layers}; the two do not belong together"
            )
        return frozenset(layer for layer in layers if kinds[layer] == "linear_attention")
    if interval:
        return frozenset(layer for layer in layers if (layer + 1) % interval)
    numbers = re.compile(rf"{re.escape(prefix)}layers\.([0-9]{{1,9}})\.linear_attn\.")
    found = {int(match[1]) for name in checkpoint.tensors if (match := numbers.match(name))}
    return frozenset(found.intersection(layers))


def _require_norms(checkpoint: Checkpoint, names: list[str], length: int | None) -> None:
    """All of these are there, vectors of `length` numbers, or of as many as the first."""
    for name in names:
        shape = checkpoint.info(name).shape
        if length is None:
            length = shape[0] if len(shape) == 1 else 0
            if not length:
                raise CheckpointError(f"{name} has shape {shape}; expected one number or more in one dimension")
        require_shape(checkpoint, name, (length,))


def _left_out(checkpoint: Checkpoint, prefix: str, num_layers: int) -> str:
    """What to say of layers that are stored past those that config.json counts; empty where there are none."""
    last = max(stored_layers(checkpoint.tensors, prefix), default=0)
    if last < num_layers:
        return ""
    which = f"layer {last} is" if last == num_layers else f"layers {num_layers} to {last} are"
    return f"{which} stored and not in config.json, which counts {num_layers}: left out"


def _ignored(checkpoint: Checkpoint, prefix: str) -> dict[str, int]:
    """{part: number of tensors} of everything beside the text tower and its head, most tensors first."""
    others = [name for name in checkpoint.tensors if not name.startswith(prefix) and name != TOWERS[prefix]]
    pieces = [name.split(".") for name in others]
    parts = Counter(".".join(piece[:2]) if piece[0] in ("model", "thinker") else piece[0] for piece in pieces)
    return dict(parts.most_common())
