"""Hostile and damaged inputs, seeded: whatever is done to a file, a command keeps its promises (tests/campaign)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.cases import Case
from tests.campaign.judge import Ended, broken_promise, snapshot

ROOT = Path(__file__).parent.parent
CASES = 300


def test_every_command_keeps_its_promises_whatever_it_is_given():
    """In a process of its own, which forks one for each command: this one has threads by now."""
    command = [sys.executable, "-m", "tests.campaign", "--cases", str(CASES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"\n{CASES} cases, " in done.stdout, done.stdout[-20_000:] + done.stderr[-2_000:]


@pytest.mark.parametrize(
    ("ended", "complaint"),
    [
        (Ended(0, "a table", "", 1.0), ""),
        (Ended(1, "", "note: x\nvindex: no such file\n", 1.0), ""),
        (Ended(1, "", "Traceback (most recent call last):\nValueError\n", 1.0), "exit status 1"),
        (Ended(-9, "", "", 1.0), "exit status -9"),
        (Ended(0, "", "", 21.0), "21 s"),
        (Ended(1, "", "vindex: x: MemoryError\n", 1.0), "memory: "),
        (Ended(0, "\x1b[31m", "", 1.0), "writes '\\x1b' to the terminal"),
        (Ended(1, "", "vindex: one\nvindex: two\n", 1.0), "exit status 1 without one line"),
        (Ended(1, "a table", "", 1.0), "exit status 1 without one line"),
        (Ended(0, "", "UserWarning: look\n", 1.0), "says on stderr, with exit status 0"),
    ],
)
def test_a_broken_promise_is_told(tmp_path, ended, complaint):
    found = broken_promise((), Case([()]), ended, {}, {}, tmp_path)
    assert found.startswith(complaint) and bool(found) == bool(complaint)


def test_what_a_command_changes_where_it_may_not_is_told(tmp_path):
    place = tmp_path / "here"
    place.mkdir()
    (place / "mine").write_text("kept")
    (tmp_path / "outside").write_text("not yours")
    well, before = Ended(0, "", "", 1.0), snapshot(tmp_path)
    (place / "out").write_text("{}")
    assert broken_promise((), Case([()]), well, before, snapshot(tmp_path), place) == "made here/out"
    assert broken_promise((), Case([()], makes=["out"]), well, before, snapshot(tmp_path), place) == "out is empty"
    (place / "out").write_text("[1]")
    assert not broken_promise((), Case([()], makes=["out"]), well, before, snapshot(tmp_path), place)
    (tmp_path / "outside").write_text("changed")
    assert broken_promise((), Case([()], makes=["out"]), well, before, snapshot(tmp_path), place) == "changed outside"
    (place / "mine").unlink()
    assert broken_promise((), Case([()], makes=["out"]), well, before, snapshot(tmp_path), place) == "removed here/mine"
