"""Every number of the method stands in the docs with its sentence, and in the record."""

from __future__ import annotations

import ast
import inspect
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path

import pytest

from probes.deletion import record
from probes.deletion.options import Attacks, BaselineOptions, ForwardOptions
from probes.records import plain

DOCS = Path(__file__).parents[3] / "docs" / "gate3-method.md"
CLASSES = (ForwardOptions, BaselineOptions, Attacks)


def rows(options: type) -> list[str]:
    """The table of an options class: name, default, and the sentence that follows it in the source."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(options)).body if isinstance(node, ast.ClassDef))
    found = []
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign):
            sentence = " ".join(ast.literal_eval(text.value).split())
            found.append(f"| `{field.target.id}` | {ast.unparse(field.value)} | {sentence} |")
    return found


@pytest.mark.parametrize("options", CLASSES)
def test_the_documented_table_is_the_one_in_the_code(options):
    made = rows(options)
    assert len(made) == len(fields(options))
    text = DOCS.read_text(encoding="utf-8")
    missing = [row for row in made if row not in text.splitlines()]
    assert not missing, "\n".join(missing)


def test_the_forward_method_has_at_most_25_numbers():
    assert len(fields(ForwardOptions)) <= 25


def test_the_record_has_every_number(bench, result):
    options = record.one(result)["options"]
    assert options["forward"] == plain(asdict(bench.options.forward))
    assert options["baselines"] == plain(asdict(bench.options.baselines))
    assert options["attacks"] == plain(asdict(bench.options.attacks))
