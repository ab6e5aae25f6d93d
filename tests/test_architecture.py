"""The rules of the house: who may import whom, and what must not be loaded early."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("vindex", "extract", "probes")
FORBIDDEN = {
    "vindex": {"torch", "transformers", "extract", "probes", "safetensors", "scipy", "tokenizers"},
    "extract": {"probes", "transformers"},
    "probes": {"extract"},
}
EVERYTHING = ROOT / "vindex" / "__main__.py"  # the one file that sees all three
ONE_CONVERTER = ROOT / "extract" / "stores" / "tokenizer.py"  # makes tokenizer.json of a GGUF with transformers, once


def modules(package: str) -> dict[str, Path]:
    paths = sorted((ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = {name: path for package in PACKAGES for name, path in modules(package).items()}


def imports(path: Path) -> set[str]:
    """What a file imports, anywhere in it; a module of ours by its full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
    return found


def room(module: str) -> str:
    """Where a module stands: a wing of probes/, or its package."""
    package, *rest = module.split(".")
    return f"{package}.{rest[0]}" if package == "probes" and rest else package


def circle(arrows: dict[str, set[str]]) -> list[str] | None:
    """Names that lead back to the first of them, if any do."""
    way: list[str] = []
    done: set[str] = set()

    def walk(name: str) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        way.append(name)
        found = next(filter(None, map(walk, sorted(arrows.get(name, ())))), None)
        done.add(way.pop())
        return found

    return next(filter(None, map(walk, sorted(arrows))), None)


def arrows(name_of) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if path != EVERYTHING:
            own = {name_of(other) for other in imports(path) if other in MODULES}
            found.setdefault(name_of(module), set()).update(own - {name_of(module)})
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_run_one_way(package):
    assert modules(package)
    for path in modules(package).values():
        names = {name.split(".")[0] for name in imports(path)}
        assert path in (EVERYTHING, ONE_CONVERTER) or not names & FORBIDDEN[package], path


def test_tests_call_what_is_public():
    """So that a simplification breaks no test for the wrong reason."""
    found = {
        path: re.findall(r"^from (?:vindex|extract|probes)\b.* _[a-z]\w*|^    _[a-z]\w*,$", path.read_text(), re.M)
        for path in sorted((ROOT / "tests").rglob("*.py"))
    }
    assert len(found) > 100 and not any(found.values()), {path: names for path, names in found.items() if names}


def test_one_file_sees_all_three_packages():
    assert {"vindex", "extract", "probes"} <= {name.split(".")[0] for name in imports(EVERYTHING)}


@pytest.mark.parametrize("name_of", [str, room], ids=["modules", "rooms"])
def test_no_imports_lead_back_to_where_they_began(name_of):
    found = arrows(name_of)
    assert circle(found) is None
    assert circle(found | {"vindex.errors": {"vindex.reader"}, "vindex": {"probes.cli"}}), "a circle would be found"


@pytest.mark.parametrize("package", ["extract", "probes"])
def test_commands_stand_last(package):
    """Nothing but a command knows a command: what one can do, a Python user can do."""
    for name, path in modules(package).items():
        own = {other for other in imports(path) if other.startswith(f"{package}.cli")}
        assert not own or name.startswith(f"{package}.cli"), path


def loaded_by(*command: str) -> set[str]:
    code = f"import sys, runpy; sys.argv = {['vindex', *command]!r}\n"
    code += "try: runpy.run_module('vindex', run_name='__main__')\nexcept SystemExit as e: assert not e.code, e.code\n"
    code += "print('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("LOADED ")[2].split())


def test_help_loads_neither_numpy_nor_torch():
    assert not loaded_by("--help") & {"numpy", "torch", "transformers"}


@pytest.mark.parametrize("command", [("score", " Paris"), ("info",), ("verify",), ("feature", "0", "1")])
def test_looking_at_a_vindex_loads_numpy_only(built, command):
    name, *rest = command
    loaded = loaded_by(name, str(built), *rest)
    assert "numpy" in loaded and not loaded & {"torch", "transformers", "scipy", "safetensors"}


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("3", "3")])
def test_a_command_keeps_small_products_to_one_thread(built, given, kept):
    """Before numpy is loaded, and unless the user says otherwise; a library that is imported sets nothing."""
    code = f"import os, sys, atexit, vindex.__main__ as m; sys.argv = ['vindex', 'info', {str(built)!r}]\n"
    code += f"assert os.environ.get('OPENBLAS_NUM_THREADS') == {given!r} and 'numpy' not in sys.modules\n"
    code += "atexit.register(lambda: print('THREADS', os.environ['OPENBLAS_NUM_THREADS'], 'numpy' in sys.modules))\n"
    code += "m.main()"
    own = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    environment = own | ({"OPENBLAS_NUM_THREADS": given} if given else {})
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"THREADS {kept} True"


def test_file_names_of_the_format_stand_in_one_place():
    """vindex/format.py is the only list of files."""
    sys.path.insert(0, str(ROOT))
    from vindex.format import FILES

    for path in MODULES.values():
        if path.name in ("format.py", "card.py"):  # the card carries the published reader's code
            continue
        literals = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        own = {spec.name for spec in FILES if spec.byte_size} & literals
        assert not own, f"{path} names {own}"
