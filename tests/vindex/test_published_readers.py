"""What others wrote to read a vindex reads ours: the published card's code, and the rules of LARQL's loader."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vindex
from extract.families import FAMILIES, MIXTURES
from tests.checkpoints import write_checkpoint, write_mixture
from tests.conftest import build_quietly

PUBLISHED = Path(__file__).with_name("published_how_to_use.txt").read_text()


def run_published(directory: Path, token_id: int) -> str:
    code = PUBLISHED.replace("path/to/downloaded/vindex", str(directory)).replace("12379", str(token_id))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_published_code_runs_unchanged_and_agrees_with_score(built):
    v = vindex.open(built)
    best = v.top_features(" Paris", k=1)[0]
    said = run_published(built, v.token_id(" Paris"))
    assert said == f"Top feature: layer={best.layer}, feature={best.feature}, score={best.cosine:.4f}"


def test_the_card_carries_the_published_code_and_it_runs(built):
    code = (built / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/downloaded/vindex", str(built))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    token_id = vindex.open(built).token_id(" Paris")
    assert done.stdout.strip() == run_published(built, token_id)


def load_like_larql(directory: Path) -> dict:
    """LARQL's V2 loader at its `browse` level, transcribed from docs/format.md without this project's code."""
    index = json.loads((directory / "index.json").read_text())
    assert index["version"] == 2 and index["extract_level"] == "browse" and index["dtype"] == "f16"
    assert index["has_model_weights"] is False and index["quant"] == "none"
    hidden, gate_file = index["hidden_size"], (directory / "gate_vectors.bin").read_bytes()
    gate = []
    for at, layer in enumerate(index["layers"]):
        assert layer["layer"] == at and layer["length"] == layer["num_features"] * hidden * 2
        block = gate_file[layer["offset"] : layer["offset"] + layer["length"]]
        gate.append(np.frombuffer(block, "<f2").reshape(layer["num_features"], hidden))
    embeddings = (directory / "embeddings.bin").read_bytes()
    assert len(embeddings) == index["vocab_size"] * hidden * 2
    for name, digest in index["checksums"].items():
        assert (directory / name).is_file() and len(digest) == 64 and digest == digest.lower()
    return {"index": index, "gate": gate, "meta": load_meta(directory / "down_meta.bin", index)}


def load_meta(path: Path, index: dict) -> list[list[tuple[int, float, list[tuple[int, float]]]]]:
    data, at = path.read_bytes(), 16
    magic, version, layers, top_k = struct.unpack_from("<4I", data)
    assert (magic, version, layers, top_k) == (0x444D4554, 1, index["num_layers"], index["down_top_k"])
    found = []
    for _ in range(layers):
        (count,) = struct.unpack_from("<I", data, at)
        at += 4
        features = []
        for _ in range(count):
            top_id, top_score = struct.unpack_from("<If", data, at)
            tokens = list(struct.iter_unpack("<If", data[at + 8 : at + 8 + 8 * top_k]))
            features.append((top_id, top_score, tokens))
            at += 8 + 8 * top_k
        found.append(features)
    assert at == len(data)
    return found


def test_larqls_loader_rules_hold(built):
    loaded, v = load_like_larql(built), vindex.open(built)
    np.testing.assert_array_equal(np.stack(loaded["gate"]), v.gate)
    for layer, feature in ((0, 0), (1, 5)):
        top_id, top_score, tokens = loaded["meta"][layer][feature]
        found = v.feature(layer, feature)
        assert [(t.token_id, t.score) for t in found.writes + found.writes_against] == tokens
        assert (top_id, top_score) == tokens[0]


# The fields of LARQL's Rust structs and their types: usize is a whole number, f64 any number, Option may be null.
USIZE, F64, STRING = (int,), (int, float), (str,)
OPTION = (str, type(None))
STRUCTS = {
    "": {
        **dict.fromkeys(
            ("version", "num_layers", "hidden_size", "intermediate_size", "vocab_size", "down_top_k"), USIZE
        ),
        **dict.fromkeys(("model", "family", "extract_level", "dtype", "quant"), STRING),
        "embed_scale": F64,
        "has_model_weights": (bool,),
    },
    "source": {
        **dict.fromkeys(("huggingface_repo", "huggingface_revision", "safetensors_sha256"), OPTION),
        **dict.fromkeys(("extracted_at", "larql_version"), STRING),
    },
    "model_config": {
        "model_type": STRING,
        **dict.fromkeys(("head_dim", "num_q_heads", "num_kv_heads"), USIZE),
        "rope_base": F64,
    },
    "moe": {"num_experts": USIZE, "top_k": USIZE, "shared_expert": (bool,), "router_type": STRING},
}
LAYER = dict.fromkeys(("layer", "num_features", "offset", "length"), USIZE)


def read_as_larql(index: dict) -> None:
    """Fail where serde would: at a field that is missing or of another type."""
    parts = {"": index, "source": index["source"], "model_config": index["model_config"]}
    parts |= {"moe": moe} if (moe := index["model_config"].get("moe")) else {}
    for name, part in parts.items():
        for key, types in STRUCTS[name].items():
            assert type(part[key]) in types, f"{name}.{key}: {part[key]!r}"
    for layer in index["layers"]:
        assert all(type(layer[key]) in types for key, types in LAYER.items()), layer
        assert all(type(layer.get(key, 0)) is int for key in ("num_experts", "num_features_per_expert")), layer
    assert all(type(digest) is str for digest in index["checksums"].values())


LEFT_OUT = ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "num_experts_per_tok")


def write_without(write, directory: Path, model_type: str) -> Path:
    """A checkpoint whose config.json leaves to the family what it may."""
    source = write(directory, model_type=model_type)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in LEFT_OUT}))
    return source


def test_larql_finds_the_types_it_takes(built, built_mixture):
    for directory in (built, built_mixture):
        read_as_larql(json.loads((directory / "index.json").read_text()))


@pytest.mark.parametrize("family", FAMILIES)
def test_larql_finds_them_where_config_json_leaves_them_out(tmp_path, family):
    write = write_mixture if family in MIXTURES else write_checkpoint
    build_quietly(write_without(write, tmp_path / "m", family), tmp_path / "v", features=4)
    index = json.loads((tmp_path / "v" / "index.json").read_text())
    read_as_larql(index)
    assert index["source"]["larql_version"] == f"vindex {vindex.__version__}"
    assert vindex.open(tmp_path / "v").index.model_config["rope_base"] >= 10_000
