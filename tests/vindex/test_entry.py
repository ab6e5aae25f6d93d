"""The command and the package by name: versions, help, completion, and the other distribution of that name."""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata

import pytest
import typer

import vindex
from tests.commands import ROOT, in_tree, run
from vindex import distribution
from vindex.__main__ import app


def test_help_is_also_asked_for_by_one_letter(built):
    long, short = (run("score", flag).stdout for flag in ("--help", "-h"))
    assert long == short and "Usage" in long


def every_command(context=None):
    """(words, command) of each, those of groups too."""
    context = context or typer.Context(typer.main.get_command(app), info_name="vindex")
    for name in context.command.list_commands(context):
        found = context.command.get_command(context, name)
        if hasattr(found, "commands"):
            inner = typer.Context(found, info_name=name, parent=context)
            yield from ((f"{name} {words}", command) for words, command in every_command(inner))
        else:
            yield name, found


def test_every_help_has_its_example_and_names_what_is_given_in_capitals_and_has_a_record():
    commands = dict(every_command())
    assert len(commands) >= 20
    for words, command in commands.items():
        assert f"{command.help}{command.epilog}".count(f"Example: vindex {words} ") == 1, words
        assert any(parameter.name == "json" and parameter.is_flag for parameter in command.params), words
        for parameter in command.params:
            kind = getattr(parameter, "type_descriptor", None)
            flag = getattr(parameter, "is_flag", False) or getattr(kind, "is_choice", False)
            assert flag or parameter.name == "help" or parameter.metavar == parameter.metavar.upper(), parameter.name


def test_what_commands_share_is_said_in_the_same_words():
    for name in ("json", "dtype", "attn"):
        said = {p.help for _, command in every_command() for p in command.params if p.name == name}
        assert len(said) == 1, (name, said)


def test_a_shell_completes_commands():
    words = {"_VINDEX_COMPLETE": "complete_bash", "COMP_WORDS": "vindex comp", "COMP_CWORD": "1"}
    done = in_tree(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'vindex'; from vindex.__main__ import main; main()"],
        80,
        **words,
    )
    assert done.stdout.decode().split() == ["compare"], done


def test_the_version_is_that_of_the_distribution_and_of_the_package():
    assert run("--version").stdout.strip() == f"vindex {vindex.__version__}"
    assert vindex.__version__ == metadata.version("vindex-svd")


@pytest.mark.parametrize(
    "entry_point, noted", [("", True), ("[console_scripts]\nvindex = vindex.__main__:main\n", False)]
)
def test_the_other_vindex_of_pypi_is_told_apart(tmp_path, monkeypatch, capsys, entry_point, noted):
    from vindex import __main__ as entry

    info = tmp_path / "vindex-0.6.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vindex\nVersion: 0.6.0\n")
    (info / "entry_points.txt").write_text(entry_point)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vindex", "--version"])
    with pytest.raises(SystemExit):
        entry.main()
    said = capsys.readouterr().err
    note = "note: the distribution vindex 0.6.0 of somebody else is installed here too"
    assert said.startswith(note) and said.count("\n") == 1 if noted else not said


def test_the_distribution_has_a_name_of_its_own_and_two_commands():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == distribution.DISTRIBUTION == "vindex-svd"
    assert project["scripts"] == dict.fromkeys(("vindex", "vindex-svd"), "vindex.__main__:main")


def test_the_package_works_where_it_is_not_installed(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert vindex.__version__ == "0+source"


def test_the_package_lists_what_a_user_wants():
    assert {"open", "Vindex", "VindexError", "__version__"} <= set(dir(vindex)) == set(vindex.__all__)
    assert all(hasattr(vindex, name) for name in dir(vindex))
