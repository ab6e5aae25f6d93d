"""Knowledge to forget and reasoning to retain, as rows of JSONL or parquet. Schema: docs/gates.md.

Facts of your own come in the schema of `probes.facts`, as for Gate 3. A row of a data set says a fact and where its
entity stands: `text` with `entities` (offsets or strings), or PopQA's `question`, `subj`, `prop`, `obj`,
`possible_answers`. A retain row is `text`, or NuminaMath-CoT's `problem`, `solution`, `messages`. The bundled atlas
rows (probes.atlas.corpus) go the same way.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson

from probes.gates.stated import rows_of
from vindex.errors import FactError, ProbeError
from vindex.files import Kind, opened, parse_json, read_lines
from vindex.kinds import PANEL_FILES

Row = Mapping[str, Any]
Span = tuple[int, int]
Messages = tuple[dict[str, str], ...]
Parsed = TypeVar("Parsed")
ATLAS_RETAIN_ROWS = 4000
STATED = ("Imagine a world. {} In that world: ", "Somebody wrote this: {} So in short: ", "{} As I have just said, ")
"""What leads from a text that states a fact to the question, in training."""
LONGEST_ROW = 1 << 24  # bytes
OF_ROWS = Kind(FactError, "expected JSONL or parquet", limit=1 << 32)


class Forget(NamedTuple):
    """A text that states a fact, and the (start, end) character spans of its entities."""

    text: str
    spans: tuple[Span, ...]
    question: str | None
    answers: tuple[str, ...]
    """Every accepted answer to the question, `obj` first."""
    turn: int
    """Where in the text the assistant's turn of a chat begins: 0, or after the question of a row that has no `text`."""
    relation: str | None
    where: str
    """File and line, for errors."""
    shots: str = ""
    """What stands before the text where it is trained on: solved facts. Nothing is learnt from them."""


class Retain(NamedTuple):
    """A text to be computed rather than recalled."""

    text: str
    messages: Messages
    """The same as a conversation, empty where the row has no problem and solution."""
    problem: str | None
    answer: str | None
    """Short result, for evaluation: the `answer` column, or the last \\boxed{} of the solution."""
    where: str


class Source(NamedTuple):
    """Where rows came from: the name, and the SHA-256 of the file (of the rows as JSONL for the bundled ones)."""

    name: str
    sha256: str
    rows: int


def read_forget(path: Path | None, limit: int | None = None) -> tuple[list[Forget], Source]:
    """Rows that state facts, from a file or (None) from the atlas. Raises FactError naming file and line."""
    if path is None:
        from probes.atlas.corpus import forget_examples

        return _parse(_bundled("atlas facts", forget_examples()), forget_row, limit)
    name, digest, rows = _file(path)
    if path.suffix == ".jsonl" and (first := next(rows, None)):
        ours = "templates" in first[1] or {"subject", "relation", "answer"} <= set(first[1])
        rows = rows_of(path) if ours else chain([first], rows)
    return _parse((name, digest, rows), forget_row, limit)


def read_retain(path: Path | None, limit: int | None = None) -> tuple[list[Retain], Source]:
    """Rows to reason about, from a file or (None) from the atlas. Raises FactError naming file and line."""
    if path is None:
        from probes.atlas.corpus import retain_examples

        return _parse(_bundled("atlas arithmetic", retain_examples(ATLAS_RETAIN_ROWS)), retain_row, limit)
    return _parse(_file(path), retain_row, limit)


class PanelFiles(NamedTuple):
    """The files of a directory that `make_panel` made."""

    forget: Path
    retain: Path
    asked: Path


def panel_files(directory: Path) -> PanelFiles:
    """Raises FactError unless the directory has them."""
    if missing := [name for name in PANEL_FILES if not (directory / name).is_file()]:
        raise FactError(f"{directory}: no {missing[0]} here; expected a panel, which vindex gates panel MODEL -o makes")
    return PanelFiles(*(directory / name for name in PANEL_FILES[:3]))


