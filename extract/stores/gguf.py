"""Tensors of GGUF files, single or split, under the names and in the shapes that Hugging Face checkpoints use.

1. Headers are parsed (extract/stores/gguf_header.py) and checked against each other, the file's size and the names of
   the architecture's tensors; bytes are read when a tensor is asked for.
2. llama.cpp's names are mapped to those of Hugging Face. Stacks of experts are given as one matrix for each expert.
3. Rows are dequantised by the `gguf` package, a piece at a time: (rows, bytes of a row) → (rows, columns) float32.
   Where llama.cpp's converter stored NAME.scale beside NAME.weight, as for NVFP4, they are multiplied by it.
4. config.json is put together from the metadata (llama.cpp, gguf-py/gguf/constants.py, class Keys).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from extract.stores import FLOATS, Files, TensorInfo
from extract.stores.gguf_header import Header, Tensor, read_header
from vindex.errors import CheckpointError
from vindex.format import MOST_EXPERTS
from vindex.model_config import checked

READ_BYTES, CACHED_BYTES = 1 << 24, 1 << 20  # of float32: what is read at a time, and dequantised in the cache
METHOD = "GGUF, by the gguf package"
ARCHITECTURE, TOKENS = "general.architecture", "tokenizer.ggml.tokens"
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
IN_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.([a-z_0-9]+)")
OF_A_TENSOR = ("weight", "bias", "scale", "input_scale")  # what llama.cpp stores of one

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
        headers = {name: read_header(files, name) for name in names}
        _require_one_model(headers)
        shapes = {tensor.name: tensor.shape for header in headers.values() for tensor in header.tensors}
        self.metadata = next(iter(headers.values())).metadata
        known = _tensor_names(self.metadata.get("general.architecture"))
        for name, header in headers.items():
            for tensor, dtype, size in _packed(name, files.sizes[name], header):
                _require_known(name, tensor.name, known, self.metadata)
                _require_scale(name, tensor, dtype, shapes)
                self.tensors.update(_placed(name, tensor, dtype, size))
        self.dtypes = FLOATS | {dtype for dtype in {info.dtype for info in self.tensors.values()} if _known(dtype)}
        self.tokens: list[str] = _texts(names[0], self.metadata)
        self.metadata = {key: value for key, value in self.metadata.items() if not key.startswith("tokenizer.")}

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        file, shape, dtype, start = self.tensors[name]
        if len(shape) == 1:
            numbers = self._rows(file, start, (1, *shape), dtype)[0, first:last]
        else:
            last = shape[0] if last is None else last
            row_bytes = _row_bytes(shape[1], dtype)
            numbers = self._rows(file, start + first * row_bytes, (last - first, shape[1]), dtype)
        scale = f"{name.removesuffix('.weight')}.scale"
        return numbers.mul_(self.read(scale)) if scale in self.tensors else numbers

    def _rows(self, file: str, start: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        (rows, columns), row_bytes = shape, _row_bytes(shape[1], dtype)
        numbers = torch.empty(rows, columns)
        step = max(1, READ_BYTES // (4 * columns))
        for at in range(0, rows, step):
            end = min(at + step, rows)
            content = self._files.read(file, start + at * row_bytes, start + end * row_bytes)
            stored = np.frombuffer(content, np.uint8).reshape(end - at, row_bytes)
            _dequantise(stored, dtype, numbers[at:end])
        return numbers


def _dequantise(stored: np.ndarray, dtype: str, numbers: torch.Tensor) -> None:
    """From (rows, bytes of a row) to (rows, columns), a few rows at a time: numpy goes over them some ten times."""
    from gguf import GGMLQuantizationType, dequantize

    step = max(1, CACHED_BYTES // (4 * numbers.shape[1]))
    with np.errstate(all="ignore"):  # what is not finite is told with its place by whoever uses it
        for at in range(0, len(stored), step):
            rows = slice(at, at + step)
            numbers[rows] = torch.from_numpy(dequantize(stored[rows], GGMLQuantizationType[dtype]))


def _placed(file: str, tensor: Tensor, dtype: str, size: int) -> Iterator[tuple[str, TensorInfo]]:
    """(Hugging Face name, place) of a tensor: none when no vindex needs it, one for each expert of a stack."""
    info = TensorInfo(file, tensor.shape, dtype, tensor.start)
    stem, _, kind = tensor.name.rpartition(".")
    in_layer = IN_BLOCK.fullmatch(stem)
    if stem in WHOLE:
        yield f"{WHOLE[stem]}.{kind}", info
    elif in_layer and in_layer[2] in IN_LAYER:
        yield f"model.layers.{in_layer[1]}.{IN_LAYER[in_layer[2]]}.{kind}", info
    elif in_layer and in_layer[2] in EXPERTS and (len(tensor.shape) == 3 or kind == "scale"):
        experts, *shape = tensor.shape
        if experts > MOST_EXPERTS:
            raise CheckpointError(f"{file}: {tensor.name} is of {experts} experts, more than {MOST_EXPERTS}")
        for expert in range(experts):
            name = f"model.layers.{in_layer[1]}.mlp.experts.{expert}.{EXPERTS[in_layer[2]]}.{kind}"
            yield name, TensorInfo(file, tuple(shape) or (1,), dtype, tensor.start + expert * (size // experts))


def _packed(file: str, size: int, header: Header) -> Iterator[tuple[Tensor, str, int]]:
    """(tensor, name of its type, bytes) of every tensor, in the file's order.

    As llama.cpp demands: one after the other, each at the next multiple of the alignment, and nothing after the last.
    """
    end = header.data
    for tensor in header.tensors:
        dtype, length = _stored_as(file, tensor)
        expected = -(-end // header.alignment) * header.alignment
        if tensor.start != expected:
            what = f"{tensor.name} lies at byte {tensor.start}, and by the types and shapes before it at {expected}"
            raise CheckpointError(f"{file} is damaged: {what}; download it again")
        end = tensor.start + length
        if end > size:
            raise CheckpointError(f"{file} is cut short: {tensor.name} lies past its end; download it again")
        yield tensor, dtype, length
    if size - end >= header.alignment:
        raise CheckpointError(f"{file} is damaged: {size - end} bytes follow its last tensor; download it again")


def _require_one_model(headers: Mapping[str, Header]) -> None:
    """The parts of a split model say so, in order; no tensor is in two of them and none is in no part."""
    architecture = None
    seen: dict[str, str] = {}
    for part, (file, header) in enumerate(headers.items()):
        said = [header.metadata.get(key, default) for key, default in ((SPLIT_NO, 0), (SPLIT_COUNT, 0))]
        if said != [part, len(headers)] and not (len(headers) == 1 and said in ([0, 0], [0, 1])):
            what = f"says that it is part {said[0]} (from 0) of {said[1]}, and is used as part {part} of {len(headers)}"
            raise CheckpointError(f"{file} {what}; give every part under the name it was made with")
        own = header.metadata.get(ARCHITECTURE)
        architecture = own if architecture is None else architecture
        if own not in (None, architecture):
            raise CheckpointError(f"{file} is of a model of architecture {own!r}, the parts before of {architecture!r}")
        for tensor in header.tensors:
            if seen.setdefault(tensor.name, file) != file:
                raise CheckpointError(f"{file}: {tensor.name} is in {seen[tensor.name]} too; the parts do not agree")
        total = header.metadata.get(SPLIT_TENSORS)
    if len(headers) > 1 and total != len(seen):
        raise CheckpointError(f"{file}: the model has {total} tensors, and its parts {len(seen)}; download them again")


def _tensor_names(architecture: Any) -> frozenset[str] | None:
    """llama.cpp's names of the architecture's tensors, with {bid} for the layer; None of one that is not known."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

    found = next((arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == architecture), None)
    return None if found is None else frozenset(TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[found])


