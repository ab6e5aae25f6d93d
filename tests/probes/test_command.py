"""`vindex probe` as a user runs it."""

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import probes
from probes.cli.model import load_model
from probes.suite.plot import describe
from probes.suite.words import choice_of_stages, meanings
from tests.commands import too_wide
from vindex.__main__ import main
from vindex.errors import CheckpointError

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
    options = ("--all", "--vindex", tiny_vindex, "-o", targets["json"], "--plot", targets["html"])
    status = run(monkeypatch, *common, *options)
    shown = capsys.readouterr()
    assert status == 0, shown.err
    record = json.loads(targets["json"].read_text())
    for symbol, entry in record["constants"].items():
        assert symbol in shown.out and entry["name"] in shown.out
    for words in ("no_sink", "|h| < 0.001", "definition unpublished", "Qwen3-8B", "var@64", "random floor", "null"):
        assert words in shown.out
    assert not too_wide(shown.out, 100)
    page = targets["html"].read_text()
    panels, heatmap = describe(record)
    assert all(panel.title.split(":")[0] in page for panel in panels) and heatmap.title in page
    assert "<script src" not in page and "Plotly.newPlot" in page  # opens offline
    assert run(monkeypatch, *common, "--plot", targets["png"], "--json") == 0
    assert json.loads(capsys.readouterr().out)["constants"].keys() == record["constants"].keys()
    assert targets["png"].read_bytes().startswith(b"\x89PNG")


def test_five_rows_and_a_sentence_each_unless_all_is_asked_for(tiny_checkpoint, tmp_path, monkeypatch, capsys, wide):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "probe", tiny_checkpoint, "--text", "code", "-o", "p.json") == 0
    record, shown = json.loads(Path("p.json").read_text()), capsys.readouterr().out
    assert record["constants"]["C1"]["interval"] is None
    assert record["constants"]["C1"]["mean"] == record["constants"]["C1"]["value"]
    flat = " ".join(shown.split())
    assert "over 1 text;" in flat and "no_sink" not in flat and "published" not in flat
    for symbol, sentence in meanings(record).items():
        assert f"{symbol} {sentence}" in flat
    assert choice_of_stages(record) in flat
    assert shown.splitlines()[-1] == "next: vindex card VINDEX --probe p.json"


def test_numbers_stay_whole_at_60_columns(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    saved = tmp_path / "p.json"
    assert run(monkeypatch, "probe", tiny_checkpoint, "--text", "code", "--text", "story", "-o", saved) == 0
    shown = capsys.readouterr().out
    assert not too_wide(shown, 60)
    low, high = json.loads(saved.read_text())["constants"]["C1"]["interval"]
    assert any(f"{low:#.3g} … {high:#.3g}" in line for line in shown.splitlines())


def test_progress_moves_with_every_layer_of_every_text_and_weight(tiny):
    seen = []

    def stage(name, total):
        seen.append([name, total, 0, set()])

        def advance(count, note=""):
            seen[-1][2] += count
            seen[-1][3].add(note)

        return advance

    probes.constants(tiny, texts=["factual", "code"], batch_size=2, progress=stage)
    size = (tiny.path / "model.safetensors").stat().st_size
    assert [(name, total, done) for name, total, done, _ in seen] == [
        ("hashing", size, size),
        ("texts", 2 * 3, 2 * 3),
        ("weights", 2 * 3, 2 * 3),
    ]
    assert seen[1][3] == {"factual, code"}


def test_ctrl_c_says_that_nothing_was_written(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("probes.suite.readings.read_layer", stop)
    assert run(monkeypatch, "probe", tiny_checkpoint, "-o", tmp_path / "p.json") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; nothing was written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["m.gguf", ".", "hf://someone/model/m.gguf"])
def test_a_gguf_is_told_what_to_do(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert run(monkeypatch, "probe", name) == 1
    assert capsys.readouterr().err == (
        f"vindex: {name}: GGUF; a live model is loaded from safetensors: give the checkpoint that the GGUF was made "
        "of, a directory or a Hub id. Without one, vindex build makes a vindex of the GGUF file\n"
    )


@pytest.mark.parametrize(
    ("capability", "asked", "found"),
    [("AVX2", None, "AUTO"), ("AVX2", "COMPATIBLE", "COMPATIBLE"), ("AVX512", None, None)],
)
def test_only_a_command_on_a_processor_without_avx512_asks_for_reproducible_products(
    tiny_checkpoint, monkeypatch, capability, asked, found
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setenv("MKL_CBWR", asked or "")
    if asked is None:
        monkeypatch.delenv("MKL_CBWR")
    probes.load(tiny_checkpoint, device="cpu")
    assert os.environ.get("MKL_CBWR") == asked
    load_model(str(tiny_checkpoint), device="cpu")
    assert os.environ.get("MKL_CBWR") == found


def test_garbage_is_collected_again_once_a_command_has_its_model(tiny_checkpoint):
    for collecting in (False, True):
        (gc.enable if collecting else gc.disable)()
        load_model(str(tiny_checkpoint), device="cpu")
        assert gc.isenabled() == collecting and gc.get_freeze_count()
    with pytest.raises(CheckpointError):
        load_model("no/such/model/here")
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "x.pdf"], "x.pdf: plots are written as .html or .png"),
        (["-o", "nowhere/x.json"], "nowhere/x.json: the directory nowhere does not exist"),
        (["-o", "."], ".: is a directory"),
        (["-o", "/dev/null"], "/dev/null: is a device, a pipe or a socket; name a plain file\n"),
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
    command = [sys.executable, "-m", "vindex", "probe", "someone/tiny", "--text", "factual", "--json"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["model"]
    assert (model["name"], model["revision"]) == ("someone/tiny", commit)
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    assert model["weights_sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}


def test_a_place_that_cannot_be_written_is_one_line(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    for option, name in (("-o", "p.json"), ("--plot", "p.html")):
        monkeypatch.setattr("os.replace", lambda source, to: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert run(monkeypatch, "probe", tiny_checkpoint, "--text", "factual", option, tmp_path / name) == 1
        monkeypatch.undo()
        assert f"{name}: cannot be written: No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_card_takes_the_record(tiny_checkpoint, tiny_vindex, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "tiny.vindex"
    shutil.copytree(tiny_vindex, copy)
    record = tmp_path / "p.json"
    assert run(monkeypatch, "probe", tiny_checkpoint, "--text", "factual", "-o", record) == 0
    assert run(monkeypatch, "card", copy, "--probe", record) == 0
    card = (copy / "README.md").read_text()
    for symbol, entry in json.loads(record.read_text())["constants"].items():
        assert symbol in card and entry["name"] in card
