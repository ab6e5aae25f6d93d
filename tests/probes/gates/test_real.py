"""What holds for toy weights holds for a real bfloat16 model."""

from __future__ import annotations

import pytest
import torch

from probes.gates.apply import gate_shape, gated
from probes.gates.gates import Gates
from probes.live.hooks import same_bits
from probes.live.load import load
from probes.weights.bake import bake

pytestmark = pytest.mark.real
IDS = torch.arange(100, 112)[None]


def logits_of(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_open_gates_change_no_bit_and_hard_agrees_with_baked(real_model, tmp_path):
    model = load(real_model, device="cpu").model
    shape, bare = gate_shape(model), logits_of(model)
    with gated(model, Gates(torch.full(shape, 30.0)).factors("energy")):
        assert same_bits(logits_of(model), bare)
    gates = Gates(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    threshold = gates.threshold_at(0.05)
    with gated(model, gates.below(threshold).factors()):
        masked = logits_of(model).float()
    bake(real_model, gates.keep(threshold), tmp_path / "baked")
    baked = logits_of(load(tmp_path / "baked", device="cpu").model).float()
    assert float((masked - bare.float()).abs().max()) > 0.5
    torch.testing.assert_close(masked, baked, rtol=0, atol=1e-6)
