"""Vindexes pushed to the Hub and pulled from it, over a local server that speaks its endpoints and misbehaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vindex
from tests.foreign import weights, write_published
from tests.hub_server import TOKEN, Bytes, HubServer, pointed_at, serve_directory
from vindex.__main__ import app
from vindex.errors import CheckpointError, FormatError, QueryError, TargetError
from vindex.places import partial_of

REPO = "someone/tiny-vindex"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server, with a token that may write to it; the cache is empty."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with HubServer({}) as server, pointed_at(server, monkeypatch):
        yield server


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return shutil.copytree(built, tmp_path / "copy.vindex")


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(work, kind=CheckpointError) -> str:
    """What is said, in one line."""
    with pytest.raises(kind) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_pushed_and_pulled_is_the_same_bytes(hub, copy, tmp_path):
    pushed = vindex.push(copy, REPO)
    pulled = vindex.pull(REPO, tmp_path / "pulled.vindex")
    assert bytes_of(pulled.path) == bytes_of(copy) and vindex.verify(pulled).holds
    assert (pushed.id, pushed.commit) == (pulled.id, hub.commits[REPO, "main"])
    assert pushed.url == f"{hub.endpoint}/{REPO}" and pushed.rows() == [pushed.record()]
    assert repr(pushed) == f"<vindex {pulled.id} on the Hub: {pushed.url}>"
    card = (copy / "README.md").read_text()
    assert f"vindex.open('hf://{REPO}')" in card and "license: apache-2.0" in card and "- vindex" in card
    assert hub.repositories[REPO]["gate_vectors.bin"].large and not hub.repositories[REPO]["index.json"].large


def test_pushing_again_removes_what_the_new_one_lacks(hub, copy, tmp_path):
    vindex.push(copy, REPO)
    hub.repositories[REPO]["router_weights.bin"] = Bytes(b"of a mixture", True)
    vindex.push(copy, REPO)
    assert set(hub.repositories[REPO]) == {".gitattributes", *bytes_of(copy)}
    assert bytes_of(vindex.pull(REPO, tmp_path / "p").path) == bytes_of(copy)


def test_a_revision_is_a_branch_of_its_own(hub, copy, tmp_path):
    vindex.push(copy, REPO)
    vindex.write_card(vindex.open(copy), licence="mit")
    pushed = vindex.push(copy, REPO, revision="v2")
    assert "license: apache-2.0" in (vindex.pull(REPO, tmp_path / "main").path / "README.md").read_text()
    for number, revision in enumerate(("v2", pushed.commit)):
        pulled = vindex.pull(REPO, tmp_path / f"v2-{number}", revision=revision)
        assert bytes_of(pulled.path) == bytes_of(copy)
    message = refused(lambda: vindex.pull(REPO, tmp_path / "v3", revision="v3"))
    assert message == f"{REPO}: there is no revision v3; leave it out for the newest"


def test_a_private_repository(hub, copy, tmp_path, monkeypatch):
    vindex.push(copy, REPO, private=True)
    assert hub.private == {REPO}
    assert vindex.pull(REPO, tmp_path / "mine").id == vindex.open(copy).id
    monkeypatch.delenv("HF_TOKEN")
    message = refused(lambda: vindex.pull(REPO, tmp_path / "theirs"))
    assert "no such model on the Hub; check the spelling, or log in if it is private (`hf auth login`" in message
    assert not (tmp_path / "theirs").exists()


def test_what_is_not_pushed(hub, copy, tmp_path, monkeypatch):
    assert "expected OWNER/NAME" in refused(lambda: vindex.push(copy, "tiny"), QueryError)
    (tmp_path / "notes").mkdir()
    assert "SHA256SUMS" in refused(lambda: vindex.push(tmp_path / "notes", REPO), FormatError)
    hub.repositories["someone/model"] = {"config.json": Bytes(b"{}", False)}
    message = refused(lambda: vindex.push(copy, "someone/model"))
    assert message == "someone/model holds config.json, which is of no vindex; push under another name"
    hub.repositories["someone/public"] = {}
    message = refused(lambda: vindex.push(copy, "someone/public", private=True))
    assert message == "someone/public is there and public; make it private in its settings, or push under another name"
    hub.trouble = lambda path, nth: "gated" if path.endswith("someone/public") else None
    assert "access is gated" in refused(lambda: vindex.push(copy, "someone/public"))
    numbers = bytearray((copy / "norms.bin").read_bytes())
    numbers[0] ^= 1
    (copy / "norms.bin").write_bytes(numbers)
    message = refused(lambda: vindex.push(copy, REPO), FormatError)
    assert message.startswith(f"{copy} is not pushed: it failed 1 of ") and "norms.bin" in message
    assert REPO not in hub.repositories
    monkeypatch.setenv("HF_TOKEN", "")
    message = refused(lambda: vindex.push(copy, REPO))
    assert message.startswith(f"{REPO}: there is no token to push with; run `hf auth login`, or set HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(lambda: vindex.push(copy, REPO))
    assert message == f"{REPO}: HF_HUB_OFFLINE is set, so nothing is pushed; unset it to go on"


@pytest.mark.parametrize(
    "action, where, message",
    [
        (
            "forbidden",
            "/repos/create",
            "upload is not allowed with this token (403); `hf auth login` with one",
        ),
        ("cut", "/upload/", "upload failed ("),
        ("500", "/commit/", "upload failed (Server error '500 Internal Server Error'); try again"),
    ],
)
def test_uploads_that_fail(hub, copy, action, where, message):
    hub.trouble = lambda path, nth: action if where in path else None
    assert f"{REPO}: {message}" in refused(lambda: vindex.push(copy, REPO))
    hub.trouble = lambda path, nth: None
    vindex.push(copy, REPO)
    assert "index.json" in hub.repositories[REPO]


def test_an_upload_that_was_cut_goes_on_with_the_large_files_that_are_missing(hub, copy):
    cut = f"/upload/{vindex.open(copy).digests['norms.bin']}"
    hub.trouble = lambda path, nth: "cut" if path == cut else None
    message = refused(lambda: vindex.push(copy, REPO))
    arrived, there = set(hub.uploaded), set(hub.repositories[REPO])
    assert message.startswith(f"{REPO}: upload failed (") and arrived and there == {".gitattributes"}
    hub.trouble = lambda path, nth: None
    hub.requests.clear()
    vindex.push(copy, REPO)
    asked = [request.path for request in hub.requests]
    assert cut in asked and not {path.removeprefix("/upload/") for path in asked} & arrived
    assert sum("/commit/" in path for path in asked) == 1, "a revision is a whole vindex or another one"


def test_what_arrived_otherwise_is_told(hub, copy, monkeypatch):
    class Other(Bytes):
        def __init__(self, content: bytes, large: bool) -> None:
            super().__init__(content[:-1] + b"x" if large else content, large)

    monkeypatch.setattr("tests.hub_server.Bytes", Other)
    message = refused(lambda: vindex.push(copy, REPO))
    assert ".bin is not the same at commit " in message and message.endswith(" as here; push again")


def test_a_pull_that_was_cut_goes_on(hub, copy, tmp_path, monkeypatch):
    hub.repositories[REPO] = serve_directory(copy)
    monkeypatch.setattr("vindex.hub_files.RETRIES", 2)
    hub.trouble = lambda path, nth: "drop" if "/storage/" in path and path.endswith("norms.bin") else None
    target = tmp_path / "p.vindex"
    message = refused(lambda: vindex.pull(REPO, target))
    assert message.startswith(f"{REPO}/norms.bin: download failed (peer closed connection") and not target.exists()
    there = set(bytes_of(partial_of(target)))
    assert "gate_vectors.bin" in there and "norms.bin" not in there
    hub.trouble = lambda path, nth: None
    hub.requests.clear()
    assert bytes_of(vindex.pull(REPO, target).path) == bytes_of(copy)
    assert not any("gate_vectors" in request.path for request in hub.requests)
    assert not partial_of(target).exists()


@pytest.mark.parametrize("name", ["gate_vectors.bin", "tokenizer.json"])
def test_a_file_that_was_changed_on_the_hub(hub, copy, tmp_path, name):
    hub.repositories[REPO] = serve_directory(copy)
    content, large = bytearray((copy / name).read_bytes()), hub.repositories[REPO][name].large
    content[100] ^= 1
    hub.repositories[REPO][name] = Bytes(bytes(content), large)
    message = refused(lambda: vindex.pull(REPO, tmp_path / "p"))
    assert message.startswith(f"hf://{REPO}/{name} has SHA-256 ") and "… and SHA256SUMS says " in message
    assert message.endswith("choose another revision, or ask its owner to push it again")
    assert not (tmp_path / "p").exists() and not (tmp_path / "hf" / name).exists()


def test_ctrl_c_during_a_pull_says_that_it_goes_on(tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("vindex.exchange.HubShelf", stop)
    done = CliRunner().invoke(app, ["pull", REPO, str(tmp_path / "p")])
    assert done.exit_code == 130 and done.stderr == "stopped; what has come is kept: the same command goes on\n"


def test_what_comes_of_another_family_is_to_be_audited(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_published(tmp_path / "theirs", weights(1, 2, 4), weights(1, 2, 4), weights(9, 4))
    hub.repositories["someone/theirs"] = serve_directory(tmp_path / "theirs")
    done = CliRunner().invoke(app, ["pull", "someone/theirs", "p"])
    assert done.output.endswith(" bytes\nnext: vindex audit p --source MODEL\n") and " of None" not in done.output
    assert bytes_of(Path("p")) == bytes_of(tmp_path / "theirs")


def test_what_is_not_pulled(hub, copy, tmp_path):
    assert "expected OWNER/NAME of a vindex on the Hub" in refused(lambda: vindex.pull("tiny"), QueryError)
    hub.repositories["someone/model"] = {"config.json": Bytes(b"{}", False)}
    message = refused(lambda: vindex.pull("someone/model", tmp_path / "m"), FormatError)
    assert "SHA256SUMS" in message or "index.json" in message
    hub.repositories[REPO] = serve_directory(copy)
    taken = tmp_path / "notes"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    for force in (False, True):
        message = refused(lambda force=force: vindex.pull(REPO, taken, force=force), TargetError)
        assert "already exists and is nothing that this tool made (vindex), so it is not replaced" in message
    assert (taken / "mine.txt").read_text() == "mine"
    assert "or replace it with --force" in refused(lambda: vindex.pull(REPO, copy), TargetError)
    assert vindex.pull(REPO, copy, force=True).path == copy
    del hub.repositories[REPO]["norms.bin"]
    message = refused(lambda: vindex.pull(REPO, tmp_path / "p"), FormatError)
    assert "norms.bin: is not there at commit" in message


def test_a_build_that_was_begun_there_is_left_alone(hub, copy, tmp_path):
    from vindex.places import begin

    hub.repositories[REPO] = serve_directory(copy)
    partial = partial_of(tmp_path / "p")
    partial.mkdir()
    begin(partial, "build", ["x"])
    message = refused(lambda: vindex.pull(REPO, tmp_path / "p"), TargetError)
    assert message == f"{partial} is an unfinished build; finish or remove it first"
