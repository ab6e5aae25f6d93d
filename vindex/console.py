"""What every handler prints with: tables for people, JSON for programs, progress with time left.

Text from users, models and files is printed as it is, never taken for markup; `shown` is what makes it fit for a
terminal, and everything here passes through it. The few words with a style of their own are made by `styled`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from vindex.errors import QueryError, TargetError
from vindex.progress import Advance, Progress, silent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.table import Table
    from rich.text import Text

# What moves the cursor, rings, hides or reorders: C0 but for the newline, DEL, C1, soft hyphen, marks of direction and
# overrides of it, other invisible formats, line separators, lone surrogates, tags. Joiners (emoji, Persian) stay.
HIDDEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
SHOWN_SPACE = "␣"
NOT_ASCII = re.compile("[^\x00-\x7f]")
QUOTED = re.compile(r"""(?<![^\s(])(?:"[^"]*"|'[^']*')""")
HELD = "\ue000"  # stands for a space at which a line is not broken: of Unicode's private use, and as wide
LINE_SECONDS = 20.0  # between lines about long work, where stderr is no terminal
NARROWEST, USUAL = 10, 80  # columns below which a terminal is taken for one that does not know, and what it then has
LONGEST_WORD = 12  # columns that a word may take on a narrow terminal before it is folded


def shown(text: str) -> str:
    r"""`text` with every control character made visible, an escape as `\x1b`; newlines stay."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """`text` as `shown`, its lines joined by spaces."""
    return shown(" ".join(text.split("\n")))


def visible(piece: str) -> str:
    """A token with its spaces made visible, so that a table neither hides them nor breaks there."""
    return repr(piece)[1:-1].replace(" ", SHOWN_SPACE)


def typed(argument: str) -> str:
    """What a user typed, where it is text and not a path: UTF-8 in any locale. Raises QueryError where it is not."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError as error:
        raise QueryError(f"{argument!r} is not UTF-8, which text on the command line has to be") from error


def styled(text: object, style: str) -> Text:
    """One of the words with a style of our own (bold, dim, red, …); the text itself is plain."""
    from rich.text import Text

    return Text(one_line(str(text)), style=style)


def line(*parts: str | Text) -> Text:
    """Plain and styled parts as one line."""
    from rich.text import Text

    return Text.assemble(*(one_line(part) if isinstance(part, str) else part for part in parts))


def say(*parts: str | Text) -> None:
    """Print plain and styled parts as one line to stdout, broken between words where the terminal ends.

    What is quoted is a word. A line with a word that is longer than the terminal, as paths are, is left whole, so that
    it can be copied; so are the commands that come next, each on a line of its own.
    """
    console, text = _console(), line(*parts)
    if text.plain.startswith("next: vindex "):
        for one in text.plain.replace(", or vindex ", "\nor:   vindex ").split("\n"):
            _print(console, one, whole=True)
        return
    text.plain = QUOTED.sub(lambda found: found[0].replace(" ", HELD), text.plain)
    whole = any(len(word) > console.width for word in text.plain.split())
    for part in [text] if whole else text.wrap(console, console.width):
        part.plain = part.plain.rstrip().replace(HELD, " ")
        _print(console, part, whole=True)


def command(*words: object) -> str:
    """A command of ours as a shell takes it, whatever names its words have."""
    return shlex.join(["vindex", *map(str, words)])


def warn(text: str) -> None:
    """Print one plain line to stderr."""
    sys.stderr.write(one_line(text) + "\n")


def print_json(record: Any) -> None:
    """Write `record` to stdout as indented JSON; numpy values become plain numbers and lists.

    What a terminal must not see, and what the encoding of stdout lacks, is written as JSON's escapes.
    """
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY
    text = HIDDEN.sub(_json_escape, orjson.dumps(record, option=options).decode())
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        text = NOT_ASCII.sub(_json_escape, text)
    sys.stdout.write(text + "\n")


def check_places(output: Path | None, plot: Path | None = None, *, reads: Path | None = None) -> None:
    """Before the work: raise TargetError where --output or --plot could not be written after it.

    reads: a file that is read, and so not written.
    """
    if output and reads and output.resolve() == reads.resolve():
        raise TargetError(f"{output}: is the file that is read; name another")
    if output:
        from vindex.targets import check_record

        check_record(output)
    if plot:
        from vindex.charts import check_target

        check_target(plot)


def put(record: Any, as_json: bool, output: Path | None) -> bool:
    """Write a record to the file of --output, and with --json to stdout; returns whether it took the tables' place."""
    if output:
        from vindex.targets import write_json

        write_json(output, record, indent=True)
    if as_json:
        print_json(record)
    return as_json


def say_places(**places: Path | None) -> None:
    """Name the files that were written, each by what it is, on a line that can be copied."""
    for what, place in places.items():
        if place:
            _print(_console(), line(f"{what}: {place}"), whole=True)


