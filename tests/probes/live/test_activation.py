"""The model's own activation is what the null is computed with and what the record names, whatever it is."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from probes.live import activation
from probes.live.hooks import capture, edited
from probes.live.load import load
from probes.live.sites import sites
from probes.suite import constants
from probes.suite.readings import read
from tests.probes.mixtures import make
from vindex.errors import ProbeError

IDS = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(0))
ORDERS = [torch.randperm(48, generator=torch.Generator().manual_seed(seed)) for seed in range(300)]
OWN = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}
OWN["gelu_pytorch_tanh"] = OWN["gelu_new"]


def with_activation(checkpoint, target, name, key="hidden_act"):
    """A copy of a checkpoint whose config names another activation."""
    target.mkdir()
    for path in checkpoint.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text()) | {key: name}
    (target / "config.json").write_text(json.dumps(config))
    return load(target, device="cpu").model


@pytest.mark.parametrize("name", OWN)
def test_c4s_null_is_that_of_the_models_own_activation(tiny_checkpoint, tmp_path, name):
    model = with_activation(tiny_checkpoint, tmp_path / name, name)
    with capture(model, sites(model, "gate", "up", "hidden")) as seen:
        model(IDS)
    readings = read(model, IDS)
    nulls = []
    for layer in range(3):
        gate, up, hidden = (seen[role, layer][0] for role in ("gate", "up", "hidden"))
        torch.testing.assert_close(OWN[name](gate) * up, hidden, rtol=1e-4, atol=1e-5)
        shuffled = torch.stack([(OWN[name](gate) * up[order]).var(0).mean() for order in ORDERS])
        assert readings[0].layers[layer].temperature.shuffled == pytest.approx(float(shuffled.mean()), rel=0.03)
        nulls.append(float(shuffled.mean()))
    c1, c4 = constants.ffn_sparsity(readings), constants.layer_temperature(readings)
    assert c4.headline.null == pytest.approx(sum(nulls) / 3, rel=0.03)
    assert readings[0].activation.name == name
    assert f"h = {name}(gate_proj x)" in c1.definition and f"{name}(gate_proj x) and up_proj x" in c4.definition
    assert f"without the {readings[0].activation.label}" in c4.variants
    assert name == "silu" or "silu" not in (c1.definition + c4.definition + " ".join(c4.variants)).lower()


def test_the_nulls_of_silu_and_relu_differ_on_the_same_weights(tiny_checkpoint, tmp_path):
    """The control: had the null been SiLU's for both, the test above would hold for one only."""
    models = [with_activation(tiny_checkpoint, tmp_path / name, name) for name in ("silu", "relu")]
    one, other = (read(model, IDS)[0].layers[0].temperature.shuffled for model in models)
    assert abs(one - other) > 0.05 * one


@pytest.mark.parametrize("name", ["relu", "gelu_pytorch_tanh"])
def test_a_mixtures_experts_have_their_own_too(name):
    model = make("qwen2_moe", hidden_act=name)
    (reading,) = read(model, IDS)
    assert reading.activation.name == name
    mixture = make("qwen2_moe")
    (other,) = read(mixture, IDS)
    assert reading.layers[0].temperature.shuffled != pytest.approx(other.layers[0].temperature.shuffled, rel=0.02)
    alone = make("qwen3_moe", hidden_act=name, num_experts=1, num_experts_per_tok=1)
    with capture(alone, [("routed", 0)]) as seen:
        alone(IDS)
    gate, up = (seen["routed", 0] @ alone.model.layers[0].mlp.experts.gate_up_proj[0].T).chunk(2, dim=-1)
    shuffled = torch.stack([(OWN[name](gate) * up[order]).var(0).mean() for order in ORDERS])
    found = read(alone, IDS)[0].layers[0].temperature.shuffled
    assert found == pytest.approx(float(shuffled.mean()), rel=0.03)


def test_a_name_in_the_config_that_is_not_what_runs_is_not_printed(tiny):
    for block in tiny.model.model.layers:
        block.mlp.act_fn = nn.ReLU()
    assert tiny.model.config.hidden_act == "silu"
    assert read(tiny.model, IDS)[0].activation.name == "ReLU"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (None, "Qwen3MLP has no act_fn; expected a gated FFN"),
        (nn.Softmax(-1), "Softmax is no function of each gate alone; expected an element-wise activation"),
        (lambda x: x * torch.arange(x.shape[-1]), "<lambda> is no function of each gate alone"),
        (nn.GLU(), "GLU is no function of each gate alone"),
        (nn.Bilinear(2, 2, 2), "Bilinear is no function of each gate alone"),
    ],
)
def test_what_is_no_function_of_each_gate_is_refused_by_name(tiny, function, message):
    mlp = tiny.model.model.layers[1].mlp
    del mlp.act_fn
    if function is not None:
        object.__setattr__(mlp, "act_fn", function)
    with pytest.raises(ProbeError, match=message) as error:
        activation.of(tiny.model, mlp, "layers.1.mlp")
    assert str(error.value).startswith("layers.1.mlp: ") and "\n" not in str(error.value)


def test_an_ffn_that_computes_something_else_is_refused_and_not_measured(tiny):
    with edited(tiny.model, {("hidden", 2): lambda h: h * 1.01}), pytest.raises(ProbeError) as error:
        read(tiny.model, IDS)
    assert "layers.2.mlp: what down_proj receives is not act_fn(gate_proj x) · (up_proj x)" in str(error.value)


def test_gemmas_key_is_read():
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_activation="relu")))
    ffn = nn.Module()
    ffn.act_fn = nn.ReLU()
    assert activation.of(model, ffn, "layers.0.mlp").name == "relu"
