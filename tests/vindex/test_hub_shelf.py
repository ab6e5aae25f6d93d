"""A vindex opened on the Hub: what is asked for travels, once, and what has travelled is checked."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import vindex
from tests.hub_server import TOKEN, Bytes, Content, HubServer, pointed_at, serve_directory
from vindex.__main__ import app
from vindex.checksums import render_sums
from vindex.errors import CheckpointError, FormatError, QueryError, VindexError
from vindex.format import DOWN, EMBEDDINGS, META_COUNT, META_HEADER, META_MAGIC, META_VERSION, files_of, meta_record
from vindex.hub_shelf import HubShelf
from vindex.index import EffectiveRank, Index, NormEntry, layer_entry
from vindex.schema import OF_A_VINDEX, to_json

REPO, LARGE = "someone/tiny-vindex", "someone/qwen3-8b-vindex"


@pytest.fixture
def hub(monkeypatch, tmp_path, built):
    """The server with one vindex, and a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("vindex.hub_files.RETRIES", 1)
    monkeypatch.setattr("vindex.hub_shelf.RETRIES", 1)
    with HubServer({REPO: serve_directory(built)}) as server, pointed_at(server, monkeypatch):
        yield server


@pytest.fixture
def by_rows(monkeypatch):
    """As if every file were large: the embeddings come by rows."""
    monkeypatch.setattr("vindex.hub_shelf.WHOLE", 0)


def refused(work, kind: type[VindexError] = CheckpointError) -> str:
    """What is said, in one line."""
    with pytest.raises(kind) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Repeated:
    """A large file of one pattern, made up as it is read. Its SHA-256 is only right where it is fetched whole."""

    large = True

    def __init__(self, pattern: np.ndarray, size: int, *, hashed: bool) -> None:
        self._pattern, self.size = pattern.tobytes(), size
        self.sha256 = hashlib.sha256(self.read(0, size) if hashed else b"").hexdigest()

    def read(self, start: int, stop: int) -> bytes:
        first = start % len(self._pattern)
        times = -(-(first + stop - start) // len(self._pattern))
        return (self._pattern * times)[first : first + stop - start]


def of_the_shape_of_qwen3_8b(small: Path) -> dict[str, Content]:
    """A vindex with 36 layers, 128 features, hidden size 4,096 and 151,936 tokens: 1.3 GB, none of it in memory."""
    index = vindex.open(small).index
    assert isinstance(index, Index)
    ranks = EffectiveRank(128, 128)
    index = dataclasses.replace(
        index,
        num_layers=36,
        num_feats=128,
        hidden_size=4096,
        vocab_size=151936,
        layers=tuple(layer_entry(at, 128, at * 128 * 4096 * 2, 4096, ranks) for at in range(36)),
        norms=(NormEntry("norm", 0, 4096),),
    )
    random = np.random.default_rng(0)
    patterns = {
        "<f2": random.standard_normal(4099).astype("<f2"),
        "<f4": np.full(1, 0.01, "<f4"),
        "<u4": np.ones(1, "<u4"),
    }
    records = np.zeros(128, meta_record(index.down_top_k))
    meta = np.array([(META_MAGIC, META_VERSION, 36, index.down_top_k)], META_HEADER).tobytes()
    meta += (np.array([128], META_COUNT).tobytes() + records.tobytes()) * 36
    files: dict[str, Content] = {
        spec.name: Repeated(patterns[spec.dtype], spec.byte_size(index), hashed=spec not in (EMBEDDINGS, DOWN))
        if spec.dtype
        else Bytes(meta, True)
        for spec in files_of(index)
        if spec.byte_size
    }
    files["tokenizer.json"] = Bytes((small / "tokenizer.json").read_bytes().ljust(11_000_000), True)
    sums = {name: content.sha256 for name, content in files.items()}
    index = dataclasses.replace(index, checksums=sums)
    texts = {name: (small / name).read_bytes() for name in ("manifest.json", "README.md")}
    texts["index.json"] = to_json(index)
    sums |= {name: hashlib.sha256(content).hexdigest() for name, content in texts.items()}
    texts["SHA256SUMS"] = render_sums(sums).encode()
    return files | {name: Bytes(content, False) for name, content in texts.items()}


def test_of_a_large_one_only_what_is_needed_travels(hub, built):
    hub.repositories[LARGE] = of_the_shape_of_qwen3_8b(built)
    size = sum(content.size for content in hub.repositories[LARGE].values())
    assert size > 1.3e9
    done = CliRunner().invoke(app, ["info", f"hf://{LARGE}"])
    assert done.exit_code == 0 and "1.3 GB" in done.output and "151,936" in done.output
    assert hub.bytes_sent < 1e6
    done = CliRunner().invoke(app, ["score", f"hf://{LARGE}", "--id", "5"])
    assert done.exit_code == 0 and "id 5" in done.output
    assert 4e7 < hub.bytes_sent < 0.05 * size
    before = hub.bytes_sent
    v = vindex.open(f"hf://{LARGE}")
    v.score(6)
    assert hub.bytes_sent - before < 8192 + 1e4  # a row, and what the Hub says of the commit
    message = refused(lambda: v.coherence(0, 0), QueryError)
    assert message.startswith(f"hf://{LARGE}/embeddings.bin is needed whole and has 1,244,659,712 bytes: `vindex pull")


def test_answers_are_those_of_the_directory(hub, built, by_rows):
    v, here = vindex.open(f"hf://{REPO}"), vindex.open(built)
    words = [here.piece(3), here.piece(7), here.piece(3)]
    assert v.info() == here.info() and v.score(words).record() == here.score(words).record()
    assert not any("embeddings.bin" in str(path) for path in Path(v.shelf.cache).iterdir())
    rows = [request for request in hub.requests if "/storage/" in request.path and "embeddings" in request.path]
    assert len(rows) == 2  # each of the two tokens once
    assert vindex.compare(v, here).rows() == vindex.compare(here, here).rows()
    assert v.feature(1, 2) == here.feature(1, 2)
    assert [check.holds for check in vindex.verify(v)] == [check.holds for check in vindex.verify(here)]
    assert repr(v) == repr(here)


def test_a_path_has_lost_a_slash(hub, built):
    assert vindex.open(Path(f"hf://{REPO}")).id == vindex.open(built).id


def test_commands_take_an_address(hub, built):
    commands = (
        ["score", f"hf://{REPO}@main", "--id", "3"],
        ["search", f"hf://{REPO}", vindex.open(built).piece(3)],
        ["feature", f"hf://{REPO}", "1", "2"],
        ["compare", f"hf://{REPO}", str(built)],
    )
    for command in commands:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.exception)


