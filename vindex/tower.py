"""The text tower of a checkpoint: what its tensors' names begin with, and whether every layer has all of them.

Other towers, adapters and multi-token heads may stand beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vindex.errors import CheckpointError
from vindex.model_config import towers
from vindex.weights import Readable, Weights, read_checkpoint

LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,8})\.(.+)")
TOWERS = {  # prefix of the text tower's tensors: the head that goes with it
    "model.language_model.": "lm_head.weight",
    "language_model.model.": "language_model.lm_head.weight",
    "thinker.model.": "thinker.lm_head.weight",
    "model.": "lm_head.weight",
    "language_model.": "lm_head.weight",
    "": "lm_head.weight",
}
PLAIN = ("model.", "")  # prefixes of a model that is nothing but its text tower
WRAPPERS = {  # what a training framework puts before every name: what it is
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DDP",
    "base_model.model.": "PEFT",
    "_fsdp_wrapped_module.": "FSDP",
}


class Tower(NamedTuple):
    """A checkpoint and its text tower."""

    config: dict[str, Any]
    """All of config.json."""
    weights: Weights
    prefix: str
    """What the names of the tower's tensors begin with."""
    layers: dict[int, set[str]]
    """{layer: names of its tensors, after `layers.N.`}."""


def read_tower(files: Readable) -> Tower:
    """A checkpoint in which every layer that its config counts is stored; headers are read and nothing else.

    Raises CheckpointError when it is damaged, only an adapter, has no text tower, or lacks a layer.
    """
    config, weights = read_checkpoint(files)
    prefix = text_prefix(weights.tensors, config, files.name)
    found = stored_layers(weights.tensors, prefix)
    count = towers(config)[-1].get("num_hidden_layers") or 0
    lost = next((layer for layer in range(count) if layer not in found), None)
    if lost is not None:
        raise CheckpointError(
            f"{files.name}: config.json says {count} layers, and no tensor of {prefix}layers.{lost} is stored; "
            "the checkpoint is incomplete"
        )
    return Tower(config, weights, prefix, found)


def stored_layers(tensors: Iterable[str], prefix: str) -> dict[int, set[str]]:
    """{layer: names of its tensors, after `layers.N.`} of the text tower with this prefix."""
    found: dict[int, set[str]] = {}
    for name in tensors:
        match = LAYER.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match:
            found.setdefault(int(match[1]), set()).add(match[2])
    return found


def text_prefix(tensors: Iterable[str], config: Mapping[str, Any], where: str) -> str:
    """What the names of the text tower's tensors begin with. Raises CheckpointError when there is no such tower.

    Where several would do, transformers loads the plain one for a config without a nested tower, else the nested one.
    """
    known, nested = set(tensors), len(towers(config)) > 1
    for prefix, head in sorted(TOWERS.items(), key=lambda tower: not nested and tower[0] not in PLAIN):
        if f"{prefix}embed_tokens.weight" in known or (head in known and f"{prefix}norm.weight" in known):
            return prefix
    for wrapper, what in WRAPPERS.items():
        if any(f".{wrapper}" in f".{name}" for name in known):
            raise CheckpointError(
                f"{where}: the tensors' names hold {wrapper!r}, which {what} puts there; "
                "save the model it wraps, or take it off the names"
            )
    names = ", ".join(f"{prefix}embed_tokens.weight" for prefix in TOWERS)
    raise CheckpointError(f"{where}: no token embeddings; expected one of {names}; it may be incomplete")


def require_equal_layers(tower: Tower, where: str) -> None:
    """Raise CheckpointError when a layer lacks a tensor that the others of its kind have.

    Hybrids have layers of several kinds: with linear or full attention, with experts or dense.
    """
    kinds: dict[tuple[bool, bool], dict[int, set[str]]] = {}
    for layer, names in tower.layers.items():
        kind = any(name.startswith("linear_attn.") for name in names), any("experts." in name for name in names)
        kinds.setdefault(kind, {})[layer] = names
    for layers in kinds.values():
        every = set().union(*layers.values())
        for layer, names in layers.items():
            if lost := sorted(every - names):
                raise CheckpointError(
                    f"{where}: {tower.prefix}layers.{layer}.{lost[0]} is not stored, and other layers have theirs; "
                    "the checkpoint is incomplete"
                )
