"""`vindex probe` as a user runs it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from probes.suite.plot import describe
from vindex.__main__ import main

ROOT = Path(__file__).parent.parent.parent


def run(monkeypatch, *arguments) -> int:
    """The exit status of `vindex ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["vindex", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code or 0


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def test_tables_record_and_plots(tiny_checkpoint, tiny_vindex, tmp_path, monkeypatch, capsys, wide):
    targets = {suffix: tmp_path / f"probe.{suffix}" for suffix in ("json", "html", "png")}
    common = ("probe", tiny_checkpoint, "--text", "factual", "--text", "story", "--device", "cpu")
    status = run(monkeypatch, *common, "--vindex", tiny_vindex, "--json", targets["json"], "--plot", targets["html"])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    record = json.loads(targets["json"].read_text())
    for symbol, entry in record["constants"].items():
        assert symbol in shown.out and entry["name"] in shown.out
    for words in ("no_sink", "|h| < 0.001", "definition unpublished", "Qwen3-8B", "var@64", "random floor", "null"):
        assert words in shown.out
    assert max(map(len, shown.out.splitlines())) <= 100
    page = targets["html"].read_text()
    panels, heatmap = describe(record)
    assert all(panel.title.split(":")[0] in page for panel in panels) and heatmap.title in page
    assert "<script src" not in page and "Plotly.newPlot" in page  # opens offline
    assert run(monkeypatch, *common, "--plot", targets["png"], "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["constants"].keys() == record["constants"].keys()
    assert targets["png"].read_bytes().startswith(b"\x89PNG")


def test_one_text_has_no_interval(tiny_checkpoint, tmp_path, monkeypatch, capsys, wide):
    assert run(monkeypatch, "probe", tiny_checkpoint, "--text", "code", "--json", tmp_path / "p.json") == 0
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["constants"]["C1"]["interval"] is None
    assert record["constants"]["C1"]["mean"] == record["constants"]["C1"]["value"]
    assert "over 1 text;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "x.pdf"], "x.pdf: plots are written as .html or .png"),
        (["--json", "nowhere/x.json"], "nowhere/x.json: the directory nowhere does not exist"),
        (["--json", "."], ".: is a directory"),
        (["--json", "/dev/null"], "/dev/null: is a device, a pipe or a socket; name a plain file, or - for stdout"),
        (["--json", "/dev/stdout"], "/dev/stdout: is a symbolic link, which is not followed; name a plain file, or -"),
        (["--plot", "/dev/stdout"], "/dev/stdout: is a symbolic link, which is not followed; name a plain file\n"),
        (["--text", "no-such-text"], "no-such-text: cannot be read (No such file or directory)"),
        (["--vindex", "no-such-vindex"], "no-such-vindex"),
        (["--dtype", "int3"], "dtype 'int3'"),
    ],
)
def test_bad_input_is_one_line_on_stderr(tiny_checkpoint, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "probe", tiny_checkpoint, *options) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("vindex: ") and message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_the_hub_cache_is_named_by_its_commit(tiny_checkpoint, tmp_path):
    """Offline, from a cache laid out as the Hub client leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_checkpoint, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    command = [sys.executable, "-m", "vindex", "probe", "someone/tiny", "--text", "factual", "--json", "-"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["model"]
    assert (model["name"], model["revision"]) == ("someone/tiny", commit)
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    assert model["weights_sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}


def test_a_place_that_cannot_be_written_is_one_line(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    for option, name in (("--json", "p.json"), ("--plot", "p.html")):
        monkeypatch.setattr("os.replace", lambda source, to: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert run(monkeypatch, "probe", tiny_checkpoint, "--text", "factual", option, tmp_path / name) == 1
        monkeypatch.undo()
        assert f"{name}: cannot be written: No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_card_takes_the_record(tiny_checkpoint, tiny_vindex, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "tiny.vindex"
    shutil.copytree(tiny_vindex, copy)
    record = tmp_path / "p.json"
    assert run(monkeypatch, "probe", tiny_checkpoint, "--text", "factual", "--json", record) == 0
    assert run(monkeypatch, "card", copy, "--probe", record) == 0
    card = (copy / "README.md").read_text()
    for symbol, entry in json.loads(record.read_text())["constants"].items():
        assert symbol in card and entry["name"] in card