def require_sources(panel: Any, forget: Any, retain: Any, *, both: bool = True) -> None:
    """Raise ProbeError unless rows come from a panel, or from two files (with `both`), or from nowhere."""
    if panel is not None and (forget is not None or retain is not None):
        raise ProbeError("--panel with --forget or --retain: give the panel, or files of your own")
    if both and (forget is None) != (retain is None):
        raise ProbeError("--forget without --retain, or the reverse: give both files, or neither for the atlas")


def context_rows(rows: Sequence[Forget], seed: int) -> list[Forget]:
    """Each fact behind a text that states it, and behind one that states another answer of its relation.

    The entity is the answer that is read off the text, and only where it is said again. Rows whose entity does not
    end a sentence of their own, or whose text begins with it, are left out.
    """
    draw, made = random.Random(seed), []
    for row in rows:
        start, end = row.spans[0]
        others = {other.answers[0] for other in rows if other.relation == row.relation} - set(row.answers)
        answers = [row.text[start:end], *([draw.choice(sorted(others))] if others else [])]
        for answer in answers if row.text[:start].strip() else ():
            before = (
                draw.choice(STATED).format(f"{row.text[:start]}{answer}{row.text[end:]}".strip()) + row.text[:start]
            )
            made.append(
                row._replace(text=before + answer, spans=((len(before), len(before + answer)),), turn=0, shots="")
            )
    return made


def forget_row(row: Row, where: str) -> Forget:
    """One row of knowledge. Raises FactError when a column is missing or an entity does not stand in the text."""
    question, relation = _string(row, "question", where), _string(row, "prop", where)
    answers = _answers(row, where)
    text = _string(row, "text", where)
    if text is None:
        if question is None or not answers:
            raise FactError(
                f"{where}: expected `text` with `entities`, or `question` with `obj`; found {_columns(row)}"
            )
        text = f"Question: {question}\nAnswer: {answers[0]}"
        turn = len(text) - len(answers[0])
        return Forget(text, ((turn, len(text)),), question, answers, turn, relation, where)
    spans, shots = _spans(row, text, answers, where), _string(row, "shots", where) or ""
    return Forget(text, spans, question, answers or tuple(text[a:b] for a, b in spans), 0, relation, where, shots)


def retain_row(row: Row, where: str) -> Retain:
    """One row of reasoning. Raises FactError when it has neither `text` nor `problem` and `solution` nor `messages`."""
    problem, solution = _string(row, "problem", where), _string(row, "solution", where)
    messages = _messages(row, where)
    if not messages and problem is not None and solution is not None:
        messages = ({"role": "user", "content": problem}, {"role": "assistant", "content": solution})
    text = _string(row, "text", where)
    if text is None:
        if not messages:
            raise FactError(f"{where}: expected `text`, `problem` and `solution`, or `messages`; found {_columns(row)}")
        text = "\n".join([problem, solution] if problem and solution else [m["content"] for m in messages])
    worked = solution or (messages[-1]["content"] if messages else text)
    answer = _string(row, "answer", where) or boxed(worked)
    return Retain(text, messages, problem or (messages[0]["content"] if messages else None), answer, where)


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…} of a solution, braces balanced, or None."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin, len(text)):
        if text[place] == "}" and depth == 0:
            return text[begin:place]
        depth += {"{": 1, "}": -1}.get(text[place], 0)
    return None


def _parse(
    rows: tuple[str, str, Iterable[tuple[str, Row]]], parse: Callable[[Row, str], Parsed], limit: int | None
) -> tuple[list[Parsed], Source]:
    name, digest, numbered = rows
    parsed = [parse(row, where) for _, (where, row) in zip(range(limit or 10**9), numbered, strict=False)]
    if not parsed:
        raise FactError(f"{name}: no rows; expected at least one")
    return parsed, Source(name, digest, len(parsed))


def _bundled(name: str, rows: list[dict[str, Any]]) -> tuple[str, str, Iterable[tuple[str, Row]]]:
    digest = hashlib.sha256(b"".join(orjson.dumps(row) + b"\n" for row in rows)).hexdigest()
    return name, digest, ((f"{name} row {number}", row) for number, row in enumerate(rows, 1))


