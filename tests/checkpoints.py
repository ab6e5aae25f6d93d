"""Small checkpoints written by hand in the layouts that released models have on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = [" Paris", " Berlin", "Paris", " France", "ä", "\n", "a", " the"]


def write_checkpoint(
    directory: Path,
    *,
    model_type: str = "qwen3",
    layers: int = 2,
    hidden: int = 16,
    neurons: int = 24,
    vocabulary: int = 40,
    tied: bool = True,
    head: bool | None = None,
    prefix: str = "model.",
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    edit=None,
    config: dict | None = None,
) -> Path:
    """Write a random checkpoint. `edit(tensors)` may change the {name: tensor} dict before it is saved."""
    directory.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        scale = torch.linspace(2.0, 0.1, columns)
        return (torch.randn(rows, columns, generator=random) * scale).to(dtype)

    tensors = {f"{prefix}embed_tokens.weight": matrix(vocabulary, hidden)}
    for layer in range(layers):
        at = f"{prefix}layers.{layer}"
        tensors[f"{at}.mlp.gate_proj.weight"] = matrix(neurons, hidden)
        tensors[f"{at}.mlp.up_proj.weight"] = matrix(neurons, hidden)
        tensors[f"{at}.mlp.down_proj.weight"] = matrix(hidden, neurons)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.rand(hidden, generator=random).to(dtype)
        if model_type.startswith("qwen3"):
            for norm in ("q_norm", "k_norm"):
                tensors[f"{at}.self_attn.{norm}.weight"] = torch.rand(8, generator=random).to(dtype)
    tensors[f"{prefix}norm.weight"] = (torch.rand(hidden, generator=random) + 0.5).to(dtype)
    if head if head is not None else not tied:
        tensors["lm_head.weight"] = matrix(vocabulary, hidden)
    if edit:
        edit(tensors)
    _save(directory, tensors, shards)
    settings = {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "vocab_size": vocabulary,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
    }
    (directory / "config.json").write_text(json.dumps(settings | (config or {})))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocabulary - 4)))
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A test model\n")
    return directory


def tokenizer_json(size: int) -> dict:
    """A byte-level tokenizer with `size` pieces, the first ones being WORDS in the byte-level spelling."""
    spelling = {" ": "Ġ", "\n": "Ċ", "ä": "Ã¤"}
    pieces = ["".join(spelling.get(character, character) for character in word) for word in WORDS]
    pieces += [f"piece{number}" for number in range(size - len(pieces) - 1)]
    special = {"id": size - 1, "content": "<|end|>", "special": True}
    return {
        "added_tokens": [special],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {piece: at for at, piece in enumerate(pieces)}, "merges": []},
    }


def _save(directory: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    names = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    weight_map = {tensor: names[at % shards] for at, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: tensors[t] for t, shard in weight_map.items() if shard == name}, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_mixture(
    directory: Path,
    *,
    model_type: str = "qwen3_next",
    experts: int = 3,
    expert_neurons: int = 12,
    shared_neurons: int = 10,
    dense_layers: tuple[int, ...] = (0,),
    names: str = "separate",
    layers: int = 3,
    prefix: str = "model.",
    edit=None,
    **options,
) -> Path:
    """Write a random mixture of experts; layers not in dense_layers have experts, and a shared one if it has neurons.

    names: "separate" as in released Qwen3-MoE, "fused" as in Qwen3.5-MoE, "swapped" as in Qwen3-VL-MoE, or "stacked",
    fused without up_proj. The numbers are the same in all of them.
    """
    hidden = options.get("hidden", 16)
    random = torch.Generator().manual_seed(options.get("seed", 0) + 1)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random) * torch.linspace(2.0, 0.1, columns)).bfloat16()

    def with_experts(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(layers):
            at = f"{prefix}layers.{layer}.mlp"
            if layer in dense_layers:
                continue
            for side in ("gate", "up", "down"):
                del tensors[f"{at}.{side}_proj.weight"]
            tensors[f"{at}.gate.weight"] = matrix(experts, hidden)
            gate, up = ([matrix(expert_neurons, hidden) for _ in range(experts)] for _ in range(2))
            down = [matrix(hidden, expert_neurons) for _ in range(experts)]
            tensors |= expert_tensors(f"{at}.experts", gate, up, down, names)
            if shared_neurons:
                tensors[f"{at}.shared_expert.gate_proj.weight"] = matrix(shared_neurons, hidden)
                tensors[f"{at}.shared_expert.up_proj.weight"] = matrix(shared_neurons, hidden)
                tensors[f"{at}.shared_expert.down_proj.weight"] = matrix(hidden, shared_neurons)
                tensors[f"{at}.shared_expert_gate.weight"] = matrix(1, hidden)
        if edit:
            edit(tensors)

    config = {
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": expert_neurons,
        "mlp_only_layers": list(dense_layers),
        "decoder_sparse_step": 1,
    } | ({"shared_expert_intermediate_size": shared_neurons} if shared_neurons else {})
    options["config"] = config | options.pop("config", {})
    return write_checkpoint(
        directory, model_type=model_type, layers=layers, prefix=prefix, edit=with_experts, **options
    )


def expert_tensors(at: str, gate: list, up: list, down: list, names: str) -> dict[str, torch.Tensor]:
    """One layer's experts under one of the kinds of name that checkpoints have."""
    if names == "separate":
        sides = {"gate": gate, "up": up, "down": down}
        return {f"{at}.{e}.{side}_proj.weight": of[e] for side, of in sides.items() for e in range(len(gate))}
    if names == "stacked":
        return {f"{at}.{side}_proj": torch.stack(of) for side, of in (("gate", gate), ("up", up), ("down", down))}
    gate_up = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
    fused = {f"{at}.gate_up_proj": gate_up, f"{at}.down_proj": torch.stack(down)}
    return {name: each.mT.contiguous() for name, each in fused.items()} if names == "swapped" else fused


def nest(directory: Path, model_type: str, *keys: str, **outer) -> Path:
    """Move a checkpoint's config under keys, as vision-language (text_config) and omni checkpoints have it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["model_type"] += "_text"
    for key in reversed(keys):
        config = {key: config}
    path.write_text(json.dumps({"model_type": model_type} | config | outer))
    return directory
