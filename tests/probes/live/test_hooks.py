"""Hooks change nothing unless asked, and leave nothing behind."""

import pytest
import torch

from probes.live.hooks import capture, edited, patched, same_bits
from probes.live.load import load
from probes.live.sites import ROLES, sites
from vindex.errors import PatchError, ProbeError

IDS = torch.arange(20).reshape(2, 10)


def hooks_left(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_with_capture_equal_logits_without_bit_for_bit(tiny_checkpoint, dtype, attn):
    model = load(tiny_checkpoint, dtype=dtype, device="cpu", attn=attn).model
    bare = model(IDS).logits
    with capture(model, sites(model, *ROLES)) as seen:
        hooked = model(IDS).logits
    assert same_bits(bare, hooked)
    assert len(seen) == len(ROLES) * 3
    assert hooks_left(model) == 0


def test_captured_tensors_are_what_the_definitions_say(tiny):
    with capture(tiny.model, sites(tiny.model, *ROLES)) as seen:
        states = tiny.model(IDS, output_hidden_states=True).hidden_states
    mlp = tiny.model.model.layers[1].mlp
    hidden = torch.nn.functional.silu(mlp.gate_proj(seen["mlp_in", 1])) * mlp.up_proj(seen["mlp_in", 1])
    torch.testing.assert_close(seen["hidden", 1], hidden)
    torch.testing.assert_close(seen["gate", 1], mlp.gate_proj(seen["mlp_in", 1]))
    torch.testing.assert_close(seen["up", 1], mlp.up_proj(seen["mlp_in", 1]))
    torch.testing.assert_close(seen["mlp_out", 1], mlp.down_proj(hidden))
    assert torch.equal(seen["residual", 1], states[2])  # states[0] is the embedding


def test_observe_streams_and_keeps_nothing(tiny):
    shapes = {}
    with capture(tiny.model, [("hidden", 0)], observe=lambda site, h: shapes.update({site: h.shape})) as seen:
        tiny.model(IDS)
    assert seen == {}
    assert shapes == {("hidden", 0): (2, 10, 48)}


def test_gradients_are_kept_only_on_request(tiny):
    tiny.model.model.embed_tokens.weight.requires_grad_(True)
    for detach in (True, False):
        with capture(tiny.model, [("hidden", 2)], detach=detach) as seen:
            tiny.model(IDS)
        assert seen["hidden", 2].requires_grad is not detach


def test_all_handles_are_gone_after_an_exception(tiny):
    bare = tiny.model(IDS).logits
    with pytest.raises(RuntimeError, match="mine"), capture(tiny.model, sites(tiny.model, *ROLES)):
        raise RuntimeError("mine")
    with pytest.raises(RuntimeError, match="mine"), edited(tiny.model, {("hidden", 0): lambda h: h * 0}):
        raise RuntimeError("mine")
    with pytest.raises(ProbeError, match="site 'typo'"), capture(tiny.model, [("hidden", 0), ("typo", 0)]):
        pass
    assert hooks_left(tiny.model) == 0
    assert same_bits(bare, tiny.model(IDS).logits)


def test_a_site_that_never_fired_is_an_error(tiny):
    with (
        pytest.raises(ProbeError, match=r"layers\.0 hidden: never fired \(1 of 1 sites\)"),
        capture(tiny.model, [("hidden", 0)]),
    ):
        pass
    tiny.model.model.layers[1].mlp.forward = lambda x: x  # bypasses its projections
    with (
        pytest.raises(ProbeError, match=r"layers\.1 hidden: never fired \(1 of 3 sites\)"),
        capture(tiny.model, sites(tiny.model, "hidden")),
    ):
        tiny.model(IDS)


class _Tupled(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x), "more"


def test_outputs_may_be_tensors_or_tuples(tiny):
    gate = tiny.model.model.layers[0].mlp.gate_proj
    tiny.model.model.layers[0].mlp.gate_proj = tupled = _Tupled(gate)
    x = torch.randn(1, 4, 32)
    with capture(tiny.model, [("gate", 0)]) as seen:
        tupled(x)
    torch.testing.assert_close(seen["gate", 0], gate(x))
    with edited(tiny.model, {("gate", 0): torch.zeros_like}):
        changed, rest = tupled(x)
    assert not changed.any()
    assert rest == "more"


def test_a_site_that_gives_no_tensor_is_named(tiny):
    with pytest.raises(ProbeError, match=r"layers\.0 residual: output of Qwen3DecoderLayer is no tensor but NoneType"):
        tiny.model.model.layers[0].forward = lambda *args, **kwargs: None
        with capture(tiny.model, [("residual", 0)]):
            tiny.model(IDS)
    assert hooks_left(tiny.model) == 0


def test_an_edit_acts_and_carries_gradients(tiny):
    scale = torch.ones(48, requires_grad=True)
    with (
        edited(tiny.model, {("hidden", 1): lambda h: h * scale}),
        capture(tiny.model, [("mlp_out", 1)], detach=False) as seen,
    ):
        logits = tiny.model(IDS).logits
    assert same_bits(logits, tiny.model(IDS).logits)  # × 1 changes nothing
    logits.square().sum().backward()
    assert scale.grad is not None and scale.grad.abs().max() > 0
    with edited(tiny.model, {("hidden", 1): lambda h: h * 0}), capture(tiny.model, [("mlp_out", 1)]) as seen:
        tiny.model(IDS)
    assert not seen["mlp_out", 1].any()


def test_an_edit_may_not_change_the_shape(tiny):
    with (
        pytest.raises(ProbeError, match=r"layers\.0 hidden: edit returned shape \(2, 10, 1\), not \(2, 10, 48\)"),
        edited(tiny.model, {("hidden", 0): lambda h: h[..., :1]}),
    ):
        tiny.model(IDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_patch_acts_and_goes_back_bit_for_bit(tiny_checkpoint, dtype):
    model = load(tiny_checkpoint, dtype=dtype, device="cpu").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bare = model(IDS).logits
    write, read = torch.randn(48), torch.randn(32)
    edits = {("gate_proj", 1): lambda w: w + write.outer(read), ("up_proj", 2): lambda w: w * 0}
    with patched(model, edits):
        assert not same_bits(model(IDS).logits, bare)
        assert not model.model.layers[2].mlp.up_proj.weight.any()
        torch.testing.assert_close(
            model.model.layers[1].mlp.gate_proj.weight.float(),
            (before["model.layers.1.mlp.gate_proj.weight"].float() + write.outer(read)).to(model.dtype).float(),
        )
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(KeyboardInterrupt), patched(model, edits):
        raise KeyboardInterrupt
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w[:1], r"layers\.0 up_proj: patched weight has shape \(1, 32\), expected \(48, 32\)"),
        (lambda w: w / 0, r"layers\.0 up_proj: patched weight is not finite"),
    ],
)
def test_a_bad_patch_changes_nothing(tiny, edit, message):
    bare = tiny.model(IDS).logits
    with (
        pytest.raises(PatchError, match=message),
        patched(tiny.model, {("gate_proj", 0): lambda w: w * 2, ("up_proj", 0): edit}),
    ):
        pass
    assert same_bits(bare, tiny.model(IDS).logits)


def test_same_bits_sees_what_equality_does_not():
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
