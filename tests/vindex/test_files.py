"""What is no regular file of a sensible size, and JSON that says two things, is refused in one line and at once."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from vindex.errors import FormatError
from vindex.files import HOLES, Kind, opened, parse_json, read_bytes, read_json, read_lines, read_text, uncollected
from vindex.schema import Fields, Problems, load_record

KIND = Kind(FormatError, "the way out", limit=100)


def refused(call) -> str:
    with pytest.raises(FormatError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "f: cannot be read (No such file or directory); the way out"),
        (
            lambda path: path.mkdir(),
            "f: cannot be read: it is a directory, and a regular file was expected; the way out",
        ),
        (lambda path: os.mkfifo(path), "f: cannot be read: it is a FIFO, and a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "f: cannot be read: it is a device, and a regular file"),
        (make_socket, "f: cannot be read: it is a socket or a device"),
        (lambda path: path.symlink_to(path), "f: cannot be read (Too many levels of symbolic links)"),
        (lambda path: path.symlink_to("gone"), "f: cannot be read: it is a link to gone, which is not there"),
        (lambda path: path.write_bytes(bytes(101)), "f: has 101 bytes, and at most 100 are read; the way out"),
    ],
    ids="missing directory fifo device socket loop dangling large".split(),
)
def test_what_is_no_regular_file_of_its_size_is_named(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    make(tmp_path / "f")
    assert message in refused(lambda: read_bytes(tmp_path / "f", KIND))


def test_a_path_with_a_nul_is_named(tmp_path):
    assert "cannot be read (embedded null byte)" in refused(lambda: read_bytes(tmp_path / "a\0b", KIND))


def test_a_link_to_a_regular_file_is_read(tmp_path):
    (tmp_path / "blob").write_text("[1]")
    (tmp_path / "f").symlink_to("blob")
    assert read_json(tmp_path / "f", KIND) == [1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no sparse files to tell by")
def test_a_file_that_is_a_hole_is_not_read(tmp_path):
    with (tmp_path / "f").open("wb") as file:
        file.write(b"x" * 5000)
        file.truncate(1 << 42)
    unlimited = KIND._replace(limit=None)

    def first():
        with opened(tmp_path / "f", unlimited) as file:
            return file.read(1)

    assert f"has {1 << 42:,} bytes, more than {HOLES:,} of them holes" in refused(first)
    os.truncate(tmp_path / "f", 1 << 29)
    assert first() == b"x"


def test_text_and_lines(tmp_path):
    (tmp_path / "f").write_bytes(b"ab\n\n \nc")
    assert list(read_lines(tmp_path / "f", KIND)) == [(1, b"ab\n"), (4, b"c")]
    assert "line 1 is longer than 1 bytes" in refused(lambda: list(read_lines(tmp_path / "f", KIND, 1)))
    (tmp_path / "f").write_bytes(b"a\xff")
    assert "is not text: byte 1 is not UTF-8" in refused(lambda: read_text(tmp_path / "f", KIND))


@pytest.mark.parametrize(
    "text, message",
    [
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice in one object"),
        (b"[NaN]", "not valid JSON"),
        (b"[1e400]", "not valid JSON"),
        (b'["\\ud800"]', "not valid JSON"),
        (b'["\xff"]', "not valid JSON"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 levels deep"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "not valid JSON"),
        (b"[" + b"1," * (1 << 22) + b"1]", "holds more than 4,194,304 values"),
        (b"1" * 101, "has 101 bytes, and at most 100 are read"),
    ],
    ids="twice nan infinity surrogate encoding deep deeper many large".split(),
)
def test_json_that_is_not_strict_is_refused(text, message):
    kind = KIND if message.startswith("has") else KIND._replace(limit=None)
    found = refused(lambda: parse_json(text, "f", kind))
    assert message in found and found.startswith("f: ") and found.endswith("; the way out")


@pytest.mark.parametrize(
    "text",
    [r'{"a\"": ":\":", "a" :1, "b": {"a"' + "\n" + r': "\\"}}', '[":", "a", {"": ":"}]', '{"\\u0061": 1, "b": 2}'],
)
def test_strings_are_told_from_keys(text):
    assert parse_json(text.encode(), "f", KIND) == json.loads(text)


def test_a_key_that_is_the_same_once_unescaped():
    assert "the key 'a' stands twice" in refused(lambda: parse_json(rb'{"a": 1, "\u0061": 2}', "f", KIND))


def test_json_of_64_levels_is_read():
    assert parse_json(b"[" * 64 + b"]" * 64, "f", KIND._replace(limit=None))[0]


@pytest.mark.parametrize("number", ["1e3", "3.0", "true", '"3"', "123456789012345678901234567890", "-1", "null"])
def test_what_is_no_count_is_refused(number):
    fields = Fields(parse_json(f'{{"n": {number}}}'.encode(), "f", KIND), "", Problems("f"))
    fields.integer("n")
    assert refused(fields.problems.refuse).startswith("f: n: expected an integer from 0, got ")


def test_of_a_million_problems_the_first_five_are_shown():
    fields = Fields({"all": [3] * 1_000_000}, "", Problems("f"))

    def read():
        for entry in fields.records("all"):
            entry.text("name")

    message = refused(read)
    assert message.startswith("f: all[0]: expected an object, got 3; all[0].name: missing")
    assert message.count("expected") == 5 and "; and 9,995 more; rebuild the vindex or" in message


def test_a_record_is_an_object(tmp_path):
    (tmp_path / "r").write_text('{"a": 1, "a": 2}')
    assert refused(lambda: load_record(tmp_path / "r")).endswith("stands twice in one object); write it with -o")


@pytest.mark.parametrize("before", [True, False])
def test_garbage_is_collected_afterwards_as_before(before):
    was = gc.isenabled()
    (gc.enable if before else gc.disable)()
    try:
        with pytest.raises(KeyError), uncollected():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is before
    finally:
        (gc.enable if was else gc.disable)()
