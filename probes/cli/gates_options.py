"""What the commands of `vindex gates` share: their options, and what those name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vindex.errors import ProbeError

if TYPE_CHECKING:
    from torch import Tensor

    from probes.gates.masks import Gates, ScaleMode

Model = Annotated[str, typer.Argument(help="A checkpoint directory, a Hub id, or `atlas`, the bundled model.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A directory of gates in the published layout.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Threshold = Annotated[float | None, typer.Option(help="Turn off the neurons with λ below this.")]
Off = Annotated[str | None, typer.Option(help="Turn off this share of the neurons, those of lowest λ: 25% or 0.25.")]
Indices = Annotated[bool, typer.Option("--indices", help="Turn off what neuron_indices.json lists.")]
Scale = Annotated[str, typer.Option(help="Rescaling after gating: none, mean, energy.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
ForgetFile = Annotated[
    Path | None, typer.Option(help="Facts: .jsonl or .parquet, PopQA's columns or ours. Default: the atlas's.")
]
RetainFile = Annotated[
    Path | None, typer.Option(help="Reasoning: .jsonl or .parquet, NuminaMath's columns or ours. Default: the atlas's.")
]


def gates_in(directory: Path) -> Gates:
    """The gates of a directory, a .pt or a .safetensors file."""
    from probes.gates.files import read_gates

    return read_gates(directory)


def mask_of(
    gates: Gates, directory: Path, threshold: float | None, off: str | None, indices: bool, *, or_soft: bool = False
) -> tuple[Tensor, str]:
    """The mask (L, I) that exactly one of the options asks for, and its description."""
    from probes.gates.files import read_indices

    if (threshold is not None) + (off is not None) + indices != 1:
        ways = "--threshold, --off, --indices" + (" or --soft" if or_soft else "")
        raise ProbeError(
            f"which neurons? give exactly one of {ways}; `vindex gates stats {directory}` lists thresholds"
        )
    if indices:
        keep = read_indices(directory, (gates.logits.shape[0], gates.logits.shape[1]))
        return keep, f"neuron_indices.json, {1 - float(keep.float().mean()):.1%} off"
    chosen = threshold if threshold is not None else gates.threshold_at(_share(str(off)))
    keep = gates.keep(chosen)
    return keep, f"λ < {chosen:g}, {1 - float(keep.float().mean()):.1%} off"


def _share(text: str) -> float:
    """`25%` or `0.25` as 0.25."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise ProbeError(f"--off {text}: expected a share such as 25% or 0.25") from error


def scale_of(name: str) -> ScaleMode:
    from probes.gates.masks import SCALE_MODES

    for mode in SCALE_MODES:
        if mode == name:
            return mode
    raise ProbeError(f"scale mode {name!r}: expected {', '.join(SCALE_MODES)}")
