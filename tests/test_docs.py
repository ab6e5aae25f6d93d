"""The documentation is run: every `$ vindex …` line of a console block, and every python block, in order."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vindex
from tests.vindex.test_commands import run

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/commands.md", "docs/probes.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def documented_commands(page: str) -> list[list[str]]:
    lines = "\n".join(blocks(page, "console")).splitlines()
    return [shlex.split(line.removeprefix("$ vindex ")) for line in lines if line.startswith("$ vindex ")]


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_run_in_order(page, tmp_path):
    commands = documented_commands(page)
    assert commands
    for command in commands:
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)


def test_every_command_has_an_example():
    listed = re.findall(r"^  (\w+)  ", run("--help").stdout.partition("Commands:")[2], re.MULTILINE)
    shown = {command[0] for page in PAGES for command in documented_commands(page)}
    assert len(listed) >= 8 and set(listed) <= shown


@pytest.mark.parametrize("page", ["README.md", "docs/probes.md"])
def test_python_blocks_run(page, tmp_path):
    run("build", "atlas", "-o", "atlas.vindex", cwd=tmp_path)
    code = "\n".join(blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_format_page_names_every_file():
    from vindex.format import FILES

    page = (ROOT / "docs" / "format.md").read_text()
    assert all(f"`{spec.name}`" in page for spec in FILES)
    assert vindex.__doc__
