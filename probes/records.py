"""What the results of every capability share: a record, rows, a table in a notebook; and what records are made of."""

from __future__ import annotations

import math
import platform
from abc import ABC, abstractmethod
from datetime import UTC, datetime
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import vindex
from vindex.targets import write_json


class Result(ABC):
    """What a capability gives back: `record` is all of it as plain JSON values, `rows` its table."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Everything measured, and what it takes to recompute it: what a command writes with --output."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """The table, a dict of plain values each, for pandas, polars or a loop."""

    def save(self, path: str | Path) -> None:
        """Write the record as JSON. Raises TargetError where it cannot be written."""
        write_json(Path(path), self.record(), indent=True)

    def _repr_html_(self) -> str:
        rows = self.rows()
        cells = [[escape(_shown(row.get(name))) for name in rows[0]] for row in rows] if rows else []
        head = "".join(f"<th>{escape(name)}</th>" for name in (rows[0] if rows else ()))
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
        return f"<p>{escape(repr(self))}</p><table><tr>{head}</tr>{body}</table>"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def head(record: str) -> dict[str, Any]:
    """The first entries of every record: `record` names its layout; when it was made, and with what."""
    return {
        "record": record,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "libraries": libraries(),
    }


def libraries() -> dict[str, str]:
    """Versions of what a figure may depend on."""
    names = ("torch", "transformers", "tokenizers", "numpy")
    own = {"python": platform.python_version(), "vindex": vindex.__version__}
    return own | {name: metadata.version(name) for name in names}


def plain(value: Any) -> Any:
    """JSON values: arrays and tuples become lists, floats 6 significant digits."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