@contextmanager
def stopped(kept: str | Callable[[], str] = "nothing was written") -> Iterator[None]:
    """Ctrl-C within says what became of the work, and is exit status 130."""
    try:
        yield
    except KeyboardInterrupt:
        warn(f"stopped; {kept if isinstance(kept, str) else kept()}")
        raise SystemExit(130) from None


def bytes_of(count: float) -> str:
    """A number of bytes that people read: 812 bytes, 40.1 kB, 1.1 MB, 16.4 GB."""
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def print_table(
    title: str | Text, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str | None = None
) -> None:
    """Print a table that fits the terminal. A cell is plain unless it is a `styled` Text.

    A column named with a leading `>` holds numbers: it is right-aligned and is never cut or wrapped.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[cell if isinstance(cell, Text) else Text(shown(str(cell))) for cell in row] for row in rows]
    table = Table(caption=caption and shown(caption), caption_justify="left", box=box.SIMPLE_HEAD)
    table.show_header = any(columns)
    numbers = [name.startswith(">") for name in columns]
    for name, number in zip(columns, numbers, strict=True):
        table.add_column(shown(name.removeprefix(">")), justify="right" if number else "left", overflow="fold")
    console = _console()
    if cells:
        _fit(table, console, cells, numbers)
    for row in cells:
        table.add_row(*row)
    if title:
        _print(console, title if isinstance(title, Text) else shown(title), style="table.title")
    _print(console, table)


def _print(console: Console, what: Table | Text | str, style: str | None = None, *, whole: bool = False) -> None:
    """Where stdout is no terminal, without the spaces with which rich fills its lines."""
    with nullcontext() if console.is_terminal else console.capture() as taken:
        console.print(what, style=style, overflow="ignore" if whole else "fold", soft_wrap=whole)
    if taken:
        sys.stdout.write("".join(f"{one.rstrip()}\n" for one in taken.get().splitlines()))


@contextmanager
def progress(enabled: bool = True) -> Iterator[Progress]:
    """What long work tells of itself goes to stderr: a bar for each stage, with its share, time and time left.

    Where stderr is no terminal, a line is written for each stage, when it begins and every LINE_SECONDS from then on.
    """
    if not enabled:
        yield silent
    elif not sys.stderr.isatty():
        yield _written_stage
    else:
        with _bars() as display:
            yield lambda name, total: _bar(display, name, total)


def _bars() -> Bars:
    from rich.progress import (
        BarColumn,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Display

    class Description(ProgressColumn):
        def render(self, task: Task) -> Text:
            return line(task.description)

    left = TextColumn("left"), TimeRemainingColumn()
    return Display(
        Description(), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), *left, console=_console(stderr=True)
    )


def _bar(display: Bars, name: str, total: int | None) -> Advance:
    task = display.add_task(name, total=total)

    def advance(count: int, note: str = "", /) -> None:
        display.update(task, advance=count, description=f"{name}: {note}" if note else name)

    return advance


def _written_stage(name: str, total: int | None) -> Advance:
    """Lines in place of a bar; none for what takes less than LINE_SECONDS."""
    began = said = time.monotonic()
    done = 0

    def advance(count: int, note: str = "", /) -> None:
        nonlocal done, said
        done, now = done + count, time.monotonic()
        if now - said >= LINE_SECONDS:
            said = now
            warn(f"{name}: {_how_far(done, total, now - began)}" + (f" ({note})" if note else ""))

    return advance


def _how_far(done: int, total: int | None, seconds: float) -> str:
    if not total:
        return duration(seconds)
    if done >= total:
        return f"100% after {duration(seconds)}"
    return f"{done / total:.0%}" + (f", {duration(seconds * (total - done) / done)} left" if done else "")


def duration(seconds: float) -> str:
    """A time that people read: 40 s, 5 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if console.width < NARROWEST:  # COLUMNS=0, as some give who do not know
        console.width = USUAL
    return console


def _fit(table: Table, console: Console, cells: Sequence[Sequence[Text]], numbers: Sequence[bool]) -> None:
    """Where the table is too wide, take the room from headers and texts, then from padding; numbers keep theirs.

    What is too wide even so is printed wider than the terminal.
    """
    columns = [[cell.plain for cell in column] for column in zip(*cells, strict=True)]
    headers = [str(column.header) for column in table.columns]
    box, padding = len(headers) + 1, 2 * len(headers)
    wide = sum(_widest("\n".join([header, *texts]).split("\n")) for header, texts in zip(headers, columns, strict=True))
    if wide + box + padding <= console.width:
        return
    room = box
    for column, header, texts, number in zip(table.columns, headers, columns, numbers, strict=True):
        content = "\n".join(texts)
        words = min(_widest(f"{header} {'' if number else content}".split()), LONGEST_WORD)
        least = max(words, _widest(content.split("\n"))) if number else words
        column.width = least if number else None
        room += least
    if room + padding > console.width:
        table.padding = 0
    console.width = max(console.width, room)


def _widest(parts: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, parts), default=0)


def _json_escape(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1]
