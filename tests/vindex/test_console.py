"""Text from outside reaches the terminal as it is: no markup, no control characters, in any locale, on any stream."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from rich.text import Text

from tests.checkpoints import write_checkpoint
from tests.commands import ROOT, in_tree, run, too_wide, with_streams
from tests.conftest import build_quietly
from vindex import __main__ as entry
from vindex import console
from vindex.errors import QueryError

HOSTILE = "\x1b[31mred\x07 \r\x85\u202eevil\u2066 [/INST] [bold]x[/] :smile:"
SEEN = r"\x1b[31mred\x07 \r\x85\u202eevil\u2066 [/INST] [bold]x[/] :smile:"
FULL = Path("/dev/full")


def rename_token(directory: Path, token_id: int, piece: str) -> None:
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({"id": token_id, "content": piece, "special": True})
    path.write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def bracketed(tmp_path_factory) -> Path:
    """A vindex with `[/INST]` and hostile pieces among its tokens, under a name with brackets, of a hostile licence."""
    directory = tmp_path_factory.mktemp("out[") / "v2].vindex"
    source = write_checkpoint(directory.parent / "m[red]")
    for token_id, piece in ((20, "[/INST]"), (21, HOSTILE)):
        rename_token(source, token_id, piece)
    (source / "README.md").write_text(f"---\nlicense: '{HOSTILE[:40]}'\n---\n".replace("\r", ""))
    build_quietly(source, directory)
    index = json.loads((directory / "index.json").read_text()) | {"model": f"a/{HOSTILE}"}
    (directory / "index.json").write_text(json.dumps(index))
    return directory


def test_brackets_in_tokens_and_paths_are_printed_as_they_are(bracketed):
    done = run("score", bracketed, "[/INST]")
    assert done.returncode == 0 and "token '[/INST]', id 20" in done.stdout, done.stderr
    done = run("info", bracketed, columns=200)
    assert done.stdout.startswith(str(bracketed)) and "out[" in str(bracketed), done.stderr
    shown = run("verify", bracketed.parent / "no[/v2].vindex").stderr
    assert shown.startswith("vindex: ") and "no[/v2].vindex" in shown


def test_a_build_into_a_path_that_reads_like_markup(tmp_path):
    source = write_checkpoint(tmp_path / "m")
    done = run("build", source, "-o", "out[/v2].vindex", "--features", 8, "--threads", 1, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("built out[/v2].vindex\n"), done.stderr


@pytest.mark.parametrize("command", [("info",), ("score", HOSTILE), ("feature", 0, 1), ("verify",)])
def test_control_characters_of_files_do_not_reach_the_terminal(bracketed, command):
    name, *rest = command
    for format in ((), ("--json",)):
        done = run(name, bracketed, *rest, *format, columns=200)
        text = done.stdout + done.stderr
        assert done.returncode == (1 if name == "verify" else 0), text
        assert not console.HIDDEN.search(text), ascii(text)
    if name in ("info", "score"):
        assert SEEN.partition(" ")[0] in run(name, bracketed, *rest, columns=300).stdout


def test_an_error_is_one_plain_line(tmp_path):
    done = run("info", tmp_path / "two\nlines\x1b[2J[/x]")
    assert done.returncode == 1
    assert done.stderr.endswith("\n") and done.stderr.count("\n") == 1
    assert r"two lines\x1b[2J[/x] is not a directory" in done.stderr


def test_an_error_of_the_system_is_one_line_that_names_the_file(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy.vindex")
    (copy / "README.md").unlink()
    (copy / "README.md").mkdir()
    done = run("card", copy)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "README.md" in done.stderr


LOCALES = [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}]
LOCALES += [{"PYTHONUTF8": "0", "LC_ALL": "C"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
ALL_OF_THEM = """
import itertools, sys
from vindex.__main__ import main

for more, words in itertools.groupby(sys.argv[1:], "::".__ne__):
    sys.argv = ["vindex", *words]
    try:
        more and main()
    except SystemExit as done:
        if done.code:
            sys.exit(f"{sys.argv} exits with {done.code}")
