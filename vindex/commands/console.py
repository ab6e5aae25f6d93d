"""What every handler prints with: tables for people, JSON for programs, progress with time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from rich.progress import Progress


def print_json(record: Any) -> None:
    """Write `record` to stdout as indented JSON; numpy values become plain numbers and lists."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY
    sys.stdout.write(orjson.dumps(record, option=options).decode() + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str | None = None) -> None:
    """Print rows that fit the terminal. A column named with a leading `>` is right-aligned and never wraps."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title or None, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD
    )
    table.show_header = any(columns)
    for name in columns:
        number = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if number else "left", no_wrap=number)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


def say(text: str) -> None:
    """Print one line of rich markup to stdout."""
    from rich.console import Console

    Console(highlight=False).print(text)


@contextmanager
def progress(enabled: bool = True) -> Iterator[Progress]:
    """A rich progress display on stderr with percentage, elapsed time and time left; silent when not `enabled`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as display:
        yield display


def stage(display: Progress, name: str, total: int | None) -> Callable[[int], None]:
    """Add a bar called `name` and return the function that advances it."""
    task = display.add_task(name, total=total)

    def advance(steps: int) -> None:
        display.advance(task, steps)

    return advance
