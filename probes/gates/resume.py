"""The state of a training run in one file: logits and Adam moments as tensors, the rest as JSON in its metadata."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from probes.gates.options import TrainOptions, differences
from vindex import targets
from vindex.errors import ProbeError
from vindex.kinds import STATE

ADAM = ("step", "exp_avg", "exp_avg_sq")


class State(NamedTuple):
    step: int
    """Steps done."""
    curves: dict[str, list[float]]
    """One value for each step done."""


def save(
    directory: Path,
    state: State,
    logits: torch.nn.Parameter,
    optimiser: torch.optim.Optimizer,
    options: TrainOptions,
    sources: dict[str, Any],
) -> None:
    """Write the state whole, or not at all."""
    tensors = {"logits": logits.detach(), **{name: optimiser.state[logits][name] for name in ADAM}}
    metadata = {"state": orjson.dumps(state._asdict() | {"options": asdict(options), "data": sources}).decode()}
    with targets.explained(directory):
        targets.make_directory(directory)
    content = to_bytes({k: v.cpu().contiguous() for k, v in tensors.items()}, metadata)
    targets.write_bytes(directory / STATE, content)


def load(
    directory: Path,
    logits: torch.nn.Parameter,
    optimiser: torch.optim.Optimizer,
    options: TrainOptions,
    sources: dict[str, Any],
) -> State:
    """Put a saved state back into `logits` and `optimiser`. Raises ProbeError unless it is the same run."""
    path = directory / STATE
    if not path.is_file():
        raise ProbeError(f"{path}: nothing to resume; start without --resume")
    try:
        with safe_open(path, framework="pt") as file:
            saved = orjson.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in ("logits", *ADAM)}
    except (SafetensorError, OSError, KeyError, TypeError, orjson.JSONDecodeError) as error:
        raise ProbeError(f"{path}: damaged ({error}); start over with --force") from error
    changed = differences(saved["options"], options)
    if changed:
        raise ProbeError(f"{path}: another run's state ({'; '.join(changed)}); resume with its options, or --force")
    if saved["data"] != orjson.loads(orjson.dumps(sources)):
        raise ProbeError(f"{path}: the run used other data or another model; resume with those, or start with --force")
    if tensors["logits"].shape != logits.shape:
        raise ProbeError(f"{path}: {tuple(tensors['logits'].shape)} logits, the model takes {tuple(logits.shape)}")
    with torch.no_grad():
        logits.copy_(tensors["logits"])
    device = logits.device
    moments = {name: tensors[name].to(device) for name in ADAM[1:]}
    optimiser.state[logits] = {"step": tensors["step"], **moments}
    return State(saved["step"], saved["curves"])
