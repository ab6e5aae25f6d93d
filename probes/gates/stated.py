"""Facts (probes.facts) said in the wordings of their relation, as rows that gates are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from probes.facts import Fact, Relation, bundled, read
from vindex.errors import FactError


def lead(fact: Fact, relation: Relation, wording: int) -> str:
    """What stands before the answer in one of the relation's wordings; 0 is the one asked in."""
    return _wordings(relation)[wording].replace("{}", fact.subject)


def statement(fact: Fact, relation: Relation, wording: int, answer: str | None = None) -> str:
    """A sentence that says the fact, or another answer."""
    return f"{lead(fact, relation, wording)} {answer or fact.answer}."


def row(fact: Fact, relation: Relation, wording: int, shots: str = "") -> dict[str, Any]:
    """A forget row (docs/gates-method.md) that states the fact behind `shots`."""
    text = statement(fact, relation, wording)
    start = len(text) - 1 - len(fact.answer)
    return {
        "shots": shots, "text": text, "entities": [[start, len(text) - 1]], "subj": fact.subject,
        "prop": relation.name, "obj": fact.answer, "question": relation.question.replace("{}", fact.subject),
    }  # fmt: skip


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(SUBJECT/RELATION, row) of each fact of a facts file in each wording but the first, which is kept for asking.

    Relations of the bundled panel need no line of their own. Raises FactError as `probes.facts.read`, and where a
    relation has no second template that is not a question.
    """
    panel = read(path, base=replace(bundled(), facts=()))
    for fact in panel.facts:
        relation = panel.relations[fact.relation]
        if len(_wordings(relation)) < 2:
            raise FactError(f"{path}: relation {relation.name!r} has no two templates without `?`; add one")
        for wording in range(1, len(_wordings(relation))):
            yield fact.name, row(fact, relation, wording)


def _wordings(relation: Relation) -> list[str]:
    return [template for template in relation.templates if "?" not in template]
