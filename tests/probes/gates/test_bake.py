"""A baked checkpoint is the original with the masked rows zeroed, byte for byte, as the published code does it."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from probes.gates.apply import gated
from probes.gates.files import read_indices, write_logits
from probes.gates.gates import Gates
from probes.live.hooks import same_bits
from probes.live.load import load
from probes.weights.bake import BAKED, bake
from tests.checkpoints import write_checkpoint
from tests.probes.gates.layout import LAYERS, NEURONS, write_published
from vindex.errors import CheckpointError, PatchError, TargetError

IDS = torch.arange(40).reshape(2, 20)

PUBLISHED_CODE = """
with open("neuron_indices.json") as f:
    knowledge_neurons = json.load(f) # {"layer_idx": [n_idx, ...]}
for layer_idx, neuron_idxs in knowledge_neurons.items():
    layer = model.model.layers[int(layer_idx)]
    with torch.no_grad():
        layer.mlp.gate_proj.weight[neuron_idxs, :] = 0
        layer.mlp.up_proj.weight[neuron_idxs, :] = 0
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Qwen3 of the published gates' size, 28 × 3072, but 16 wide, in bfloat16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    directory = tmp_path_factory.mktemp("wide") / "qwen3-28x3072"
    model.save_pretrained(directory)
    return directory


def test_the_published_usage_code_gives_the_same_logits(wide, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    write_published(tmp_path / "baseline")
    gates = Gates.read(tmp_path / "baseline")
    bake(wide, gates.keep(0.5), tmp_path / "baked")
    monkeypatch.chdir(tmp_path / "baseline")
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = model(IDS).logits
        exec(PUBLISHED_CODE, {"json": json, "torch": torch, "model": model})
        published = model(IDS).logits
        baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=torch.bfloat16)(IDS).logits
    assert same_bits(published, baked)  # tolerance: none needed
    assert float((published - plain).abs().max()) > 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hard_indices_and_baked_agree(tiny_checkpoint, gates, tmp_path, dtype):
    model = load(tiny_checkpoint, dtype=dtype, device="cpu").model
    write_logits(gates.logits, tmp_path / "gates")
    bake(tiny_checkpoint, gates.keep(0.5), tmp_path / "baked")
    with torch.no_grad():
        with gated(model, gates.below(0.5).factors()):
            masked = model(IDS).logits
        with gated(model, read_indices(tmp_path / "gates", (3, 48)).float()):
            by_indices = model(IDS).logits
        baked = load(tmp_path / "baked", dtype=dtype, device="cpu").model(IDS).logits
    assert same_bits(masked, by_indices)
    torch.testing.assert_close(masked, baked, rtol=0, atol=1e-6 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("scale_mode", ["none", "energy"])
def test_soft_gates_baked_are_soft_gates_applied(tiny_checkpoint, gates, tmp_path, scale_mode):
    """In bfloat16 either is about as far from what float32 gives."""
    soft = Gates(gates.logits, training={"options": {"scale_mode": scale_mode}})
    assert soft.bake(tiny_checkpoint, tmp_path / "baked") == 0
    logits = {}
    for dtype in ("float32", "bfloat16"):
        model, baked = (load(at, dtype=dtype, device="cpu").model for at in (tiny_checkpoint, tmp_path / "baked"))
        with torch.no_grad():
            logits[dtype, "plain"], logits[dtype, "baked"] = model(IDS).logits.float(), baked(IDS).logits.float()
            with soft.applied(SimpleNamespace(model=model)):
                logits[dtype, "applied"] = model(IDS).logits.float()
    expected = logits["float32", "applied"]
    assert float((expected - logits["float32", "plain"]).abs().max()) > 0.05
    torch.testing.assert_close(logits["float32", "baked"], expected, rtol=0, atol=1e-5)
    off = {how: float((logits["bfloat16", how] - expected).abs().mean()) for how in ("baked", "applied")}
    assert off["baked"] < 1.5 * off["applied"]
    before, after = (load_file(at / "model.safetensors") for at in (tiny_checkpoint, tmp_path / "baked"))
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)}
    note = json.loads((tmp_path / "baked" / BAKED).read_text())
    assert note == {"checkpoint": note["checkpoint"], "gates": "gates", "mask": "soft", "scale_mode": scale_mode}


