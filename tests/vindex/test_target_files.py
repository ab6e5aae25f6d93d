"""A file is written over nothing but a plain file, and through no link."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import vindex
from tests.kills import tree
from tests.vindex.test_targets import dangling_link_at, fifo_at, write
from vindex import targets
from vindex.card import write_card
from vindex.console import check_places
from vindex.errors import TargetError


@pytest.mark.parametrize(
    "make, message",
    [
        (fifo_at, "is a device, a pipe or a socket; name a plain file"),
        (dangling_link_at, "is a symbolic link, which is not followed; name a plain file"),
        (Path.mkdir, "is a directory; name a file in it"),
    ],
)
def test_records_are_written_over_nothing_but_plain_files(tmp_path, make, message):
    make(tmp_path / "record.json")
    with pytest.raises(TargetError, match=message):
        targets.check_file(tmp_path / "record.json")
    with pytest.raises(TargetError):
        targets.write_json(tmp_path / "record.json", {})
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("/dev/null", "is a device"),
        ("/dev/stdout", "is a symbolic link, which is not followed; name a plain file"),
        (".", "is a directory"),
        ("..", "is a directory"),
        ("nowhere/x", "the directory nowhere does not exist; make it first"),
        ("", "is a directory"),
    ],
)
def test_places_for_a_file(name, message):
    with pytest.raises(TargetError, match=message):
        targets.check_file(Path(name))


def test_nothing_is_written_into_a_vindex_nor_over_a_checkpoint(built, checkpoint, tmp_path):
    v, model = shutil.copytree(built, tmp_path / "v"), shutil.copytree(checkpoint, tmp_path / "m")
    before = tree(v), tree(model)
    for place in (v / "index.json", v / "record.json", v / "page.html"):
        with pytest.raises(TargetError, match="is inside a vindex, which holds its own files alone; name a file"):
            targets.check_file(place)
    with pytest.raises(TargetError, match=r"config.json: is a file of a checkpoint; name another"):
        check_places(model / "config.json")
    targets.check_file(model / "record.json")
    assert (tree(v), tree(model)) == before


def test_a_file_that_is_read_is_not_written_over(tmp_path):
    (tmp_path / "words.json").write_text(" Paris\n")
    with pytest.raises(TargetError, match="words.json: is the file that is read; name another"):
        check_places(tmp_path / "words.json", reads=tmp_path / "." / "words.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write to a read-only directory")
def test_a_read_only_place_for_a_file_is_told_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TargetError, match="cannot be written: .* is read-only; choose another place"):
        targets.check_file(tmp_path / "record.json")


def test_nothing_is_written_through_planted_links(built, tmp_path):
    copy, precious = shutil.copytree(built, tmp_path / "v"), tmp_path / "precious"
    precious.write_text("thesis")
    for name in (".README.md.new", targets.PENDING, "README.md"):
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(precious)
    with pytest.raises(TargetError, match="is a symbolic link, which is not followed"):
        write_card(vindex.open(copy), None, None)
    (copy / targets.PENDING).unlink()
    with pytest.raises(TargetError, match="README.md: is a symbolic link"):
        write_card(vindex.open(copy), None, None)
    (tmp_path / "record.json.partial").symlink_to(precious)
    targets.write_json(tmp_path / "record.json", {})
    assert precious.read_text() == "thesis"


def test_a_file_that_another_process_is_writing_is_left_to_it(tmp_path):
    with targets.written(tmp_path / "x") as ours:
        ours.write(b"ours")
        child = os.fork()
        if child == 0:
            targets.write_bytes(tmp_path / "x", b"theirs")
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert (tmp_path / "x").read_bytes() == b"theirs"
    assert (tmp_path / "x").read_bytes() == b"ours"


def test_a_path_of_thousands_of_directories_is_made_or_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deep = Path("/".join("y" * 1500))
    write(deep)
    assert tree(deep)
    with pytest.raises(TargetError, match="cannot be written"):
        write(Path("/".join("z" * 2500)))
    assert not Path("z").exists()
    subprocess.run(["rm", "-r", "y"], check=True)  # pytest's own way of removing it goes too deep
