from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

import vindex
from vindex.checks import verify
from vindex.checksums import load_sums, render_sums
from vindex.errors import FormatError
from vindex.verification import Check


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy.vindex")


def failures(directory):
    return {check.what: check.detail for check in verify(vindex.open(directory)) if not check.holds}


def change(directory, name, dtype, edit, *, resum=False):
    """Edit a binary; with resum, as someone would who also updated the checksums."""
    values = np.fromfile(directory / name, dtype)
    edit(values)
    values.tofile(directory / name)
    if resum:
        digests = load_sums(directory)
        before, after = digests[name], hashlib.sha256(values.tobytes()).hexdigest()
        index = (directory / "index.json").read_text().replace(before, after)
        (directory / "index.json").write_text(index)
        digests |= {name: after, "index.json": hashlib.sha256(index.encode()).hexdigest()}
        (directory / "SHA256SUMS").write_text(render_sums(digests))


def test_a_fresh_build_passes(built):
    assert failures(built) == {}


@pytest.mark.parametrize("name", ["gate_vectors.bin", "embeddings.bin", "down_meta.bin", "tokenizer.json"])
def test_one_flipped_bit_is_found_and_the_file_named(copy, name):
    change(copy, name, np.uint8, lambda data: data.__setitem__(len(data) // 2, data[len(data) // 2] ^ 1))
    assert failures(copy)["checksums"] == f"changed since the build: {name}"


def test_an_edited_card_is_no_damage(copy):
    with (copy / "README.md").open("a") as card:
        card.write("A note of mine.\n")
    assert failures(copy) == {"README.md": f"edited since it was written; `vindex card {copy}` writes it anew"}


def test_numbers_are_checked_even_when_checksums_agree(copy):
    change(copy, "embeddings.bin", "<f2", lambda v: v.__setitem__(16 * 3 + 2, np.nan), resum=True)
    found = failures(copy)
    assert found.pop("embeddings.bin finite") == "row 3, column 2 is nan"
    assert all("recomputed" in what for what in found), "what is made of them is wrong, too"


def test_rows_that_are_not_orthonormal(copy):
    change(copy, "down_features.bin", "<f2", lambda v: v[8 * 16 : 9 * 16].__imul__(np.float16(0.9)), resum=True)
    (what,) = failures(copy)
    assert what == "down_features.bin orthonormal"


def test_singular_values_out_of_order(copy):
    change(copy, "singular_values.bin", "<f4", lambda v: v.__setitem__(3, 1e6), resum=True)
    assert failures(copy) == {"singular values": "gate layer 0 rises after feature 2"}
    change(copy, "singular_values.bin", "<f4", lambda v: v.__setitem__(slice(0, 8), -1.0), resum=True)
    assert "singular values" in failures(copy)


def agree(directory):
    """Make every checksum agree with what is there, as an attacker would."""
    index = json.loads((directory / "index.json").read_text())
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}
    index["checksums"] = {name: digests[name] for name in index["checksums"]}
    (directory / "index.json").write_text(json.dumps(index))
    digests["index.json"] = hashlib.sha256((directory / "index.json").read_bytes()).hexdigest()
    (directory / "SHA256SUMS").write_text(
        render_sums({name: of for name, of in digests.items() if name != "SHA256SUMS"})
    )


RECORD = 8 + 8 * 20  # bytes of a meta file's record
FIRST = 16 + 4  # bytes before its first one


@pytest.mark.parametrize(
    "at, content, message",
    [
        (0, b"x", "gate_meta.bin: expected header"),
        (4, b"\x02", "gate_meta.bin: expected header"),
        (16, b"\x07", "layer 0: expected 8 records, got 7"),
        (FIRST + RECORD, b"\x01\0\0\0", "layer 0, row 1: top_token_id is not the first token"),
        (FIRST + 4, np.float32(0.5).tobytes(), "layer 0, row 0: top_score is not the first score"),
        (FIRST + 8 + 8 * 3, np.uint32(36).tobytes(), "layer 0, row 0: expected token ids below 36"),
        (FIRST + 12 + 8 * 3, np.float32(np.nan).tobytes(), "layer 0, row 0: a score is not finite"),
        (FIRST + 12 + 8 * 3, np.float32(-1).tobytes(), "layer 0, row 0: the highest scores do not stand highest first"),
        (FIRST + 12 + 8 * 13, np.float32(1).tobytes(), "layer 0, row 0: the lowest scores do not stand lowest first"),
        (FIRST + 12 + 8 * 10, np.float32(-3).tobytes(), "layer 0, row 0: a cosine is larger than 1"),
    ],
)
def test_meta_files_are_read(copy, at, content, message):
    path = copy / "gate_meta.bin"
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)
    agree(copy)
    ((what, detail),) = failures(copy).items()
    assert what == "gate_meta.bin tokens" and detail.startswith(message)


def test_a_token_that_stands_twice_at_a_pole(copy):
    path = copy / "down_meta.bin"
    data = bytearray(path.read_bytes())
    data[FIRST + 8 + 8 * 5 : FIRST + 8 + 8 * 5 + 4] = data[FIRST + 8 : FIRST + 12]
    path.write_bytes(data)
    agree(copy)
    assert failures(copy) == {"down_meta.bin tokens": "layer 0, row 0: a token stands twice at one pole"}


def test_what_is_beside_the_files_is_reported(copy):
    (copy / ".gitattributes").write_text("*.bin filter=lfs")  # the Hub writes it
    assert failures(copy) == {}
    (copy / "notes.txt").write_text("")
    (copy / "more").mkdir()
    (copy / "way out").symlink_to("/etc/passwd")
    expected = "not part of a vindex: more (a directory); notes.txt; way out (a link); remove it"
    assert failures(copy) == {"directory": expected}


