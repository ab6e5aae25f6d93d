"""The state of a training run in one file: logits and Adam moments as tensors, the rest as JSON in its metadata."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from probes.gates.options import TrainOptions, differences
from probes.weights.tensor_file import read_tensors
from vindex import targets
from vindex.errors import ProbeError
from vindex.files import Kind, parse_json
from vindex.kinds import STATE

OF_A_STATE = Kind(ProbeError, "start over with --force", limit=None)
LOGITS, ADAM = "logits", ("step", "exp_avg", "exp_avg_sq")


class State(NamedTuple):
    """A run after a whole step; nothing that happens later changes it."""

    step: int
    """Steps done."""
    curves: dict[str, list[float]]
    """One value for each step done."""
    tensors: dict[str, Tensor]
    """Logits and Adam's moments, on the CPU; empty before the first step."""


def taken(
    step: int, curves: dict[str, list[float]], logits: torch.nn.Parameter, optimiser: torch.optim.Optimizer
) -> State:
    """The state after `step` steps, copied, so that Ctrl-C in the middle of the next one leaves it as it is."""
    tensors = {LOGITS: logits.detach(), **{name: optimiser.state[logits][name] for name in ADAM}}
    return State(step, curves, {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()})


def restore(state: State, logits: torch.nn.Parameter, optimiser: torch.optim.Optimizer) -> None:
    """Put a state back into `logits` and `optimiser`."""
    with torch.no_grad():
        logits.copy_(state.tensors[LOGITS])
    moments = {name: state.tensors[name].to(logits.device) for name in ADAM[1:]}
    optimiser.state[logits] = {"step": state.tensors[ADAM[0]], **moments}


def save(directory: Path, state: State, options: TrainOptions, sources: dict[str, Any]) -> None:
    """Write the state whole, or not at all."""
    about = {"step": state.step, "curves": state.curves, "options": asdict(options), "data": sources}
    with targets.explained(directory):
        targets.make_directory(directory)
    content = to_bytes(state.tensors, {"state": orjson.dumps(about).decode()})
    targets.write_bytes(directory / STATE, content)


def load(directory: Path, shape: tuple[int, int], options: TrainOptions, sources: dict[str, Any]) -> State:
    """The state in a directory. Raises ProbeError unless it is of the same run, of gates (L, I) of this shape."""
    path = directory / STATE
    if not path.is_file():
        raise ProbeError(f"{path}: nothing to resume; start without --resume")
    metadata, tensors = read_tensors(path, OF_A_STATE)
    saved = parse_json(metadata.get("state", "").encode(), f"{path}: state", OF_A_STATE)
    if lost := {LOGITS, *ADAM} - tensors.keys():
        raise OF_A_STATE.refusal(path, f"damaged: no tensor {min(lost)}")
    changed = differences(saved["options"], options)
    if changed:
        raise ProbeError(f"{path}: another run's state ({'; '.join(changed)}); resume with its options, or --force")
    if saved["data"] != orjson.loads(orjson.dumps(sources)):
        raise ProbeError(f"{path}: the run used other data or another model; resume with those, or start with --force")
    if tensors[LOGITS].shape != shape:
        raise ProbeError(f"{path}: {tuple(tensors[LOGITS].shape)} logits, the model takes {shape}")
    return State(saved["step"], saved["curves"], tensors)