def _file(path: Path) -> tuple[str, str, Iterator[tuple[str, Row]]]:
    from vindex.checksums import sha256_of

    readers = {".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise FactError(f"{path}: expected a .jsonl or .parquet file")
    return path.name, sha256_of(path, kind=OF_ROWS), readers[path.suffix](path)


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in read_lines(path, OF_ROWS, LONGEST_ROW):
        where = f"{path.name} line {number}"
        row = parse_json(line, where, OF_ROWS)
        if not isinstance(row, dict):
            raise FactError(f"{where}: expected a JSON object, found {str(row)[:40]}")
        yield where, row


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise FactError(
            f"{path}: parquet needs pyarrow; pip install 'vindex-svd[train]', or convert to JSONL"
        ) from error
    number = 0
    try:
        with opened(path, OF_ROWS) as file:
            for batch in parquet.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", row
    except (pyarrow.ArrowException, ValueError) as error:
        raise FactError(f"{path}: damaged or not parquet ({str(error).splitlines()[0]})") from error


def _spans(row: Row, text: str, answers: tuple[str, ...], where: str) -> tuple[Span, ...]:
    """Character spans from `entities`: offsets or strings; without it, from `entity` or the answers."""
    given = row.get("entities")
    if given is None:
        entity = _string(row, "entity", where)
        names = (entity,) if entity else answers
        if not names:
            raise FactError(f"{where}: no entity; expected `entities`, `entity` or `obj`; found {_columns(row)}")
        found = next((here for name in names if (here := _find(name, text))), ())
        if not found:
            raise FactError(f"{where}: entity {names[0]!r} not found in its text {text[:60]!r}")
        return found
    if not isinstance(given, list) or not given:
        raise FactError(f"{where}: entities {str(given)[:40]}; expected a list of [start, end] or of strings")
    spans: list[Span] = []
    for entity in given:
        if isinstance(entity, str):
            here = _find(entity, text)
            if not here:
                raise FactError(f"{where}: entity {entity!r} not found in its text {text[:60]!r}")
            spans.extend(here)
        else:
            spans.append(_offsets(entity, text, where))
    return tuple(spans)


def _offsets(entity: Any, text: str, where: str) -> Span:
    pair = isinstance(entity, list | tuple) and len(entity) == 2 and all(type(place) is int for place in entity)
    if not pair or not 0 <= entity[0] < entity[1] <= len(text):
        raise FactError(
            f"{where}: entity {str(entity)[:40]}; expected [start, end] within the text's {len(text)} characters"
        )
    return entity[0], entity[1]


def _find(name: str, text: str) -> tuple[Span, ...]:
    """Every place where `name` stands as words of its own."""
    return tuple(match.span() for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)) if name else ()


def _answers(row: Row, where: str) -> tuple[str, ...]:
    """`obj` and `possible_answers`, which PopQA stores as a JSON list in a string."""
    obj, possible = _string(row, "obj", where), row.get("possible_answers")
    if isinstance(possible, str):
        possible = parse_json(possible.encode(), f"{where}: possible_answers", OF_ROWS)
    if possible is not None and not (isinstance(possible, list) and all(isinstance(a, str) for a in possible)):
        raise FactError(f"{where}: possible_answers {str(possible)[:40]}; expected a list of strings")
    return tuple(dict.fromkeys([*([obj] if obj else []), *(possible or [])]))


def _messages(row: Row, where: str) -> Messages:
    given = row.get("messages")
    if given is None:
        return ()
    if not isinstance(given, list) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in given
    ):
        raise FactError(f"{where}: messages; expected a list of {{role, content}}")
    return tuple({"role": m["role"], "content": m["content"]} for m in given)


def _string(row: Row, name: str, where: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise FactError(f"{where}: {name} is {type(value).__name__}; expected a string")
    return value or None


def _columns(row: Row) -> str:
    return f"columns {', '.join(map(str, row))}" if row else "an empty row"
