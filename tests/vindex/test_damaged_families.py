"""Directories of the families that others publish, damaged: each is refused in one line, and nothing is guessed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import vindex
from tests.vindex.damaged import change, cut, link, repeat
from vindex.errors import FormatError

SUMMARY = "gate_vectors_index.json"
DAMAGE = [
    ("published", lambda d: cut(d / "gate_vectors.bin"), r"gate_vectors.bin: expected 576 bytes \(float16\) or 1,152"),
    ("published", lambda d: cut(d / "embeddings.bin"), "embeddings.bin: expected 64,000 bytes"),
    (
        "published",
        lambda d: change(d, "index.json", lambda i: i.update(num_layers=2**14)),
        "gate_vectors.bin: expected ",
    ),
    (
        "published",
        lambda d: change(d, "index.json", lambda i: i.update(num_layers=2**62)),
        "num_layers: expected an int",
    ),
    (
        "published",
        lambda d: change(d, "index.json", lambda i: i.update(hidden_size=-16)),
        "hidden_size: expected an in",
    ),
    (
        "published",
        lambda d: change(d, "index.json", lambda i: i.update(vocab_size="9")),
        "vocab_size: expected an integ",
    ),
    ("published", lambda d: change(d, "index.json", lambda i: i.pop("num_layers")), "num_layers: missing"),
    ("published", lambda d: (d / "index.json").write_text("{"), "index.json: not valid JSON"),
    ("published", lambda d: link(d, "gate_vectors.bin", "/dev/zero"), "gate_vectors.bin: cannot be read: it is a dev"),
    (
        "published",
        lambda d: link(d, "gate_vectors.bin", "gone"),
        "gate_vectors.bin: cannot be read: it is a link to go",
    ),
    (
        "published",
        lambda d: repeat(d, "gate_vectors.bin"),
        "by their sizes gate_vectors.bin is float32 and down_features.bin float16, so that one of them is not",
    ),
    (
        "published",
        lambda d: repeat(d, "gate_vectors.bin", "down_features.bin"),
        "by their sizes gate_vectors.bin is float32 and embeddings.bin float16",
    ),
    (
        "published",
        lambda d: (repeat(d, "gate_vectors.bin", "down_features.bin"), (d / "embeddings.bin").unlink()),
        "gate_vectors.bin is float32, or float16 of twice the layers, and no other file tells which; put its emb",
    ),
    (
        "published",
        lambda d: change(d, "index.json", lambda i: i.update(num_experts=3)),
        "num_experts: expected none, since nothing says which rows are whose",
    ),
    ("published", lambda d: (d / "gate_vectors.bin").unlink(), "gate_vectors.bin: cannot be read"),
    ("published", lambda d: (d / "SHA256SUMS").write_text("evil\n"), "SHA256SUMS line 1: expected"),
    ("published", lambda d: (d / "SHA256SUMS").write_text(f"{'0' * 64}  ../x\n"), "names '../x', which is not a plain"),
    ("summary", lambda d: cut(d / "gate_vectors.bin", -4), "gate_vectors.bin: expected 1,536 bytes"),
    ("summary", lambda d: cut(d / "gate_vectors.bin", 4), "gate_vectors.bin: expected 1,536 bytes"),
    (
        "summary",
        lambda d: change(d, SUMMARY, lambda i: i["layers"].update(x={})),
        "layers.x: expected the number of a l",
    ),
    ("summary", lambda d: change(d, SUMMARY, lambda i: i["layers"].clear()), "layers: expected one or more, got none"),
    (
        "summary",
        lambda d: change(d, SUMMARY, lambda i: i["layers"]["2"].update(shape=[4, 6, 99])),
        r"layers.2.shape: expected 4 experts × 64 × hidden size, the same in each, got \[4, 6, 99\]",
    ),
    (
        "summary",
        lambda d: change(d, SUMMARY, lambda i: i["layers"]["2"].update(shape=[4, 6])),
        "layers.2.shape: expected a list of 3 positive integers",
    ),
    (
        "summary",
        lambda d: change(d, SUMMARY, lambda i: i["layers"]["2"].update(file_offset=4)),
        "layers.2.file_offset: expected 1536, right after the layer before it, got 4",
    ),
    ("summary", lambda d: change(d, SUMMARY, lambda i: i["layers"].update({"2": 7})), "layers.2: expected an object"),
    (
        "summary",
        lambda d: change(d, SUMMARY, lambda i: i["model_config"].pop("moe")),
        "model_config.moe: missing",
    ),
    (
        "summary",
        lambda d: (change(d, SUMMARY, lambda i: i["layers"].pop("2")), cut(d / "gate_vectors.bin", -2304)),
        "layers: of one layer expected 1,536 bytes, float32, in gate_vectors.bin, got 768, which half of it has too",
    ),
    (
        "summary",
        lambda d: cut(d / "gate_vectors.bin", -1536),
        "layers.2.file_offset: expected 768, right after the layer before it, got 1536",
    ),
    (
        "summary",
        lambda d: change(d, SUMMARY, lambda i: i["layers"].update({"3": i["layers"]["2"], "4": i["layers"]["2"]})),
        "layers.2.file_offset: expected 768",
    ),
    (
        "browse",
        lambda d: change(d, "index.json", lambda i: i["layers"][0].update(num_features_per_expert=6)),
        "num_features_per_expert: 6, and no num_experts says of how many",
    ),
    (
        "browse",
        lambda d: (change(d, "index.json", lambda i: i.pop("dtype")), repeat(d, "gate_vectors.bin")),
        "gate_vectors.bin: expected 2,304 bytes",
    ),
    (
        "browse",
        lambda d: (change(d, "index.json", lambda i: i.pop("dtype")), cut(d / "gate_vectors.bin", -2304)),
        r"layers\[0\].length: expected 768, got 1536",
    ),
    ("browse", lambda d: cut(d / "gate_vectors.bin"), "gate_vectors.bin: expected 2,304 bytes"),
    ("browse", lambda d: cut(d / "down_meta.bin"), "down_meta.bin: expected 2,332 bytes, 3 tokens for each of 72 rows"),
    ("browse", lambda d: cut(d / "down_meta.bin", -2330), "down_meta.bin: expected a header of 16 bytes"),
    ("browse", lambda d: (d / "down_meta.bin").write_bytes(bytes(2332)), "down_meta.bin: expected header"),
    (
        "browse",
        lambda d: change(d, "index.json", lambda i: i.update(dtype="f16")),
        "dtype: gate_vectors.bin holds float32 by its size, and it says 'f16'",
    ),
    (
        "browse",
        lambda d: change(d, "index.json", lambda i: i["layers"][1].update(offset=0)),
        r"layers\[1\].offset: expected 1536, got 0",
    ),
    (
        "browse",
        lambda d: change(d, "index.json", lambda i: i["layers"][1].update(layer=0)),
        "layers: expected each layer once and in order, and rows in one of them",
    ),
    (
        "browse",
        lambda d: change(d, "index.json", lambda i: i["layers"][1].update(num_experts=5)),
        "layers of 5 experts: expected as many rows for each, got 24 in all",
    ),
]


@pytest.mark.parametrize("family, damage, message", DAMAGE, ids=range(len(DAMAGE)))
def test_what_is_damaged_is_refused_in_one_line(request, tmp_path, family, damage, message):
    directory = shutil.copytree(request.getfixturevalue(family), tmp_path / family)
    damage(directory)
    with pytest.raises(FormatError, match=message) as caught:
        vindex.open(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["published", "browse", "built"])
def test_a_clone_without_lfs_is_told_as_such(request, tmp_path, family):
    directory = shutil.copytree(request.getfixturevalue(family), tmp_path / "clone")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 576\n"
    (directory / "gate_vectors.bin").write_text(pointer)
    with pytest.raises(
        FormatError, match="gate_vectors.bin: is a git-lfs pointer, not the file; run `git lfs pull` there"
    ):
        vindex.open(directory)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_give_no_score(published, tmp_path, number):
    for name in ("gate_vectors.bin", "embeddings.bin"):
        directory = shutil.copytree(published, tmp_path / name)
        numbers = np.memmap(directory / name, np.float16, "r+")
        numbers[7] = number
        numbers.flush()
        with pytest.raises(FormatError, match=f"{name} holds a number that is not finite, or too large"):
            vindex.open(directory).cosines(0)
    with pytest.raises(FormatError, match=r"compared: gate_vectors.bin holds a number that is not finite, in layer 0"):
        v = vindex.open((tmp_path / "gate_vectors.bin").rename(tmp_path / "compared"))
        vindex.compare(v, v)


def test_a_damaged_vindex_of_ours_is_taken_for_no_other(built, tmp_path):
    for name, edit in (("index.json", lambda index: index.pop("format")), ("index.json", lambda index: index.clear())):
        directory = shutil.copytree(built, tmp_path / str(id(edit)))
        change(directory, name, edit)
        with pytest.raises(FormatError, match="index.json: format"):
            vindex.open(directory)
    (directory / "singular_values.bin").unlink()
    with pytest.raises(FormatError):
        vindex.open(directory)