"""


@pytest.mark.parametrize("locale", LOCALES, ids=lambda locale: "-".join(locale.values()))
def test_every_command_is_right_in_every_locale_at_60_columns(bracketed, built, checkpoint, tmp_path, locale):
    """All in one process: no traceback, no line over 60 columns, no number cut. torch is only loaded in one locale."""
    shutil.copytree(built, tmp_path / "c")
    commands = [
        ("score", bracketed, " Paris", "ä"),
        ("feature", bracketed, 0, 1),
        ("info", "c"),
        ("compare", "c", built, "-o", "r.json"),
        ("card", "c"),
        ("verify", "c"),
    ]
    if locale is LOCALES[0]:
        commands += [
            ("verify", "c", "--source", checkpoint),
            ("audit", "c", "--source", checkpoint),
            ("plan", checkpoint, "--features", 8),
            ("build", checkpoint, "-o", "v", "--features", 8, "--threads", 1),
        ]
    words = [str(word) for command in commands for word in ("::", *command)]
    done = in_tree([sys.executable, "-c", ALL_OF_THEM, *words], 60, cwd=tmp_path, **locale)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    text = done.stdout.decode(errors="replace")
    assert not too_wide(text, 60) and "…" not in text and "0.0e+00" in text, text
    assert json.loads((tmp_path / "r.json").read_text())["record"] == "vindex-comparison/1"
    record = json.loads(with_streams("score", bracketed, "ä", "--json", **locale).stdout)
    assert record["scores"][0]["token"] == "ä"


def test_words_that_are_not_utf8_are_refused(built):
    done = with_streams("score", built, os.fsdecode(b"\xff"))
    assert done.returncode == 1 and rb"'\udcff' is not UTF-8" in done.stderr
    with pytest.raises(QueryError, match="is not UTF-8, which text on the command line has to be"):
        console.typed("\udcff")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [("info",), ("score", " Paris", "--json")])
def test_a_full_disk_behind_stdout_is_one_line(built, command, unbuffered):
    name, *rest = command
    with FULL.open("w") as full:
        done = with_streams(name, built, *rest, stdout=full, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"vindex: ") and b"No space left on device" in done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stderr_stops_nothing(built):
    with FULL.open("w") as full:
        assert b"ok" in with_streams("verify", built, stderr=full).stdout
        assert with_streams("verify", built, stderr=full).returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("format", [(), ("--json",)])
def test_a_reader_that_goes_away_is_no_error(built, format, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    done = with_streams("score", built, *[" Paris"] * 50, *format, stdout=writing, PYTHONUNBUFFERED=unbuffered)
    os.close(writing)
    assert done.returncode == 1 and done.stderr == b""


def test_closed_streams_are_no_error(built):
    command = f"{sys.executable} -m vindex info {built}"
    for redirected in (">&-", ">&- 2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(f"{command} {redirected}", shell=True, cwd=ROOT, capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def printed(capsys, monkeypatch, columns: int, *table, **options) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    console.print_table(*table, **options)
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [20, 60, 80])
def test_numbers_are_never_cut(capsys, monkeypatch, columns):
    numbers = ["0.123456", "12,345,678", "40% / 30%", "-1.5e-07"]
    heads = [">reading at once", ">b", ">c", f">in {'a-long-name-of-a-directory' * 2}"]
    text = printed(capsys, monkeypatch, columns, "t", ["name", *heads], [["a name of many words " * 3, *numbers]])
    assert any(all(number in row for number in numbers) for row in text.splitlines()), text
    assert columns < 60 or max(map(len, text.splitlines())) <= columns


def test_long_text_is_folded_and_not_cut(capsys, monkeypatch):
    path = "/".join(f"part{number}" for number in range(40))
    text = printed(capsys, monkeypatch, 60, path, ["", ""], [["path", path]], caption=HOSTILE)
    assert "…" not in text and max(map(len, text.splitlines())) <= 60
    words = "".join(text.split())
    assert words.count(path) == 2 or path in words.replace("path", "", 1)
    assert "[/INST]" in text and "\x1b" not in text


def test_a_line_with_a_long_path_is_left_whole_and_others_break_between_words(capsys):
    place = Path("/".join(f"part{number}" for number in range(40)))
    console.say_places(record=place)
    console.say("some words " * 20)
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"record: {place}" and len(others) == 3 and max(map(len, others)) <= 80


def test_what_is_quoted_is_not_broken(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    console.say("before: ' Paris' 0.95  ' Moscow' 0.01 and it's the \" Rome\" of others")
    assert capsys.readouterr().out.splitlines() == [
        "before: ' Paris' 0.95",
        "' Moscow' 0.01 and it's the",
        '" Rome" of others',
    ]


def test_commands_that_come_next_are_whole_and_on_lines_of_their_own(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    console.say('next: vindex verify made.vindex --source model, or vindex score made.vindex " Paris"')
    assert capsys.readouterr().out.splitlines() == [
        "next: vindex verify made.vindex --source model",
        'or:   vindex score made.vindex " Paris"',
    ]


@pytest.mark.parametrize("columns", ["0", "3"])
def test_a_terminal_of_no_width_is_taken_for_one_that_does_not_know(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    console.say("a line of " + "many words " * 20)
    assert [len(one) > 60 for one in capsys.readouterr().out.splitlines()[:2]] == [True, True]


def test_our_own_styles_are_kept_and_never_read_from_the_text(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console.say("[red]plain[/] ", console.styled("[/]FAILED\n\x1b", "red"))
    assert capsys.readouterr().out == "[red]plain[/] \x1b[31m[/]FAILED \\x1b\x1b[0m\n"


def test_descriptions_of_progress_bars_are_plain(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console.progress() as stage:
        stage("fact[/x]\x1b", 1)(1, "note[/y]")
    assert r"fact[/x]\x1b: note[/y]" in capsys.readouterr().err


def test_long_work_writes_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    with console.progress() as stage:
        advance = stage("hashing\x1b", 4)
        advance(1)
        advance(3, "model.safetensors")
        stage("copying", None)(1)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "hashing\\x1b: 25%, 0 s left" and second == "hashing\\x1b: 100% after 0 s (model.safetensors)"
    assert third == "copying: 0 s"


def test_short_work_writes_nothing_where_there_is_no_terminal_and_silent_work_nothing_anywhere(capsys):
    for enabled in (True, False):
        with console.progress(enabled) as stage:
            stage("hashing", 4)(4)
    assert not capsys.readouterr().err


def test_durations_are_in_the_unit_that_people_read():
    assert [console.duration(seconds) for seconds in (7.6, 300, 9000)] == ["8 s", "5 min", "2.5 h"]


def test_json_on_stdout_holds_what_was_given(capsys):
    record = {"text": HOSTILE + "λ\U000e0041", "count": 1}
    console.print_json(record)
    out = capsys.readouterr().out
    assert json.loads(out) == record == orjson.loads(out) and not console.HIDDEN.search(out) and "λ" in out


def test_joiners_and_newlines_of_a_text_stay():
    assert console.shown("👩\u200d🔬 می\u200cخواهم\n") == "👩\u200d🔬 می\u200cخواهم\n"
    assert console.one_line("a\nb") == "a b" and isinstance(console.line("a"), Text)


def test_ctrl_c_says_what_became_of_the_work(monkeypatch, capsys):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "app", stopped)
    with pytest.raises(SystemExit) as done:
        entry.main()
    assert done.value.code == 130 and capsys.readouterr().err == "vindex: interrupted; nothing is left half-written\n"


def test_a_command_to_go_on_with_can_be_pasted_whatever_its_names_are():
    assert console.command("info", Path("my vindex"), 3) == "vindex info 'my vindex' 3"
