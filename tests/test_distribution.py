"""What is published holds what the packages read, and nothing else: the sdist, and the wheel that is built from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("vindex", "extract", "probes")


def files_of(root: Path) -> set[str]:
    """The files of the packages under a root, without what Python makes there."""
    found = (path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file())
    return {str(path.relative_to(root)) for path in found if "__pycache__" not in path.parts}


def build(kind: str, source: Path, target: Path) -> Path:
    """An sdist or a wheel of a tree, as `pip` and `python -m build` have hatchling make it."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    shutil.unpack_archive(build("sdist", ROOT, folder / "made"), folder)
    (tree,) = (path for path in folder.iterdir() if path.name != "made")
    return tree


def test_an_sdist_is_enough_to_build_and_to_test(unpacked):
    assert files_of(unpacked) == files_of(ROOT)
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md", "tests/conftest.py", "docs"):
        assert (unpacked / name).exists(), name


def test_a_wheel_holds_the_packages_with_their_data_and_no_tests(unpacked, tmp_path):
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path)) as wheel:
        names = set(wheel.namelist())
        about = {name for name in names if name.split("/")[0].endswith(".dist-info")}
        (scripts,) = (wheel.read(name).decode() for name in about if name.endswith("entry_points.txt"))
        (metadata,) = (wheel.read(name).decode() for name in about if name.endswith("METADATA"))
    assert names - about == files_of(ROOT)
    data = {name.rpartition(".")[2] for name in names - about}
    assert {"safetensors", "jinja", "json", "jsonl", "txt", "html", "js", "css", "typed", "template"} < data
    assert "vindex = vindex.__main__:main\nvindex-svd = vindex.__main__:main" in scripts
    assert metadata.startswith("Metadata-Version: ") and "\nName: vindex-svd\n" in metadata
