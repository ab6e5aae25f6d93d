"""GGUF files made from a checkpoint's tensors, beside the same numbers as plain float32."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from extract.checkpoint import open_checkpoint

ARCHITECTURES = {"qwen3": "QWEN3", "qwen2": "QWEN2", "llama": "LLAMA", "qwen3moe": "QWEN3MOE"}
# where a block keeps its float16 scales, for types that gguf cannot quantise to; the rest of its bytes may be anything
HALVES = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    **dict.fromkeys((Kind.IQ1_S, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S), (0,)),
    **dict.fromkeys((Kind.IQ4_NL, Kind.IQ4_XS), (0,)),
}


def write_gguf(
    checkpoint: Path,
    path: Path,
    kind_of: Callable[[str], Kind],
    *,
    architecture: str = "qwen3",
    per_file: int = 0,
    metadata: dict[str, int] | None = None,
    scale_of: Callable[[str], float | None] = lambda name: None,
) -> dict[str, torch.Tensor]:
    """Write the tensors of a safetensors checkpoint as GGUF and return {name: float32} as gguf dequantises them.

    kind_of(name): how a matrix is stored. per_file: split the model, so many tensors a file. Tensor names are those of
    llama.cpp's own converter (gguf.get_tensor_name_map). metadata: keys after the architecture's name. scale_of(name):
    what a tensor of the checkpoint is multiplied by in the float32 result and the file, in its NAME.scale; or None.
    """
    opened = open_checkpoint(str(checkpoint))
    layers = opened.config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[architecture]], layers)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=per_file)
    _write_metadata(writer, opened.config, metadata or {})
    _write_tokens(writer, json.loads((checkpoint / "tokenizer.json").read_text()))
    numbers = {}
    for merged, parts in _merged_experts(sorted(opened.tensors)).items():
        stored = torch.stack([opened.tensor(part) for part in parts]) if merged not in parts else opened.tensor(merged)
        kind = kind_of(merged) if stored.ndim > 1 else Kind.F32
        raw = stored.numpy() if kind == Kind.F32 else _stored(stored.numpy(), kind)
        writer.add_tensor(names.get_name(merged, (".weight",)), raw, raw_dtype=kind)
        plain = torch.from_numpy(gguf.dequantize(raw, kind)).reshape(len(parts), *opened.tensor(parts[0]).shape)
        scales = [scale_of(part) for part in parts]
        if None not in scales:
            writer.add_tensor(names.get_name(merged, (".weight",)).replace(".weight", ".scale"), np.float32(scales))
            plain *= torch.tensor(scales).view(-1, *[1] * (plain.ndim - 1))
        numbers |= {part: plain[at].clone() for at, part in enumerate(parts)}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


def write_plain(
    checkpoint: Path, directory: Path, numbers: dict[str, torch.Tensor], config: dict | None = None
) -> Path:
    """The same checkpoint with these float32 numbers as its weights, and these changes to its config.json."""
    directory.mkdir()
    save_file(numbers, directory / "model.safetensors")
    (directory / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    settings = json.loads((checkpoint / "config.json").read_text()) | (config or {})
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def _merged_experts(names: list[str]) -> dict[str, list[str]]:
    """{name of a tensor: the tensors in it}: the experts of a layer go into one, in the order of their numbers."""
    merged: dict[str, list[str]] = {}
    for name in names:
        merged.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(name)

    def numbers(name: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", name)]

    return {name: sorted(parts, key=numbers) for name, parts in merged.items()}


def _stored(numbers: np.ndarray, kind: Kind) -> np.ndarray:
    """Quantised, where gguf can; else blocks of random bytes with scales of a sensible size."""
    if kind not in HALVES:
        return gguf.quantize(numbers, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(numbers.size)
    blocks = random.integers(0, 256, (numbers.size // block, size), np.uint8)
    for at in HALVES[kind]:
        scales = random.uniform(0.001, 0.01, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*numbers.shape[:-1], -1)


def _write_metadata(writer: gguf.GGUFWriter, config: dict, more: dict[str, int]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config.get("rope_theta", 1e4))
    writer.add_license("apache-2.0")
    for key, value in more.items():
        writer.add_uint32(f"{writer.arch}.{key}", value)


def _write_tokens(writer: gguf.GGUFWriter, tokenizer: dict) -> None:
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    pieces = {at: piece for piece, at in tokenizer["model"]["vocab"].items()} | special
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([pieces[at] for at in range(len(pieces))])
    writer.add_token_types([3 if at in special else 1 for at in range(len(pieces))])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
