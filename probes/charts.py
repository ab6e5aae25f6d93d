"""What the pictures of every capability share: suffixes, colours, and the check before any work."""

from __future__ import annotations

from pathlib import Path

from vindex import targets
from vindex.errors import TargetError

SUFFIXES = (".html", ".png")
COLOURS = ("#2563a8", "#c2571a", "#2f8f5b", "#8b4a9c")
QUIET = "#888888"


def check_target(path: Path) -> None:
    """Raise TargetError now if `path` cannot be drawn to later: no place for a file, another suffix, no matplotlib."""
    targets.check_file(path)
    if path.suffix not in SUFFIXES:
        raise TargetError(f"{path}: plots are written as {' or '.join(SUFFIXES)}")
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise TargetError(f"{path}: PNG needs matplotlib; pip install 'vindex[plot]', or write .html") from error
