"""What the results of every capability share: a record, rows, a table in a notebook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from html import escape
from pathlib import Path
from typing import Any

from vindex.targets import check_record, write_json


class Result(ABC):
    """What a capability gives back: `record` is all of it as plain JSON values, `rows` its table."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Everything measured, and what it takes to recompute it: what a command writes with --output."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """The table, a dict of plain values each, for pandas, polars or a loop."""

    def save(self, path: str | Path) -> None:
        """Write the record as JSON. Raises TargetError where it cannot be written, or `path` names another format."""
        check_record(Path(path))
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
