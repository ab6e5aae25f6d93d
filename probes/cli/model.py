"""The model that a command works on, and the options that choose it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    advance = progress("loading", 1)
    with _quick_start():
        from probes.live.load import load, require_head

        _steady_products()
        loaded = load(model, dtype=dtype, device=device, attn=attn, revision=revision)
    advance(1)
    if head:
        require_head(loaded)
    for note in loaded.notes:
        warn(f"note: {note}")
    return loaded


@contextmanager
def _quick_start() -> Iterator[None]:
    """Import transformers and load a model in four fifths of the time (docs/log/trace-start.md).

    What is imported lives as long as the process, and looking through it for garbage again and again finds none: it is
    let alone, then and later. And scipy and scikit-learn are hidden from transformers, which wants them for the losses
    of object detectors and for drafts of another model.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        import transformers.utils

        transformers.utils.is_scipy_available = transformers.utils.is_sklearn_available = lambda: False
        yield
    finally:
        if not gc.get_freeze_count():  # once: whoever loads another model may want rid of the first
            gc.freeze()
        if collecting:
            gc.enable()


def _steady_products() -> None:
    """Ask MKL, on a processor with AVX2 but not AVX-512, for its reproducible mode (once, before its first product).

    Products give the same bits wherever their operands lie in memory, and those of the few rows of short prompts take a
    fifth to a third less time there than in its default mode (docs/log/gate3-time-and-memory.md, 2026-11-26). A user's
    own setting stands.
    """
    import torch

    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        os.environ.setdefault("MKL_CBWR", "AUTO")
