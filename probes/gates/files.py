"""Gates on disk, in the layout of the published checkpoints.

    lambda_logits.pt           state dict, keys ending in layers.<i>.mlp.lambda_logits, float32 (I,)
    lambda_logits.safetensors  the same tensors
    neuron_indices.json        {"layer": [neuron, …]}: the neurons with λ below 0.5
    gate_stats.json            number, mean, standard deviation, extremes, the five thresholds (see stats.py)
    selected_thresholds.txt    the five thresholds, comma-separated; thresholds.txt is read too

Keys may have any prefix (DDP's `module.` among them). Nothing but tensors is ever unpickled.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import save
from torch import Tensor

from probes.gates.masks import (
    DIGITS,
    INDICES_THRESHOLD,
    indices_of,
    keep_from_indices,
    kept,
    point,
    selected_thresholds,
)
from probes.weights.tensor_file import read_tensors
from vindex import kinds, targets
from vindex.errors import PatchError
from vindex.files import Kind, opened, read_text
from vindex.files import read_json as read_any_json
from vindex.format import MOST_LAYERS, MOST_NEURONS
from vindex.kinds import GATE_FILES, TRAINED_GATES

LOGITS_PT, LOGITS_SAFETENSORS, INDICES, STATS, _ = GATE_FILES
THRESHOLDS = (GATE_FILES[-1], "thresholds.txt")  # the first is written
PUBLISHED_PREFIX = "model.module.model."
KEY = re.compile(r"(?:.*\.)?layers\.(0|[1-9][0-9]{0,4})\.mlp\.lambda_logits")
LAYER = re.compile(r"0|[1-9][0-9]{0,4}")
MOST_THRESHOLDS = 100
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MADE = (*TRAINED_GATES, kinds.Kind("gates", GATE_FILES, TRAINED_GATES[0].files))  # what --force replaces
OF_LOGITS = Kind(PatchError, "download it again", limit=1 << 28)
OF_TEXTS = Kind(PatchError, "download it again")


def read_logits(path: Path) -> Tensor:
    """The logits (L, I) float32 in a directory of the published layout, or in one .pt or .safetensors file.

    Raises PatchError when there are none, or when a directory's two files differ.
    """
    if not os.path.isdir(path):
        return _assemble(_read_tensors(path), path.name)
    found = [path / name for name in (LOGITS_SAFETENSORS, LOGITS_PT) if os.path.lexists(path / name)]
    if not found:
        raise PatchError(f"{path}: neither {LOGITS_PT} nor {LOGITS_SAFETENSORS} here; expected a directory of gates")
    logits, *others = (_assemble(_read_tensors(file), file.name) for file in found)
    if any(not torch.equal(logits, other) for other in others):
        raise PatchError(f"{path}: {LOGITS_PT} and {LOGITS_SAFETENSORS} differ; remove the one that is out of date")
    return logits


def write_logits(logits: Tensor, directory: Path, *, prefix: str = PUBLISHED_PREFIX) -> None:
    """Write every file of the layout. Each is complete when it appears; the logits come last."""
    state = {f"{prefix}layers.{number}.mlp.lambda_logits": row.clone() for number, row in enumerate(logits)}
    pickled, values = io.BytesIO(), torch.sigmoid(logits)
    torch.save(state, pickled)
    indices = {str(layer): neurons for layer, neurons in indices_of(kept(values, INDICES_THRESHOLD)).items()}
    payloads = {
        STATS: orjson.dumps(summary(values), option=orjson.OPT_INDENT_2),
        INDICES: orjson.dumps(indices),
        THRESHOLDS[0]: (",".join(map(str, selected_thresholds(values))) + "\n").encode(),
        LOGITS_SAFETENSORS: save(state),
        LOGITS_PT: pickled.getvalue(),
    }
    with targets.explained(directory):
        targets.make_directory(directory)
    for name, payload in payloads.items():
        targets.write_bytes(directory / name, payload)


def summary(values: Tensor) -> dict[str, Any]:
    """The contents of gate_stats.json as this project writes it, of λ (L, I)."""
    rows, width = values.shape
    points = [point(values, threshold) for threshold in selected_thresholds(values)]
    return {
        "total_gates": values.numel(),
        "num_layers": rows,
        "neurons_per_layer": width,
        "mean": round(float(values.double().mean()), DIGITS),
        "std": round(float(values.double().std(correction=0)), DIGITS),
        "min": round(float(values.min()), DIGITS),
        "max": round(float(values.max()), DIGITS),
        "direction": "below",  # a neuron is off, and listed in neuron_indices.json, when its λ is below the threshold
        "neuron_indices_threshold": INDICES_THRESHOLD,
        "selected_thresholds": [p._replace(off_fraction=round(p.off_fraction, DIGITS))._asdict() for p in points],
    }


def read_indices(directory: Path, shape: tuple[int, int]) -> Tensor:
    """The mask (L, I) bool that neuron_indices.json describes: False at the neurons it lists.

    Raises PatchError when it is missing or does not fit `shape`.
    """
    path = directory / INDICES if os.path.isdir(directory) else directory
    record = read_json(path)
    if not isinstance(record, dict):
        raise PatchError(f'{path}: expected {{"layer": [neuron, …]}}, found a {type(record).__name__}')
    for layer, neurons in record.items():
        if layer != "direction" and not (LAYER.fullmatch(layer) and _are_neurons(neurons)):
            raise PatchError(
                f'{path}: layer {layer[:40]!r}: expected {{"layer": [neuron, …]}}, whole numbers, each neuron once, '
                f"found {str(neurons)[:60]}"
            )
    return keep_from_indices({int(key): neurons for key, neurons in record.items() if key != "direction"}, shape)


def _are_neurons(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value) and len(set(value)) == len(value)


def read_thresholds(directory: Path) -> tuple[float, ...] | None:
    """The comma-separated thresholds under either file name, or None where there is no such file."""
    for name in THRESHOLDS:
        path = directory / name
        if os.path.lexists(path):
            found = [value for value in re.split(r"[,\s]+", read_text(path, OF_TEXTS).strip()) if value]
            return _thresholds(path, found)
    return None


def _thresholds(path: Path, found: list[str]) -> tuple[float, ...]:
    if len(found) > MOST_THRESHOLDS:
        raise PatchError(f"{path}: expected at most {MOST_THRESHOLDS} thresholds, found {len(found):,}")
    try:
        values = tuple(float(value) for value in found)
    except ValueError as error:
        raise PatchError(f"{path}: expected comma-separated numbers ({str(error)[:80]})") from error
    wrong = [value for value in values if not 0 < value < 1]
    if wrong:
        raise PatchError(f"{path}: threshold {wrong[0]:g}: expected a λ between 0 and 1, both excluded")
    return values


def read_json(path: Path) -> Any:
    """The value in a JSON file of a directory of gates or of a checkpoint. Raises PatchError."""
    return read_any_json(path, OF_TEXTS)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not os.path.lexists(path):
        raise PatchError(f"{path}: no such file or directory; expected a directory of gates, or a .pt or .safetensors")
    state = read_tensors(path, OF_LOGITS).tensors if path.suffix == ".safetensors" else _from_pickle(path)
    if not isinstance(state, dict):
        raise PatchError(f"{path}: holds a {type(state).__name__}; expected a state dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise PatchError(f"{path}: {str(name)[:80]!r} is a {type(value).__name__}; expected tensors only")
    return state


def _from_pickle(path: Path) -> Any:
    """What a .pt holds: nothing but tensors is unpickled, and nothing becomes more than it is on disk."""
    with opened(path, OF_LOGITS) as file:
        try:
            if zipfile.is_zipfile(file) and any(entry.compress_type for entry in zipfile.ZipFile(file).infolist()):
                raise PatchError(f"{path}: is compressed, which torch.save never does; refused")
            file.seek(0)
            with warnings.catch_warnings(action="ignore"):  # of pickle protocols; the errors below say more
                return torch.load(file, map_location="cpu", weights_only=True)
        except PatchError:
            raise
        except pickle.UnpicklingError as error:
            raise PatchError(
                f"{path}: damaged, or holds something that is not a tensor; refused, since loading it could run code"
            ) from error
        except Exception as error:  # whatever a damaged pickle makes torch do
            raise OF_LOGITS.refusal(path, "damaged or not a PyTorch file") from error


def _assemble(state: dict[str, Tensor], where: str) -> Tensor:
    """Rows by layer number, all present, all of one width."""
    rows: dict[int, Tensor] = {}
    for name, value in state.items():
        match = KEY.fullmatch(name)
        if not match:
            raise PatchError(f"{where}: key {name[:80]!r}; expected only keys ending in layers.<i>.mlp.lambda_logits")
        number = int(match[1])
        if number in rows:
            raise PatchError(f"{where}: two keys for layer {number}, the second {name[:80]!r}")
        rows[number] = _row(value, f"{where}: {name[:80]}")
    if not rows:
        raise PatchError(f"{where}: no tensors; expected keys ending in layers.<i>.mlp.lambda_logits")
    if max(rows) >= MOST_LAYERS:
        raise PatchError(f"{where}: a key for layer {max(rows)}; expected fewer than {MOST_LAYERS} layers")
    missing = next((number for number in range(max(rows)) if number not in rows), None)
    if missing is not None:
        raise PatchError(f"{where}: layer {missing} is missing of 0 to {max(rows)}; the file is incomplete")
    widths = {number: len(row) for number, row in rows.items()}
    for number, width in sorted(widths.items()):
        if width != widths[0]:
            raise PatchError(f"{where}: layer {number} has {width} neurons, layer 0 {widths[0]}")
    return torch.stack([rows[number] for number in range(len(rows))])


def _row(value: Tensor, name: str) -> Tensor:
    """One layer's logits as float32 of their own: plain numbers, all of which lie in the file."""
    plain = value.layout is torch.strided and not value.is_meta and not value.is_quantized
    if not plain or value.dtype not in FLOATS or value.numel() != max(value.shape, default=0):
        kind = f"{value.dtype} {tuple(value.shape)}" + ("" if plain else ", sparse, quantised or without numbers")
        raise PatchError(f"{name} is {kind}; expected one float per neuron")
    if not 1 <= value.numel() <= MOST_NEURONS or value.untyped_storage().nbytes() < value.nbytes:
        raise PatchError(
            f"{name} has shape {tuple(value.shape)} and fewer numbers in the file; expected one per neuron"
        )
    return value.detach().flatten().float()
