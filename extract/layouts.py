"""Where each model family keeps the tensors a vindex is made from.

Qwen3, Qwen2/2.5, Llama and Mistral agree on their names. Exports of the bare model (Qwen3-Embedding and -Reranker) lack
the leading `model.` and have no head of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from extract.checkpoint import Checkpoint
from vindex.errors import CheckpointError

FAMILIES = ("qwen3", "qwen2", "llama", "mistral")
LAYER_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


@dataclass(frozen=True)
class Layout:
    """Shapes and tensor names of one dense checkpoint. H hidden_size, I intermediate_size, V vocab_size."""

    family: str
    prefix: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    unembedding: str
    norms: tuple[tuple[str, str], ...]  # (name in the vindex, tensor name)

    @property
    def embeddings(self) -> str:
        return f"{self.prefix}embed_tokens.weight"

    @property
    def final_norm(self) -> str:
        return self.norms[-1][1]

    def projection(self, layer: int, side: str) -> str:
        """Tensor name of gate_proj (I, H) or down_proj (H, I). side: "gate" or "down"."""
        return f"{self.prefix}layers.{layer}.mlp.{side}_proj.weight"


def find_layout(checkpoint: Checkpoint) -> Layout:
    """Read config and tensor names, and check that every needed tensor is there with the shape the config says.

    Raises CheckpointError on an unknown model_type, a missing tensor or a shape that differs.
    """
    family = checkpoint.config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{checkpoint.model}: model_type {family!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    prefix = "model." if "model.embed_tokens.weight" in checkpoint.tensors else ""
    num_layers = _positive(checkpoint, "num_hidden_layers")
    tied, unembedding = _unembedding(checkpoint, prefix)
    layout = Layout(
        family=family,
        prefix=prefix,
        num_layers=num_layers,
        hidden_size=_positive(checkpoint, "hidden_size"),
        intermediate_size=_positive(checkpoint, "intermediate_size"),
        vocab_size=_positive(checkpoint, "vocab_size"),
        tied=tied,
        unembedding=unembedding,
        norms=tuple(_norms(checkpoint, prefix, num_layers)),
    )
    _check_shapes(checkpoint, layout)
    return layout


def _positive(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{checkpoint.model}: config.json {key}: expected a positive integer, got {value!r}")
    return value


def _unembedding(checkpoint: Checkpoint, prefix: str) -> tuple[bool, str]:
    """(tied, tensor name) of the matrix that makes logits, by config and by what is there.

    transformers ties where the config says so, whatever else is stored; the config's default is untied for all
    families here. An untied model without a head is only right when it is an export of the bare model.
    """
    embeddings = f"{prefix}embed_tokens.weight"
    if checkpoint.config.get("tie_word_embeddings", False):
        return True, embeddings
    if "lm_head.weight" in checkpoint.tensors:
        return False, "lm_head.weight"
    if prefix:
        raise CheckpointError(
            f"{checkpoint.model}: lm_head.weight is missing although config.json says tie_word_embeddings is false; "
            "the checkpoint is incomplete"
        )
    return False, embeddings


def _norms(checkpoint: Checkpoint, prefix: str, num_layers: int) -> list[tuple[str, str]]:
    """Every norm in the vindex's order: per layer those of LAYER_NORMS that exist, and last the final norm."""
    found = [
        (f"layers.{layer}.{short}", tensor)
        for layer in range(num_layers)
        for short, long in LAYER_NORMS.items()
        if (tensor := f"{prefix}layers.{layer}.{long}.weight") in checkpoint.tensors
    ]
    return [*found, ("norm", f"{prefix}norm.weight")]


def _check_shapes(checkpoint: Checkpoint, layout: Layout) -> None:
    hidden, neurons = layout.hidden_size, layout.intermediate_size
    expected: dict[str, tuple[int, ...]] = {
        layout.embeddings: (layout.vocab_size, hidden),
        layout.unembedding: (layout.vocab_size, hidden),
    }
    for layer in range(layout.num_layers):
        expected[layout.projection(layer, "gate")] = (neurons, hidden)
        expected[layout.projection(layer, "down")] = (hidden, neurons)
        for required in ("input_layernorm", "post_attention_layernorm"):
            expected[f"{layout.prefix}layers.{layer}.{required}.weight"] = (hidden,)
    expected[layout.final_norm] = (hidden,)
    for name, shape in expected.items():
        found = checkpoint.info(name).shape
        if found != shape:
            raise CheckpointError(
                f"{name} has shape {found}, and config.json says {shape}; the two do not belong together"
            )
