"""docs/atlas.md prints the figures of the shipped checkpoint, and its code does what its comment says."""

import json
import re
from pathlib import Path

import pytest

from probes.atlas.corpus import MIXTURE
from probes.atlas.facts import facts
from vindex.demo import CHECKPOINT

DOCS = (Path(__file__).parents[3] / "docs" / "atlas.md").read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_training_record():
    record = json.loads((CHECKPOINT / "training.json").read_text())
    printed = dict(re.findall(r"│ (.+?) +│ ([\d.]+) │", DOCS))
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(record["figures"], abs=6e-4)


def test_the_code_prints_what_it_says(capsys):
    [block] = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    exec(compile(block, "docs/atlas.md", "exec"), {})
    [comment] = re.findall(r"# (.+)", block)
    assert capsys.readouterr().out.strip() == comment


def test_the_recipe_is_the_one_in_the_code():
    first = {name: kind.share for name, kind in MIXTURE.items()}
    second = {name: kind.practice for name, kind in MIXTURE.items()}
    printed = re.findall(r"^\| (.+?) \| (\.\d+) \| (\.\d+) \|", DOCS, re.MULTILINE)
    groups = {"comparisons, worked sums, chains": ("comparisons", "worked", "chains")}
    groups |= {"chats": ("fact chats", "sum chats", "small talk"), "sums in words": ("words",)}
    groups |= {"word problems": ("problems",)}
    for name, share, practice in printed:
        kinds = groups.get(name, (name,))
        assert float(share) == pytest.approx(sum(first.pop(kind) for kind in kinds)), name
        assert float(practice) == pytest.approx(sum(second.pop(kind) for kind in kinds)), name
    assert not first
    assert f"knows {len(facts('capital'))} countries" in DOCS
