from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple

import pytest

from vindex.checksums import load_sums
from vindex.errors import TargetError
from vindex.format import NORMS
from vindex.writer import open_writer

JOB = {"options": {"features": 8}}


def write(target, *, fingerprint=JOB, resume=False, force=False, size=10):
    return open_writer(target, fingerprint, size, resume=resume, force=force)


def test_nothing_is_visible_before_the_commit(tmp_path):
    target = tmp_path / "v.vindex"
    with write(target) as writer:
        writer.allocate(NORMS, 6)
        writer.write(NORMS.name, 2, b"abcd")
        writer.finish_block("a", {"n": 1})
        assert [p.name for p in tmp_path.iterdir()] == ["v.vindex.partial"]
        writer.commit({"norms.bin": "0" * 64}, force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["v.vindex"]
    assert (target / "norms.bin").read_bytes() == b"\0\0abcd"
    assert sorted(p.name for p in target.iterdir()) == ["SHA256SUMS", "norms.bin"]
    assert load_sums(target) == {"norms.bin": "0" * 64}


def test_a_torn_journal_line_is_dropped(tmp_path):
    with write(tmp_path / "v") as writer:
        writer.finish_block("a", 1)
        writer.finish_block("b", 2)
    journal = tmp_path / "v.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-4])
    with write(tmp_path / "v", resume=True) as writer:
        assert writer.finished == {"a": 1}
        writer.finish_block("b", 2)
    with write(tmp_path / "v", resume=True) as writer:
        assert writer.finished == {"a": 1, "b": 2}


def test_a_journal_cut_in_its_first_line_starts_over(tmp_path):
    with write(tmp_path / "v") as writer:
        writer.finish_block("a", 1)
    (tmp_path / "v.partial" / "journal.jsonl").write_bytes(b'{"vind')
    damaged = "unfinished build with a damaged journal, not to be resumed; start over with --force"
    with pytest.raises(TargetError, match=damaged), write(tmp_path / "v", resume=True):
        pass
    with write(tmp_path / "v", force=True) as writer:
        assert writer.finished == {}


def test_two_builds_at_once_are_refused(tmp_path):
    with write(tmp_path / "v"):
        for options in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(TargetError, match="another command is writing"), write(tmp_path / "v", **options):
                pass


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    with write(tmp_path / "v") as writer:
        (tmp_path / "v").mkdir()
        (tmp_path / "v" / "mine").touch()
        with pytest.raises(TargetError, match="appeared during the build; the new one is whole in"):
            writer.commit({}, force=False)
    assert (tmp_path / "v" / "mine").exists()


def test_an_empty_directory_is_a_fine_target(tmp_path):
    (tmp_path / "v").mkdir()
    with write(tmp_path / "v") as writer:
        writer.commit({}, force=False)
    assert (tmp_path / "v" / "SHA256SUMS").exists()


def test_a_full_disk_before_the_build(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2_000_000_000))
    message = r"the vindex needs 3.00 GB and 2.00 GB are free; make room or choose another place"
    with pytest.raises(TargetError, match=message), write(tmp_path / "v", size=3_000_000_000):
        pass


@pytest.mark.parametrize(
    "code, message",
    [
        (errno.ENOSPC, "the disk is full while writing .*; make room and repeat with --resume"),
        (errno.EROFS, r"cannot be written to \(Read-only file system\); choose another place"),
        (errno.EACCES, r"cannot be written to \(Permission denied\); choose another place"),
    ],
)
def test_what_the_system_refuses_is_explained(tmp_path, monkeypatch, code, message):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    with pytest.raises(TargetError, match=message), write(tmp_path / "v") as writer:
        writer.allocate(NORMS, 6)
        monkeypatch.setattr("os.pwrite", refuse)
        writer.write(NORMS.name, 0, b"abc")


def test_other_system_errors_pass_unchanged(tmp_path):
    with pytest.raises(IsADirectoryError), write(tmp_path / "v"):
        raise IsADirectoryError


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write to a read-only directory")
def test_a_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TargetError, match="cannot be written to"), write(tmp_path / "v"):
        pass


# ---- a resumed build trusts nothing


def begun(target, fingerprint=JOB):
    """A stopped build of two blocks, of eight bytes each."""
    with write(target, fingerprint=fingerprint) as writer:
        writer.allocate(NORMS, 16)
        for place, block in enumerate("ab"):
            writer.write(NORMS.name, 8 * place, block.encode() * 8)
            writer.finish_block(block, {"n": place})
    return target.with_name("v.partial")


