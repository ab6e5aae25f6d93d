"""The rules of the house: who may import whom, and what must not be loaded early."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "vindex": {"torch", "transformers", "extract", "probes", "safetensors", "scipy", "tokenizers"},
    "extract": {"probes", "transformers"},
    "probes": {"extract"},
}
MAY_IMPORT_IN_HANDLERS = ROOT / "vindex" / "commands"
ONE_CONVERTER = ROOT / "extract" / "stores" / "tokenizer.py"  # makes tokenizer.json of a GGUF with transformers, once
TRAINING = ROOT / "vindex" / "demo"  # the script that made the bundled checkpoint, never imported by the package


def modules(package: str):
    return [path for path in sorted((ROOT / package).rglob("*.py")) if TRAINING not in path.parents]


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_dependencies_run_one_way(package):
    assert modules(package)
    for path in modules(package):
        in_handlers = MAY_IMPORT_IN_HANDLERS in path.parents or path == ONE_CONVERTER
        names = {name.split(".")[0] for name in imports(path, top_level_only=in_handlers)}
        assert not names & FORBIDDEN[package], path
        if package != "vindex":
            assert "vindex.commands" not in {
                ".".join(name.split(".")[:2]) for name in imports(path, top_level_only=False)
            }


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


def test_file_names_of_the_format_stand_in_one_place():
    """vindex/format.py is the only list of files."""
    sys.path.insert(0, str(ROOT))
    from vindex.format import FILES

    for package in FORBIDDEN:
        for path in modules(package):
            if path.name in ("format.py", "card.py"):  # the card carries the published reader's code
                continue
            literals = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
            own = {spec.name for spec in FILES if spec.byte_size} & literals
            assert not own, f"{path} names {own}"
