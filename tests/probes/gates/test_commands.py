"""`vindex gates` as a user runs it: what it prints, and one line when it cannot."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from probes.cli import gates_eval, gates_train
from probes.gates.files import write_logits
from probes.gates.gates import Gates
from probes.gates.options import EvalOptions, PanelOptions, TrainOptions
from tests.commands import too_wide
from tests.probes.gates.progress import Told
from vindex.__main__ import EXAMPLES, app
from vindex.demo import CHECKPOINT
from vindex.errors import VindexError

DOCS = Path(__file__).parents[3] / "docs"
LAYOUT = {"lambda_logits.pt", "lambda_logits.safetensors", "neuron_indices.json", "gate_stats.json"}


def run(*arguments, columns: int = 80) -> str:
    """What a command that succeeds prints, which fits so many columns."""
    done = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["gates", *map(str, arguments)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "--json" in arguments or not too_wide(done.stdout, columns)
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
    write_logits(torch.randn(4, 384, generator=torch.Generator().manual_seed(0)) * 0.1, place)
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
    assert "already exists; choose another place, or replace it with --force" in fails("convert", directory, "-o", copy)
    assert "vindex gates stats" in run("convert", directory, "-o", copy, "--force")
    record = json.loads(run("convert", directory, "-o", copy, "--force", "--json"))
    assert (record["directory"], record["name"], record["total_gates"]) == (str(copy), "mine", 4 * 384)
    assert all(claim["holds"] for claim in json.loads(run("stats", copy, "--json", "-o", tmp_path / "s"))["claims"])
    assert json.loads((tmp_path / "s").read_text())["name"] == "copy"
    (copy / "gate_stats.json").write_text("{}")
    assert "states none of these figures" in run("stats", copy)
    (copy / "thesis.txt").touch()
    assert "holds thesis.txt, which this tool did not write" in fails("convert", directory, "-o", copy, "--force")
    assert "which is being read" in fails("convert", directory, "-o", directory, "--force")


def test_convert_writes_every_file_of_the_layout(directory, tmp_path):
    run("convert", directory / "lambda_logits.safetensors", "-o", tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == LAYOUT | {"selected_thresholds.txt"}
    assert torch.equal(Gates.read(tmp_path / "out").logits, Gates.read(directory).logits)


@pytest.mark.parametrize("mask", [("--off", "25%"), ("--threshold", "0.48"), ("--indices",), ("--soft",)])
def test_apply_writes_with_and_without_gates(directory, mask):
    shown = run("apply", "atlas", directory, *mask, "--prompt", "The capital of France is", "--tokens", 4)
    assert "without" in shown and "Paris" in shown and "with (" in shown


def test_apply_in_chat_as_json(directory):
    asked = ("--prompt", "What is the capital of France?", "--chat", "--scale-mode", "energy", "--json")
    record = json.loads(run("apply", "atlas", directory, "--soft", *asked))
    assert record["scale_mode"] == "energy" and "Paris" in record["outputs"][0]["base"]


def test_bake_writes_a_checkpoint_that_loads(directory, tmp_path):
    from probes.live.load import load

    shown = run("bake", "atlas", directory, "--off", "25%", "-o", tmp_path / "baked")
    assert "384 of 1,536 neurons off (λ < " in " ".join(shown.split())
    weight = load(tmp_path / "baked", device="cpu").model.model.layers[0].mlp.gate_proj.weight
    off = ~Gates.read(directory).keep(Gates.read(directory).threshold_at(0.25))[0]
    assert bool((weight[off] == 0).all()) and bool((weight[~off] != 0).any())
    note = json.loads((tmp_path / "baked" / "baked_gates.json").read_text())
    assert note["gates"] == "mine" and note["neurons_off"] == 384
    again = run("bake", "atlas", directory, "--off", "25%", "-o", tmp_path / "baked", "--force", "--json")
    assert json.loads(again) == note | {"model": "atlas", "checkpoint": str(tmp_path / "baked")}


def test_mask_prints_the_record_of_what_it_made(tmp_path):
    record = json.loads(run("mask", "atlas", "--by", "random", "-o", tmp_path / "made", "--json"))
    made = Gates.read(tmp_path / "made").record()
    assert record == json.loads(json.dumps(made)) | {"directory": str(tmp_path / "made")}


def test_train_eval_and_compare_from_files(rows, tmp_path):
    facts, sums = rows
    out = tmp_path / "trained"
    data = ("--forget", facts, "--retain", sums)
    shown = run("train", "atlas", "-o", out, *data, "--max-steps", 3, "--batch-size", 2, "--preset", "chat_mean",
                "--plot", tmp_path / "curves.html")  # fmt: skip
    assert "retain: KL on reasoning" in (tmp_path / "curves.html").read_text()
    assert "λ std 0.0" in " ".join(shown.split())
    assert {file.name for file in out.iterdir()} == LAYOUT | {"selected_thresholds.txt", "training.json"}
    made = json.loads((out / "training.json").read_text())
    assert made["options"]["scale_mode"] == "mean" and made["data"]["forget"]["rows"] == 3
    assert len(made["curves"]["loss"]) == 3 and len(made["data"]["weights_sha256"]) == 1
    (tmp_path / "n.txt").write_text("Emma walked to the market.")
    record, picture = tmp_path / "eval.json", tmp_path / "eval.html"
    settings = ("--neutral", tmp_path / "n.txt", "--thresholds", 0.5, "-o", record, "--plot", picture)
    shown = run("eval", "atlas", out, *data, *settings)
    assert "random ×5" in shown and "gates minus random" in shown and picture.exists()
    assert "next: vindex card VINDEX --gates" in " ".join(shown.split())[-200:]
    found = json.loads(record.read_text())
    assert found["choices"]["soft_scale_mode"] == "mean" and found["panels"]["counts"]["forget"] == 3
    digest = hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()
    assert found["model"]["weights_sha256"] == {"model.safetensors": digest}
    assert "made on other weights" not in shown
    training = json.loads((out / "training.json").read_text())
    training["model"] |= {"name": "elsewhere", "weights_sha256": {"model.safetensors": "0" * 64}}
    other = shutil.copytree(out, tmp_path / "other")
    (other / "training.json").write_text(json.dumps(training))
    shown = run("eval", "atlas", other, *data, "--neutral", tmp_path / "n.txt", "--thresholds", 0.5, columns=60)
    assert "note: the gates were made on other weights, those of elsewhere" in " ".join(shown.split())
    shown = run("compare", out, out)
    assert "correlation of λ over all neurons: 1.000" in shown
    assert json.loads(run("compare", out, out, "--json"))["overlaps"][0]["jaccard"] == 1
    assert "already exists; choose another place, or replace it with --force" in fails(
        "train", "atlas", "-o", out, *data
    )
    run("train", "atlas", "-o", out, *data, "--max-steps", 1, "--batch-size", 2, "--force")
    assert len(json.loads((out / "training.json").read_text())["curves"]["loss"]) == 1
    (out / "thesis.txt").touch()
    assert "holds thesis.txt, which this tool did not write" in fails("train", "atlas", "-o", out, *data, "--force")
    mine = "is nothing that this tool made (trained gates, stopped training, gates), so it is not replaced"
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
    assert "give exactly one of --threshold, --off, --indices or --soft;" in fails(
        "bake", "atlas", directory, "-o", tmp_path / "o", "--off", "5%", "--threshold", 0.4
    )
    for command in (("apply", "atlas", directory, *prompt), ("bake", "atlas", directory, "-o", tmp_path / "o")):
        assert "--soft with a mask" in fails(*command, "--soft", "--off", "5%")
    assert "--off half: expected a share such as 25% or 0.25" in fails(
        "apply", "atlas", directory, *prompt, "--off", "half"
    )
    assert "scale mode 'rms'" in fails("apply", "atlas", directory, *prompt, "--soft", "--scale-mode", "rms")
    write_logits(torch.zeros(4, 300), tmp_path / "narrow")
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


@pytest.fixture
def stops(monkeypatch):
    """A function: the next command hears Ctrl-C when a stage has done so much; the error stream of it comes back."""

    def run_until(at, *arguments) -> str:
        for module in (gates_train, gates_eval):
            monkeypatch.setattr(module, "progress", lambda *_: nullcontext(Told(at)))
        done = CliRunner().invoke(app, ["gates", *map(str, arguments)])
        monkeypatch.undo()
        assert done.exit_code == 130, (done.output, done.exception)
        return " ".join(done.stderr.split())

    return run_until


def test_ctrl_c_says_what_became_of_a_training_and_how_to_go_on(rows, tmp_path, stops):
    out = tmp_path / "run"
    command = ("train", "atlas", "-o", out, "--forget", rows[0], "--retain", rows[1], "--batch-size", 2)
    assert "stopped; no step was finished, nothing is saved" in stops({"hashing": 1}, *command)
    assert not out.exists()
    said = stops({"training": 3}, *command)
    assert f"the state is in {out}: go on with the same command and --resume" in said
    assert [file.name for file in out.iterdir()] == ["training_state.safetensors"]
    assert "holds a run that was stopped; continue it with --resume" in fails(*command)
    assert "epochs: 3 there, 9 here" in fails(*command, "--resume", "--epochs", 9)
    assert "after 6 steps" in " ".join(run(*command, "--resume").split())
    assert {file.name for file in out.iterdir()} == LAYOUT | {"selected_thresholds.txt", "training.json"}


def test_ctrl_c_says_what_became_of_an_evaluation_and_the_same_command_goes_on(directory, rows, tmp_path, stops):
    out, text = tmp_path / "eval.json", tmp_path / "n.txt"
    text.write_text("Emma walked to the market.")
    command = ("eval", "atlas", directory, "--forget", rows[0], "--retain", rows[1], "--neutral", text)
    command += ("--thresholds", 0.5)
    assert "stopped; nothing is kept; with -o FILE the finished masks are" in stops({"masks": 30}, *command)
    assert "stopped; no mask was finished" in stops({"activations": 1}, *command, "-o", out)
    kept = f"finished masks are kept in {out}.unfinished: go on with the same command"
    assert kept in stops({"masks": 37}, *command, "-o", out)
    assert "2 of 11 masks were kept from a run that was stopped" in run(*command, "-o", out)
    assert [file.name for file in tmp_path.iterdir()] == ["n.txt", "eval.json"]


def commands():
    return typer.main.get_command(app).commands["gates"].commands


def test_every_example_in_a_help_parses():
    assert len(commands()) == 10
    for name, command in commands().items():
        words = shlex.split(EXAMPLES[f"gates {name}"])
        command.make_context(name, words[3:])  # raises on an option or argument that is not there


@pytest.mark.parametrize(
    "name, options",
    [("panel", PanelOptions), ("train", TrainOptions), ("eval", EvalOptions)],
    ids=["panel", "training", "evaluation"],
)
def test_the_class_the_command_and_the_page_state_the_same_options(name, options):
    page = (DOCS / "gates-method.md").read_text()
    offered = {parameter.name: parameter for parameter in commands()[name].params}
    for option in dataclasses.fields(options):
        default = "" if option.default is None else "no" if option.default is False else str(option.default)
        assert f"| `{option.name}` | {default} | {option.metadata['help']} |" in page
        if option.name != "preset":
            assert (
                offered[option.name].help.startswith(option.metadata["help"]) and offered[option.name].default is None
            )
