"""Matrices and checkpoints of a large model's shapes with a real model's spectrum, made fast enough to benchmark on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

SPECTRUM = json.loads((Path(__file__).parent / "gate_proj_spectrum.json").read_text())["singular_values"]


class Shapes(NamedTuple):
    hidden: int
    neurons: int
    vocabulary: int


QWEN3_8B = Shapes(4096, 12288, 151936)


def real_spectrum(size: int) -> torch.Tensor:
    """The singular values of a real gate_proj, as quantiles, stretched to `size` values: (size,) float32."""
    positions = np.linspace(0, 1, size)
    return torch.from_numpy(np.interp(positions, np.linspace(0, 1, len(SPECTRUM)), SPECTRUM).astype(np.float32))


def real_looking_weight(neurons: int, hidden: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """(I, H) bfloat16 values, as float32, with that spectrum (up to bfloat16 rounding) and random directions."""
    random = torch.Generator(device).manual_seed(seed)
    left = torch.linalg.qr(torch.randn(neurons, hidden, generator=random, device=device))[0]
    right = torch.linalg.qr(torch.randn(hidden, hidden, generator=random, device=device))[0]
    return ((left * real_spectrum(hidden).to(device)) @ right.T).bfloat16().float()


def qwen3_config(layers: int, hidden: int, neurons: int, vocabulary: int) -> dict:
    """config.json of a dense, untied Qwen3 of these shapes."""
    return {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "vocab_size": vocabulary,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }


def write_checkpoint(directory: Path, shapes: Shapes, layers: int, device: str = "cpu") -> Path:
    """A Qwen3 checkpoint in bfloat16, a shard for each layer, untied. Nothing larger than one shard is in memory.

    Columns are scaled by the real spectrum, which gives weights close to it without the cost of orthogonal factors.
    device: where the numbers are drawn; they are others on a GPU.
    """
    directory.mkdir(parents=True)
    hidden, neurons, vocabulary = shapes
    random = torch.Generator(device).manual_seed(0)
    scale = real_spectrum(hidden).to(device) / neurons**0.5

    def matrix(rows: int, columns: int, scales: torch.Tensor | float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random, device=device) * scales).bfloat16().cpu()

    shards = []
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shards.append(
            {
                f"{at}.mlp.gate_proj.weight": matrix(neurons, hidden, scale),
                f"{at}.mlp.up_proj.weight": matrix(neurons, hidden, scale),
                f"{at}.mlp.down_proj.weight": matrix(hidden, neurons, scale[:, None]),
                f"{at}.self_attn.q_proj.weight": matrix(hidden, hidden, 0.02),
                f"{at}.self_attn.q_norm.weight": torch.ones(128).bfloat16(),
                f"{at}.self_attn.k_norm.weight": torch.ones(128).bfloat16(),
                f"{at}.input_layernorm.weight": torch.ones(hidden).bfloat16(),
                f"{at}.post_attention_layernorm.weight": torch.ones(hidden).bfloat16(),
            }
        )
        _save(directory, f"model-{layer}.safetensors", shards)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shards.append({name: matrix(vocabulary, hidden, 0.02)})
        _save(directory, f"model-{name}.safetensors", shards)
    shards.append({"model.norm.weight": torch.ones(hidden).bfloat16()})
    _save(directory, "model-norm.safetensors", shards)
    weight_map = {tensor: file for shard in shards for tensor, file in shard.items()}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = qwen3_config(layers, hidden, neurons, vocabulary)
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory / "tokenizer.json", vocabulary)
    return directory


def _save(directory: Path, name: str, shards: list) -> None:
    """Write the newest shard and keep only where its tensors went."""
    save_file(shards[-1], directory / name)
    shards[-1] = dict.fromkeys(shards[-1], name)


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """A byte-level tokenizer.json as large as Qwen3's: that many pieces, and as many merges."""
    pieces = ["ĠParis", *(f"Ġpiece{number}" for number in range(1, vocabulary - 300))]
    merges = [["Ġpiece", str(number)] for number in range(len(pieces))]
    model = {"type": "BPE", "vocab": {piece: at for at, piece in enumerate(pieces)}, "merges": merges}
    path.write_text(json.dumps({"model": model, "decoder": {"type": "ByteLevel"}, "added_tokens": []}))
