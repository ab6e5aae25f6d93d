"""A vindex of float8 weights equals the vindex of the numbers they stand for."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import vindex
from extract.checkpoint import open_checkpoint
from extract.layouts import find_layout
from tests.checkpoints import write_checkpoint
from tests.conftest import build_quietly
from tests.extract.test_build import contents
from tests.gguf_files import write_plain
from vindex.errors import CheckpointError
from vindex.manifest import Dequantised

HIDDEN, NEURONS = 200, 300  # no multiples of 128
FLOAT8 = torch.float8_e4m3fn


def is_scaled(name: str) -> bool:
    return "_proj.weight" in name


def quantise(matrix: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float8, scale (⌈R/r⌉, ⌈C/c⌉), the numbers they stand for), block by block as the definition says."""
    stored, numbers = torch.empty(matrix.shape, dtype=FLOAT8), torch.empty(matrix.shape)
    scale = torch.empty(-(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale[i, j] = matrix[block].float().abs().max() / 448
            stored[block] = (matrix[block].float() / scale[i, j]).to(FLOAT8)
            numbers[block] = stored[block].float() * scale[i, j]
    return stored, scale, numbers


def write_float8(directory, settings, suffix, rows, columns, *, scale_shape=None, edit=None):
    """A checkpoint whose projections are float8 with scales, and {name: float32} of what it stands for."""
    numbers = {}

    def to_float8(tensors):
        for name in list(tensors):
            numbers[name] = tensors[name].float()
            if is_scaled(name):
                r, c = rows or tensors[name].shape[0], columns or tensors[name].shape[1]
                tensors[name], scale, numbers[name] = quantise(tensors[name], r, c)
                tensors[name + suffix] = scale if scale_shape is None else scale.reshape(scale_shape)
        if edit:
            edit(tensors)

    write_checkpoint(
        directory, hidden=HIDDEN, neurons=NEURONS, edit=to_float8, config={"quantization_config": settings}
    )
    return directory, numbers


def fp8(**settings):
    """As the released Qwen3-*-FP8 checkpoints have it."""
    names = ["lm_head", "model.layers.0.input_layernorm"]
    released = {"activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": names, "quant_method": "fp8"}
    return released | {"weight_block_size": [128, 128]} | settings


def compressed(*weights):
    """As llm-compressor writes it."""
    groups = {
        f"group_{at}": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True} | one}
        for at, one in enumerate(weights)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


COMPRESSED = "compressed-tensors float8"
LAYOUTS = {
    "fp8": (fp8(), "_scale_inv", 128, 128, None, "fp8, 128×128 blocks"),
    "fp8, one scale": (fp8(weight_block_size=None), "_scale_inv", 0, 0, (), "fp8, one scale a matrix"),
    "tensor": (compressed({"strategy": "tensor"}), "_scale", 0, 0, (1,), f"{COMPRESSED}, one scale a matrix"),
    "channel": (compressed({"strategy": "channel"}), "_scale", 1, 0, None, f"{COMPRESSED}, one scale a row"),
    "group": (
        compressed({"strategy": "group", "group_size": 20}), "_scale", 1, 20, None, f"{COMPRESSED}, 1×20 blocks"
    ),
    "block": (
        compressed({"strategy": "block", "block_structure": [128, 128]}),
        "_scale", 128, 128, None, f"{COMPRESSED}, 128×128 blocks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_vindex_of_float8_equals_that_of_its_numbers(tmp_path, layout):
    settings, suffix, rows, columns, scale_shape, method = LAYOUTS[layout]
    source, numbers = write_float8(tmp_path / "m", settings, suffix, rows, columns, scale_shape=scale_shape)
    opened = open_checkpoint(str(source))
    assert set(opened.tensors) == set(numbers)
    for name, expected in numbers.items():
        assert opened.tensor(name).equal(expected), name
    gate = "model.layers.1.mlp.gate_proj.weight"
    assert opened.store.read(gate, 120, 140).equal(numbers[gate][120:140])  # across the edge of a block
    build_quietly(source, tmp_path / "q.vindex")
    build_quietly(
        write_plain(source, tmp_path / "plain", numbers, {"quantization_config": None}), tmp_path / "p.vindex"
    )
    assert contents(tmp_path / "q.vindex") == contents(tmp_path / "p.vindex")
    v = vindex.open(tmp_path / "q.vindex")
    assert v.manifest.dequantised == (Dequantised(method, "F8_E4M3", 4),) and v.index.quant == "none"


def test_released_names_hold(tmp_path):
    """The scale of Qwen3-*-FP8 is stored beside its weight, as NAME_scale_inv, float32 or bfloat16."""

    def to_bfloat16(tensors):
        for name in [n for n in tensors if n.endswith("_scale_inv")]:
            tensors[name] = tensors[name].bfloat16()

    source, _ = write_float8(tmp_path / "m", fp8(), "_scale_inv", 128, 128, edit=to_bfloat16)
    stored = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert stored[name].dtype == FLOAT8 and stored["model.layers.0.mlp.down_proj.weight_scale_inv"].shape == (2, 3)
    wide = stored[name + "_scale_inv"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert open_checkpoint(str(source)).tensor(name).equal(stored[name].float() * wide[:HIDDEN, :NEURONS])


def test_fused_experts_have_a_scale_each(tmp_path):
    random = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    experts = [quantise(torch.randn(200, 300, generator=random), 128, 128) for _ in range(3)]

    def add_experts(tensors):
        tensors[name] = torch.stack([stored for stored, _, _ in experts])
        tensors[f"{name}_scale_inv"] = torch.stack([scale for _, scale, _ in experts])

    source, _ = write_float8(tmp_path / "m", fp8(), "_scale_inv", 128, 128, edit=add_experts)
    opened = open_checkpoint(str(source))
    assert opened.info(name).shape == (3, 200, 300) and f"{name}_scale_inv" not in opened.tensors
    assert opened.tensor(name).equal(torch.stack([numbers for _, _, numbers in experts]))
    for index, (_, _, numbers) in enumerate(experts):
        assert opened.expert(name, index).equal(numbers)


def drop_scale(tensors):
    del tensors["model.layers.1.mlp.gate_proj.weight_scale_inv"]


def turn_scale(tensors):
    name = "model.layers.1.mlp.gate_proj.weight_scale_inv"
    tensors[name] = tensors[name].T.contiguous()


def scale_of_plain(tensors):
    tensors["model.norm.weight_scale_inv"] = torch.ones(1)


@pytest.mark.parametrize(
    "edit, message",
    [
        (drop_scale, "gate_proj.weight is stored as F8_E4M3 and its scale .*gate_proj.weight_scale_inv is missing"),
        (turn_scale, r"gate_proj.weight_scale_inv is F32 of shape \(2, 3\); expected \(3, 2\) in .*128×128 blocks"),
        (scale_of_plain, "model.norm.weight is stored as BF16 and yet has a model.norm.weight_scale_inv"),
    ],
)
def test_scales_that_do_not_fit_are_named(tmp_path, edit, message):
    source, _ = write_float8(tmp_path / "m", fp8(), "_scale_inv", 128, 128, edit=edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(source))
    assert "\n" not in str(caught.value)


SUPPORTED = (
    "supported are fp8 (float8 with weight_scale_inv), compressed-tensors with 8-bit float weights, and GGUF files"
)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quant_method": "gptq", "bits": 4}, f"quant_method is 'gptq' (4 bits), tensor a.qweight; {SUPPORTED}"),
        ({"quant_method": "awq", "bits": 4}, "quantization_config.quant_method is 'awq' (4 bits), tensor a.qweight;"),
        ({"quant_method": "bitsandbytes"}, "quantization_config.quant_method is 'bitsandbytes'"),
        ({"bits": 8}, "quantization_config.quant_method is None (8 bits)"),
        (fp8(weight_block_size=[128]), "weight_block_size is [128]; expected two positive integers"),
        (compressed({"num_bits": 4, "type": "int"}), f"config_groups.group_0.weights is 4-bit int; {SUPPORTED}"),
        (compressed({"strategy": "tensor"}, {"strategy": "channel"}), "config_groups holds 2 different schemes"),
        (compressed(), "config_groups holds 0 different schemes of weights"),
        (compressed({"strategy": "attn_head"}), "group_0.weights.strategy is 'attn_head'; supported are tensor, chan"),
        (compressed({"strategy": "block"}), "group_0.weights.strategy is 'block'; supported are tensor, channel"),
        (
            compressed({"strategy": "tensor"}) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "quantization_config.sparsity_config.format is 'sparse-24-bitmask'; only dense is supported",
        ),
    ],
)  # fmt: skip
def test_other_quantisations_are_refused_by_key(tmp_path, settings, message):
    def pack(tensors):
        tensors["a.qweight"] = torch.zeros(4, dtype=torch.int32)

    source = write_checkpoint(tmp_path / "m", config={"quantization_config": settings}, edit=pack)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        open_checkpoint(str(source))
    assert "\n" not in str(caught.value)


def test_float8_without_a_quantization_config_is_named(tmp_path):
    source, _ = write_float8(tmp_path / "m", fp8(), "_scale_inv", 128, 128)
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="gate_proj.weight is stored as F8_E4M3; only BF16, F16, F32 are supported"
    ):
        find_layout(open_checkpoint(str(source)))
