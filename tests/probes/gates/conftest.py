"""The atlas, loaded once, and gates of the tiny model's size."""

from __future__ import annotations

import pytest
import torch

from probes.gates.gates import Gates


@pytest.fixture(scope="session")
def atlas():
    from probes.live.load import load
    from vindex.demo import CHECKPOINT

    return load(CHECKPOINT, dtype="float32", device="cpu")


@pytest.fixture
def gates():
    """Gates of the tiny model's size: 3 layers, 48 neurons, λ all over 0..1."""
    return Gates(torch.randn(3, 48, generator=torch.Generator().manual_seed(1)))
