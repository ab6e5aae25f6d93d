"""What is written appears whole or not at all, and nothing of anybody else's is ever replaced, emptied or followed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import vindex
from tests.kills import die_at, each_way, steps_of, tree
from vindex import places, targets
from vindex.card import write_card
from vindex.checks import verify
from vindex.errors import FormatError, TargetError
from vindex.format import CARD, INDEX, NORMS
from vindex.writer import open_writer, refuse_taken


def write(target: Path, content: bytes = b"new", *, force: bool = False, resume: bool = False) -> None:
    """A vindex in so far as the writer is concerned."""
    with open_writer(target, {"of": content.decode()}, 10, resume=resume, force=force) as writer:
        writer.allocate(NORMS, 6)
        for half in (0, 3):
            if f"half {half}" not in writer.finished:
                writer.write(NORMS.name, half, content)
                writer.finish_block(f"half {half}", {})
        writer.flush()
        writer.require_covered()
        writer.write_text(INDEX, content)
        writer.commit({INDEX.name: "0" * 64, NORMS.name: "0" * 64}, force=force)


@pytest.fixture(params=["exchange", "two renames"])
def renames(request, monkeypatch):
    """Systems that can exchange two names in one step, and those that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(places, "exchange", lambda a, b: False)


def put_right(target: Path) -> None:
    """What every command does first."""
    missing = not target.exists()
    assert not missing or "repeat what made it, or rename that to" in places.whereabouts(target)
    with pytest.raises(TargetError, match="already exists"):
        places.check_directory(target, force=False)


@pytest.mark.usefixtures("unsynced")
def test_a_vindex_is_replaced_whole_at_whatever_step_it_is_stopped(tmp_path, monkeypatch, renames):
    target = tmp_path / "v"
    write(target, b"new")
    new = tree(target)
    write(target, b"old", force=True)
    old = tree(target)
    count = len(steps_of(lambda: write(target, b"new", force=True), monkeypatch))
    write(target, b"old", force=True)
    seen = []
    for _ in each_way(count, lambda: write(target, b"new", force=True), monkeypatch):
        put_right(target)
        seen.append(tree(target) == new)
        assert tree(target) in (old, new)
        write(target, b"old", force=True)  # the next run works, and leaves nothing else
        assert tree(target) == old and [path.name for path in tmp_path.iterdir()] == ["v"]
    assert any(seen) and not all(seen)


@pytest.mark.usefixtures("unsynced")
def test_a_vindex_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "v"
    count = len(steps_of(lambda: write(target), monkeypatch))
    new = tree(target)
    shutil.rmtree(target)
    for _ in each_way(count, lambda: write(target, resume=True), monkeypatch):
        places.recover(target)
        assert tree(target) in (None, new)
        if not target.exists():
            write(target, resume=True)
        assert tree(target) == new and [path.name for path in tmp_path.iterdir()] == ["v"]
        shutil.rmtree(target)


def test_a_missing_vindex_is_said_to_be_beside_its_place(tmp_path, monkeypatch):
    target = tmp_path / "v"
    monkeypatch.setattr(places, "exchange", lambda a, b: False)
    write(target, b"new")
    names = steps_of(lambda: write(target, b"old", force=True), monkeypatch)
    assert die_at(names.index("rename v to old") + 1, lambda: write(target, b"new", force=True))
    with pytest.raises(FormatError, match=r"whole in .*v\.replacing/new: repeat what made it, or rename that to v"):
        vindex.open(target)
    put_right(target)
    assert (target / "norms.bin").read_bytes() == b"newnew"


