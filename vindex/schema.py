"""Read JSON at the border: every problem is collected with its path, and all are reported at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import orjson

from vindex.errors import FormatError

T = TypeVar("T")


class Fields:
    """A JSON object being read. A field that is missing or wrong is noted and a harmless stand-in is returned."""

    def __init__(self, value: Any, path: str, problems: list[str]) -> None:
        self._path, self.problems = path, problems
        self._values: dict[str, Any] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            self._complain(path or "top level", "an object", value)

    def _complain(self, path: str, expected: str, got: Any) -> None:
        shown = repr(got) if isinstance(got, str | int | float | bool | None) else type(got).__name__
        self.problems.append(f"{path}: expected {expected}, got {shown[:60]}")

    def _at(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _take(self, key: str, fits: Callable[[Any], bool], expected: str, stand_in: T) -> T:
        if key not in self._values:
            self.problems.append(f"{self._at(key)}: missing, expected {expected}")
            return stand_in
        if not fits(self._values[key]):
            self._complain(self._at(key), expected, self._values[key])
            return stand_in
        return self._values[key]

    def text(self, key: str, choices: Collection[str] = ()) -> str:
        expected = f"one of {', '.join(choices)}" if choices else "a string"
        return self._take(key, lambda v: isinstance(v, str) and (not choices or v in choices), expected, "")

    def text_or_none(self, key: str) -> str | None:
        return self._take(key, lambda v: v is None or isinstance(v, str), "a string or null", None)

    def integer(self, key: str, low: int = 0, high: int = 2**53) -> int:
        expected = f"{low}" if low == high else f"an integer from {low}" + (f" to {high}" if high < 2**53 else "")
        return self._take(key, lambda v: type(v) is int and low <= v <= high, expected, low)

    def number(self, key: str) -> float:
        return self._take(key, lambda v: type(v) in (int, float), "a number", 0.0)

    def number_or_none(self, key: str) -> float | None:
        return self._take(key, lambda v: v is None or type(v) in (int, float), "a number or null", None)

    def interval_or_none(self, key: str) -> tuple[float, float] | None:
        """[low, high], or null."""

        def fits(value: Any) -> bool:
            pair = isinstance(value, list) and len(value) == 2
            return value is None or (pair and all(type(end) in (int, float) for end in value))

        found = self._take(key, fits, "two numbers or null", None)
        return None if found is None else (found[0], found[1])

    def integer_or_none(self, key: str) -> int | None:
        return self._take(key, lambda v: v is None or type(v) is int, "an integer or null", None)

    def optional_integer(self, key: str, low: int = 0) -> int | None:
        """An integer that may be absent, or null."""
        return None if self._values.get(key) is None else self.integer(key, low)

    def flag(self, key: str) -> bool:
        return self._take(key, lambda v: isinstance(v, bool), "true or false", False)

    def mapping(self, key: str) -> dict[str, Any]:
        return self._take(key, lambda v: isinstance(v, dict), "an object", {})

    def record(self, key: str) -> Fields:
        value = self._take(key, lambda v: isinstance(v, dict), "an object", None)
        return Fields(value, self._at(key), self.problems if value is not None else [])

    def records(self, key: str) -> list[Fields]:
        values: list[Any] = self._take(key, lambda v: isinstance(v, list), "a list", [])
        return [Fields(value, f"{self._at(key)}[{i}]", self.problems) for i, value in enumerate(values)]


def load_fields(path: Path) -> Fields:
    """Parse a JSON file into Fields with an empty problem list.

    Raises FormatError when the file is missing, unreadable or not JSON.
    """
    try:
        return Fields(orjson.loads(path.read_bytes()), "", [])
    except OSError as error:
        raise FormatError(f"{path.name}: cannot be read ({error.strerror}); is {path.parent} a vindex?") from error
    except orjson.JSONDecodeError as error:
        raise FormatError(f"{path.name}: not valid JSON ({error}); rebuild the vindex or download it again") from error


def load_record(path: Path) -> dict[str, Any]:
    """A JSON object that this project wrote earlier. Raises FormatError when it is missing or not one."""
    try:
        record = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise FormatError(f"{path}: not a readable JSON record ({error}); write it with --json") from error
    if not isinstance(record, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(record).__name__}; write it with --json")
    return record


def to_json(record: Any) -> bytes:
    """A dataclass as indented JSON. Fields that may be None by default are left out when they are."""
    return orjson.dumps(_plain(record), option=orjson.OPT_INDENT_2)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kept = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {field.name: _plain(item) for field, item in kept if item is not None or field.default is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def refuse_problems(name: str, problems: list[str]) -> None:
    """Raise FormatError with every problem in one line; do nothing when there is none."""
    if problems:
        raise FormatError(f"{name}: " + "; ".join(problems))
