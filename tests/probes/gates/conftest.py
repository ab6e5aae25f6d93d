"""The atlas, loaded once, gates of its size and of the tiny model's, and rows."""

from __future__ import annotations

import json

import pytest
import torch

from probes.gates.gates import Gates
from tests.probes.gates.rows import ROWS, SUMS
from tests.probes.gates.short import SHORT, data_for


@pytest.fixture(scope="session")
def atlas():
    from probes.live.load import load
    from vindex.demo import CHECKPOINT

    return load(CHECKPOINT, dtype="float32", device="cpu")


@pytest.fixture
def gates():
    """Gates of the tiny model's size: 3 layers, 48 neurons, λ all over 0..1."""
    return Gates(torch.randn(3, 48, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="session")
def random_gates():
    return Gates(torch.randn(4, 384, generator=torch.Generator().manual_seed(3)) * 0.1)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Rows and a neutral text as the options of evaluate_gates."""
    place = tmp_path_factory.mktemp("rows")
    for name, rows in (("forget", ROWS), ("retain", SUMS)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "neutral.txt").write_text("Emma walked to the market.")
    return {"forget": place / "forget.jsonl", "retain": place / "retain.jsonl", "neutral": place / "neutral.txt"}


@pytest.fixture(scope="session")
def plain(atlas):
    return data_for(atlas, SHORT)