@pytest.mark.usefixtures("unsynced")
def test_a_record_is_replaced_whole_at_whatever_step_it_is_stopped(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    count = len(steps_of(lambda: targets.write_json(path, {"new": 1}), monkeypatch))
    for _ in each_way(count, lambda: targets.write_json(path, {"new": 1}), monkeypatch):
        assert path.read_bytes() in (b'{"old":1}\n', b'{"new":1}\n')
        targets.write_json(path, {"old": 1})
        assert [file.name for file in tmp_path.iterdir()] == ["record.json"]  # nor is a killed run's file left


@pytest.mark.usefixtures("unsynced")
def test_a_card_agrees_with_its_checksum_at_whatever_step_it_is_stopped(built, tmp_path, monkeypatch):
    copy = shutil.copytree(built, tmp_path / "v")
    before = (copy / CARD.name).read_bytes()
    v = vindex.open(copy)
    monkeypatch.setattr("vindex.card.render_card", lambda *arguments: "a new card\n")
    count = len(steps_of(lambda: write_card(v, None, None), monkeypatch))
    states = set()
    for stopped in each_way(count, lambda: write_card(v, None, None), monkeypatch):
        assert all(check.holds for check in verify(vindex.open(copy))), stopped
        states.add((copy / CARD.name).read_bytes())
        monkeypatch.setattr("vindex.card.render_card", lambda *arguments: before.decode())
        write_card(v, None, None)
        monkeypatch.setattr("vindex.card.render_card", lambda *arguments: "a new card\n")
        assert tree(copy) == tree(built)
    assert states == {before, b"a new card\n"}


def test_a_pending_line_that_is_not_of_the_card_is_dropped(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "v")
    other = (copy / "SHA256SUMS").read_text().replace((copy / "SHA256SUMS").read_text()[:64], "0" * 64, 1)
    for content in (other, "nonsense\n"):
        (copy / targets.PENDING).write_text(content)
        vindex.open(copy)
        assert tree(copy) == tree(built)


# ---- what may be replaced


def vindex_at(place: Path) -> None:
    write(place, b"old")


def thesis_at(place: Path) -> None:
    (place / "sub").mkdir(parents=True)
    (place / "sub" / "thesis.txt").write_text("thesis")


def thesis_in_a_vindex_at(place: Path) -> None:
    write(place, b"old")
    (place / "thesis.txt").write_text("thesis")


def file_at(place: Path) -> None:
    place.write_text("thesis")


def link_at(place: Path) -> None:
    write(place.with_name("elsewhere"), b"old")
    place.symlink_to("elsewhere")


def dangling_link_at(place: Path) -> None:
    place.symlink_to("nowhere")


def fifo_at(place: Path) -> None:
    os.mkfifo(place)


def link_in_a_vindex_at(place: Path) -> None:
    write(place, b"old")
    (place / "norms.bin").unlink()
    (place / "norms.bin").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    "make, message",
    [
        (thesis_at, r"is nothing that this tool made \(vindex, baked checkpoint, patched checkpoint\), so it is not"),
        (thesis_in_a_vindex_at, "holds thesis.txt, which this tool did not write, so it is not replaced"),
        (link_in_a_vindex_at, "holds norms.bin, which this tool did not write, so it is not replaced"),
        (file_at, "already exists and is not a directory"),
        (fifo_at, "already exists and is not a directory"),
        (link_at, "is a symbolic link, which is not followed"),
        (dangling_link_at, "is a symbolic link, which is not followed"),
    ],
)
def test_force_replaces_nothing_that_is_not_ours(tmp_path, make, message):
    make(tmp_path / "v")
    before = sorted(os.listdir(tmp_path))
    for force in (False, True):
        with pytest.raises(TargetError, match=message):
            write(tmp_path / "v", force=force)
    assert sorted(os.listdir(tmp_path)) == before
    assert "thesis" not in make.__name__ or "thesis" in str(tree(tmp_path / "v"))


@pytest.mark.parametrize("name", [".", "/", "", ".."])
def test_places_without_a_name(name):
    with pytest.raises(TargetError, match="cannot be made anew; name a directory that does not exist yet"):
        refuse_taken(Path(name), resume=False, force=True)


def test_what_is_read_is_never_replaced(tmp_path):
    write(tmp_path / "v")
    (tmp_path / "alias").symlink_to(tmp_path / "v")
    for source in (tmp_path / "v", tmp_path / "v" / "norms.bin", tmp_path / "alias" / "norms.bin"):
        with pytest.raises(TargetError, match="v is, or holds, .*, which is being read; choose another place"):
            places.check_directory(tmp_path / "v", force=True, reads=[source])
    places.check_directory(tmp_path / "v", force=True, reads=[tmp_path, tmp_path / "elsewhere"])


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 2600 + "b"])
def test_names_too_long_are_one_line(tmp_path, name):
    with pytest.raises(TargetError, match=r"cannot be written \(File name too long\)"):
        write(tmp_path / name)
    with pytest.raises(TargetError, match="cannot be written: File name too long"):
        targets.check_file(tmp_path / name)


