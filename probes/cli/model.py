"""The model that a command works on, and the options that choose it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from vindex.console import warn
from vindex.progress import Progress, silent

if TYPE_CHECKING:
    from probes.live.load import Loaded

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint directory, a Hub id, or `atlas`, the bundled model.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="A UTF-8 file, or the name of a bundled text; repeatable. Default: the eight bundled.",
    ),
]


def load_model(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attn: str = "sdpa",
    revision: str | None = None,
    head: bool = True,
    progress: Progress = silent,
) -> Loaded:
    """As `probes.load`, in a process of our own; what its user should know of the model goes to stderr.

    head: a model without one is refused.
    """
    from probes.live.load import load, require_head

    _steady_products()
    advance = progress("loading", 1)
    loaded = load(model, dtype=dtype, device=device, attn=attn, revision=revision)
    advance(1)
    if head:
        require_head(loaded)
    for note in loaded.notes:
        warn(f"note: {note}")
    return loaded


def _steady_products() -> None:
    """Ask MKL, on a processor with AVX2 but not AVX-512, for its reproducible mode (once, before its first product).

    Products give the same bits wherever their operands lie in memory, and those of the few rows of short prompts take a
    fifth to a third less time there than in its default mode (docs/log/gate3-time-and-memory.md, 2026-11-26). A user's
    own setting stands.
    """
    import torch

    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        os.environ.setdefault("MKL_CBWR", "AUTO")
