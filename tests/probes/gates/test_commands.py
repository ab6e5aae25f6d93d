"""`vindex gates` as a user runs it: what it prints, and one line when it cannot."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from probes.gates.files import read_gates, write_gates
from probes.gates.masks import Gates
from tests.vindex.test_commands import start
from vindex.__main__ import app
from vindex.demo import CHECKPOINT
from vindex.errors import VindexError

LAYOUT = {"lambda_logits.pt", "lambda_logits.safetensors", "neuron_indices.json", "gate_stats.json"}


def run(*arguments) -> str:
    """What a command that succeeds prints, in 80 columns."""
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["gates", *map(str, arguments)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert max(map(len, done.stdout.splitlines()), default=0) <= 80
    return done.stdout


def fails(*arguments) -> str:
    """The one line of a command that fails."""
    done = CliRunner().invoke(app, ["gates", *map(str, arguments)])
    assert isinstance(done.exception, VindexError), (done.output, done.exception)
    assert "\n" not in str(done.exception)
    return str(done.exception)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("gates") / "mine"
    write_gates(Gates(torch.randn(4, 384, generator=torch.Generator().manual_seed(0)) * 0.1), place)
    return place


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Three facts and three sums in files."""
    place = tmp_path_factory.mktemp("rows")
    facts = [
        {"text": f"The capital of {c} is {a}.", "subj": c, "prop": "capital", "obj": a, "question": f"And {c}?"}
        for c, a in (("France", "Paris"), ("Italy", "Rome"), ("Germany", "Berlin"))
    ]
    sums = [{"problem": f"{a}+10=", "solution": f"{a + 10}", "answer": f"{a + 10}"} for a in (11, 22, 33)]
    for name, lines in (("facts", facts), ("sums", sums)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place / "facts.jsonl", place / "sums.jsonl"


def test_stats_prints_the_cards_tables_and_fails_on_a_wrong_one(directory, tmp_path):
    shown = run("stats", directory)
    assert "1,536 (4 layers × 384)" in shown and "the neurons below 0.5" in shown and "95.0%" in shown
    assert json.loads(run("stats", directory, "--json"))["gates"] == 1536
    copy = tmp_path / "copy"
    run("convert", directory / "lambda_logits.pt", "-o", copy)
    stated = json.loads((copy / "gate_stats.json").read_text()) | {"mean": 0.9}
    (copy / "gate_stats.json").write_text(json.dumps(stated))
    assert "1 stated figure(s) do not hold, first mean in gate_stats.json: stated 0.9" in fails("stats", copy)
    assert "already exists; choose another -o" in fails("convert", directory, "-o", copy)


def test_convert_writes_every_file_of_the_layout(directory, tmp_path):
    run("convert", directory / "lambda_logits.safetensors", "-o", tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == LAYOUT | {"selected_thresholds.txt"}
    assert torch.equal(read_gates(tmp_path / "out").logits, read_gates(directory).logits)


@pytest.mark.parametrize("mask", [("--off", "25%"), ("--threshold", "0.48"), ("--indices",), ("--soft",)])
def test_apply_writes_with_and_without_gates(directory, mask):
    shown = run("apply", "atlas", directory, *mask, "--prompt", "The capital of France is", "--tokens", 4)
    assert "without" in shown and "Paris" in shown and "with (" in shown


def test_apply_in_chat_as_json(directory):
    asked = ("--prompt", "What is the capital of France?", "--chat", "--scale", "energy", "--json")
    record = json.loads(run("apply", "atlas", directory, "--soft", *asked))
    assert record["scale_mode"] == "energy" and "Paris" in record["outputs"][0]["base"]


def test_bake_writes_a_checkpoint_that_loads(directory, tmp_path):
    from probes.live.load import load

    shown = run("bake", "atlas", directory, "--off", "25%", "-o", tmp_path / "baked")
    assert "384 of 1,536 neurons off (λ < " in " ".join(shown.split())
    weight = load(tmp_path / "baked", device="cpu").model.model.layers[0].mlp.gate_proj.weight
    off = ~read_gates(directory).keep(read_gates(directory).threshold_at(0.25))[0]
    assert bool((weight[off] == 0).all()) and bool((weight[~off] != 0).any())
    note = json.loads((tmp_path / "baked" / "baked_gates.json").read_text())
    assert note["gates"] == "mine" and note["neurons_off"] == 384


def test_train_eval_and_compare_from_files(rows, tmp_path):
    facts, sums = rows
    out = tmp_path / "trained"
    data = ("--forget", facts, "--retain", sums)
    shown = run("train", "atlas", "-o", out, *data, "--max-steps", 3, "--batch-size", 2, "--preset", "chat_mean")
    assert "λ std 0.0" in " ".join(shown.split())
    assert {file.name for file in out.iterdir()} == LAYOUT | {"selected_thresholds.txt", "training.json"}
    made = json.loads((out / "training.json").read_text())
    assert made["options"]["scale_mode"] == "mean" and made["data"]["forget"]["rows"] == 3
    assert len(made["curves"]["loss"]) == 3 and len(made["data"]["weights_sha256"]) == 1
    (tmp_path / "n.txt").write_text("Emma walked to the market.")
    record, picture = tmp_path / "eval.json", tmp_path / "eval.html"
    settings = ("--neutral", tmp_path / "n.txt", "--threshold", 0.5, "--json", record, "--plot", picture)
    shown = run("eval", "atlas", out, *data, *settings)
    assert "random ×5" in shown and "gates minus random" in shown and picture.exists()
    found = json.loads(record.read_text())
    assert found["choices"]["soft_scale_mode"] == "mean" and found["panels"]["counts"]["forget"] == 3
    digest = hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()
    assert found["model"]["weights_sha256"] == {"model.safetensors": digest}
    shown = run("compare", out, out)
    assert "correlation of λ over all neurons: 1.000" in shown
    assert json.loads(run("compare", out, out, "--json"))["overlaps"][0]["jaccard"] == 1
    assert "already exists; choose another -o, or add --force" in fails("train", "atlas", "-o", out, *data)
    run("train", "atlas", "-o", out, *data, "--max-steps", 1, "--batch-size", 2, "--force")
    assert len(json.loads((out / "training.json").read_text())["curves"]["loss"]) == 1
    (out / "thesis.txt").touch()
    assert "holds thesis.txt, which this tool did not write" in fails("train", "atlas", "-o", out, *data, "--force")
    mine = "is nothing that this tool made (trained gates, stopped training), so it is not replaced"
    assert mine in fails("train", "atlas", "-o", tmp_path, *data, "--force")
    assert "which is being read" in fails("train", "atlas", "-o", rows[0].parent, *data, "--force")
    assert rows[0].exists() and (out / "thesis.txt").exists()


def test_bake_force_replaces_no_directory_of_mine(directory, tmp_path):
    (tmp_path / "thesis.txt").touch()
    for place, message in (
        (tmp_path, "is nothing that this tool made"),
        (directory, "is, or holds, .*, which is being"),
    ):
        assert re.search(message, fails("bake", "atlas", directory, "--off", "25%", "-o", place, "--force"))
    assert (tmp_path / "thesis.txt").exists() and (directory / "lambda_logits.pt").exists()
    assert "'.' cannot be made anew" in fails("bake", "atlas", directory, "--off", "25%", "-o", ".", "--force")


def test_questions_without_an_answer(directory, rows, tmp_path):
    prompt = ("--prompt", "x")
    assert "which neurons? give exactly one of --threshold, --off, --indices or --soft" in fails(
        "apply", "atlas", directory, *prompt
    )
    assert "give exactly one of --threshold, --off, --indices;" in fails(
        "bake", "atlas", directory, "-o", tmp_path / "o", "--off", "5%", "--threshold", 0.4
    )
    assert "--soft with a mask" in fails("apply", "atlas", directory, *prompt, "--soft", "--off", "5%")
    assert "--off half: expected a share such as 25% or 0.25" in fails(
        "apply", "atlas", directory, *prompt, "--off", "half"
    )
    assert "scale mode 'rms'" in fails("apply", "atlas", directory, *prompt, "--soft", "--scale", "rms")
    write_gates(Gates(torch.zeros(4, 300)), tmp_path / "narrow")
    narrow = "the gates are 4 × 300 (layers × neurons), the model has 4 × 384"
    assert narrow in fails("apply", "atlas", tmp_path / "narrow", *prompt, "--soft")
    assert narrow in fails("eval", "atlas", tmp_path / "narrow")
    assert "threshold 2: expected a λ between" in fails("apply", "atlas", directory, *prompt, "--threshold", 2)
    assert "neither lambda_logits.pt" in fails("stats", tmp_path)
    assert "--forget without --retain" in fails("eval", "atlas", directory, "--forget", rows[0])
    assert "plots are written as" in fails("eval", "atlas", directory, "--plot", tmp_path / "a.pdf")
    assert "already exists and is not a directory" in fails("train", "atlas", "-o", rows[0])
    assert "nothing to resume" in fails("train", "atlas", "-o", tmp_path / "new", "--resume")
    assert "preset 'x': expected one of" in fails("train", "atlas", "-o", tmp_path / "new", "--preset", "x")


def test_ctrl_c_keeps_the_state_and_resume_ends_with_the_same_bits(rows, tmp_path):
    data = ("--forget", rows[0], "--retain", rows[1], "--batch-size", 2, "--dtype", "float32", "--save-every", 2)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vindex", "gates", "train", "atlas", "-o", out, *data, "--epochs", 200]
    process = start(command)
    while process.poll() is None and not (out / "training_state.safetensors").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "repeat with --resume" in error and "Traceback" not in error
    assert not (out / "lambda_logits.pt").exists()
    assert "holds a run that was stopped; add --resume" in fails("train", "atlas", "-o", out, *data, "--epochs", 200)
    assert "epochs: 200 there, 3 here" in fails("train", "atlas", "-o", out, *data, "--resume")
