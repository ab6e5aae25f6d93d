"""Tensors of GGUF files, single or split, under the names and in the shapes that Hugging Face checkpoints use.

1. Headers are parsed (extract/stores/gguf_header.py); bytes are read when a tensor is asked for.
2. llama.cpp's names are mapped to those of Hugging Face. Stacks of experts are given as one matrix for each expert.
3. Rows are dequantised by the `gguf` package, a piece at a time: (rows, bytes of a row) → (rows, columns) float32.
4. config.json is put together from the metadata (llama.cpp, gguf-py/gguf/constants.py, class Keys).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from extract.stores import FLOATS, Files, TensorInfo
from extract.stores.gguf_header import Tensor, read_header
from vindex.errors import CheckpointError

PIECE_BYTES = 1 << 24  # dequantise about this many bytes of float32 at a time
METHOD = "GGUF, by the gguf package"

MODEL_TYPES = {"qwen3": "qwen3", "qwen2": "qwen2", "llama": "llama", "qwen3moe": "qwen3_moe"}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
# config.json key: the metadata key after the architecture's name
KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}


class Gguf:
    """The tensors of one model in GGUF, dequantised to float32. tokens: every piece of its vocabulary, by id."""

    method = METHOD

    def __init__(self, files: Files, names: Sequence[str]) -> None:
        self._files = files
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name in names:
            header = read_header(files, name)
            self.metadata = self.metadata or header.metadata
            for tensor in header.tensors:
                self.tensors.update(self._placed(name, tensor))
        self.dtypes = FLOATS | {dtype for dtype in {info.dtype for info in self.tensors.values()} if _known(dtype)}
        self.tokens: list[str] = self.metadata.get("tokenizer.ggml.tokens", [])
        self.metadata = {key: value for key, value in self.metadata.items() if not key.startswith("tokenizer.")}

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        file, shape, dtype, start = self.tensors[name]
        if len(shape) == 1:
            return self._rows(file, start, (1, *shape), dtype)[0, first:last]
        last = shape[0] if last is None else last
        row_bytes = _row_bytes(shape[1], dtype)
        return self._rows(file, start + first * row_bytes, (last - first, shape[1]), dtype)

    def _placed(self, file: str, tensor: Tensor) -> Iterator[tuple[str, TensorInfo]]:
        """(Hugging Face name, place) of a tensor: none when no vindex needs it, one for each expert of a stack."""
        dtype, size = _stored_as(file, tensor)
        if tensor.start + size > self._files.sizes[file]:
            raise CheckpointError(f"{file} is cut short: {tensor.name} lies past its end; download it again")
        info = TensorInfo(file, tensor.shape, dtype, tensor.start)
        stem, _, kind = tensor.name.rpartition(".")
        in_layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if stem in WHOLE:
            yield f"{WHOLE[stem]}.{kind}", info
        elif in_layer and in_layer[2] in IN_LAYER:
            yield f"model.layers.{in_layer[1]}.{IN_LAYER[in_layer[2]]}.{kind}", info
        elif in_layer and in_layer[2] in EXPERTS and len(tensor.shape) == 3:
            experts, *shape = tensor.shape
            for expert in range(experts):
                name = f"model.layers.{in_layer[1]}.mlp.experts.{expert}.{EXPERTS[in_layer[2]]}.{kind}"
                yield name, TensorInfo(file, tuple(shape), dtype, tensor.start + expert * (size // experts))

    def _rows(self, file: str, start: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        from gguf import GGMLQuantizationType, dequantize

        (rows, columns), row_bytes = shape, _row_bytes(shape[1], dtype)
        numbers = torch.empty(rows, columns)
        step = max(1, PIECE_BYTES // (4 * columns))
        for at in range(0, rows, step):
            end = min(at + step, rows)
            content = self._files.read(file, start + at * row_bytes, start + end * row_bytes)
            stored = np.frombuffer(content, np.uint8).reshape(end - at, row_bytes)
            numbers[at:end] = torch.from_numpy(dequantize(stored, GGMLQuantizationType[dtype]))
        return numbers


def gguf_config(store: Gguf, name: str) -> dict[str, Any]:
    """What config.json would say, from the metadata. Raises CheckpointError on an architecture that is not known."""
    architecture = store.metadata.get("general.architecture")
    if architecture not in MODEL_TYPES:
        raise CheckpointError(
            f"{name}: general.architecture {architecture!r} is not supported; known: {', '.join(MODEL_TYPES)}"
        )
    if architecture == "llama" and store.metadata.get("llama.expert_count"):
        raise CheckpointError(f"{name}: llama.expert_count is set (Mixtral); of mixtures only qwen3moe is supported")
    found = {key: store.metadata.get(f"{architecture}.{theirs}") for key, theirs in KEYS.items()}
    config = {key: value for key, value in found.items() if value is not None}
    embeddings = store.tensors.get("model.embed_tokens.weight")
    return config | {
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": embeddings.shape[0] if embeddings else None,
        "tie_word_embeddings": "lm_head.weight" not in store.tensors,
    }


def gguf_names(name: str, present: Collection[str]) -> list[str]:
    """The file names of the model that `name` belongs to: itself, or every part of a split model, in order.

    Raises CheckpointError naming the first part that is not present.
    """
    split = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", name)
    if not split:
        return [name]
    names = [f"{split[1]}-{part:05d}-of-{split[3]}.gguf" for part in range(1, int(split[3]) + 1)]
    missing = [part for part in names if part not in present]
    if missing:
        raise CheckpointError(
            f"{name}: {len(missing)} of {len(names)} parts are missing, first {missing[0]}; put them side by side"
        )
    return names


def require_gguf() -> None:
    """Raise CheckpointError with the way out when the gguf package is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError("reading GGUF needs the gguf package: pip install 'vindex[gguf]'") from error


def _stored_as(file: str, tensor: Tensor) -> tuple[str, int]:
    """(ggml's name of the type, bytes) of a tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(tensor.kind)
    except ValueError as error:
        what = f"{tensor.name} is of ggml type {tensor.kind}, which this version of the gguf package does not know"
        raise CheckpointError(f"{file}: {what}; pip install --upgrade gguf") from error
    block, size = GGML_QUANT_SIZES[kind]
    return kind.name, math.prod(tensor.shape) // block * size


def _row_bytes(columns: int, dtype: str) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    return columns // block * size


def _known(dtype: str) -> bool:
    """Whether the gguf package can dequantise this type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[dtype]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
