"""`vindex gate3` and `vindex patch` as a user runs them, on the atlas."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from probes.live.load import load
from probes.weights import patches
from vindex.__main__ import app
from vindex.demo import CHECKPOINT
from vindex.errors import VindexError

SHORT = ("--method", "forward", "--layer", "0", "--no-certificate")


def run(*arguments) -> str:
    """The command's stdout; errors come out as exceptions, as `main` gets them."""
    environment = {"COLUMNS": "80"}
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False, env=environment)
    assert done.exit_code == 0, done.output
    return done.stdout


def fails(*arguments) -> str:
    """The message of the error that `main` prints as one line."""
    with pytest.raises(VindexError) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One full run: what it printed, and where its record, picture and patch lie."""
    directory = tmp_path_factory.mktemp("gate3")
    files = {name: directory / name for name in ("record.json", "picture.png", "patch.safetensors")}
    printed = run(
        "gate3", CHECKPOINT, "--json", files["record.json"], "--plot", files["picture.png"],
        "--save-patch", files["patch.safetensors"],
    )  # fmt: skip
    return printed, files


def test_one_fact_prints_both_methods_all_sets_controls_and_verdicts(whole):
    printed, _ = whole
    methods = (
        "forward: layer",
        "geometric: layer",
        "Controls at equal ‖ΔW‖",
        "random",
        "published ",
        "strict ",
        "robust ",
    )
    sets = ("Germany", "paraphrases", "other subjects", "its other facts", "neutral text: KL", "before: ' Paris'")
    assert [part for part in (*methods, *sets, "s for this fact") if part not in printed] == []
    assert max(map(len, printed.splitlines())) <= 80


def test_each_attack_is_one_short_line_with_what_was_before_and_after(whole):
    printed = whole[0].splitlines()
    start = next(row for row, line in enumerate(printed) if line.split()[:3] == ["attack", "before", "after"])
    lines = printed[start : start + 9]
    record = json.loads(whole[1]["record.json"].read_text())["methods"]["forward"]["verdicts"]["robust"]
    assert [line[4:27].strip() for line in lines[1:]] == [one["name"] for one in record["criteria"]]
    assert max(map(len, lines)) <= 60
    assert "Asked otherwise, and writing freely" in whole[0]


def test_the_record_has_the_documented_top_level(whole):
    record = json.loads(whole[1]["record.json"].read_text())
    assert record["record"] == "vindex-gate3/1"
    digest = hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()
    assert record["model"]["weights_sha256"] == {"model.safetensors": digest}
    assert record["method"] == "forward"
    assert record["fact"]["name"] == "France/capital"
    assert record["before"] > 0.9 > 0.3 > record["after"]
    assert set(record["verdicts"]) == {"published", "strict", "robust"}
    assert all({"result", "reason", "criteria"} <= set(verdict) for verdict in record["verdicts"].values())
    assert set(record["methods"]) == {"forward", "geometric"}
    assert record["layer"] == record["methods"]["forward"]["layer"]
    tried = [one for one in record["methods"]["forward"]["scan"] if one["harm"] is not None]
    assert record["layer"] in [one["layer"] for one in tried]
    assert all("France" in text for text in record["methods"]["forward"]["own"])
    shown = {"forward": record["methods"]["forward"]}
    for name, found in shown.items():
        assert {control["kind"] for control in found["controls"]} == {"random", "random_read", "shuffled_write"}, name
        for prompt in found["sets"]["other_subjects"]["prompts"]:
            assert prompt["loss"] == pytest.approx(1 - prompt["after"] / prompt["before"], abs=1e-3)
    fit, held = record["sets"]["fit"], record["sets"]["held_out"]
    assert not {one["text"] for one in fit["phrasings"]} & {one["text"] for one in held["paraphrases"]}
    assert whole[1]["record.json"].stat().st_size < 300_000


def test_the_picture_is_one(whole):
    assert whole[1]["picture.png"].read_bytes().startswith(b"\x89PNG")


def test_a_saved_patch_applied_gives_the_recorded_probability_and_reverts(whole, tmp_path):
    record = json.loads(whole[1]["record.json"].read_text())
    out = tmp_path / "patched"
    assert "patched, everything else as in" in run(
        "patch", "apply", CHECKPOINT, whole[1]["patch.safetensors"], "-o", out
    )
    model = load(out, dtype="float32", device="cpu").model
    fact = record["fact"]
    with torch.no_grad():
        shares = model(torch.tensor([fact["prompt_ids"]])).logits[0, -1].float().softmax(-1)
    assert float(shares[fact["answer_ids"][0]]) == pytest.approx(record["after"], rel=1e-3)
    assert "SHA-256 verified" in run("patch", "revert", out)
    digest = {name: hashlib.sha256((name / "model.safetensors").read_bytes()).digest() for name in (out, CHECKPOINT)}
    assert digest[out] == digest[CHECKPOINT]


def test_patch_show(whole):
    shown = json.loads(run("patch", "show", whole[1]["patch.safetensors"], "--json"))
    assert shown["fact"] == "France/capital"
    assert shown["tensor"].endswith("mlp.gate_proj.weight")
    assert "France/capital" in run("patch", "show", whole[1]["patch.safetensors"])


def test_a_patch_is_verified_from_base_and_patch_alone(whole, tmp_path):
    patch = whole[1]["patch.safetensors"]
    made = json.loads(whole[1]["record.json"].read_text())["methods"]["forward"]
    printed = run("gate3", "verify", CHECKPOINT, patch, "--json", tmp_path / "v.json")
    assert "What the patch records" in printed and "forward: layer" in printed and "✗   robust" not in printed
    record = json.loads((tmp_path / "v.json").read_text())
    again = record["methods"]["forward"]
    assert [claim["standard"] for claim in record["claims"]] == ["published", "strict", "robust"]
    assert all(claim["recorded"] == claim["measured"] for claim in record["claims"])
    for key in ("headline", "sets", "controls", "certificate", "verdicts"):
        assert again[key] == made[key], key
    assert json.loads(run("gate3", "verify", CHECKPOINT, patch, "--json", "-"))["claims"] == record["claims"]


def rewritten(whole, path, provenance=None, **factors) -> Path:
    """The saved patch with another provenance or other factors."""
    found = patches.read(whole[1]["patch.safetensors"])
    delta = dataclasses.replace(found.delta, **factors)
    return patches.save(path, delta, CHECKPOINT, {**found.provenance, **(provenance or {})}) and path


def test_a_verdict_that_is_not_confirmed_is_exit_status_1(whole, tmp_path):
    path = tmp_path / "p.safetensors"
    said = patches.read(whole[1]["patch.safetensors"]).provenance["verdicts"]
    other = "fail" if said["published"] == "pass" else "pass"
    rewritten(whole, path, {"verdicts": {**said, "published": other, "seed": "pass"}})
    told = fails("gate3", "verify", CHECKPOINT, path)
    assert f"2 recorded verdict(s) not confirmed, first published: {other} recorded, {said['published']} meas" in told
    nothing = torch.full_like(patches.read(path).delta.gate_write, 1e-9)
    rewritten(whole, path, {"verdicts": {"published": "pass"}}, gate_write=nothing)
    assert "first published: pass recorded, fail measured" in fails("gate3", "verify", CHECKPOINT, path)


def test_what_a_patch_does_not_say_is_given(whole, tmp_path):
    path = rewritten(whole, tmp_path / "p.safetensors", {"fact": None, "seed": None, "verdicts": {}})
    assert "does not say which fact it deletes; give --fact" in fails("gate3", "verify", CHECKPOINT, path)
    printed = run("gate3", "verify", CHECKPOINT, path, "--fact", "Germany/capital", "--seed", 3)
    assert "Germany/capital" in printed and "the patch records no verdicts: nothing to confirm" in printed
    rewritten(whole, path, {"seed": "seven"})
    assert "provenance: seed is 'seven', expected int; the patch file was" in fails("gate3", "verify", CHECKPOINT, path)


def test_a_patch_of_another_base_is_not_verified(whole, tmp_path):
    patched = tmp_path / "patched"
    run("patch", "apply", CHECKPOINT, whole[1]["patch.safetensors"], "-o", patched)
    told = fails("gate3", "verify", patched, whole[1]["patch.safetensors"])
    assert "but the patch was made for" in told and "other weights, or already patched" in told


@pytest.mark.parametrize("options", [("--chat",), ("--dtype", "bfloat16")])
def test_chat_and_bfloat16(options, tmp_path):
    run("gate3", CHECKPOINT, *SHORT, *options, "--json", tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["before"] > 0.5
    assert record["suppression"] > 0.7
    assert record["fact"]["prompt"].count("France") == (2 if options == ("--chat",) else 1)


def test_all_facts_of_a_relation(tmp_path):
    picture = tmp_path / "all.png"
    printed = run(
        "gate3", CHECKPOINT, "--all", "--limit", 2, *SHORT, "--json", tmp_path / "all.json", "--plot", picture
    )
    record = json.loads((tmp_path / "all.json").read_text())
    assert record["record"] == "vindex-gate3-all/1"
    assert len(record["facts"]) == 2
    rate = record["rates"]["forward"]["published"]
    assert rate["of"] == 2 and rate["low"] <= rate["share"] <= rate["high"]
    assert "Facts that pass" in printed and "95 % Wilson" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_geometric_alone_takes_directions_from_a_vindex(tmp_path):
    run("build", CHECKPOINT, "-o", tmp_path / "atlas.vindex", "--threads", 1)
    run(
        "gate3",
        CHECKPOINT,
        "--method",
        "geometric",
        "--vindex",
        tmp_path / "atlas.vindex",
        "--json",
        tmp_path / "v.json",
    )
    run("gate3", CHECKPOINT, "--method", "geometric", "--no-certificate", "--json", tmp_path / "e.json")
    stored, exact = (json.loads((tmp_path / name).read_text()) for name in ("v.json", "e.json"))
    assert stored["method"] == exact["method"] == "geometric"
    assert stored["layer"] == exact["layer"]
    assert stored["after"] == pytest.approx(exact["after"], abs=0.01)


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    """What two baselines beside forward print and record; `--method` both repeated and with commas."""
    file = tmp_path_factory.mktemp("baselines") / "record.json"
    asked = ("--method", "neurons,rome", "--method", "forward", "--no-certificate")
    printed = run("gate3", CHECKPOINT, *asked, "--json", file)
    return printed, json.loads(file.read_text())


def test_methods_stand_side_by_side(baselines):
    printed, record = baselines
    table = [line.split() for line in printed.partition("Methods side by side")[2].splitlines()]
    assert [row[0] for row in table if row and row[0] in record["methods"]] == ["forward", "rome", "neurons"]
    assert max(map(len, printed.splitlines())) <= 80
    assert record["method"] == "forward" and list(record["methods"]) == ["forward", "rome", "neurons"]


def test_the_record_has_every_methods_projection_and_scan(baselines):
    methods = baselines[1]["methods"]
    assert {name: found["projection"] for name, found in methods.items()} == {
        "forward": "gate_proj", "rome": "down_proj", "neurons": "gate_proj",
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


def test_json_to_stdout_is_only_json():
    record = json.loads(run("gate3", CHECKPOINT, *SHORT, "--json", "-"))
    assert record["record"] == "vindex-gate3/1"


def test_a_fact_the_model_does_not_know_is_not_applicable(tmp_path):
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"subject": "France", "relation": "capital", "answer": "Rome"}')
    printed = run("gate3", CHECKPOINT, "--facts", facts, "--json", tmp_path / "r.json")
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
    assert "the directory" in fails("gate3", CHECKPOINT, "--json", tmp_path / "none" / "r.json")
    assert "leave --all out" in fails("gate3", CHECKPOINT, "--all", "--save-patch", tmp_path / "p")
    assert "knows no fact" in fails("gate3", CHECKPOINT, "--all", "--known-from", 1.1)
    assert "no such subject" in fails("gate3", CHECKPOINT, "--fact", "Narnia/capital")
    assert "no such file" in fails("patch", "show", tmp_path / "none")


def test_a_mixture_of_experts_is_refused(tmp_path):
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    assert "mixture of experts" in fails("gate3", tmp_path)


@pytest.mark.real
def test_france_on_the_real_model_passes_both_verdicts(real_model: Path, tmp_path):
    """published and strict on held-out sets by forward; geometric fails; random patches do nothing."""
    run("gate3", real_model, "--json", tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["verdicts"]["published"]["result"] == "pass"
    assert record["verdicts"]["strict"]["result"] == "pass", record["verdicts"]["strict"]["reason"]
    assert record["methods"]["geometric"]["verdicts"]["strict"]["result"] == "fail"
    random = [c["suppression"] for c in record["methods"]["forward"]["controls"] if c["kind"] == "random"]
    assert max(map(abs, random)) <= 0.05


@pytest.mark.parametrize(
    "option, name, message",
    [
        ("--json", "/dev/null", "/dev/null: is a device, a pipe or a socket; name a plain file, or - for stdout"),
        ("--save-patch", "pipe", "pipe: is a device, a pipe or a socket; name a plain file"),
        ("--save-patch", "folder", "folder: is a directory; name a file in it"),
        ("--plot", "link.png", "link.png: is a symbolic link, which is not followed; name a plain file"),
        ("--plot", "a.html", "a.html: pictures are written as .png, .svg or .pdf"),
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