def test_files_may_be_links_as_in_the_cache_of_the_hub(copy, tmp_path):
    for name in ("norms.bin", "index.json"):
        (copy / name).rename(tmp_path / name)
        (copy / name).symlink_to(tmp_path / name)
    checks = {check.what: check for check in verify(vindex.open(copy))}
    assert all(check.holds for check in checks.values())
    assert checks["directory"].detail == "nothing else in it; 2 of its files are links"


def test_a_listed_file_that_is_none_of_a_vindex(copy):
    with (copy / "SHA256SUMS").open("a") as sums:
        sums.write("0" * 64 + "  big.bin\n")
    assert failures(copy) == {"checksums": "SHA256SUMS lists what is no file of this vindex: 'big.bin'"}


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda m: m["source"].update(model="other"),
            "index.json and it differ: model is 'tiny' there and 'other' here",
        ),
        (lambda m: m["options"].update(features=4), "index.json and it differ: features is 8 there and 4 here"),
        (
            lambda m: m["options"].update(embeddings=False),
            "index.json and it differ: embeddings is True there and False here",
        ),
        (lambda m: m["source"]["files"].pop(), "index.json and it differ: weights is '"),
        (lambda m: m["certificates"].pop(), "there are 4 weights there, and 3 certificates of 3 of them here"),
        (
            lambda m: m["certificates"].append(m["certificates"][0]),
            "there are 4 weights there, and 5 certificates of 4 of them here",
        ),
        (lambda m: m["certificates"][0].update(max_residual=1.0), "certificate 1.0e+00, limit 1.0e-04"),
        (lambda m: m.update(certificates=[]), "manifest.json: certificates: expected one for each weight, got none"),
        (
            lambda m: m["options"].update(tolerance=0),
            "manifest.json: options: --tolerance 0: expected a number above 0",
        ),
        (
            lambda m: m["certificates"][0].update(max_residual=-1),
            "max_residual: expected a number from 0, or null, got -1",
        ),
        (
            lambda m: m["source"]["files"][0].update(sha256="A" * 64),
            "sha256: expected 64 lower-case hex digits, got 'AAA",
        ),
        (lambda m: m["versions"].update(torch=2), "manifest.json: versions: expected an object of strings, got dict"),
    ],
)
def test_the_manifest_is_compared_with_the_index(copy, edit, message):
    manifest = json.loads((copy / "manifest.json").read_text())
    edit(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    agree(copy)
    ((what, detail),) = failures(copy).items()
    assert what == "manifest.json" and message in detail


def test_rows_past_the_rank_are_exactly_zero(copy):
    change(copy, "singular_values.bin", "<f4", lambda v: v.__setitem__(7, 0), resum=True)
    index = json.loads((copy / "index.json").read_text())
    index["layers"][0]["effective_rank"]["gate"] = 7
    (copy / "index.json").write_text(json.dumps(index))
    agree(copy)
    assert failures(copy) == {"gate_vectors.bin orthonormal": "|row·row − identity| inf (layer 0)"}
    change(copy, "gate_vectors.bin", "<f2", lambda v: v.__setitem__(slice(7 * 16, 8 * 16), 0))
    agree(copy)
    assert set(failures(copy)) == {"gate_peaks.bin recomputed"}, "they were of the direction that is gone"


def test_orthonormality_is_checked_some_rows_at_a_time(copy, monkeypatch):
    monkeypatch.setattr("vindex.checks.ROWS", 3)
    assert failures(copy) == {}
    change(copy, "gate_vectors.bin", "<f2", lambda v: v.__setitem__(slice(112, 128), v[:16]), resum=True)
    assert "1.0e+00 (layer 0)" in failures(copy)["gate_vectors.bin orthonormal"]


def test_counts_past_all_sense_are_refused(copy):
    """Counts are compared before anything is made of them."""
    index = json.loads((copy / "index.json").read_text())
    for key, value in (("num_layers", 10**12), ("down_top_k", 10**12), ("hidden_size", 10**12), ("vocab_size", 10**12)):
        (copy / "index.json").write_text(json.dumps(index | {key: value}))
        with pytest.raises(FormatError, match=rf"{key}: expected an integer from . to \d+, got 1000000000000"):
            vindex.open(copy)


def test_a_router_bias_that_is_not_zero(built_mixture, tmp_path):
    copy = shutil.copytree(built_mixture, tmp_path / "copy.vindex")
    change(copy, "router_weights.bin", "<f2", lambda v: v.__setitem__(3 * 16 + 1, 1), resum=True)
    assert failures(copy) == {"router biases": "layer 1 has one that is not zero"}


def test_singular_values_that_are_negative_or_nan(copy):
    change(
        copy, "singular_values.bin", "<f4", lambda v: v.__setitem__(slice(0, 8), [8, 7, 6, 5, 4, 3, 2, -1]), resum=True
    )
    assert failures(copy) == {"singular values": "gate layer 0 has a negative one"}
    change(copy, "singular_values.bin", "<f4", lambda v: v.__setitem__(3, np.nan), resum=True)
    found = failures(copy)
    assert found["singular_values.bin finite"] == "row 0, column 3 is nan" and "singular values" in found


def test_a_directory_that_cannot_be_listed(built, monkeypatch):
    v = vindex.open(built)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    assert Check("directory", False, "cannot be listed (Permission denied); make it readable") in list(verify(v))
