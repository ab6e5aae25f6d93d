"""A checkpoint read from the Hub by byte range, over a local server that speaks its endpoints and misbehaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from huggingface_hub import close_session

import extract
import vindex
from extract.checkpoint import open_checkpoint
from extract.pipeline import build
from tests.checkpoints import write_checkpoint
from tests.conftest import build_quietly
from tests.extract.test_build import contents, rederived
from tests.gguf_files import write_gguf
from tests.hub_server import COMMIT, Bytes, HubServer, pointed_at, serve_directory
from vindex.errors import CheckpointError, QueryError, TargetError
from vindex.options import BuildOptions
from vindex.progress import silent

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("hub") / "model", shards=2, vocabulary=400, tied=False)
    (directory / "unrelated.safetensors").write_bytes(b"x" * 100_000)
    return directory


@pytest.fixture
def hub(source, monkeypatch):
    """The server, with the Hub's client pointed at it; nothing may be written to the client's cache."""
    with HubServer({"someone/model": serve_directory(source)}) as server, pointed_at(server, monkeypatch):
        yield server


def once(action: str, wanted: str):
    """Trouble on the first request of every path that holds `wanted`."""
    return lambda path, nth: action if wanted in path and nth == 1 else None


def test_a_remote_build_equals_a_local_one(hub, source, tmp_path, monkeypatch):
    monkeypatch.setattr("vindex.hub_files.PIECE", 1000)  # several pieces a tensor
    options = BuildOptions(features=8)
    manifest = build(
        open_checkpoint("hf://someone/model"), tmp_path / "r.vindex", options, silent, resume=False, force=False
    )
    build_quietly(source, tmp_path / "l.vindex")
    assert contents(tmp_path / "r.vindex") == contents(tmp_path / "l.vindex")
    local = vindex.open(tmp_path / "l.vindex").manifest.source
    assert (manifest.source.model, manifest.source.revision) == ("someone/model", COMMIT)
    assert {f.name: f.sha256 for f in manifest.source.files} == {f.name: f.sha256 for f in local.files}
    by = {f.name: f.hashed_by for f in manifest.source.files}
    assert by[SHARD] == "hub" and by["config.json"] == by["tokenizer.json"] == by["README.md"] == "vindex"
    index = vindex.open(tmp_path / "r.vindex").index.source
    assert (index["huggingface_repo"], index["huggingface_revision"]) == ("someone/model", COMMIT)


def test_only_headers_and_needed_tensors_travel(hub, source):
    opened = open_checkpoint("hf://someone/model@main")
    name = "model.layers.0.mlp.down_proj.weight"
    before = hub.bytes_sent
    assert opened.tensor(name).equal(open_checkpoint(str(source)).tensor(name))
    assert hub.bytes_sent - before == 16 * 24 * 2
    headers = sum(8 + int.from_bytes((source / f).read_bytes()[:8], "little") for f in opened.weight_files)
    texts = ("config.json", "model.safetensors.index.json")
    api_answer = 4000
    assert before <= headers + sum((source / text).stat().st_size for text in texts) + api_answer
    assert not any("unrelated" in request.path for request in hub.requests)


@pytest.mark.parametrize(
    "trouble",
    [
        once("500", "/api/"),
        once("500", "/resolve/"),
        once("500", "/storage/"),
        once("drop", "/storage/"),
        once("drop", "config.json"),
        lambda path, nth: "500" if "/storage/" in path and nth % 3 else None,
    ],
    ids=[
        "500 of the API",
        "500 of a redirect",
        "500 of the storage",
        "drop in a shard",
        "drop in a text",
        "mostly 500",
    ],
)
def test_server_errors_and_dropped_connections_are_survived(hub, source, trouble):
    hub.trouble = trouble
    opened = open_checkpoint("hf://someone/model")
    for name in ("model.layers.1.mlp.gate_proj.weight", "lm_head.weight"):
        assert opened.tensor(name).equal(open_checkpoint(str(source)).tensor(name))
    assert any(sum(r.path == request.path for r in hub.requests) > 1 for request in hub.requests)


@pytest.mark.parametrize("action, seconds", [("too many", 42), ("wait", 7), ("500", 0.01)])
def test_the_pause_is_as_long_as_the_server_asks(hub, monkeypatch, action, seconds):
    paused = []
    hub.trouble = once(action, "/api/resolve-cache/models/someone/model/resolve/" + COMMIT + "/config.json")
    monkeypatch.setattr("vindex.hub_files.time.sleep", paused.append)
    assert open_checkpoint("hf://someone/model").config["model_type"] == "qwen3"
    assert paused == [seconds]


@pytest.mark.parametrize(
    "action, where, message",
    [
        (
            "other etag",
            "/resolve/",
            r"someone/model/model-0000\d-of-00002.safetensors changed on the Hub while it was read",
        ),
        ("no range", "/storage/", r"asked for bytes 0-7/\d+ and got status 200, no Content-Range; a proxy or mirror"),
        (
            "500",
            "/storage/",
            r"/model-0000\d\S*: download failed \(Server error '500 Internal Server Error'\); try again$",
        ),
        ("short", "/storage/", r"someone/model/model-0000\d\S*: expected 8 bytes, got 7; try again"),
        (
            "gone",
            "/storage/",
            r"/model-0000\d\S*: download failed: the Hub lists what it has not; ask its owner to push",
        ),
        ("drop", "/storage/", r"download failed \(peer closed connection"),
        ("gated", "/resolve/", r"accept its terms on https://huggingface.co/someone/model, then run `hf auth login`"),
    ],
)
def test_what_does_not_go_away_is_refused_in_one_line(hub, monkeypatch, action, where, message):
    monkeypatch.setattr("vindex.hub_files.RETRIES", 3)
    hub.trouble = lambda path, nth: action if where in path and path.endswith(".safetensors") else None
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint("hf://someone/model")
    assert "\n" not in str(caught.value)


def test_a_small_file_may_come_whole_and_a_repository_may_have_a_new_name(hub, source):
    """A server need not cut what is asked for whole; every address of the old name leads to the new one."""
    hub.trouble = lambda path, nth: "no range" if path.endswith("config.json") else None
    hub.renamed["someone/old"] = "someone/model"
    opened, name = open_checkpoint("hf://someone/old"), "model.layers.1.mlp.gate_proj.weight"
    assert opened.tensor(name).equal(open_checkpoint(str(source)).tensor(name))
    assert any(request.path.startswith("/someone/old/resolve/") for request in hub.requests)


def test_an_etag_that_changes_in_the_middle_stops_the_build_and_a_resume_goes_on(hub, source, tmp_path):
    target, seen = tmp_path / "r.vindex", []

    def changes(path, nth):
        if "/resolve/" in path and path.endswith(SHARD):
            seen.append(path)
            return "other etag" if len(seen) > 4 else None
        return None

    hub.trouble = changes
    options = BuildOptions(features=8)
    with pytest.raises(CheckpointError, match=f"{SHARD} changed on the Hub while it was read: its ETag was .* is 0000"):
        build(open_checkpoint("hf://someone/model"), target, options, silent, resume=False, force=False)
    assert not target.exists() and Path(f"{target}.partial").exists()
    hub.trouble = lambda path, nth: None
    build(open_checkpoint("hf://someone/model"), target, options, silent, resume=True, force=False)
    build_quietly(source, tmp_path / "l.vindex")
    assert contents(target) == contents(tmp_path / "l.vindex")


def test_a_new_commit_does_not_resume_an_old_build(hub, source, tmp_path, monkeypatch):
    target = tmp_path / "r.vindex"
    hub.trouble = lambda path, nth: "gated" if path.endswith(SHARD) and nth > 6 else None
    options = BuildOptions(features=8)
    with pytest.raises(CheckpointError):
        build(open_checkpoint("hf://someone/model"), target, options, silent, resume=False, force=False)
    hub.trouble = lambda path, nth: None
    monkeypatch.setattr("tests.hub_server.COMMIT", "f" * 40)
    with pytest.raises(TargetError, match=rf"begun with other inputs \(source.revision: {COMMIT} then, ffff"):
        build(open_checkpoint("hf://someone/model"), target, options, silent, resume=True, force=False)


def test_names_that_are_not_there(hub):
    for name, message in {
        "hf://someone/else": "someone/else: no such directory here and no such model on the Hub",
        "hf://someone/model@v9": "someone/model: there is no revision v9",
        "hf://someone": "hf://someone: expected hf://owner/name",
        "hf://someone/model/a.safetensors": r"expected hf://owner/name\[@revision\], or that and /FILE.gguf",
        "hf://someone/model/a.gguf": "someone/model: has no a.gguf; it has no GGUF",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(name)
    with pytest.raises(QueryError, match="--revision b: hf://someone/model@a names one as well; give one of the two"):
        extract.build("hf://someone/model@a", "x.vindex", revision="b")
    hub.repositories["someone/gguf"] = {"config.json": Bytes(b"{}", False), "m-Q4_0.gguf": Bytes(b"GGUF", True)}
    with pytest.raises(CheckpointError, match="name one, such as hf://someone/gguf/m-Q4_0.gguf"):
        open_checkpoint("hf://someone/gguf")


def test_a_gguf_file_is_streamed_as_well(hub, source, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", hidden=32, neurons=64)
    write_gguf(checkpoint, tmp_path / "m-Q8_0.gguf", lambda name: Kind.Q8_0)
    hub.repositories["someone/gguf"] = serve_directory(tmp_path)
    remote = open_checkpoint("hf://someone/gguf/m-Q8_0.gguf", tokenizer=checkpoint / "tokenizer.json")
    build(remote, tmp_path / "r.vindex", BuildOptions(features=8), silent, resume=False, force=False)
    local = open_checkpoint(str(tmp_path / "m-Q8_0.gguf"), tokenizer=checkpoint / "tokenizer.json")
    build(local, tmp_path / "l.vindex", BuildOptions(features=8), silent, resume=False, force=False)
    assert contents(tmp_path / "r.vindex") == contents(tmp_path / "l.vindex")
    files = {f.name: f.hashed_by for f in vindex.open(tmp_path / "r.vindex").manifest.source.files}
    assert files == {"m-Q8_0.gguf": "hub", "tokenizer.json": "vindex"}
    with pytest.raises(
        CheckpointError, match="tokenizer.json is missing; .* or give the model's own with --tokenizer PATH"
    ):
        open_checkpoint("hf://someone/gguf/m-Q8_0.gguf").tokenizer()


def test_offline_is_said(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, so the Hub is not asked; unset it to go on"):
        open_checkpoint("hf://someone/model")


def test_a_vindex_is_verified_against_the_hub(hub, source, tmp_path):
    build_quietly(source, tmp_path / "l.vindex")
    assert all(
        found.holds for found in rederived(vindex.open(tmp_path / "l.vindex"), "hf://someone/model@main", [0, 1])
    )
    assert extract.audit(tmp_path / "l.vindex", "hf://someone/model").holds


def test_the_command_builds_and_verifies_from_the_hub_and_fills_no_cache(hub, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}

    def run(*command):
        return subprocess.run(
            [sys.executable, "-m", "vindex", *command], env=environment, capture_output=True, text=True
        )

    target = str(tmp_path / "r.vindex")
    done = run("build", "hf://someone/model", "-o", target, "--features", "8", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.vindex" / "manifest.json").read_text())["source"]["revision"] == COMMIT
    verified = run("verify", target, "--source", "hf://someone/model")
    assert verified.returncode == 0, verified.stderr
    assert not [p for p in (tmp_path / "hf").rglob("*") if p.is_file() and p.stat().st_size > 10_000]
