"""A model and a vindex that a test may spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def model(tiny_checkpoint, tmp_path) -> Path:
    """A copy of a live tiny model that a test may change."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny-qwen3")


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy.vindex")
