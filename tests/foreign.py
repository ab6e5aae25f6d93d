"""Vindexes as others publish them, of weights that the caller has: one function for each family."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

ATLAS_TOKENIZER = Path(__file__).parent.parent / "vindex" / "demo" / "atlas" / "tokenizer.json"
TOP_K = 3
LAYERS, FEATURES, HIDDEN, TOKENS, NEURONS, EXPERTS = 3, 6, 16, 2000, 24, 4
"""Sizes of the directories that tests/vindex/conftest.py makes."""


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    """Seeded float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def leading(weight: np.ndarray, features: int) -> np.ndarray:
    """(features, H): the leading right singular vectors of (I, H)."""
    return np.linalg.svd(weight, full_matrices=False)[2][:features]


def write_published(
    directory: Path, gate: np.ndarray, down: np.ndarray, embeddings: np.ndarray, *, sums: bool = True, **more: Any
) -> Path:
    """The published dense form. gate, down: (L, F, H). embeddings: (V, H). more: further keys of index.json."""
    directory.mkdir()
    layers, features, hidden = gate.shape
    sizes = {"num_layers": layers, "num_feats": features, "hidden_size": hidden, "vocab_size": len(embeddings)}
    (directory / "index.json").write_text(json.dumps(sizes | more))
    for name, array in (("gate_vectors", gate), ("down_features", down), ("embeddings", embeddings)):
        array.astype(np.float16).tofile(directory / f"{name}.bin")
    np.ones(layers * hidden, np.float16).tofile(directory / "norms.bin")
    (directory / "down_meta.bin").write_bytes(b"[[some other layout]]")
    if sums:
        write_sums(directory)
    return directory


def write_sums(directory: Path) -> None:
    """SHA256SUMS of all files, as `sha256sum *` writes it."""
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(directory.iterdir())]
    (directory / "SHA256SUMS").write_text("".join(lines))


def write_summary(directory: Path, experts: dict[int, np.ndarray], dtype: str = "<f4") -> Path:
    """A research summary of a mixture. experts: (E, F, H) of each layer that is in it."""
    directory.mkdir()
    entries, offset = {}, 0
    with open(directory / "gate_vectors.bin", "wb") as file:
        for layer, frames in sorted(experts.items()):
            content = frames.astype(dtype).tobytes()
            shares = {"median_var64": 0.05 + layer / 100, "q25_var64": 0.04, "q75_var64": 0.2}
            entries[str(layer)] = {"file_offset": offset, "shape": list(frames.shape), **shares}
            offset += file.write(content)
    count, features, hidden = next(iter(experts.values())).shape
    index = {"num_feats": features, "layers": entries}
    index["model_config"] = {"moe": {"n_routed_experts": count, "hidden_size": hidden}}
    (directory / "gate_vectors_index.json").write_text(json.dumps(index))
    return directory


def write_browse(directory: Path, gate: list[np.ndarray], embeddings: np.ndarray, dtype: str = "f32") -> Path:
    """LARQL's browse level. gate: (I, H) of each layer. A neuron writes the tokens of its own number and the next two.

    The last neuron of each layer is a free place. The tokenizer is that of the atlas.
    """
    directory.mkdir()
    width, layers, offset = (2 if dtype == "f16" else 4), [], 0
    meta = bytearray(struct.pack("<4I", 0x444D4554, 1, len(gate), TOP_K))
    for layer, rows in enumerate(gate):
        layers.append({"layer": layer, "num_features": len(rows), "offset": offset, "length": rows.size * width})
        offset += rows.size * width
        meta += struct.pack("<I", len(rows))
        for neuron in range(len(rows) - 1):
            tokens = [(neuron + place, 9.0 - place) for place in range(TOP_K)]
            meta += struct.pack("<If", *tokens[0]) + b"".join(struct.pack("<If", *token) for token in tokens)
        meta += bytes(8 + 8 * TOP_K)
    index = {
        "version": 2,
        "model": "test/browse",
        "family": "qwen3",
        "num_layers": len(gate),
        "hidden_size": embeddings.shape[1],
        "intermediate_size": len(gate[0]),
        "vocab_size": len(embeddings),
        "embed_scale": 1.0,
        "extract_level": "browse",
        "dtype": dtype,
        "layers": layers,
        "down_top_k": TOP_K,
        "has_model_weights": False,
    }
    (directory / "index.json").write_text(json.dumps(index))
    np.concatenate(gate).astype(f"<f{width}").tofile(directory / "gate_vectors.bin")
    embeddings.astype(f"<f{width}").tofile(directory / "embeddings.bin")
    (directory / "down_meta.bin").write_bytes(bytes(meta))
    shutil.copy(ATLAS_TOKENIZER, directory / "tokenizer.json")
    return directory
