"""The commands as a user runs them: what they print, and one line when they cannot."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
import time

import pytest

import vindex
from tests.checkpoints import write_checkpoint
from tests.commands import run, start, too_wide
from tests.conftest import build_quietly
from vindex.errors import TargetError
from vindex.writer import open_writer


def fails(*arguments) -> str:
    """The one line a failing command prints."""
    done = run(*arguments)
    assert done.returncode == 1, done
    error = [line for line in done.stderr.splitlines() if line.startswith("vindex: ")]
    assert len(error) == 1 and "Traceback" not in done.stderr, done.stderr
    return error[0]


def test_build_says_what_it_made(checkpoint, tmp_path):
    done = run("build", checkpoint, "-o", tmp_path / "out.vindex", "--features", 8, "--threads", 1)
    assert done.returncode == 0, done.stderr
    for part in ("size", "time", "peak memory", "worst certificate"):
        assert part in done.stdout
    assert "next: vindex verify" in done.stdout
    assert run("verify", tmp_path / "out.vindex", "--source", checkpoint).returncode == 0


def test_tables_fit_eighty_columns_and_json_holds_the_same(built):
    for command in (("info",), ("verify",), ("score", " Paris", " Berlin"), ("feature", 0, 1), ("compare", built)):
        name, *rest = command
        table, record = run(name, built, *rest), run(name, built, *rest, "--json")
        assert table.returncode == record.returncode == 0, (command, table.stderr, record.stderr)
        lines = table.stdout.splitlines()
        assert not too_wide(table.stdout, 80) and all(one == one.rstrip() for one in lines)
        assert json.loads(record.stdout)


def test_score_prints_id_and_piece_and_mentions_the_other_spacing(built):
    shown = run("score", built, " Paris", "-k", 2).stdout
    assert "token ' Paris', id 0" in shown and "'Paris' is one (id 2): leading spaces matter" in shown
    assert f"next: vindex feature {built}" in " ".join(run("search", built, "Paris", "--writes").stdout.split())
    assert run("search", built, "Paris", "--writes").stdout.rstrip().endswith("--down")
    record = json.loads(run("score", built, " Paris", "-k", 2, "--json").stdout)["scores"]
    assert record[0]["token_id"] == 0 and record[0]["piece"] == " Paris" and len(record[0]["features"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("score", "Berlin"), "'Berlin' is not a single token of this model, but ' Berlin' is one"),
        (("score", "nonsense"), "'nonsense' is not a single token"),
        (("score", "␣Paris"), "'␣Paris' is not a single token of this model; ␣ is how a space is shown: type a space"),
        (("search", "␣Paris"), "nor '␣Paris' is a single token of this model; ␣ is how a space is shown: type a space"),
        (("feature", 7, 0), "layer 7 is out of range"),
        (("compare", "nowhere"), "nowhere is not a directory"),
        (("verify", "--source", "nowhere"), "nowhere: no such directory"),
        (
            ("card", "--probe", "nowhere.json"),
            "nowhere.json: cannot be read (No such file or directory); write it with -o",
        ),
    ],
)
def test_questions_without_an_answer(built, arguments, message):
    name, *rest = arguments
    assert message in fails(name, built, *rest)


def test_builds_that_cannot_start(checkpoint, built, tmp_path):
    assert "no such directory" in fails("build", tmp_path / "nothing", "-o", tmp_path / "o")
    assert "already exists" in fails("build", checkpoint, "-o", built, "--features", 8)
    assert "at most 16 directions" in fails("build", checkpoint, "-o", tmp_path / "o")
    blocked = tmp_path / "file"
    blocked.touch()
    assert "cannot be written to (Not a directory)" in fails("build", checkpoint, "-o", blocked / "o", "--features", 8)
    bad = write_checkpoint(tmp_path / "bad", model_type="gpt2")
    assert "model_type 'gpt2' is not supported" in fails("build", bad, "-o", tmp_path / "o")


def test_a_flipped_bit_fails_verify_and_is_named(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy.vindex")
    data = bytearray((copy / "embeddings.bin").read_bytes())
    data[100] ^= 4
    (copy / "embeddings.bin").write_bytes(data)
    assert "first: checksums: changed since the build: embeddings.bin" in fails("verify", copy)


def test_ctrl_c_leaves_a_state_to_resume_from_and_says_so(tmp_path):
    source, target = write_checkpoint(tmp_path / "m", layers=300), tmp_path / "out.vindex"
    command = [sys.executable, "-m", "vindex", "build", source, "-o", target, "--features", "8", "--threads", "1"]
    process = start(command)
    journal = tmp_path / "out.vindex.partial" / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "repeat with --resume to go on" in error and "Traceback" not in error
    assert not target.exists() and journal.exists()
    assert "continue it with --resume (resume=True), or start over with --force" in fails(
        "build", source, "-o", target, "--features", 8
    )
    done = run("build", source, "-o", target, "--features", 8, "--threads", 1, "--resume")
    assert done.returncode == 0, done.stderr
    assert run("verify", target).returncode == 0


def test_card_is_rewritten_with_its_checksum(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy.vindex")
    (copy / "README.md").write_text("spoilt")
    assert run("card", copy).returncode == 0
    assert (copy / "README.md").read_text() == (built / "README.md").read_text()
    assert run("verify", copy).returncode == 0


@pytest.mark.parametrize(
    "options, said",
    [
        ({"tied": True}, "embed_tokens (tied)"),
        ({"tied": False}, "lm_head"),
        ({"tied": False, "head": False}, "embed_tokens (the model has no head)"),
    ],
    ids=["tied", "untied", "no head"],
)
def test_info_says_what_the_down_projection_is(tmp_path, options, said):
    build_quietly(write_checkpoint(tmp_path / "m", **options), tmp_path / "v")
    assert said in run("info", tmp_path / "v").stdout
    assert json.loads(run("info", tmp_path / "v", "--json").stdout)["down_meta_projection"] == said


def test_the_card_takes_no_record_of_another_checkpoint(tmp_path):
    """A fine-tune has the shape of its base, and the record of one is not the other's."""
    for name, seed in (("base", 0), ("tuned", 1)):
        build_quietly(write_checkpoint(tmp_path / name, seed=seed), tmp_path / f"{name}.vindex")
    digest = hashlib.sha256((tmp_path / "base" / "model.safetensors").read_bytes()).hexdigest()
    model = {"dtype": "float32", "weights_sha256": {"model.safetensors": digest}}
    record = {"record": "vindex-probe/1", "definition": "v1", "model": model, "constants": {}}
    (tmp_path / "probe.json").write_text(json.dumps(record))
    assert run("card", tmp_path / "base.vindex", "--probe", tmp_path / "probe.json").returncode == 0
    refused = fails("card", tmp_path / "tuned.vindex", "--probe", tmp_path / "probe.json")
    assert "probe.json: of model.safetensors with SHA-256 " in refused and "measure the checkpoint it was" in refused


