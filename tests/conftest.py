"""Fixtures shared by all tests: a small checkpoint, its vindex, and the real model where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from extract.build import build
from extract.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from vindex.options import BuildOptions

torch.set_num_threads(1)  # tests on small matrices are slower with more


def silent(name: str, total: int):
    """A progress report that nobody watches."""
    return lambda steps: None


def build_quietly(checkpoint: Path, target: Path, *, resume: bool = False, force: bool = False, **options):
    """Build with few features and no output."""
    chosen = BuildOptions(**({"features": 8} | options))
    return build(open_checkpoint(str(checkpoint)), target, chosen, silent, resume=resume, force=force)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", shards=2)


@pytest.fixture(scope="session")
def built(checkpoint, tmp_path_factory) -> Path:
    """A finished vindex of `checkpoint`; tests that change it copy it first."""
    target = tmp_path_factory.mktemp("built") / "tiny.vindex"
    build_quietly(checkpoint, target)
    return target


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The real 135M checkpoint. `make test-real` lays it on disk and names it in VINDEX_REAL_MODEL."""
    directory = os.environ.get("VINDEX_REAL_MODEL")
    if not directory:
        pytest.skip("VINDEX_REAL_MODEL is not set; run `make test-real`, which downloads the model first")
    return Path(directory)