def test_files_travel_once_and_are_told(hub, by_rows):
    told = []
    v = vindex.open(f"hf://{REPO}", progress=lambda stage, total: told.append((stage, total)) or (lambda *of: None))
    v.score(3)
    assert ("fetch gate_vectors.bin", v.shelf.size("gate_vectors.bin")) in told
    hub.requests.clear()
    vindex.open(f"hf://{REPO}").score(3)
    assert [request.path.rpartition("/")[2] for request in hub.requests if "/resolve/main" not in request.path][1:] in (
        ["embeddings.bin", "embeddings.bin"],
    )


def test_offline_the_cache_answers(hub, built, monkeypatch):
    address = f"hf://{REPO}"
    vindex.open(address).score(3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert vindex.open(address).score(3).record() == vindex.open(built).score(3).record()
    assert not hub.requests
    message = refused(lambda: vindex.open(f"{address}@v2"))
    assert message == f"{address}@v2: HF_HUB_OFFLINE is set and this was never opened here; unset it to go on"
    message = refused(lambda: vindex.open(address).down)
    assert message == f"{REPO}/down_features.bin: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it to go on"


@pytest.mark.parametrize("content", [b"{}", b"[1]", b'{"commit": "x", "entries": {"a": 3}}'])
def test_a_damaged_cache(hub, tmp_path, monkeypatch, content):
    vindex.open(f"hf://{REPO}")
    record = tmp_path / "hf" / "vindex" / "someone--tiny-vindex" / "main.json"
    record.write_bytes(content)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(lambda: vindex.open(f"hf://{REPO}"))
    assert message == f"{record}: is no listing of a repository; remove it, and open the vindex again"


@pytest.mark.parametrize(
    "name, when",
    [
        ("gate_vectors.bin", "opened"),
        ("index.json", "opened"),
        ("tokenizer.json", "read"),
    ],
)
def test_a_file_that_was_changed_on_the_hub(hub, name, when):
    content = hub.repositories[REPO][name]
    changed = bytearray(content.read(0, content.size))
    changed[-2] ^= 1
    hub.repositories[REPO][name] = Bytes(bytes(changed), content.large)

    def work():
        v = vindex.open(f"hf://{REPO}")
        assert when != "opened"
        return v.vocabulary

    message = refused(work)
    assert message.startswith(f"hf://{REPO}/{name} has SHA-256 ") and "and SHA256SUMS says" in message


def test_rows_are_of_the_file_that_was_compared(hub, by_rows):
    v = vindex.open(f"hf://{REPO}")
    hub.trouble = lambda path, nth: "other etag" if path.endswith("embeddings.bin") else None
    assert f"{REPO}/embeddings.bin changed on the Hub while it was read" in refused(lambda: v.score(3))


@pytest.mark.parametrize(
    "action, where, message",
    [
        ("drop", "/storage/", "gate_vectors.bin: download failed (peer closed connection"),
        ("cut", "/resolve/", "gate_vectors.bin: download failed ("),
        ("500", "/storage/", "gate_vectors.bin: download failed (Server error '500 Internal Server Error'); try again"),
    ],
)
def test_a_broken_connection_leaves_no_half_of_a_file(hub, action, where, message):
    v = vindex.open(f"hf://{REPO}")
    hub.trouble = lambda path, nth: action if where in path else None
    assert refused(lambda: v.gate).startswith(f"{REPO}/{message}")
    assert "gate_vectors.bin" not in {path.name for path in v.shelf.cache.iterdir()}
    hub.trouble = lambda path, nth: None
    assert v.gate.shape


def test_what_cannot_be_opened(hub, monkeypatch):
    hub.repositories["someone/model"] = {"config.json": Bytes(b"{}", False)}
    assert "SHA256SUMS" in refused(lambda: vindex.open("hf://someone/model"), FormatError)
    assert "no such model on the Hub" in refused(lambda: vindex.open("hf://someone/else"))
    assert "there is no revision v9" in refused(lambda: vindex.open(f"hf://{REPO}@v9"))
    assert "expected hf://owner/name[@revision]" in refused(lambda: vindex.open("hf://someone"))
    assert "of a vindex" in refused(lambda: vindex.open(f"hf://{REPO}/x.gguf"))
    hub.private.add(REPO)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert "or log in if it is private" in refused(lambda: vindex.open(f"hf://{REPO}"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert vindex.open(f"hf://{REPO}").id


def test_a_server_that_names_no_commit(hub):
    hub.commits[REPO, "main"] = "../../x"
    message = refused(lambda: vindex.open(f"hf://{REPO}"))
    assert message == f"hf://{REPO}: expected a commit of 40 hex digits from the Hub, got '../../x'"


def test_files_of_other_sizes(hub, built, tmp_path):
    shelf = HubShelf(f"hf://{REPO}")
    assert "cannot be mapped" in refused(lambda: shelf.array("norms.bin", np.dtype("<f2"), (1 << 20,)), FormatError)
    assert shelf.read("index.json") == (built / "index.json").read_bytes()
    message = refused(lambda: shelf.size("nothing.bin"), FormatError)
    assert message.startswith(f"hf://{REPO}/nothing.bin: is not there at commit 0123")


def test_rows_of_a_file_that_is_shorter(hub, by_rows):
    shelf = HubShelf(f"hf://{REPO}")
    message = refused(lambda: shelf.rows("embeddings.bin", np.dtype("<f2"), (1 << 20, 16), [3]), FormatError)
    assert message.startswith(f"hf://{REPO}/embeddings.bin: ") and "bytes are no (1048576, 16) of float16" in message


def test_a_text_that_is_too_long(hub):
    shelf = HubShelf(f"hf://{REPO}")
    message = refused(lambda: shelf.read("index.json", OF_A_VINDEX._replace(limit=10)), FormatError)
    assert "bytes, and at most 10 are read" in message


def test_its_card_is_not_written(hub):
    message = refused(lambda: vindex.write_card(vindex.open(f"hf://{REPO}")), QueryError)
    assert message == f"hf://{REPO} is on the Hub: `vindex pull {REPO}`, write its card, and push it"


def test_a_pull_takes_what_is_in_the_cache(hub, built, tmp_path):
    vindex.open(f"hf://{REPO}").score(3)
    hub.requests.clear()
    pulled = vindex.pull(REPO, tmp_path / "p")
    assert not any("gate_vectors" in request.path for request in hub.requests)
    assert {p.name: p.read_bytes() for p in pulled.path.iterdir()} == {p.name: p.read_bytes() for p in built.iterdir()}
    shutil.rmtree(pulled.path)
