"""A model and a vindex that a test may spoil, and a directory of each family that others publish."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.foreign import (
    EXPERTS,
    FEATURES,
    HIDDEN,
    LAYERS,
    NEURONS,
    TOKENS,
    leading,
    weights,
    write_browse,
    write_published,
    write_summary,
)


@pytest.fixture
def model(tiny_checkpoint, tmp_path) -> Path:
    """A copy of a live tiny model that a test may change."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny-qwen3")


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy.vindex")


@pytest.fixture(scope="session")
def embeddings() -> np.ndarray:
    return weights(TOKENS, HIDDEN, seed=1)


@pytest.fixture(scope="session")
def published(tmp_path_factory, embeddings) -> Path:
    gate = np.stack([leading(weights(NEURONS, HIDDEN, seed=10 + layer), FEATURES) for layer in range(LAYERS)])
    down = np.stack([leading(weights(NEURONS, HIDDEN, seed=20 + layer), FEATURES) for layer in range(LAYERS)])
    return write_published(tmp_path_factory.mktemp("a") / "published", gate, down, embeddings, model="Qwen/Qwen3-8B")


@pytest.fixture(scope="session")
def experts() -> dict[int, np.ndarray]:
    """Layers 1 and 2 of a model: its layer 0 is dense and not in the summary."""
    return {
        layer: np.stack([leading(weights(NEURONS, HIDDEN, seed=100 * layer + e), FEATURES) for e in range(EXPERTS)])
        for layer in (1, 2)
    }


@pytest.fixture(scope="session")
def summary(tmp_path_factory, experts) -> Path:
    return write_summary(tmp_path_factory.mktemp("b") / "summary", experts)


@pytest.fixture(scope="session")
def neurons() -> list[np.ndarray]:
    return [weights(NEURONS, HIDDEN, seed=30 + layer) for layer in range(LAYERS)]


@pytest.fixture(scope="session")
def browse(tmp_path_factory, neurons, embeddings) -> Path:
    return write_browse(tmp_path_factory.mktemp("c") / "browse", neurons, embeddings)
