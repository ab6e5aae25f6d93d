"""Records with one value left out or of another type, and spoiled directories, for readers that say so in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

LEFT_OUT = "left out"


def damaged(record: Any, path: Sequence[Any], wrong: Any) -> Any:
    """A copy of a record with the value at `path` replaced by `wrong`, or taken away where that is LEFT_OUT."""
    record = deepcopy(record)
    holder = record
    for key in path[:-1]:
        holder = holder[key]
    if wrong == LEFT_OUT:
        del holder[path[-1]]
    else:
        holder[path[-1]] = wrong
    return record


def change(directory: Path, name: str, edit) -> None:
    value = json.loads((directory / name).read_text())
    edit(value)
    (directory / name).write_text(json.dumps(value))


def cut(path: Path, by: int = -1) -> None:
    os.truncate(path, path.stat().st_size + by)


def repeat(directory: Path, *names: str) -> None:
    """As many numbers again."""
    for name in names:
        (directory / name).write_bytes(2 * (directory / name).read_bytes())


def shift(index: dict, by: int) -> None:
    for entry in index["layers"]:
        entry["offset"] += by


def link(directory: Path, name: str, to: str) -> None:
    (directory / name).unlink()
    (directory / name).symlink_to(to)
