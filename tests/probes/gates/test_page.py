"""docs/gates.md is run, command by command and line by line, with fewer steps and prompts than it says."""

from __future__ import annotations

from typer.testing import CliRunner

from tests.conftest import build_quietly
from tests.test_docs import FEW_ROWS, blocks, documented_commands
from vindex.__main__ import app
from vindex.demo import CHECKPOINT

LESS = {
    "train": ["--max-steps", "2", "--forget-limit", "32", "--retain-limit", "64"],
    "eval": ["--count", "4", "--thresholds", "0.5", "--neutral", "n.txt"],
    "apply": ["--tokens", "2"],
    "panel": ["--pool", "8", "--facts", "4", "--items", "4"],
    "mask": [],
    "link": ["-k", "2"],
}


def test_the_commands_of_the_page_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(*FEW_ROWS)
    (tmp_path / "n.txt").write_text("Emma walked to the market.")
    commands = documented_commands("docs/gates.md")
    own = {command[1] for command in commands if command[0] == "gates"}
    assert own == set(LESS) | {"stats", "bake", "convert", "compare"}
    for command in commands:
        done = CliRunner().invoke(app, [*command, *(LESS.get(command[1], []) if command[0] == "gates" else [])])
        assert done.exit_code == 0, (command, done.output, done.exception)


def test_the_python_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(*FEW_ROWS)
    build_quietly(CHECKPOINT, tmp_path / "atlas.vindex")
    (tmp_path / "n.txt").write_text("Emma walked to the market.")
    code = "\n".join(blocks("docs/gates.md", "python"))
    for said, instead in (
        ("max_steps=20", "max_steps=2, forget_limit=32, retain_limit=64"),
        ("count=8", "count=4, neutral='n.txt'"),
    ):
        assert said in code
        code = code.replace(said, instead)
    exec(code, {})
    assert "<gates on atlas: area " in capsys.readouterr().out and (tmp_path / "eval.html").exists()
