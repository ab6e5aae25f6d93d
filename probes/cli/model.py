"""The model that a command works on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vindex.console import warn
from vindex.progress import Progress, silent

if TYPE_CHECKING:
    from probes.live.load import Loaded


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
