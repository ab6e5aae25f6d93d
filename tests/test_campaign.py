"""Hostile and damaged inputs, seeded: whatever is done to a file, a command keeps its promises (tests/campaign)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CASES = 420


def test_every_command_keeps_its_promises_whatever_it_is_given():
    """In a process of its own, which forks one for each command: this one has threads by now."""
    command = [sys.executable, "-m", "tests.campaign", "--cases", str(CASES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"\n{CASES} cases, " in done.stdout, done.stdout[-20_000:] + done.stderr[-2_000:]
