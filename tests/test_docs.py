"""The documentation is run: every `$ vindex …` line of a console block, and every python block, in order."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from contextlib import ExitStack
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import extract
import probes
import vindex
from tests.hub_server import TOKEN, HubServer, pointed_at
from vindex.__main__ import Few, app

ROOT = Path(__file__).parent.parent
HUB = "docs/hub.md"  # of which the commands ask a local Hub
PAGES = [
    "README.md",
    "docs/tutorial.md",
    "docs/commands.md",
    "docs/probes.md",
    "docs/scores.md",
    "docs/trace.md",
    "docs/audit.md",
    "docs/responses.md",
    "docs/report.md",
    HUB,
]
READ = "python probes scores trace audit responses families report"
IN_PYTHON = ["README.md", *(f"docs/{page}.md" for page in READ.split())]
LESS = {"--max-steps 60": "--max-steps 2 --forget-limit 32 --retain-limit 64", "--count 40": "--count 4"}
ONE_POINT = "probes.gates.gates.Gates.selected_thresholds", lambda gates: (gates.threshold_at(0.25),)
FEW_ROWS = "probes.gates.controls.ACTIVATION_ROWS", 16
FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
WRITTEN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def documented_commands(page: str) -> list[list[str]]:
    text = "\n".join(blocks(page, "console"))
    for said, instead in LESS.items():  # runs that are only to be seen to run
        text = text.replace(said, instead)
    lines = text.splitlines()
    return [shlex.split(line.removeprefix("$ vindex ")) for line in lines if line.startswith("$ vindex ")]


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_run_in_order(page, tmp_path, monkeypatch):
    commands = documented_commands(page)
    assert commands
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vindex.__main__.DEMO_GATES", Few(2, 4))
    monkeypatch.setattr(*ONE_POINT)
    monkeypatch.setattr(*FEW_ROWS)
    with ExitStack() as stack:
        if page == HUB:
            monkeypatch.setenv("HF_TOKEN", TOKEN)
            monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
            stack.enter_context(pointed_at(stack.enter_context(HubServer({})), monkeypatch))
        for command in commands:
            done = CliRunner().invoke(app, command)  # in this process: most of the time would go to importing torch
            assert done.exit_code == 0, (command, done.output, done.exception)


def test_every_command_has_an_example():
    listed = re.findall(
        r"^  (\w+)  ", CliRunner().invoke(app, ["--help"]).stdout.partition("Commands:")[2], re.MULTILINE
    )
    shown = {command[0] for page in PAGES for command in documented_commands(page)}
    assert len(listed) >= 8 and {name.split()[0] for name in listed} <= shown


@pytest.mark.parametrize("page", IN_PYTHON)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(*ONE_POINT)
    monkeypatch.setattr(*FEW_ROWS)
    extract.build("atlas", "atlas.vindex")
    exec("\n".join(blocks(page, "python")), {})


def fenced(page: Path) -> str:
    """All that stands between fences on a page."""
    return "\n".join(match[0] for match in FENCED.finditer(page.read_text()))


GUIDES = [page for page in WRITTEN if page.parent.name != "log"]  # the log says what was run then


def test_every_command_that_a_page_shows_is_one_that_there_is():
    """What takes too long to be run, or asks for a model that is not here, is parsed, and nothing is carried out."""
    lines = [line for page in GUIDES for line in re.findall(r"^(?:\$ )?vindex ([a-z].*)", fenced(page), re.MULTILINE)]
    assert len(lines) > 60
    for line in lines:
        command, words = typer.main.get_command(app), shlex.split(line, comments=True)
        context = command.make_context("vindex", list(words))
        while hasattr(command, "resolve_command"):
            name, command, words = command.resolve_command(context, words)
            context = command.make_context(name, list(words), parent=context)


def test_every_call_that_a_page_shows_has_arguments_that_there_are():
    """Gate 3 takes minutes, so that its page is not run."""
    calls = []
    for page in GUIDES:
        for code in re.findall(
            r"^import (?:probes|vindex|extract).*?(?=^ *```)", fenced(page), re.DOTALL | re.MULTILINE
        ):
            calls += [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    faces = {"probes": probes, "vindex": vindex, "extract": extract}
    shown = [call for call in calls if getattr(getattr(call.func, "value", None), "id", None) in faces]
    assert {call.func.attr for call in shown} > {
        "delete",
        "delete_all",
        "verify_patch",
        "revert_patch",
        "build",
        "open",
    }
    for call in shown:
        function = getattr(faces[call.func.value.id], call.func.attr)
        inspect.signature(function).bind(*call.args, **{keyword.arg: keyword for keyword in call.keywords})


def test_the_page_on_python_names_every_public_call():
    page = (ROOT / "docs" / "python.md").read_text()
    names = {name for face in (extract, probes, vindex) for name in dir(face) if name.islower() and name[0] != "_"}
    assert len(names) > 25 and not {name for name in names if f"`{name}`" not in page}


def test_prose_stays_within_120_columns():
    for page in [*WRITTEN, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        for line in FENCED.sub("", page.read_text()).splitlines():
            assert len(line) <= 120 or line.lstrip().startswith("|"), f"{page.name}: {line[:60]}…"


def test_the_format_page_names_every_file():
    from vindex.format import FILES

    page = (ROOT / "docs" / "format.md").read_text()
    assert all(f"`{spec.name}`" in page for spec in FILES)


def links(page: Path) -> list[tuple[Path, str]]:
    """The file and the #fragment (or "") of every link and picture of a page that does not lead to the web."""
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    targets += re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    here = [target.partition("#") for target in targets if not re.match(r"[a-z]+:", target)]
    return [((page.parent / path).resolve() if path else page, fragment) for path, _, fragment in here]


def fragments(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page; the second of two equal ones ends in -1."""
    names: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.*?)[ #]*$", FENCED.sub("", page.read_text()), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        names.append(re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-"))
    return {name + (f"-{names[:i].count(name)}" if name in names[:i] else "") for i, name in enumerate(names)}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    for target, fragment in links(page):
        assert target.is_relative_to(ROOT) and target.exists(), f"{target.name} is not there"
        assert not fragment or fragment in fragments(target), f"{target.name} has no heading #{fragment}"


def test_the_map_leads_to_every_page():
    """A page of the log by way of the log's own index."""
    index, log = ROOT / "docs" / "index.md", ROOT / "docs" / "log" / "index.md"
    assert set(WRITTEN) - {index} <= {target for page in (index, log) for target, _ in links(page)}
    assert log in {target for target, _ in links(index)}
    assert index in {target for target, _ in links(ROOT / "README.md")}


def test_links_and_headings_are_found_outside_code(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c: d\n# Same\n# Same\n```\n# none, [x](none.md)\n```\n[x\ny](#same-1) `[z](none.md)`\n")
    assert fragments(page) == {"a-b-c-d", "same", "same-1"} and links(page) == [(page, "same-1")]