def test_rows_and_biases_are_scaled_in_the_stored_dtype_and_rounded_once(tmp_path):
    def narrow(tensors):
        tensors["model.layers.0.mlp.up_proj.bias"] = torch.ones(24)
        for name in list(tensors):
            tensors[name] = tensors[name].bfloat16()

    source = write_checkpoint(tmp_path / "source", layers=1, edit=narrow)
    factors = torch.linspace(0, 1.5, 24)[None].clone()
    factors[0, 5] = 1
    assert bake(source, factors, tmp_path / "baked") == 1
    before, after = (load_file(at / "model.safetensors") for at in (source, tmp_path / "baked"))
    for name in ("weight", "bias"):
        old, new = (tensors[f"model.layers.0.mlp.up_proj.{name}"] for tensors in (before, after))
        wanted = (old.float() * factors[0].view(-1, *[1] * (old.ndim - 1))).bfloat16()
        assert torch.equal(new, wanted) and torch.equal(new[5], old[5])
    gate = after["model.layers.0.mlp.gate_proj.weight"]
    assert bool((gate[0] == 0).all()) and torch.equal(gate[1:], before["model.layers.0.mlp.gate_proj.weight"][1:])


def test_soft_gates_scale_floats_only(tmp_path):
    def small(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    source = write_checkpoint(tmp_path / "source", layers=1, edit=small)
    with pytest.raises(PatchError, match="stored as F8_E4M3, and soft gates scale only F32, BF16, F16; bake a mask"):
        bake(source, torch.full((1, 24), 0.5), tmp_path / "baked")
    assert bake(source, torch.arange(24)[None] > 3, tmp_path / "masked") == 4


@pytest.mark.parametrize("shards", [1, 3])
def test_only_the_masked_rows_change_and_all_else_is_byte_identical(tmp_path, shards):
    source = write_checkpoint(tmp_path / "source", layers=3, shards=shards)
    (source / "pytorch_model.bin").write_bytes(b"unmasked weights")
    keep = torch.rand(3, 24, generator=torch.Generator().manual_seed(0)) > 0.4
    count = bake(source, keep, tmp_path / "baked", note={"threshold": 0.5})
    assert count == int((~keep).sum())
    names = {file.name for file in (tmp_path / "baked").iterdir()}
    assert names == {file.name for file in source.iterdir()} - {"pytorch_model.bin"} | {BAKED}
    for file in source.glob("*.safetensors"):
        old, new = file.read_bytes(), (tmp_path / "baked" / file.name).read_bytes()
        header = 8 + int.from_bytes(old[:8], "little")
        assert old[:header] == new[:header] and len(old) == len(new)
        for name, before in load_file(file).items():
            after = load_file(tmp_path / "baked" / file.name)[name]
            if ".mlp.gate_proj." in name or ".mlp.up_proj." in name:
                mask = keep[int(name.split(".")[2])]
                assert bool((after[~mask] == 0).all()) and same_bits(after[mask], before[mask])
            else:
                assert same_bits(after, before), name
    for name in ("config.json", "tokenizer.json", "README.md"):
        assert (tmp_path / "baked" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "baked" / BAKED).read_text()) == {"threshold": 0.5}


def test_biases_of_masked_rows_are_zeroed_too(tmp_path):
    def with_bias(tensors):
        tensors["model.layers.0.mlp.gate_proj.bias"] = torch.ones(24)
        tensors["model.layers.0.mlp.up_proj.bias"] = torch.ones(24)

    source = write_checkpoint(tmp_path / "source", layers=1, edit=with_bias)
    keep = torch.arange(24)[None] % 2 == 0
    bake(source, keep, tmp_path / "baked")
    bias = load_file(tmp_path / "baked" / "model.safetensors")["model.layers.0.mlp.up_proj.bias"]
    assert torch.equal(bias, keep[0].float())


