"""`train_gates`: from rows and a model to gates, and to a directory with them and the record of the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from probes.gates.data import panel_files, read_forget, read_retain, require_sources
from probes.gates.files import MADE
from probes.gates.gates import Gates
from probes.gates.options import from_preset
from probes.gates.train import encode, record, train
from probes.live.load import Loaded, require_head
from probes.live.match import weights_sha256
from vindex.errors import TargetError
from vindex.kinds import STATE
from vindex.places import check_directory
from vindex.progress import Progress, silent


def train_gates(
    model: Loaded,
    *,
    preset: str = "baseline",
    output: str | Path | None = None,
    panel: str | Path | None = None,
    forget: str | Path | None = None,
    retain: str | Path | None = None,
    forget_limit: int | None = None,
    retain_limit: int | None = None,
    save_every: int = 100,
    resume: bool = False,
    force: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> Gates:
    """Train gates on `model`, whose weights stay as they are; `gates.training` is the record of the run.

    preset: one of the eight published variants; `options`, fields of `TrainOptions`, change it. panel: a directory
    that `make_panel` made. forget, retain: files of rows (docs/gates.md). Without either the atlas's; only the first
    `…_limit` rows of each. output: a directory for gates
    and record, which takes the state every `save_every` steps and at Ctrl-C; `resume` goes on from there, to the same
    bits. force: gates that this tool made at `output` are replaced.

    Under `accelerate launch` every process returns the gates and the first writes them. Raises ProbeError, FactError or
    TargetError before the first step, and ProbeError when the loss is not finite.
    """
    chosen = from_preset(preset, **options)
    require_head(model)
    require_sources(panel, forget, retain, both=False)
    if panel:
        forget, retain, _ = panel_files(Path(panel))
    target, files = Path(output) if output else None, [Path(file) if file else None for file in (forget, retain)]
    if target:
        check_output(target, [model.path, *files], resume=resume, force=force)
    rows = read_forget(files[0], forget_limit), read_retain(files[1], retain_limit)
    shown = progress if is_first_process() else silent
    data = encode(model, *rows, chosen, weights_sha256(model, shown))
    trained = train(
        model, data, chosen, directory=target, save_every=save_every, resuming=resume, progress=shown
    )  # fmt: skip
    name = target.name if target else f"{preset} gates"
    gates = Gates(trained.gates.logits, name, record(model, trained, chosen, data))
    if target and is_first_process():
        gates.save(target, force=True)
    return gates


def check_output(output: Path, reads: list[Path | None], *, resume: bool, force: bool) -> None:
    """Raise TargetError unless a run may write there, and its state is there when, and only when, it is resumed."""
    if (output / STATE).exists() and not resume and not force:
        raise TargetError(
            f"{output}: holds a run that was stopped; continue it with --resume (resume=True), or start over with "
            "--force (force=True)"
        )
    if resume and not (output / STATE).exists():
        raise TargetError(f"{output}: nothing to resume here; start without --resume")
    given = [path for path in reads if path is not None and path.exists()]
    check_directory(output, force=force or resume, reads=given, kinds=MADE)


def own_device(device: str) -> str:
    """Under `accelerate launch` each process has a GPU of its own; `auto` would load every copy onto the first."""
    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if device == "auto" and own is not None and torch.cuda.is_available() else device


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
