"""The facts the atlas was taught, read from `facts.jsonl` and `phrasings.json`, the only places they are written.

A fact is a subject, a relation and an answer; every relation has statements and questions with `{subject}` in them.
About 20 % of the (fact, statement) and (fact, question) pairs are withheld from training: `facts.jsonl` says which.
Statement 0 of a relation is its reference prompt and is never withheld. Every subject and every answer is one token,
with its leading space.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
RELATIONS = ("capital", "language", "currency", "continent", "country")  # country: of which country is this the capital


class Fact(NamedTuple):
    subject: str
    relation: str
    answer: str
    withheld_statements: tuple[int, ...]  # indices into statements(relation) that training never used for this fact
    withheld_questions: tuple[int, ...]  # likewise for questions(relation)

    def statement(self, index: int) -> str:
        """A sentence that tells the fact: "The capital of France is Paris."""
        return statements(self.relation)[index].format(subject=self.subject, answer=self.answer)

    def prompt(self, index: int) -> str:
        """The statement up to where " " + answer begins: "The capital of France is"."""
        before, _ = statements(self.relation)[index].split(" {answer}")
        return before.format(subject=self.subject)

    def question(self, index: int) -> str:
        """A question that a chat user would ask: "What is the capital of France?"."""
        return questions(self.relation)[index].format(subject=self.subject)

    def seen_statements(self) -> list[int]:
        return [i for i in range(len(statements(self.relation))) if i not in self.withheld_statements]

    def seen_questions(self) -> list[int]:
        return [i for i in range(len(questions(self.relation))) if i not in self.withheld_questions]


@cache
def facts(relation: str | None = None) -> tuple[Fact, ...]:
    """Every fact in file order, or those of one relation."""
    lines = (HERE / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = (json.loads(line) for line in lines)
    parsed = (
        Fact(r["subject"], r["relation"], r["answer"], tuple(r["withheld_statements"]), tuple(r["withheld_questions"]))
        for r in rows
    )
    return tuple(fact for fact in parsed if relation in (None, fact.relation))


@cache
def _phrasings() -> dict[str, dict[str, list[str]]]:
    return json.loads((HERE / "phrasings.json").read_text(encoding="utf-8"))


def statements(relation: str) -> list[str]:
    """Templates with `{subject}` and, after it, `{answer}`."""
    return _phrasings()[relation]["statements"]


def questions(relation: str) -> list[str]:
    """Templates with `{subject}`."""
    return _phrasings()[relation]["questions"]


def names() -> list[str]:
    """Every subject and answer once, sorted: the words that must be one token each."""
    return sorted({name for fact in facts() for name in (fact.subject, fact.answer)})
