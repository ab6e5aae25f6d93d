"""The experts of Qwen3-30B-A3B: time for each beside batched torch.linalg.svd, and the memory of a build.

    python -m benchmarks.mixture [--experts 4] [--repeat 2] [--threads 1] [--memory] [--scratch DIR]

Time: 32 directions of gate_proj (768×2048) and of down_proj (2048×768) for each expert, in one run, best of the
repeats. Once with the spectrum of a real gate_proj, once with that of a random matrix, which is as flat as can be and
the worst case for any method that looks for leading directions. `residual` is the largest ‖WᵀWv − σ²v‖/σ² over the 32
directions, in float64. --memory builds checkpoints of these shapes with more and more experts and layers, each in a
process of its own (needs about 5 GB of disk).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.synthetic import real_spectrum, write_tokenizer
from extract.svd import top_directions

HIDDEN, NEURONS, FEATURES = 2048, 768, 32
MEMORY_RUNS = ((1, 16), (1, 64), (2, 64), (1, 128))  # layers, experts
VOCABULARY = 16384

Expert = tuple[torch.Tensor, torch.Tensor]  # gate_proj (I, H) and down_proj (H, I)


def real_looking_experts(count: int) -> torch.Tensor:
    """(count, I, H) bfloat16 values as float32 with a real spectrum and random directions."""
    random = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(count, NEURONS, NEURONS, generator=random))[0]
    right = torch.linalg.qr(torch.randn(count, HIDDEN, NEURONS, generator=random))[0]
    return ((left * real_spectrum(NEURONS)) @ right.mT).bfloat16().float()


def random_experts(count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return (torch.randn(count, NEURONS, HIDDEN, generator=random) * 0.02).bfloat16().float()


def ours(weights: torch.Tensor) -> torch.Tensor:
    """(experts, F, H), one expert at a time as a build takes them; a view of down_proj is what it has, too."""
    return torch.stack([top_directions(weight, FEATURES, 1e-4, "w").rows for weight in weights])


def batched_svd(weights: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svd(weights, full_matrices=False).Vh[:, :FEATURES]


def batched_eigh(weights: torch.Tensor) -> torch.Tensor:
    """The best anyone gets from torch alone: eigenvectors of the Gram matrices of the shorter side, mapped back."""
    vectors = torch.linalg.eigh(weights @ weights.mT).eigenvectors.flip(-1)[..., :FEATURES]
    return torch.nn.functional.normalize(vectors.mT @ weights, dim=-1)


METHODS = {"vindex": ours, "torch.linalg.svd": batched_svd, "torch.linalg.eigh": batched_eigh}


def worst_residual(weights: torch.Tensor, rows: torch.Tensor) -> float:
    exact, directions = weights.double(), rows.double()
    loadings = directions @ exact.mT
    squares = loadings.square().sum(-1, keepdim=True)
    return float(((loadings @ exact - squares * directions).norm(dim=-1) / squares[..., 0]).max())


def best_of(repeat: int, run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    seconds = float("inf")
    for _ in range(repeat):
        started = time.perf_counter()
        rows = run()
        seconds = min(seconds, time.perf_counter() - started)
    return seconds, rows


def time_experts(count: int, repeat: int) -> None:
    print(f"{count} experts of {NEURONS}×{HIDDEN}, {FEATURES} directions, {torch.get_num_threads()} thread(s)")
    print(f"{'spectrum':10}{'side':6}{'method':20}{'ms each':>9}{'× ours':>8}{'residual':>10}")
    for spectrum, make in (("real", real_looking_experts), ("random", random_experts)):
        gate = make(count)
        down_by_neuron = gate.mT.contiguous().mT  # (I, H) views of (H, I) as stored
        for side, weights in (("gate", gate), ("down", down_by_neuron)):
            first = None
            for name, method in METHODS.items():
                seconds, rows = best_of(repeat, lambda method=method, weights=weights: method(weights))
                first = first or seconds
                each, residual = 1000 * seconds / count, worst_residual(weights, rows)
                print(f"{spectrum:10}{side:6}{name:20}{each:9.1f}{seconds / first:8.1f}{residual:10.1e}", flush=True)


def write_checkpoint(directory: Path, layers: int, experts: int) -> Path:
    """A Qwen3-MoE checkpoint of random numbers in the shapes above."""
    random = torch.Generator().manual_seed(0)
    scale = real_spectrum(HIDDEN) / NEURONS**0.5

    def matrix(rows: int, columns: int, scales: torch.Tensor | float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random) * scales).bfloat16()

    ffns = (
        ((matrix(NEURONS, HIDDEN, scale), matrix(HIDDEN, NEURONS, scale[:, None])) for _ in range(experts))
        for _ in range(layers)
    )
    return write_experts(directory, ffns, matrix(VOCABULARY, HIDDEN, 0.02))


def write_experts(directory: Path, ffns: Iterable[Iterable[Expert]], embeddings: torch.Tensor) -> Path:
    """A Qwen3-MoE checkpoint of these experts of each layer, with released names and a shard for each layer."""
    directory.mkdir(parents=True)
    vocabulary, hidden = embeddings.shape
    random, weight_map = torch.Generator().manual_seed(0), {}
    for layer, pairs in enumerate(ffns):
        at, tensors = f"model.layers.{layer}", {}
        for expert, (gate, down) in enumerate(pairs):
            tensors[f"{at}.mlp.experts.{expert}.gate_proj.weight"] = gate
            tensors[f"{at}.mlp.experts.{expert}.down_proj.weight"] = down
        router = torch.randn(len(tensors) // 2, hidden, generator=random) * 0.02
        tensors[f"{at}.mlp.gate.weight"] = router.bfloat16()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        for norm in ("q_norm", "k_norm"):
            tensors[f"{at}.self_attn.{norm}.weight"] = torch.ones(128).bfloat16()
        save_file(tensors, directory / f"model-{layer}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
    others = {"model.embed_tokens.weight": embeddings, "model.norm.weight": torch.ones(hidden)}
    save_file(others, directory / "model-others.safetensors")
    weight_map |= dict.fromkeys(others, "model-others.safetensors")
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": layer + 1,
        "hidden_size": hidden,
        "moe_intermediate_size": len(gate),
        "num_experts": len(router),
        "num_experts_per_tok": min(8, len(router)),
        "vocab_size": vocabulary,
        "num_attention_heads": 32,
        "head_dim": 128,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_tokenizer(directory / "tokenizer.json", vocabulary)
    return directory


def measure_memory(scratch: Path, threads: int) -> None:
    print(f"{'layers':>6}{'experts':>9}{'GB read':>9}{'seconds':>9}{'ms for each expert':>20}{'peak MB':>9}")
    for layers, experts in MEMORY_RUNS:
        name = f"{layers}x{experts}"
        source, target = scratch / name, scratch / f"{name}.vindex"
        if not source.exists():
            write_checkpoint(source, layers, experts)
        command = [sys.executable, "-m", "vindex", "build", str(source), "-o", str(target), "--force"]
        subprocess.run([*command, "--threads", str(threads)], check=True, capture_output=True)
        manifest = json.loads((target / "manifest.json").read_text())
        seconds, peak = manifest["wall_seconds"], manifest["peak_memory_bytes"] / 1e6
        read = sum(file["size"] for file in manifest["source"]["files"]) / 1e9
        each = 1000 * seconds / (layers * experts)
        print(f"{layers:6}{experts:9}{read:9.2f}{seconds:9.1f}{each:20.0f}{peak:9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.memory:
        time_experts(arguments.experts, arguments.repeat)
        return
    with tempfile.TemporaryDirectory() as temporary:
        measure_memory(arguments.scratch or Path(temporary), arguments.threads)


if __name__ == "__main__":
    main()
