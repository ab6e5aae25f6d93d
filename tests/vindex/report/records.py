"""Records of the weights of any vindex, with every part that a report draws; their figures are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vindex.reader import Vindex


def records(v: Vindex) -> dict[str, dict[str, Any]]:
    """By the name of the option that takes them."""
    layers = v.index.num_layers
    model = {"name": "made up", "dtype": "float32", "weights_sha256": v.manifest.source.weights}
    return {
        "probe": {"record": "vindex-probe/1", "definition": "v1", "model": model, **_probe(layers)},
        "gate3": {"record": "vindex-gate3/1", "model": model, **_gate3()},
        "gates": {"record": "vindex-gates-evaluation/1", "model": model, **_gates()},
        "trace": {"record": "vindex-trace/1", "model": model, "vindex": v.id, **_trace(layers)},
    }


def written(v: Vindex, directory: Path, **changed: dict[str, Any]) -> dict[str, Path]:
    """The records as files, those of `changed` in place of ours."""
    paths = {}
    for name, record in (records(v) | changed).items():
        paths[name] = directory / f"{name}.json"
        paths[name].write_text(json.dumps(record))
    return paths


def _probe(layers: int) -> dict[str, Any]:
    one = {"name": "FFN sparsity", "definition": "of |h| < 0.01", "mean": 0.12, "interval": [0.1, 0.15], "n": 8}
    one |= {"over": "texts", "null": 0.01, "per_layer": [0.1 + 0.01 * layer for layer in range(layers)]}
    bare = one | {"interval": None, "null": None, "per_layer": []}
    norms = {"squared_norm": [400.0] * layers}
    return {"constants": {"C1": one, "C2": bare}, "spectra": {"gate_proj": norms, "down_proj": norms}}


def _gate3() -> dict[str, Any]:
    criterion = {"name": "suppression", "relation": ">=", "limit": 0.7, "value": 0.96, "holds": True}
    open_one = criterion | {"name": "other facts", "value": None, "holds": None}
    verdict = {"result": "pass", "reason": "all hold", "criteria": [criterion, open_one]}
    prompt = {"name": "France/capital#0", "before": 0.9, "after": 0.1}
    some = {"prompts": [prompt, prompt | {"after": 0.2}]}
    said = {"question": "The capital is", "before": {"text": " Paris."}, "after": {"text": " unknown."}}
    certificate = {"families": {"few_shot": some}, "four_bit": some, "relearned": some, "texts": [said]}
    method = {"headline": prompt, "sets": {"paraphrases": some}, "certificate": certificate}
    return {
        "fact": {"name": "France/capital", "answer": " Paris"},
        "method": "forward",
        "layer": 1,
        "before": 0.9,
        "after": 0.1,
        "suppression": 0.89,
        "reference_loss": 0.01,
        "verdicts": {"published": verdict, "strict": verdict, "robust": verdict | {"result": "fail"}},
        "methods": {"forward": method},
    }


def _gates() -> dict[str, Any]:
    entry = {"family": "gates", "seed": None, "off_fraction": 0.25, "knowledge_retained": 0.5}
    entry |= {"reasoning_retained": 0.9}
    chance = entry | {"family": "random", "seed": 0, "reasoning_retained": 0.4}
    area = {"value": 0.7, "low": 0.6, "high": 0.8}
    return {
        "gates": "gates",
        "panels": {"source": "facts"},
        "choices": {"scoring": "teacher-forced"},
        "areas": {"gates": area, "random": area | {"value": 0.3}},
        "advantage": 0.4,
        "entries": [entry, entry | {"off_fraction": 0.5, "knowledge_retained": None}, chance],
    }


def _trace(layers: int) -> dict[str, Any]:
    def row(layer: int | None, after: str, place: int) -> dict[str, Any]:
        seen = {"rank": 9 - place, "log_prob": -9.0 + place, "top": " is"}
        patched = {f"{key}_patched": value for key, value in seen.items()} | {"rank_patched": 1_234}
        return {"layer": layer, "after": after, **seen, **patched, "adds": 0.5}

    stages = [(layer, after) for layer in range(layers) for after in ("attention", "FFN")]
    read = {"feature": 1, "z": 4.0, "response": -0.216, "causal": 1.53, "tokens": [" Paris", " Rome"]}
    write = {"feature": 2, "what": "direction", "adds": 0.3, "tokens": [" Paris"], "causal": None}
    rest = write | {"feature": None, "what": "outside the directions", "tokens": []}
    shares = {"read_share": 0.2, "write_share": 0.3, "adds_inside": 0.3, "adds_outside": 0.1, "usual_z": 4.9}
    check = {"side": "writes", "layer": 0, "feature": 2, "read": None, "written": 0.71, "causal": 0.646}
    return {
        "prompt": "The capital of France is",
        "against": None,
        "patch": "paris.safetensors",
        "fate": {"dies": 2, "later": [], "words": "The answer dies at 0 FFN."},
        "sums": {"logit": 4e-7, "stages": 5e-8},
        "generic": {"texts": ["story"], "tokens": 384},
        "chance": 0.25,
        "tokens": [{"piece": "The", "position": 0, "sink": True}, {"piece": " is", "position": 1, "sink": False}],
        "position": 1,
        "target": {"id": 7, "piece": " Paris"},
        "trajectory": [row(None, "embeddings", 0), *(row(*stage, at + 1) for at, stage in enumerate(stages))],
        "layers": [{"layer": layer, **shares} for layer in range(layers)],
        "reads": [[read]] * layers,
        "writes": [[write, rest]] * layers,
        "checks": [check | {"log_prob": 0.008, "tokens": [" Paris"]}],
    }
