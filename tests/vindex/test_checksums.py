from __future__ import annotations

import hashlib
import shutil
import subprocess

import pytest

import vindex
from vindex.checksums import load_sums, render_sums, sha256_of, sha256_of_all, vindex_id
from vindex.errors import FormatError
from vindex.format import FILES


def test_sha256sum_accepts_what_is_written(built_whole):
    built = built_whole
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=built, check=True)
    listed = load_sums(built)
    assert sorted(listed) == sorted(spec.name for spec in FILES if spec.name != "SHA256SUMS")
    assert (built / "SHA256SUMS").read_text() == render_sums(listed)


def test_the_id_covers_the_payload_only(built):
    """Golden: the definition of docs/format.md, spelled out."""
    listed = load_sums(built)
    optional = {"gate_stats.bin", "gate_peaks.bin", "mean_embedding.bin", "random_poles.bin"}
    payload = sorted(name for name in listed if name.endswith(".bin") or name == "tokenizer.json")
    payload = [name for name in payload if name not in optional]
    lines = "".join(f"{listed[name]}  {name}\n" for name in payload)
    expected = hashlib.sha256(lines.encode()).hexdigest()[:8]
    assert vindex_id(listed) == vindex.open(built).id == expected
    assert vindex_id(listed | {"README.md": "0" * 64}) == expected
    assert vindex_id(listed | {"gate_stats.bin": "0" * 64}) == expected
    assert vindex_id(listed | {"norms.bin": "0" * 64}) != expected


def test_digest_and_progress(tmp_path):
    data = bytes(range(256)) * 40_000
    (tmp_path / "f").write_bytes(data)
    pieces = []
    assert sha256_of(tmp_path / "f", pieces.append) == hashlib.sha256(data).hexdigest()
    assert sum(pieces) == len(data) and len(pieces) > 1


def test_several_files_at_once_and_stopping_in_the_middle(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 30_000_000)
    assert sha256_of_all(paths, 2) == {path.name: sha256_of(path) for path in paths}
    seen = []

    def interrupt(count):
        seen.append(count)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sha256_of_all(paths, 1, interrupt)
    assert sum(seen) < 30_000_000


@pytest.mark.parametrize(
    "line, message",
    [
        ("abc  f", "line 1: expected `<64 lower-case hex digits>  <file name>`, got 'abc  f'"),
        ("0" * 64 + " f", "line 1: expected"),
        ("Z" * 64 + "  f", "line 1: expected"),
        ("0" * 64 + "  ../f", "line 1: names '../f', which is not a plain file name inside the vindex; refused"),
        ("0" * 64 + "  /etc/passwd", "line 1: names '/etc/passwd', which is not a plain file name"),
        ("0" * 64 + "  ..", "line 1: names '..', which is not a plain file name"),
        ("0" * 64 + " *f", "line 1: expected"),
        ("A" * 64 + "  f", "line 1: expected"),
        ("0" * 64 + "  f\r", r"line 1: names 'f\\r', which is not a plain file name"),
        ("0" * 64 + "  f\u2028", r"line 1: names 'f\\u2028', which is not a plain file name"),
        ("\n" + "0" * 64 + "  f", "line 1: expected"),
        (("0" * 64 + "  f\n") * 2, "line 2: lists f a second time"),
        ("0" * 64 + "  f\n" + "0" * 64, "its last line '0*' has no end"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    (tmp_path / "SHA256SUMS").write_bytes((line + "\n" * (not line.endswith("0"))).encode())
    with pytest.raises(FormatError, match=message):
        load_sums(tmp_path)


def test_a_list_that_is_not_text(tmp_path):
    (tmp_path / "SHA256SUMS").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="not text"):
        load_sums(tmp_path)


def test_a_file_that_is_not_listed(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy.vindex")
    listed = load_sums(copy)
    del listed["norms.bin"]
    (copy / "SHA256SUMS").write_text(render_sums(listed))
    with pytest.raises(FormatError, match="norms.bin: not listed in SHA256SUMS"):
        vindex.open(copy)
