"""Do the reading of the next thing while the last one is computed with."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
_END: Any = object()


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made by a thread while the one before is used; an error comes when its turn comes.

    Nothing is kept here of an item that was handed out: two are in memory at a time if the caller lets go of each.
    """
    with ThreadPoolExecutor(1, "vindex-read") as thread:
        coming = thread.submit(next, items, _END)
        while True:
            made = [coming.result()]
            if made[0] is _END:
                return
            coming = thread.submit(next, items, _END)
            yield made.pop()
