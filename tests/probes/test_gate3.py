"""`vindex gate3` and `vindex patch` as a user runs them, on the atlas."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from probes.deletion import delete
from probes.live.load import load
from probes.weights import patches
from tests.commands import too_wide
from vindex.__main__ import app
from vindex.demo import CHECKPOINT
from vindex.errors import VindexError


def run(*arguments, columns: int = 80) -> str:
    """The command's stdout; errors come out as exceptions, as `main` gets them."""
    environment = {"COLUMNS": str(columns)}
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
def whole(tmp_path_factory, deleted):
    """What the command prints of one whole run, and where its record, picture and patch lie."""
    directory = tmp_path_factory.mktemp("gate3")
    files = {name: directory / name for name in ("record.json", "picture.png", "patch.safetensors")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("probes.deletion.delete.delete", lambda *_, **__: deleted)
        printed = run(
            "gate3", CHECKPOINT, "-o", files["record.json"], "--plot", files["picture.png"],
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
    assert not too_wide(printed, 80)


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
    assert json.loads(run("patch", "revert", out, "-o", out.with_name("back"), "--json")) == {
        "checkpoint": str(out.with_name("back"))
    }
    assert "SHA-256 verified" in run("patch", "revert", out)
    digest = {name: hashlib.sha256((name / "model.safetensors").read_bytes()).digest() for name in (out, CHECKPOINT)}
    assert digest[out] == digest[CHECKPOINT]


def test_patch_show(whole):
    shown = json.loads(run("patch", "show", whole[1]["patch.safetensors"], "--json"))
    assert shown["fact"] == "France/capital"
    assert shown["tensor"].endswith("mlp.gate_proj.weight")
    printed = " ".join(run("patch", "show", whole[1]["patch.safetensors"]).split())
    assert "shape 384 × 128" in printed and "fact France/capital" in printed and "chat no" in printed
    assert "verdicts published pass, strict pass" in printed and "None" not in printed


def test_a_patch_is_verified_from_base_and_patch_alone(whole, tmp_path):
    patch = whole[1]["patch.safetensors"]
    made = json.loads(whole[1]["record.json"].read_text())["methods"]["forward"]
    printed = run("gate3", "verify", CHECKPOINT, patch, "-o", tmp_path / "v.json")
    assert "What the patch records" in printed and "forward: layer" in printed and "✗   robust" not in printed
    record = json.loads((tmp_path / "v.json").read_text())
    again = record["methods"]["forward"]
    assert [claim["standard"] for claim in record["claims"]] == ["published", "strict", "robust"]
    assert all(claim["recorded"] == claim["measured"] for claim in record["claims"])
    for key in ("headline", "sets", "controls", "certificate", "verdicts"):
        assert again[key] == made[key], key


def rewritten(whole, path, provenance=None, **factors) -> Path:
    """The saved patch with another provenance or other factors."""
    found = patches.read(whole[1]["patch.safetensors"])
    delta = dataclasses.replace(found.delta, **factors)
    return patches.save(path, delta, CHECKPOINT, {**found.provenance, **(provenance or {})}) and path


def test_a_verdict_that_is_not_confirmed_is_exit_status_1(whole, tmp_path):
    path = tmp_path / "p.safetensors"
    said = patches.read(whole[1]["patch.safetensors"]).provenance["verdicts"]
    other = "fail" if said["published"] == "pass" else "pass"
    rewritten(whole, path, {"verdicts": {"published": other, "strict": said["strict"], "seed": "pass"}})
    told = fails("gate3", "verify", CHECKPOINT, path, "--no-certificate")
    assert f"2 recorded verdict(s) not confirmed, first published: {other} recorded, {said['published']} meas" in told
    nothing = torch.full_like(patches.read(path).delta.gate_write, 1e-9)
    rewritten(whole, path, {"verdicts": {"published": "pass"}}, gate_write=nothing)
    told = fails("gate3", "verify", CHECKPOINT, path, "--no-certificate")
    assert "first published: pass recorded, fail measured" in told


def test_what_a_patch_does_not_say_is_given(whole, tmp_path):
    path = rewritten(whole, tmp_path / "p.safetensors", {"fact": None, "seed": None, "verdicts": {}})
    assert "does not say which fact it deletes; give --fact" in fails("gate3", "verify", CHECKPOINT, path)
    printed = run("gate3", "verify", CHECKPOINT, path, "--fact", "Germany/capital", "--seed", 3, "--no-certificate")
    assert "Germany/capital" in printed and "the patch records no verdicts: nothing to confirm" in printed
    rewritten(whole, path, {"seed": "seven"})
    assert "provenance: seed is 'seven', expected int; the patch file was" in fails("gate3", "verify", CHECKPOINT, path)


def test_a_patch_of_another_base_is_not_verified(whole, tmp_path):
    patched = tmp_path / "patched"
    made = json.loads(run("patch", "apply", CHECKPOINT, whole[1]["patch.safetensors"], "-o", patched, "--json"))
    assert (
        made["checkpoint"] == str(patched) and made["layer"] == json.loads(whole[1]["record.json"].read_text())["layer"]
    )
    told = fails("gate3", "verify", patched, whole[1]["patch.safetensors"])
    assert "but the patch was made for" in told and "other weights, or already patched" in told


def test_json_is_only_the_record():
    record = json.loads(run("gate3", CHECKPOINT, "--chat", "--method", "geometric", "--no-certificate", "--json"))
    assert record["record"] == "vindex-gate3/1"
    assert record["before"] > 0.5
    assert record["fact"]["prompt"].count("France") == 2


ALL = ("gate3", CHECKPOINT, "--all", "--method", "geometric", "--no-certificate")


def test_all_facts_of_a_relation_stop_and_go_on(tmp_path, monkeypatch, capsys):
    """Ctrl-C keeps what is finished; --resume does the rest, and nothing twice."""
    file, picture = tmp_path / "all.json", tmp_path / "all.html"
    begun, whole = [], delete.run

    def stopping(bench, fact):
        begun.append(fact.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return whole(bench, fact)

    monkeypatch.setattr("probes.deletion.delete.run", stopping)
    stopped = CliRunner().invoke(app, [*map(str, ALL), "--limit", "2", "-o", str(file)])
    assert stopped.exit_code == 130
    assert f"stopped; 1 fact is finished and stands in {file}: repeat with --resume to go on" in stopped.stderr
    first = json.loads(file.read_text())
    printed = run(*ALL, "--limit", 2, "-o", file, "--resume", "--plot", picture)
    record = json.loads(file.read_text())
    assert record["record"] == "vindex-gate3-all/1"
    assert record["facts"][:1] == first["facts"] and len(record["facts"]) == 2
    assert begun == [record["facts"][number]["name"] for number in (0, 1, 1)]
    rate = record["rates"]["geometric"]["published"]
    assert rate["of"] == 2 and rate["low"] <= rate["share"] <= rate["high"]
    assert "Facts that pass" in printed and "95 % Wilson" in printed and "record: " in printed
    assert "plotly" in picture.read_text()[:20_000].lower()
    assert "made with options {'seed': 0}, not {'seed': 1}; repeat" in fails(*ALL, "--resume", "-o", file, "--seed", 1)


def test_only_a_record_of_many_facts_can_be_gone_on_with(whole, tmp_path):
    message = fails(*ALL, "--resume", "-o", whole[1]["record.json"])
    assert "expected the record of gate3 --all (vindex-gate3-all/1)" in message
    assert "none.json: cannot be read" in fails(*ALL, "--resume", "-o", tmp_path / "none.json")
    assert fails("gate3", CHECKPOINT, "--resume", "-o", "r.json") == (
        "--resume goes on with the record of --all; give --all and -o FILE"
    )


@pytest.mark.parametrize(("option", "value"), [("--relation", "capital"), ("--limit", 3), ("--known-from", 0.5)])
def test_what_chooses_among_all_facts_is_no_option_of_one(option, value):
    assert fails("gate3", CHECKPOINT, option, value) == (
        f"{option} chooses among the facts of --all; give --all, or name one fact with --fact"
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [(("--all",), "no fact is finished, nothing was written"), (("--fact", "France/capital"), "nothing was written")],
)
def test_ctrl_c_says_what_became_of_the_work(monkeypatch, options, told):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("probes.deletion.delete.run", stopped)
    done = CliRunner().invoke(app, ["gate3", "atlas", "--method", "geometric", *options])
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (130, f"stopped; {told}")


def test_the_last_line_says_what_to_do_next(whole):
    patch = whole[1]["patch.safetensors"]
    printed = " ".join(whole[0].split())
    assert "record: " in printed
    assert printed.endswith("-o DIR") and printed.count(patch.name) == 3


def test_geometric_alone_takes_directions_from_a_vindex(tmp_path):
    run("build", CHECKPOINT, "-o", tmp_path / "atlas.vindex", "--threads", 1)
    run(
        "gate3",
        CHECKPOINT,
        "--method",
        "geometric",
        "--vindex",
        tmp_path / "atlas.vindex",
        "-o",
        tmp_path / "v.json",
        "--no-certificate",
    )
    run("gate3", CHECKPOINT, "--method", "geometric", "--no-certificate", "-o", tmp_path / "e.json")
    stored, exact = (json.loads((tmp_path / name).read_text()) for name in ("v.json", "e.json"))
    assert stored["method"] == exact["method"] == "geometric"
    assert stored["layer"] == exact["layer"]
    assert stored["after"] == pytest.approx(exact["after"], abs=0.01)


@pytest.mark.real
def test_france_on_the_real_model_passes_both_verdicts(real_model: Path, tmp_path):
    """published and strict on held-out sets by forward; geometric fails; random patches do nothing."""
    run("gate3", real_model, "-o", tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["verdicts"]["published"]["result"] == "pass"
    assert record["verdicts"]["strict"]["result"] == "pass", record["verdicts"]["strict"]["reason"]
    assert record["methods"]["geometric"]["verdicts"]["strict"]["result"] == "fail"
    random = [c["suppression"] for c in record["methods"]["forward"]["controls"] if c["kind"] == "random"]
    assert max(map(abs, random)) <= 0.05
