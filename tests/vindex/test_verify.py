from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pytest

import vindex
from vindex.checksums import load_sums, render_sums
from vindex.verify import verify


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
    assert failures(copy) == {"embeddings.bin finite": "row 3, column 2 is nan"}


def test_rows_that_are_not_orthonormal(copy):
    change(copy, "down_features.bin", "<f2", lambda v: v[8 * 16 : 9 * 16].__imul__(np.float16(0.9)), resum=True)
    (what,) = failures(copy)
    assert what == "down_features.bin orthonormal"


def test_singular_values_out_of_order(copy):
    change(copy, "singular_values.bin", "<f4", lambda v: v.__setitem__(3, 1e6), resum=True)
    assert failures(copy) == {"singular values": "gate layer 0 rises after feature 2"}
    change(copy, "singular_values.bin", "<f4", lambda v: v.__setitem__(slice(0, 8), -1.0), resum=True)
    assert "singular values" in failures(copy)
