"""Where a trace can be written; imported before any work, so without torch."""

from __future__ import annotations

from pathlib import Path

from vindex import targets
from vindex.errors import TargetError

SUFFIXES = (".html", ".json")


def check_target(path: Path) -> None:
    """Raise TargetError now if a trace cannot be written to `path` later."""
    targets.check_file(path)
    if path.suffix not in SUFFIXES:
        raise TargetError(f"{path}: a trace is written as {' or '.join(SUFFIXES)}")