def finished_after(target) -> set[str]:
    with write(target, resume=True) as writer:
        return set(writer.finished)


def test_blocks_whose_bytes_are_lost_or_changed_are_made_again(tmp_path):
    file = begun(tmp_path / "v") / "norms.bin"
    whole = file.read_bytes()
    for at in range(16):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert finished_after(tmp_path / "v") == ({"b"} if at < 8 else {"a"})
        shutil.rmtree(tmp_path / "v.partial")
        begun(tmp_path / "v")
    file.write_bytes(whole[:12])
    assert finished_after(tmp_path / "v") == {"a"}
    assert finished_after(tmp_path / "v") == {"a"}  # the journal without the lost block is a journal
    file.unlink()
    assert finished_after(tmp_path / "v") == set()


def test_a_journal_with_any_byte_changed_is_refused(tmp_path):
    journal = begun(tmp_path / "v") / "journal.jsonl"
    whole = journal.read_bytes()
    first = whole.index(b"\n") + 1
    for at in range(len(whole)):
        journal.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if at == len(whole) - 1:
            assert finished_after(tmp_path / "v") == {"a"}  # without its end the last line is a torn one
            continue
        in_first = "move it away|not to be resumed|other inputs|" if at < first else ""
        expected = in_first + "line [23] is damaged or was not written by this build"
        with pytest.raises(TargetError, match=expected) as error, write(tmp_path / "v", resume=True):
            pass
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        b'{"block":"c","record":{}}',
        b'{"block":"c","record":{},"written":[],"sum":"0"}',
        b'{"block":"c","record":{},"written":7,"sum":"0"}',
        b"[]",
        b"7",
        b"null",
        b'"block"',
        b"{",
        b"\xff",
        b"",
    ],
)
def test_lines_that_this_build_did_not_write_are_refused(tmp_path, line):
    journal = begun(tmp_path / "v") / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + line + b"\n")
    message = r"journal.jsonl: line 4 is damaged or was not written by this build; start over with --force"
    with pytest.raises(TargetError, match=message), write(tmp_path / "v", resume=True):
        pass
    with write(tmp_path / "v", force=True) as writer:
        assert writer.finished == {}


def test_lines_of_another_build_or_in_another_order_are_refused(tmp_path):
    other = (begun(tmp_path / "w", JOB | {"other": 1}).parent / "w.partial" / "journal.jsonl").read_bytes().splitlines()
    journal = begun(tmp_path / "v") / "journal.jsonl"
    first, a, b = journal.read_bytes().splitlines()
    for lines in ((first, *other[1:]), (first, b, a), (first, b), (first, a, a)):
        journal.write_bytes(b"\n".join(lines) + b"\n")
        with pytest.raises(TargetError, match="is damaged or was not written by this build"):
            finished_after(tmp_path / "v")


def test_a_journal_of_any_length_is_read_a_line_at_a_time(tmp_path):
    """A line that never ends is refused before it is held whole: this one has 512 MiB."""
    journal = begun(tmp_path / "v") / "journal.jsonl"
    with journal.open("r+b") as file:
        file.truncate(journal.stat().st_size + (1 << 29))
    with pytest.raises(
        TargetError, match=r"journal.jsonl: a line has more than 67,108,864 bytes; start over with --force"
    ):
        finished_after(tmp_path / "v")


@pytest.mark.parametrize("blocks", [[(0, 8)], [(0, 8), (8, 4)], [(0, 8), (4, 12)], [(0, 16), (0, 16)]])
def test_files_that_the_journal_does_not_account_for_are_not_committed(tmp_path, blocks):
    with write(tmp_path / "v") as writer:
        writer.allocate(NORMS, 16)
        for number, (offset, length) in enumerate(blocks):
            writer.write(NORMS.name, offset, b"x" * length)
            writer.finish_block(str(number), {})
        with pytest.raises(
            TargetError, match="its blocks are not the whole of norms.bin, each once; start over with --force"
        ):
            writer.require_covered()


def test_nothing_is_noted_after_a_block_that_is_not_durable(tmp_path, monkeypatch):
    def fail(descriptor):
        monkeypatch.undo()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    message = r"v cannot be written \(Input/output error\); repeat with --resume"
    with pytest.raises(TargetError, match=message), write(tmp_path / "v") as writer:
        writer.allocate(NORMS, 16)
        monkeypatch.setattr("os.fsync", fail)
        for place, block in enumerate("ab"):
            writer.write(NORMS.name, 8 * place, block.encode() * 8)
            writer.finish_block(block, {})
        writer.flush()
    assert finished_after(tmp_path / "v") == set()
