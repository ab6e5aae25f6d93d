"""Read JSON at the border: every problem is collected with its path, and all are reported at once."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import orjson

from vindex.errors import FormatError
from vindex.files import Kind, parse_json, read_json

T = TypeVar("T")

SHOWN = 5  # problems in a message
MOST_PROBLEMS = 10_000  # after which a file is not read on
LONGEST_TEXT = 10_000  # characters of a name
OF_A_VINDEX = Kind(FormatError, "rebuild the vindex or download it again")
RECORD = Kind(FormatError, "write it with -o")


class Problems(list[str]):
    """What is wrong with one file of a kind, in the order it was found."""

    def __init__(self, name: str, kind: Kind = OF_A_VINDEX) -> None:
        super().__init__()
        self._name, self._kind = name, kind

    def append(self, problem: str) -> None:
        super().append(problem)
        if len(self) >= MOST_PROBLEMS:
            self.refuse()

    def refuse(self) -> None:
        """Raise the error of the kind, with the first problems and the number of the others; nothing without any."""
        if self:
            raise self._kind.refusal(self._name, listed(self))


def listed(problems: Collection[str]) -> str:
    """The first SHOWN of them and how many more there are, in one line."""
    more = len(problems) - SHOWN
    return "; ".join([*list(problems)[:SHOWN], *([f"and {more:,} more"] if more > 0 else [])])


class Fields:
    """A JSON object being read. A field that is missing or wrong is noted and a harmless stand-in is returned."""

    def __init__(self, value: Any, path: str, problems: Problems) -> None:
        self._path, self.problems = path, problems
        self.values: dict[str, Any] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            self._complain(path or "top level", "an object", value)

    def _complain(self, path: str, expected: str, got: Any) -> None:
        shown = repr(got) if isinstance(got, str | int | float | bool | None) else type(got).__name__
        self.problems.append(f"{path}: expected {expected}, got {shown[:60]}")

    def _at(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _take(self, key: str, fits: Callable[[Any], bool], expected: str, stand_in: T) -> T:
        if key not in self.values:
            self.problems.append(f"{self._at(key)}: missing, expected {expected}")
            return stand_in
        if not fits(self.values[key]):
            self._complain(self._at(key), expected, self.values[key])
            return stand_in
        return self.values[key]

    def text(self, key: str, choices: Collection[str] = ()) -> str:
        expected = f"one of {', '.join(choices)}" if choices else "a string"
        return self._take(key, lambda v: _is_text(v) and (not choices or v in choices), expected, "")

    def text_or_none(self, key: str) -> str | None:
        return self._take(key, lambda v: v is None or _is_text(v), "a string or null", None)

    def optional_text(self, key: str) -> str | None:
        """A string that may be absent, or null."""
        return self.text_or_none(key) if key in self.values else None

    def integers(self, key: str, count: int) -> tuple[int, ...]:
        """A list of so many positive integers."""
        fits = lambda v: isinstance(v, list) and len(v) == count and all(type(n) is int and n > 0 for n in v)  # noqa: E731
        return tuple(self._take(key, fits, f"a list of {count} positive integers", [1] * count))

    def integer(self, key: str, low: int = 0, high: int = 2**53) -> int:
        expected = f"{low}" if low == high else f"an integer from {low}" + (f" to {high}" if high < 2**53 else "")
        return self._take(key, lambda v: type(v) is int and low <= v <= high, expected, low)

    def digest(self, key: str) -> str:
        fits = lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None  # noqa: E731
        return self._take(key, fits, "64 lower-case hex digits", "")

    def number(self, key: str) -> float:
        return self._take(key, is_number, "a number", 0.0)

    def share(self, key: str) -> float:
        """A relative figure: 0 or more."""
        return self._take(key, lambda v: is_number(v) and v >= 0, "a number from 0", 0.0)

    def share_or_none(self, key: str) -> float | None:
        """A relative figure: 0 or more."""
        return self._take(key, lambda v: v is None or (is_number(v) and v >= 0), "a number from 0, or null", None)

    def number_or_none(self, key: str) -> float | None:
        return self._take(key, lambda v: v is None or is_number(v), "a number or null", None)

    def interval_or_none(self, key: str) -> tuple[float, float] | None:
        """[low, high], or null."""

        def fits(value: Any) -> bool:
            pair = isinstance(value, list) and len(value) == 2
            return value is None or (pair and all(map(is_number, value)))

        found = self._take(key, fits, "two numbers or null", None)
        return None if found is None else (found[0], found[1])

    def integer_or_none(self, key: str) -> int | None:
        return self._take(key, lambda v: v is None or type(v) is int, "an integer or null", None)

    def optional_integer(self, key: str, low: int = 0, high: int = 2**53) -> int | None:
        """An integer that may be absent, or null."""
        return None if self.values.get(key) is None else self.integer(key, low, high)

    def optional_texts(self, key: str) -> tuple[str, ...] | None:
        """A list of strings that may be absent."""
        if key not in self.values:
            return None
        fits = lambda v: isinstance(v, list) and all(isinstance(text, str) for text in v)  # noqa: E731
        return tuple(self._take(key, fits, "a list of strings", []))

    def flag(self, key: str) -> bool:
        return self._take(key, lambda v: isinstance(v, bool), "true or false", False)

    def has(self, key: str) -> bool:
        return key in self.values

    def optional_flag(self, key: str) -> bool | None:
        """True or false, that may be absent."""
        return self.flag(key) if key in self.values else None

    def mapping(self, key: str) -> dict[str, Any]:
        return self._take(key, lambda v: isinstance(v, dict), "an object", {})

    def texts(self, key: str) -> dict[str, str]:
        """An object whose values are strings."""
        fits = lambda v: isinstance(v, dict) and all(map(_is_text, v.values()))  # noqa: E731
        return self._take(key, fits, "an object of strings", {})

    def record(self, key: str) -> Fields:
        value = self._take(key, lambda v: isinstance(v, dict), "an object", None)
        return Fields(value, self._at(key), self.problems if value is not None else Problems(key))

    def records(self, key: str) -> Iterator[Fields]:
        values: list[Any] = self._take(key, lambda v: isinstance(v, list), "a list", [])
        return (Fields(value, f"{self._at(key)}[{i}]", self.problems) for i, value in enumerate(values))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def parse_fields(content: bytes, name: str) -> Fields:
    """The JSON text of a file of a vindex as Fields with no problems yet. Raises FormatError when it is not JSON."""
    return Fields(parse_json(content, name, OF_A_VINDEX), "", Problems(name))


def load_record(path: Path) -> dict[str, Any]:
    """A JSON object that this project wrote earlier. Raises FormatError when it is missing or not one."""
    record = read_json(path, RECORD)
    if not isinstance(record, dict):
        raise RECORD.refusal(path, f"expected a JSON object, got {type(record).__name__}")
    return record


def to_json(record: Any) -> bytes:
    """A dataclass as indented JSON. Fields that may be None by default are left out when they are."""
    try:
        return orjson.dumps(_plain(record), option=orjson.OPT_INDENT_2)
    except orjson.JSONEncodeError as error:  # a name of a file or directory that is not UTF-8
        raise FormatError(f"a name in it cannot be written as JSON ({error}); rename the checkpoint") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kept = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {field.name: _plain(item) for field, item in kept if item is not None or field.default is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def require_plain_name(name: str, where: str) -> None:
    """Raise FormatError when `name` could lead out of the directory it is listed in."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise FormatError(f"{where}: names {name!r}, which is not a plain file name inside the vindex; refused")
