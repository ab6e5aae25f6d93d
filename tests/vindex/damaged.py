"""Records with one value left out or of another type, for readers that must say so in one line."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
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
