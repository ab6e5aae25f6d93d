"""Tiny mixtures of experts, made by transformers from a config and a seed, with the atlas's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig, Qwen3NextConfig

ATLAS = Path(__file__).parent.parent.parent / "vindex" / "demo" / "atlas"
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
}
SHARED = {"shared_expert_intermediate_size": 24}
CONFIGS = {
    "qwen3_moe": lambda **more: Qwen3MoeConfig(**SIZES | more),
    "mixed": lambda **more: Qwen3MoeConfig(**SIZES | {"mlp_only_layers": [1]} | more),
    "qwen2_moe": lambda **more: Qwen2MoeConfig(**SIZES | SHARED | more),
    "qwen3_next": lambda **more: Qwen3NextConfig(
        **SIZES | SHARED | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"]} | more
    ),
}  # fmt: skip


def make(kind: str, experts: str = "eager", **more: Any) -> PreTrainedModel:
    """A seeded model in float32 and evaluation mode, whose weights are large enough for its routers to choose."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**more), experts_implementation=experts).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    return model.requires_grad_(False)


def save(kind: str, directory: Path) -> Path:
    """A checkpoint directory with a tokenizer."""
    make(kind).save_pretrained(directory)
    AutoTokenizer.from_pretrained(ATLAS).save_pretrained(directory)
    return directory
