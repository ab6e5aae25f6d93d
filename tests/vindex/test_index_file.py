"""index.json at the border: every problem at once, with its path."""

from __future__ import annotations

import orjson
import pytest

import vindex
from vindex.errors import FormatError


def edit_index(directory, edit):
    index = orjson.loads((directory / "index.json").read_bytes())
    edit(index)
    (directory / "index.json").write_bytes(orjson.dumps(index))


def test_index_problems_come_together_with_their_paths(copy):
    def spoil(index):
        del index["num_layers"]
        index["hidden_size"] = "16"
        index["layers"][1]["length"] = -1
        index["norms"] = 3
        index["projection"]["tied"] = 1

    edit_index(copy, spoil)
    with pytest.raises(FormatError) as caught:
        vindex.open(copy)
    for part in (
        "num_layers: missing, expected an integer from 1 to 16384",
        "hidden_size: expected an integer from 1 to 1048576, got '16'",
        "layers[1].length: expected an integer from 0, got -1",
        "norms: expected a list, got 3",
        "projection.tied: expected true or false, got 1",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("format", "version"), 2, "format.version: expected 1, got 2; a newer vindex may read it"),
        (("format", "name"), "other", "format.name: expected one of vindex, got 'other'"),
        (("version",), 3, "version: expected 2, got 3"),
        (("layers", 1, "length"), 255, r"layers\[1\].length: expected 256, got 255"),
        (("layers", 1, "offset"), 0, r"layers\[1\].offset: expected 256, got 0"),
        (("layers", 0, "effective_rank", "gate"), 9, r"layers\[0\].effective_rank.gate: expected at most 8, got 9"),
        (("norms", 1, "offset"), 15, r"norms\[1\].offset: expected 16, got 15"),
        (("num_layers",), 3, r"layers \(their number\): expected 3, got 2"),
        (("checksums", "../evil"), "0" * 64, r"index.json checksums: names '../evil', which is not a plain file name"),
        (("checksums", "extra.bin"), "0" * 64, r"checksums \(its files\): expected"),
        (("checksums", "norms.bin"), "0" * 64, r"norms.bin: index.json and SHA256SUMS give different checksums"),
        (("dtype",), "f32", "dtype: expected one of f16, got 'f32'"),
    ],
)
def test_an_index_that_contradicts_itself(copy, path, value, message):
    def spoil(index):
        for key in path[:-1]:
            index = index[key]
        index[path[-1]] = value

    edit_index(copy, spoil)
    with pytest.raises(FormatError, match=message):
        vindex.open(copy)


@pytest.mark.parametrize(
    "text, message", [("{", "index.json: not valid JSON"), ("[]", "top level: expected an object")]
)
def test_an_index_that_is_not_an_object(copy, text, message):
    (copy / "index.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        vindex.open(copy)


def test_unknown_keys_are_ignored(copy):
    edit_index(copy, lambda index: index.update(future=1))
    vindex.open(copy)


def test_a_manifest_with_problems(copy):
    manifest = orjson.loads((copy / "manifest.json").read_bytes())
    manifest["certificates"][0]["projection"] = "up"
    del manifest["source"]
    (copy / "manifest.json").write_bytes(orjson.dumps(manifest))
    with pytest.raises(
        FormatError, match=r"manifest.json: source: missing.*certificates\[0\].projection: expected one of"
    ):
        _ = vindex.open(copy).manifest


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda i: i["norms"].__setitem__(1, i["norms"][0] | {"offset": 16}), "norms: expected every name once"),
        (lambda i: i["norms"].pop(), r"norms \(the last one\): expected norm, got layers.1.k_norm"),
        (
            lambda i: i["checksums"].update({f"x{n}": "" for n in range(9)}),
            "got 'x0'; 'x1'; 'x2'; 'x3'; 'x4'; and 4 more",
        ),
        (lambda i: i.update(model="x" * 10_001), "model: expected a string, got 'xxx"),
        (lambda i: i["projection"].update(down_meta="head"), "down_meta: expected one of lm_head, embed_tokens, got"),
        (lambda i: i.update(embed_scale="1"), "embed_scale: expected a number"),
    ],
)
def test_more_an_index_must_not_say(copy, edit, message):
    edit_index(copy, edit)
    with pytest.raises(FormatError, match=message):
        vindex.open(copy)
