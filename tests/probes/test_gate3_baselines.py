"""`vindex gate3` with the baselines beside its own methods, and one line for what cannot be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.commands import too_wide
from tests.probes.test_gate3 import fails, run
from vindex.demo import CHECKPOINT


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    """What two baselines beside geometric print and record; `--method` both repeated and with commas."""
    file = tmp_path_factory.mktemp("baselines") / "record.json"
    asked = ("--method", "neurons,rome", "--method", "geometric", "--no-certificate")
    printed = run("gate3", CHECKPOINT, *asked, "-o", file, columns=60)
    return printed, json.loads(file.read_text())


def test_methods_stand_side_by_side(baselines):
    printed, record = baselines
    side_by_side = printed.partition("Methods side by side")[2]
    rows = {row[0]: row for row in map(str.split, side_by_side.splitlines()) if row and row[0] in record["methods"]}
    assert list(rows) == ["geometric", "rome", "neurons"]
    marks = {"pass": "✓", "fail": "✗"}
    for name, found in record["methods"].items():
        assert rows[name][-2:] == [marks[found["verdicts"][one]["result"]] for one in ("published", "strict")]
    assert not too_wide(printed, 60)
    assert record["method"] == "geometric" and list(record["methods"]) == ["geometric", "rome", "neurons"]


def test_the_record_has_every_methods_projection_and_scan(baselines):
    methods = baselines[1]["methods"]
    assert {name: found["projection"] for name, found in methods.items()} == {
        "geometric": "gate_proj", "rome": "down_proj", "neurons": "gate_proj",
    }  # fmt: skip
    for name in ("rome", "neurons"):
        assert {control["kind"] for control in methods[name]["controls"]} == {"random"}
        for row in methods[name]["scan"]:
            harm = 5 * row["withheld_kl"] + row["about_kl"] + max(0, 0.95 - row["suppressed"])
            assert row["harm"] == pytest.approx(harm, rel=1e-4)
    assert [row["size"] for row in methods["neurons"]["scan"]][-3:] == [8, 32, 128]
    assert baselines[1]["options"]["baselines"]["rome_clamp"] == 4


def test_a_method_that_is_none_is_an_error():
    message = fails("gate3", CHECKPOINT, "--method", "rome,memit")
    assert message.startswith("method 'memit': expected forward, geometric, rome, ") and message.endswith("both or all")


def test_a_change_of_another_projection_cannot_be_saved(tmp_path):
    file = tmp_path / "p.safetensors"
    message = fails("gate3", CHECKPOINT, "--method", "rome,neurons", "--layer", "0", "--save-patch", file)
    assert message == (
        "no patch to save: a patch is a rank-1 change of a gate_proj, which rome and neurons make none of; "
        "add --method forward"
    )
    assert not file.exists()


def test_a_fact_the_model_does_not_know_is_not_applicable(tmp_path):
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"subject": "France", "relation": "capital", "answer": "Rome"}')
    printed = run("gate3", CHECKPOINT, "--facts", facts, "-o", tmp_path / "r.json")
    assert "not_applicable" in printed and "rank" in printed and "' Paris'" in printed
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["verdicts"]["strict"]["result"] == "not_applicable"
    assert "P = " in record["verdicts"]["strict"]["reason"] and "rank" in record["verdicts"]["strict"]["reason"]
    options = ("--facts", facts, "--save-patch", tmp_path / "p")
    assert "no patch to save" in fails("gate3", CHECKPOINT, *options)
    assert "nothing to draw" in fails("gate3", CHECKPOINT, "--facts", facts, "--plot", tmp_path / "p.png")


def test_errors_are_one_line(tmp_path):
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"subject": "France", "relation": "capital", "answer": "Paris", "answer_ids": [1]}')
    assert "is tokens" in fails("gate3", CHECKPOINT, "--facts", facts)
    facts.write_text('{"subject": "France"\n')
    assert "facts.jsonl:1: not valid JSON" in fails("gate3", CHECKPOINT, "--facts", facts)
    assert "layer 7: the model has layers 0 to 3" in fails("gate3", CHECKPOINT, "--layer", 7)
    assert "the directory" in fails("gate3", CHECKPOINT, "-o", tmp_path / "none" / "r.json")
    assert "leave --all out" in fails("gate3", CHECKPOINT, "--all", "--save-patch", tmp_path / "p")
    assert "knows no fact" in fails("gate3", CHECKPOINT, "--all", "--known-from", 1.1)
    assert "no such subject" in fails("gate3", CHECKPOINT, "--fact", "Narnia/capital")
    assert "No such file" in fails("patch", "show", tmp_path / "none")


def test_a_mixture_of_experts_is_refused(tmp_path):
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    assert "mixture of experts" in fails("gate3", tmp_path)


@pytest.mark.parametrize(
    "option, name, message",
    [
        ("-o", "/dev/null", "/dev/null: is a device, a pipe or a socket; name a plain file"),
        ("--save-patch", "pipe", "pipe: is a device, a pipe or a socket; name a plain file"),
        ("--save-patch", "folder", "folder: is a directory; name a file in it"),
        ("--plot", "link.png", "link.png: is a symbolic link, which is not followed; name a plain file"),
        ("--plot", "a.svg", "a.svg: plots are written as .html or .png"),
        ("--plot", "none/a.png", "the directory none does not exist; make it first"),
    ],
)
def test_places_that_cannot_be_written_to_are_told_before_the_work(tmp_path, monkeypatch, option, name, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("probes.live.load.load", None)  # nothing is loaded
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("link.png").symlink_to("elsewhere.png")
    before = sorted(os.listdir())
    assert message in fails("gate3", "atlas", option, name)
    assert sorted(os.listdir()) == before
