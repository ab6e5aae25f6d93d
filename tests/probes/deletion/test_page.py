"""docs/gate3.md is run, every command and every line, around the one whole deletion that all tests share."""

from __future__ import annotations

import re
import shlex

import pytest
from typer.testing import CliRunner

from probes.deletion import delete
from tests.test_docs import ROOT, blocks, fenced
from vindex.__main__ import app

PAGE = "docs/gate3.md"


@pytest.fixture
def shared(tmp_path, monkeypatch, deleted):
    """A directory in which each deletion is that of France; patches are measured."""
    monkeypatch.chdir(tmp_path)
    whole = delete.run
    monkeypatch.setattr(delete, "run", lambda bench, fact, patch=None: whole(bench, fact, patch) if patch else deleted)
    return tmp_path


def test_the_commands_of_the_page_run_in_order(shared):
    rows = next(block for block in blocks(PAGE, "json") if '"answer_ids"' in block)
    (shared / "mine.jsonl").write_text(re.sub(r",\n +", ", ", rows).replace('"…"', '"{} is paid by", "{} left"'))
    lines = re.findall(r"^(?:\$ )?vindex (.*)", fenced(ROOT / PAGE), re.MULTILINE)
    assert len(lines) == 13
    for line in lines:
        words = shlex.split(line.replace("MODEL", "atlas"), comments=True)
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (line, done.output, done.exception)


def test_the_python_of_the_page_runs_and_says_what_it_says(shared):
    (code,) = blocks(PAGE, "python")
    found: dict = {}
    exec(code, found)
    assert "# True, True, False" in code
    d = found["d"]
    assert (d.published.passed, d.strict.passed, d.robust.passed) == (True, True, False)
    assert (shared / "paris.html").exists() and found["many"].rates("forward")["strict"]
