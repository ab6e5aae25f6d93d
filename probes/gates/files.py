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
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor

from probes.gates.masks import DIGITS, INDICES_THRESHOLD, Gates, indices_of, keep_from_indices, point
from vindex import targets
from vindex.errors import PatchError
from vindex.targets import GATE_FILES

LOGITS_PT, LOGITS_SAFETENSORS, INDICES, STATS, _ = GATE_FILES
THRESHOLDS = (GATE_FILES[-1], "thresholds.txt")  # the first is written
PUBLISHED_PREFIX = "model.module.model."
KEY = re.compile(r"(?:^|.*\.)layers\.(\d+)\.mlp\.lambda_logits$")


def read_gates(path: Path) -> Gates:
    """The gates in a directory of the published layout, or in one .pt or .safetensors file.

    Raises PatchError when there are none, or when a directory's two files differ, NumericError when one is not finite.
    """
    if not path.is_dir():
        return _assemble(_read_tensors(path), path.name)
    found = [path / name for name in (LOGITS_SAFETENSORS, LOGITS_PT) if (path / name).is_file()]
    if not found:
        raise PatchError(f"{path}: neither {LOGITS_PT} nor {LOGITS_SAFETENSORS} here; expected a directory of gates")
    gates, *others = (_assemble(_read_tensors(file), file.name) for file in found)
    if any(not torch.equal(gates.logits, other.logits) for other in others):
        raise PatchError(f"{path}: {LOGITS_PT} and {LOGITS_SAFETENSORS} differ; remove the one that is out of date")
    return gates


def write_gates(gates: Gates, directory: Path, *, prefix: str = PUBLISHED_PREFIX) -> None:
    """Write every file of the layout. Each is complete when it appears; the logits come last."""
    state = {f"{prefix}layers.{number}.mlp.lambda_logits": row.clone() for number, row in enumerate(gates.logits)}
    pickled = io.BytesIO()
    torch.save(state, pickled)
    indices = {str(layer): neurons for layer, neurons in indices_of(gates.keep(INDICES_THRESHOLD)).items()}
    payloads = {
        STATS: orjson.dumps(summary(gates), option=orjson.OPT_INDENT_2),
        INDICES: orjson.dumps(indices),
        THRESHOLDS[0]: (",".join(map(str, gates.selected_thresholds())) + "\n").encode(),
        LOGITS_SAFETENSORS: _safetensors(state),
        LOGITS_PT: pickled.getvalue(),
    }
    with targets.explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for name, payload in payloads.items():
        targets.write_bytes(directory / name, payload)


def summary(gates: Gates) -> dict[str, Any]:
    """The contents of gate_stats.json as this project writes it."""
    values = gates.values
    rows, width = values.shape
    points = [point(gates, threshold) for threshold in gates.selected_thresholds()]
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
    path = directory / INDICES if directory.is_dir() else directory
    record = read_json(path)
    try:
        indices = {int(layer): [int(n) for n in neurons] for layer, neurons in record.items() if layer != "direction"}
    except (ValueError, TypeError, AttributeError) as error:
        raise PatchError(f'{path}: expected {{"layer": [neuron, …]}}, found {str(record)[:60]}') from error
    return keep_from_indices(indices, shape)


def read_thresholds(directory: Path) -> tuple[float, ...] | None:
    """The comma-separated thresholds under either file name, or None where there is no such file."""
    for name in THRESHOLDS:
        path = directory / name
        if path.is_file():
            try:
                return tuple(float(value) for value in re.split(r"[,\s]+", path.read_text().strip()) if value)
            except ValueError as error:
                raise PatchError(f"{path}: expected comma-separated numbers ({error})") from error
    return None


def read_json(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise PatchError(f"{path}: no such file") from error
    except (OSError, orjson.JSONDecodeError) as error:
        raise PatchError(f"{path}: not readable as JSON ({error})") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise PatchError(f"{path}: no such file or directory; expected a directory of gates, or a .pt or .safetensors")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise PatchError(f"{path}: damaged or not safetensors ({error}); download it again") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols; the errors below say more
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PatchError(
            f"{path}: damaged, or holds something that is not a tensor; refused, since loading it could run code"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise PatchError(f"{path}: damaged or not a PyTorch file; download it again") from error
    if not isinstance(state, dict):
        raise PatchError(f"{path}: holds a {type(state).__name__}; expected a state dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise PatchError(f"{path}: {name!r} is a {type(value).__name__}; expected tensors only")
    return state


def _assemble(state: dict[str, Tensor], where: str) -> Gates:
    """Rows by layer number, all present, all of one width."""
    rows: dict[int, Tensor] = {}
    for name, value in state.items():
        match = KEY.match(name)
        if not match:
            raise PatchError(f"{where}: key {name!r}; expected only keys ending in layers.<i>.mlp.lambda_logits")
        number = int(match[1])
        if number in rows:
            raise PatchError(f"{where}: two keys for layer {number}, the second {name!r}")
        if not value.is_floating_point() or value.numel() != max(value.shape, default=0):
            raise PatchError(f"{where}: {name} is {value.dtype} {tuple(value.shape)}; expected one float per neuron")
        rows[number] = value.flatten().float()
    if not rows:
        raise PatchError(f"{where}: no tensors; expected keys ending in layers.<i>.mlp.lambda_logits")
    missing = sorted(set(range(max(rows) + 1)) - rows.keys())
    if missing:
        raise PatchError(f"{where}: layer {missing[0]} is missing of 0 to {max(rows)}; the file is incomplete")
    widths = {number: len(row) for number, row in rows.items()}
    for number, width in sorted(widths.items()):
        if width != widths[0]:
            raise PatchError(f"{where}: layer {number} has {width} neurons, layer 0 {widths[0]}")
    return Gates(torch.stack([rows[number] for number in range(len(rows))]))


def _safetensors(state: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save(state)