# ---- what stands beside


def beside(place: Path, what: str) -> None:
    """Something of somebody's in the way of an unfinished build."""
    if what == "link":
        place.with_name("precious").mkdir()
        place.symlink_to("precious")
    elif what == "file":
        place.write_text("thesis")
    else:
        place.mkdir()
        (place / what).mkdir() if what == "folder" else (place / what).write_text("thesis")


@pytest.mark.parametrize("suffix", [".partial", ".replacing"])
@pytest.mark.parametrize("what", ["link", "file", "folder", "thesis.txt", "norms.bin", "journal.jsonl"])
def test_what_somebody_keeps_beside_the_target_stays(tmp_path, suffix, what):
    beside(tmp_path / f"v{suffix}", what)
    before = tree(tmp_path), sorted(os.listdir(tmp_path))
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(TargetError, match="move it away"):
            write(tmp_path / "v", **options)
        with pytest.raises(TargetError, match="move it away"), places.new_directory(tmp_path / "v", [], making="x"):
            pass
    assert (tree(tmp_path), sorted(os.listdir(tmp_path))) == before


def test_somebodys_replaced_stays(tmp_path):
    thesis_at(tmp_path / "v.replaced")
    write(tmp_path / "v")
    write(tmp_path / "v", force=True)
    assert (tmp_path / "v.replaced" / "sub" / "thesis.txt").exists()


@pytest.mark.parametrize("planted", ["thesis.txt", "sub/", "norms.bin ->", "norms.bin =="])
def test_a_stopped_build_with_anything_else_in_it_is_left_alone(tmp_path, planted):
    with open_writer(tmp_path / "v", {"of": "new"}, 10, resume=False, force=False) as writer:
        writer.finish_block("half 0", {})
    elsewhere, name = tmp_path / "elsewhere", planted.rstrip("/ ->=")
    elsewhere.write_text("thesis")
    if planted.endswith("/"):
        (tmp_path / "v.partial" / name).mkdir()
    elif planted.endswith("->"):
        (tmp_path / "v.partial" / name).symlink_to(elsewhere)
    elif planted.endswith("=="):
        os.link(elsewhere, tmp_path / "v.partial" / name)
    else:
        shutil.copy(elsewhere, tmp_path / "v.partial" / name)
    with pytest.raises(TargetError, match=f"{name}, which is of no stopped run|is a hard link to a file elsewhere"):
        write(tmp_path / "v", resume=True)
    assert elsewhere.read_text() == "thesis" and not (tmp_path / "v").exists()


def test_one_command_does_not_take_over_what_another_began(tmp_path):
    with open_writer(tmp_path / "v", {}, 10, resume=False, force=False) as writer:
        writer.finish_block("half 0", {})
    with (
        pytest.raises(TargetError, match=r"v.partial is an unfinished vindex; finish or remove it"),
        places.new_directory(tmp_path / "v", ["a"], making="baked checkpoint"),
    ):
        pass
    assert (tmp_path / "v.partial" / "journal.jsonl").exists()
    names = []
    assert die_at(5, lambda: make_directory(tmp_path / "w", names))
    with pytest.raises(
        TargetError, match="an unfinished baked checkpoint is in .*w.partial; continue it with --resume"
    ):
        write(tmp_path / "w")
    with pytest.raises(
        TargetError, match="is an unfinished baked checkpoint, not to be resumed; start over with --force"
    ):
        write(tmp_path / "w", resume=True)
    write(tmp_path / "w", force=True)


def make_directory(place: Path, names: list[str]) -> None:
    with places.new_directory(place, ["a", "b/c"], making="baked checkpoint") as partial:
        (partial / "b").mkdir()
        for name in ("a", "b/c"):
            targets.write_bytes(partial / name, name.encode())


def test_a_directory_that_fails_half_way_is_gone(tmp_path):
    def fail():
        with places.new_directory(tmp_path / "v", ["a"], making="x") as partial:
            targets.write_bytes(partial / "a", b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


# ---- files
