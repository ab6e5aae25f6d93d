"""The norm scales of a vindex, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

import numpy as np

from vindex.errors import QueryError
from vindex.index import NormEntry


class UnknownNorm(QueryError, KeyError):
    """A KeyError to a mapping, and one line to a reader."""

    __str__ = Exception.__str__


class Norms(Mapping[str, np.ndarray]):
    """float16 vectors by name. A name that is not there raises UnknownNorm, which says one that is."""

    def __init__(self, flat: np.ndarray, entries: Sequence[NormEntry]) -> None:
        self._flat, self._entries = flat, {entry.name: entry for entry in entries}

    def __repr__(self) -> str:
        return f"<{len(self)} norm scales: {', '.join([*list(self)[:2], '…', list(self)[-1]])}>"

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._entries:
            near = get_close_matches(str(name), self._entries, n=1) or [next(iter(self))]
            raise UnknownNorm(f"no norm is called {str(name)[:60]!r} here; there are {len(self)}, such as {near[0]!r}")
        entry = self._entries[name]
        return self._flat[entry.offset : entry.offset + entry.length]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
