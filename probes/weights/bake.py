"""Gates in an ordinary checkpoint: a masked neuron's rows of gate_proj and up_proj become zero, others are scaled.

1. The checkpoint is copied file by file. Weights that transformers would not load stay behind (other formats, the
   shards of another model, an adapter), for they would still hold the unmasked neurons.
2. A safetensors header says where each tensor's bytes lie, and a row of gate_proj or up_proj (I, H) is one run of them:
   the masked rows are overwritten with zero bytes, which is +0.0 in every float format. A bias of that row too.
   Soft gates scale what up_proj gives, which scales h = act(gate) ∘ up as much: its row and bias times the factor, in
   float32, rounded once to the stored dtype. A factor of 1 leaves a row as it is.
3. Only the text tower counts: other towers and multi-token heads stay as they are. Every other byte of every file is
   the original's. Memory stays at a few rows, however large the model is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from probes.weights.tensors import DTYPES, copied, plain_files, whole
from vindex import targets
from vindex.directory import LocalFiles
from vindex.errors import CheckpointError, PatchError
from vindex.kinds import BAKED
from vindex.places import check_directory, new_directory
from vindex.tower import Tower
from vindex.weights import ADAPTER, WEIGHT_MAP, Weights

TENSOR = re.compile(r"layers\.(\d+)\.mlp\.(gate_proj|up_proj)\.(weight|bias)")
PIECE_ROWS = 1024  # scaled at once
OTHER_WEIGHTS = {".bin", ".pth", ".pt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot"}


class Place(NamedTuple):
    """Where a tensor lies in its file."""

    layer: int
    name: str
    offset: int  # of its first byte in the file
    row_bytes: int
    rows: int
    dtype: str  # as safetensors writes it


def bake(
    checkpoint: Path,
    factors: Tensor,
    target: Path,
    *,
    note: dict[str, Any] | None = None,
    force: bool = False,
    reads: Sequence[Path] = (),
    advance: Callable[[int], object] = lambda count: None,
) -> int:
    """Write a copy of `checkpoint` to `target` in which every neuron's h is multiplied by its factor.

    factors: (L, I); a mask's are 0 and 1, or False and True. Returns how many neurons are zero. `note` goes to
    baked_gates.json; `advance` is told the bytes copied. Raises CheckpointError on a mixture of experts or missing
    weights, PatchError when the factors do not fit or weights that must be scaled are no floats, TargetError when the
    target is taken, or holds the checkpoint or any of `reads`. An interrupted run leaves nothing at `target`.
    """
    factors = factors.float()
    check_directory(target, force=force, reads=[checkpoint, *reads])
    tower = whole(LocalFiles(checkpoint))
    _refuse_mixture(tower, checkpoint)
    places = _places(tower)
    _require_fit([place for found in places.values() for place in found], factors, checkpoint)
    files = [file for file in plain_files(checkpoint) if _belongs(file.name, tower.weights)]
    names, reads = [file.name for file in files], [checkpoint, *files, *reads]
    with new_directory(target, [*names, BAKED], making="baked checkpoint", force=force, reads=reads) as partial:
        for file in files:
            with copied(file, partial / file.name) as copy:
                for place in places.get(file.name, []):
                    _multiply(copy, place, factors[place.layer])
            advance(file.stat().st_size)
        targets.write_json(partial / BAKED, note or {}, indent=True)
    return int((factors == 0).sum())


def _refuse_mixture(tower: Tower, checkpoint: Path) -> None:
    experts = tower.config.get("num_experts") or tower.config.get("num_local_experts")
    if experts:
        raise CheckpointError(
            f"{checkpoint}: mixture of experts ({experts} experts); gates belong to the neurons of dense FFN layers"
        )


def _belongs(name: str, weights: Weights) -> bool:
    """Whether a file is copied: anything but weights that are not the model's, and what goes with them."""
    stale = name == WEIGHT_MAP and weights.listing != WEIGHT_MAP
    other = name.endswith(".safetensors") and name not in weights.files
    left = name in (ADAPTER, BAKED) or PurePath(name).suffix in OTHER_WEIGHTS
    return not (stale or other or left)


def _places(tower: Tower) -> dict[str, list[Place]]:
    """The text tower's gate_proj and up_proj by file."""
    found: dict[str, list[Place]] = {}
    for name, stored in tower.weights.tensors.items():
        match = TENSOR.fullmatch(name.removeprefix(tower.prefix)) if name.startswith(tower.prefix) else None
        if match and stored.shape and stored.shape[0]:
            rows = stored.shape[0]
            place = Place(int(match[1]), name, stored.start, (stored.stop - stored.start) // rows, rows, stored.dtype)
            found.setdefault(stored.file, []).append(place)
    return found


def _require_fit(places: list[Place], factors: Tensor, checkpoint: Path) -> None:
    weights = [place for place in places if place.name.endswith(".weight")]
    layers = max((place.layer for place in weights), default=-1) + 1
    if not layers or len(weights) != 2 * layers:
        raise CheckpointError(
            f"{checkpoint}: {len(weights)} gate_proj and up_proj weights for {layers} layers; expected two for each"
        )
    for place in places:
        if (layers, place.rows) != tuple(factors.shape):
            raise PatchError(
                f"{place.name}: the model has {layers} layers × {place.rows} neurons, the gates are "
                f"{factors.shape[0]} × {factors.shape[1]}; give the model they were trained on"
            )
        if place.dtype not in DTYPES and _is_scaled(place, factors[place.layer]):
            raise PatchError(
                f"{place.name}: stored as {place.dtype}, and soft gates scale only {', '.join(DTYPES)}; "
                "bake a mask, or give the checkpoint in one of these"
            )


def _is_scaled(place: Place, factors: Tensor) -> bool:
    """Whether rows of a tensor are neither left as they are nor zeroed; in gate_proj none is."""
    return ".up_proj." in place.name and bool(((factors != 0) & (factors != 1)).any())


def _multiply(opened: BinaryIO, place: Place, factors: Tensor) -> None:
    """Zero and scale rows of a tensor in its file. factors: (I,)."""
    zeros = bytes(place.row_bytes)
    for row in (factors == 0).nonzero().flatten().tolist():
        opened.seek(place.offset + row * place.row_bytes)
        opened.write(zeros)
    if not _is_scaled(place, factors):
        return
    for first in range(0, place.rows, PIECE_ROWS):
        some, at = factors[first : first + PIECE_ROWS], place.offset + first * place.row_bytes
        opened.seek(at)
        content = bytearray(opened.read(len(some) * place.row_bytes))
        rows = torch.frombuffer(content, dtype=DTYPES[place.dtype]).view(len(some), -1)
        rows.copy_(rows.float() * some[:, None])
        opened.seek(at)
        opened.write(content)