def test_a_card_that_was_edited_is_told_apart_from_damage(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy.vindex")
    with (copy / "README.md").open("a") as card:
        card.write("A note of mine.\n")
    said = fails("verify", copy)
    assert said.endswith(f"README.md: edited since it was written; `vindex card {copy}` writes it anew")
    assert run("card", copy).returncode == 0 and run("verify", copy).returncode == 0


def test_verify_names_the_file_of_another_source(built, tmp_path):
    other = write_checkpoint(tmp_path / "m", shards=2, seed=1)
    assert "m is not the checkpoint that tiny.vindex was built from: model-00001-of-00002" in fails(
        "verify", built, "--source", other
    )


def test_the_demo_replaces_a_vindex_of_its_own_model_and_nothing_else(built, tmp_path, monkeypatch, capsys):
    from vindex.__main__ import demo

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    with pytest.raises(TargetError, match="mine already exists and is nothing that this tool made"):
        demo(mine)
    copy = shutil.copytree(built, tmp_path / "v")
    with pytest.raises(TargetError, match="v is a vindex of another model; choose another place"):
        demo(copy)
    with open_writer(tmp_path / "w", {"source": {"files": []}}, 1, resume=False, force=False) as writer:
        writer.finish_block("a", {})
    with pytest.raises(TargetError, match="w.partial is an unfinished build of another model; choose another place"):
        demo(tmp_path / "w")
    assert (mine / "thesis.txt").exists() and (tmp_path / "w.partial" / "journal.jsonl").exists()
    for step in (
        "extract.cli.verify.verify",
        "vindex.cli_scores.score",
        "probes.cli.delete.gate3",
        "probes.cli.gates_train.train",
        "probes.cli.gates_eval.evaluate",
        "probes.cli.trace.trace",
        "vindex.cli_report.report",
    ):
        monkeypatch.setattr(step, lambda *arguments, **options: None)
    demo(tmp_path / "demo.vindex")
    before = (tmp_path / "demo.vindex").stat().st_ino
    capsys.readouterr()
    demo(tmp_path / "demo.vindex", json=True)
    assert (tmp_path / "demo.vindex").stat().st_ino != before
    assert json.loads(capsys.readouterr().out)["id"] == vindex.open(tmp_path / "demo.vindex").id


def test_usage_errors_exit_with_2():
    assert run("score").returncode == 2