def test_only_the_text_tower_is_masked_and_what_is_not_the_model_stays_behind(tmp_path):
    def with_others(tensors):
        for name in ("mtp.layers.0.mlp.gate_proj.weight", "model.visual.layers.0.mlp.up_proj.weight"):
            tensors[name] = torch.ones(24, 16)

    source = write_checkpoint(tmp_path / "source", layers=2, edit=with_others)
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    for stale in ("model-1.safetensors", "adapter_model.safetensors"):
        shutil.copy(source / "model.safetensors", source / stale)
    assert bake(source, torch.zeros(2, 24, dtype=torch.bool), tmp_path / "baked") == 48
    before, after = (load_file(at / "model.safetensors") for at in (source, tmp_path / "baked"))
    masked = {name for name in before if not same_bits(before[name], after[name])}
    assert masked == {f"model.layers.{layer}.mlp.{side}_proj.weight" for layer in (0, 1) for side in ("gate", "up")}
    left = {file.name for file in source.iterdir()} - {file.name for file in (tmp_path / "baked").iterdir()}
    assert left == {
        "model-1.safetensors", "adapter_model.safetensors", "adapter_config.json", "model.safetensors.index.json"
    }  # fmt: skip


def test_a_baked_checkpoint_is_replaced_when_forced_and_nothing_else(tiny_checkpoint, tmp_path):
    target, all_on = tmp_path / "baked", torch.ones(3, 48, dtype=torch.bool)
    bake(tiny_checkpoint, all_on, target)
    with pytest.raises(TargetError, match="already exists; choose another place, or replace it with --force"):
        bake(tiny_checkpoint, ~all_on, target)
    bake(tiny_checkpoint, ~all_on, target, note={"mask": "all"}, force=True)
    assert json.loads((target / BAKED).read_text()) == {"mask": "all"}
    with pytest.raises(TargetError, match="baked is, or holds, .*baked, which is being read"):
        bake(target, all_on, target, force=True)
    (target / "results").mkdir()
    with pytest.raises(TargetError, match="holds results, which this tool did not write, so it is not replaced"):
        bake(tiny_checkpoint, all_on, target, force=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(TargetError, match="is nothing that this tool made"):
        bake(tiny_checkpoint, all_on, tmp_path / "taken", force=True)
    assert (tmp_path / "taken" / "mine").exists()


def test_an_interrupted_bake_leaves_nothing(tiny_checkpoint, tmp_path):
    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bake(tiny_checkpoint, torch.ones(3, 48, dtype=torch.bool), tmp_path / "out", advance=stop)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_baked_is_told_in_one_line(tiny_checkpoint, tmp_path):
    keep = torch.ones(3, 48, dtype=torch.bool)
    with pytest.raises(PatchError, match="3 layers × 48 neurons, the gates are 2 × 48"):
        bake(tiny_checkpoint, keep[:2], tmp_path / "o")
    with pytest.raises(CheckpointError, match="config.json is missing"):
        bake(tmp_path, keep, tmp_path / "o")
    moe = shutil.copytree(tiny_checkpoint, tmp_path / "moe")
    (moe / "config.json").write_text('{"num_experts": 8}')
    with pytest.raises(
        CheckpointError, match=r"mixture of experts \(8 experts\); gates belong to the neurons of dense"
    ):
        bake(moe, keep, tmp_path / "o")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no model.safetensors found"):
        bake(bare, keep, tmp_path / "o")
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, bare / "model.safetensors")
    with pytest.raises(CheckpointError, match="0 gate_proj and up_proj weights for 0 layers"):
        bake(bare, keep, tmp_path / "o")
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(TargetError, match="cannot be written to"):
        bake(tiny_checkpoint, keep, blocked / "o")


def test_nothing_masked_changes_nothing(tiny_checkpoint, tmp_path):
    bake(tiny_checkpoint, Gates(torch.full((3, 48), 5.0)).keep(0.5), tmp_path / "same")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (
        tiny_checkpoint / "model.safetensors"
    ).read_bytes()