def _require_known(file: str, name: str, known: frozenset[str] | None, metadata: Mapping[str, Any]) -> None:
    """A name that no tensor of the architecture has is a damaged one: without it another could be taken for missing."""
    stem, _, kind = name.rpartition(".")
    in_layer, architecture = IN_BLOCK.fullmatch(stem), metadata.get(ARCHITECTURE)
    layers = metadata.get(f"{architecture}.block_count")
    right = known is None or (f"blk.{{bid}}.{in_layer[2]}" if in_layer else stem) in known
    if not right or kind not in OF_A_TENSOR or (in_layer and type(layers) is int and int(in_layer[1]) >= layers):
        raise CheckpointError(
            f"{file}: {name!r} is no tensor of a {architecture} of {layers} layers; download it again, or upgrade gguf"
        )


def _require_scale(file: str, tensor: Tensor, dtype: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A scale is one number for its weight, or one for each expert of a stack."""
    stem, _, kind = tensor.name.rpartition(".")
    weight = shapes.get(f"{stem}.weight")
    expected = (1,) if weight is None else weight[:-2] or (1,)
    if kind == "scale" and (weight is None or tensor.shape != expected or dtype not in FLOATS):
        beside = "no weight" if weight is None else f"a weight of shape {weight}"
        raise CheckpointError(
            f"{file}: {tensor.name} is {dtype} of shape {tensor.shape}, beside {beside}; expected floats of shape "
            f"{expected} beside their weight; download it again, or convert the model again"
        )


def _texts(file: str, metadata: Mapping[str, Any]) -> list[str]:
    """The pieces of the vocabulary. Raises CheckpointError when they, or the licence, are no text."""
    tokens, licence = metadata.get(TOKENS, []), metadata.get("general.license", "")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{file}: {TOKENS} is no array of strings; download it again")
    if not isinstance(licence, str):
        raise CheckpointError(f"{file}: general.license is {str(licence)[:40]}, not a string; download it again")
    return tokens


def gguf_config(store: Gguf, name: str) -> dict[str, Any]:
    """What config.json would say, from the metadata. Raises CheckpointError on an architecture that is not known."""
    architecture = store.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in MODEL_TYPES:
        raise CheckpointError(
            f"{name}: general.architecture {str(architecture)[:40]!r} is not supported; known: {', '.join(MODEL_TYPES)}"
        )
    if architecture == "llama" and store.metadata.get("llama.expert_count"):
        raise CheckpointError(f"{name}: llama.expert_count is set (Mixtral); of mixtures only qwen3moe is supported")
    found = {key: store.metadata.get(f"{architecture}.{theirs}") for key, theirs in KEYS.items()}
    config = {key: value for key, value in found.items() if value is not None}
    embeddings = store.tensors.get("model.embed_tokens.weight")
    config |= {
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": embeddings.shape[0] if embeddings else None,
        "tie_word_embeddings": "lm_head.weight" not in store.tensors,
    }
    return checked(config, name)


def gguf_names(name: str, present: Collection[str]) -> list[str]:
    """The file names of the model that `name` belongs to: itself, or every part of a split model, in order.

    Raises CheckpointError naming the first part that is not present.
    """
    split = re.fullmatch(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", name)
    if not split:
        return [name]
    if not 1 <= int(split[2]) <= int(split[3]):
        raise CheckpointError(f"{name}: there is no part {int(split[2])} of {int(split[3])}; give it the name it had")
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
        raise CheckpointError("reading GGUF needs the gguf package: pip install 'vindex-svd[gguf]'") from error


def _stored_as(file: str, tensor: Tensor) -> tuple[str, int]:
    """(ggml's name of the type, bytes) of a tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(tensor.kind)
    except ValueError as error:
        what = f"{tensor.name} is of ggml type {tensor.kind}, which this version of the gguf package does not know"
        raise CheckpointError(f"{file}: {what}; pip install --upgrade gguf") from error
    block, size = GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        what = f"{tensor.name} has rows of {tensor.shape[-1]} numbers, and {kind.name} is stored in blocks of {block}"
        raise CheckpointError(f"{file} is damaged: {what}; download it again")
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
