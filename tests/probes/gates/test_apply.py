"""Gates do to h what their definitions say, and nothing else."""

from __future__ import annotations

import pytest
import torch

from probes.gates.apply import gated
from probes.gates.gates import Gates
from probes.gates.masks import lowest_keep, random_keep, rescaled
from probes.live.hooks import capture, edited, patched, same_bits
from probes.live.load import load
from probes.live.sites import sites
from vindex.errors import PatchError, ProbeError

IDS = torch.arange(40).reshape(2, 20)
SCALES = ("none", "mean", "energy")


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", SCALES)
def test_gates_all_at_one_leave_the_logits_bit_identical(tiny_checkpoint, dtype, scale):
    model = load(tiny_checkpoint, dtype=dtype, device="cpu").model
    bare = logits_of(model)
    open_gates = Gates(torch.full((3, 48), 30.0))
    assert bool((open_gates.values == 1).all())
    with gated(model, open_gates.factors(scale)):
        assert same_bits(logits_of(model), bare)
    with gated(model, open_gates.below(0.5).factors(scale)):
        assert same_bits(logits_of(model), bare)


def test_one_neuron_off_equals_zeroing_its_down_proj_column_by_hand(tiny):
    keep = torch.ones(3, 48)
    keep[1, 17] = 0
    with gated(tiny.model, keep):
        masked = logits_of(tiny.model)

    def without(weight):
        weight[:, 17] = 0
        return weight

    with patched(tiny.model, {("down_proj", 1): without}):
        by_hand = logits_of(tiny.model)
    assert not same_bits(masked, logits_of(tiny.model))
    torch.testing.assert_close(masked, by_hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mask_gives_what_multiplying_h_by_it_gives(tiny_checkpoint, dtype):
    model = load(tiny_checkpoint, dtype=dtype, device="cpu").model
    mask = (torch.rand(3, 48, generator=torch.Generator().manual_seed(0)) > 0.3).float()
    with gated(model, mask):
        filled = logits_of(model)
    with edited(model, {("hidden", n): lambda h, n=n: h * mask[n] for n in range(3)}):
        assert same_bits(filled, logits_of(model))
    assert not same_bits(filled, logits_of(model))


@pytest.mark.parametrize("scale", SCALES)
def test_soft_gating_multiplies_h_by_the_defined_factors(tiny, gates, scale):
    with capture(tiny.model, sites(tiny.model, "hidden", only=[0])) as plain:
        logits_of(tiny.model)
    with gated(tiny.model, gates.factors(scale)), capture(tiny.model, sites(tiny.model, "hidden", only=[0])) as seen:
        logits_of(tiny.model)
    lam = gates.values[0]
    divisor = {"none": 1.0, "mean": lam.mean(), "energy": lam.square().mean().sqrt()}[scale]
    torch.testing.assert_close(seen["hidden", 0], plain["hidden", 0] * lam / divisor)


def test_mean_preserves_the_mean_activation_and_energy_the_energy_on_known_activations(gates):
    even = torch.full((48,), 2.0)  # every neuron fires alike
    for row in range(3):
        mean, energy, none = (even * gates.factors(scale)[row] for scale in ("mean", "energy", "none"))
        torch.testing.assert_close(mean.mean(), even.mean())
        torch.testing.assert_close(energy.square().sum(), even.square().sum())
        assert none.mean() < 0.7 * even.mean() and none.square().sum() < 0.6 * even.square().sum()


def test_a_layer_that_is_wholly_off_stays_off():
    for scale in SCALES:
        assert torch.equal(rescaled(torch.zeros(2, 4), scale), torch.zeros(2, 4))


def test_capture_inside_sees_gated_activations_and_outside_plain_ones(tiny, gates):
    factors = gates.below(0.5).factors()
    off = factors[2] == 0
    where = sites(tiny.model, "hidden", only=[2])
    with gated(tiny.model, factors), capture(tiny.model, where) as inside:
        logits_of(tiny.model)
    with capture(tiny.model, where) as outside, gated(tiny.model, factors):
        logits_of(tiny.model)
    assert bool((inside["hidden", 2][..., off] == 0).all())
    assert bool((outside["hidden", 2][..., off] != 0).any())


def test_gating_stays_float32_in_a_bfloat16_model(tiny_checkpoint):
    model = load(tiny_checkpoint, dtype="bfloat16", device="cpu").model
    factors = torch.full((3, 48), 1 + 2**-12)  # no bfloat16 holds this
    where = sites(model, "hidden", only=[0])
    with capture(model, where) as plain, gated(model, factors), capture(model, where) as seen:
        logits_of(model)
    h = plain["hidden", 0]
    assert seen["hidden", 0].dtype == torch.bfloat16
    assert torch.equal(seen["hidden", 0], (h.float() * factors[0]).to(torch.bfloat16))


def test_hooks_are_gone_after_gating(tiny, gates):
    bare = logits_of(tiny.model)
    with pytest.raises(RuntimeError, match="mine"), gated(tiny.model, gates.factors("none")):
        raise RuntimeError("mine")
    assert same_bits(bare, logits_of(tiny.model))


@pytest.mark.parametrize("shape", [(2, 48), (3, 47)])
def test_gates_of_another_model_are_refused(tiny, shape):
    message = rf"the gates are {shape[0]} × {shape[1]} \(layers × neurons\), the model has 3 × 48"
    with pytest.raises(PatchError, match=message), gated(tiny.model, torch.ones(shape)):
        pass


def test_gates_are_float32_matrices():
    with pytest.raises(PatchError, match="gate logits are torch.float16, 1-D; expected float32"):
        Gates(torch.zeros(3, dtype=torch.float16))


def test_layers_of_different_width_are_refused(tiny):
    tiny.model.model.layers[1].mlp.gate_proj.out_features = 40
    with pytest.raises(PatchError, match=r"layers.1 has 40 neurons, layers.0 48"), gated(tiny.model, torch.ones(3, 48)):
        pass


def test_an_unknown_scale_mode_is_refused(gates):
    with pytest.raises(ProbeError, match="scale mode 'rms': expected none, mean, energy"):
        gates.factors("rms")


def test_a_mixture_of_experts_is_refused_with_the_reason():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_experts=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    message = r"layers.0.mlp: .* is a mixture of experts, whose fused experts a hook cannot"
    model = Qwen3MoeForCausalLM(config)
    with pytest.raises(ProbeError, match=message), gated(model, torch.ones(1, 16)):
        pass


def test_control_masks_drop_as_many_neurons_of_every_layer(gates):
    keep = gates.keep(0.4)
    first, again, other = random_keep(keep, 0), random_keep(keep, 0), random_keep(keep, 1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    scores = torch.rand(3, 48)
    lowest = lowest_keep(scores, keep)
    for mask in (first, other, lowest):
        assert torch.equal((~mask).sum(1), (~keep).sum(1))
    assert all(scores[row][~lowest[row]].max() < scores[row][lowest[row]].min() for row in range(3))
