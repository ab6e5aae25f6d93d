"""The atlas checkpoint on the bench, and France deleted from it once."""

from __future__ import annotations

import pytest

from probes.atlas import panel as atlas
from probes.deletion.bench import Bench, Options
from probes.deletion.experiment import run
from probes.facts.prompts import Encoder
from probes.facts.sets import split
from probes.live.load import load
from vindex.demo import CHECKPOINT


@pytest.fixture(scope="session")
def loaded():
    return load(CHECKPOINT, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def sets(loaded):
    panel = atlas.panel()
    return split(panel, panel.find("France/capital"), Encoder(loaded.tokenizer))


@pytest.fixture(scope="session")
def bench(loaded):
    return Bench(loaded, atlas.panel(), Options(samples=512))


@pytest.fixture(scope="session")
def result(bench):
    return run(bench, bench.panel.find("France/capital"))
