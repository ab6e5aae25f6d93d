"""What a build could not write so that its reader opens it is refused before the work, in one line and at once."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
import torch
from typer.testing import CliRunner

from extract.checkpoint import open_checkpoint
from extract.estimate import shapes_of, work_of
from extract.layouts import find_layout
from tests.checkpoints import nest, write_checkpoint, write_mixture
from tests.conftest import build_quietly
from vindex.__main__ import app
from vindex.errors import CheckpointError, FormatError, NumericError, QueryError, VindexError
from vindex.options import BuildOptions

WRONG = {
    "num_hidden_layers": (10**9, "expected at most 16384, got 1000000000"),
    "hidden_size": ([16], "expected a positive integer, got [16]"),
    "intermediate_size": (24.0, "expected a positive integer, got 24.0"),
    "vocab_size": (0, "expected a positive integer, got 0"),
    "num_attention_heads": ("2", "expected a positive integer, got '2'"),
    "num_key_value_heads": (-1, "expected a positive integer, got -1"),
    "head_dim": (True, "expected a positive integer, got True"),
    "rope_parameters": ([], "expected an object with a number as rope_theta, got []"),
    "rope_scaling": ({"rope_theta": "1"}, "expected an object with a number as rope_theta, got {'rope_theta': '1'}"),
    "rope_theta": ("1e4", "expected a number, got '1e4'"),
    "text_config": ("tower", "expected an object, got 'tower'"),
    "quantization_config": (["fp8"], "expected an object, got ['fp8']"),
    "tie_word_embeddings": ("yes", "expected true or false, got 'yes'"),
    "model_type": (["qwen3"], "expected a string, got ['qwen3']"),
    "layer_types": ("full", "expected a list of names, got 'full'"),
    "dtype": (16, "expected a string, got 16"),
}


def opened(directory):
    return find_layout(open_checkpoint(str(directory)))


@pytest.mark.parametrize("key", WRONG)
@pytest.mark.parametrize("nested", [False, True])
def test_a_value_of_the_wrong_kind_is_named(tmp_path, key, nested):
    value, message = WRONG[key]
    directory = write_checkpoint(tmp_path / "m", config={key: value})
    if nested and key not in ("model_type", "text_config"):
        nest(directory, "qwen3_vl", "text_config")
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=re.escape(f"m: config.json {key}: {message}")):
        opened(directory)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "config, message",
    [
        ({"mlp_only_layers": ["0"]}, "config.json mlp_only_layers: expected a list of layers, got ['0']"),
        ({"mlp_only_layers": [0, 1, 2]}, "mlp_only_layers and decoder_sparse_step leave no layer with experts"),
        ({"decoder_sparse_step": 4}, "mlp_only_layers and decoder_sparse_step leave no layer with experts"),
        ({"num_experts": 0}, "config.json num_experts: expected a positive integer, got 0"),
        ({"num_experts": 10**9}, "config.json num_experts: expected at most 65536, got 1000000000"),
        ({"num_experts_per_tok": 4}, "config.json num_experts_per_tok: expected 1 to 3, got 4"),
        ({"num_experts_per_tok": 0}, "config.json num_experts_per_tok: expected 1 to 3, got 0"),
        ({"shared_expert_intermediate_size": 9}, "has shape (10, 16), and config.json says (9, 16)"),
        ({"shared_expert_intermediate_size": 0}, "has shape (10, 16), and config.json says (0, 16)"),
    ],
)
def test_a_mixture_that_cannot_be(tmp_path, config, message):
    directory = write_mixture(tmp_path / "m", config=config)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        opened(directory)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "fp8", "weight_block_size": 128},
        {"quant_method": "compressed-tensors", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "config_groups": {"a": "b"}},
        {"quant_method": "compressed-tensors", "sparsity_config": "dense"},
    ],
)
def test_quantisation_settings_of_the_wrong_kind(tmp_path, settings):
    def to_float8(tensors):  # without a quantised tensor the settings say nothing
        tensors["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"].to(
            torch.float8_e4m3fn
        )

    directory = write_checkpoint(tmp_path / "m", config={"quantization_config": settings}, edit=to_float8)
    with pytest.raises(CheckpointError, match="quantization_config holds a value of the wrong type .*; supported are"):
        opened(directory)


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def renamed(name, other):
    return lambda tensors: tensors.update({other: tensors.pop(name)})


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"edit": renamed("model.layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.q_nor-.weight")},
            "1.self",
        ),
        ({"edit": without("model.layers.0.self_attn.k_norm.weight"), "layers": 1}, "0.self_attn.k_norm"),
        ({"edit": without("model.layers.1.input_layernorm.weight")}, "1.input_layernorm"),
        ({"edit": without("model.norm.weight")}, "tensor model.norm.weight"),
        (
            {
                "model_type": "llama",
                "edit": lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8).bfloat16()}),
            },
            "1.self_attn.q_norm",
        ),
        (
            {
                "model_type": "qwen3_5",
                "edit": without("model.layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight"),
                "config": {"layer_types": ["full_attention", "linear_attention"]},
            },
            "1.linear_attn.norm",
        ),
        (
            {
                "model_type": "qwen3_5",
                "edit": lambda t: t.update({"model.layers.1.linear_attn.in_proj.weight": torch.ones(8).bfloat16()}),
            },
            "1.linear_attn.norm",
        ),
        ({"model_type": "qwen3_5", "config": {"full_attention_interval": 2}}, "0.linear_attn.norm"),
    ],
)
def test_a_norm_that_the_layers_of_its_kind_have_is_missing_not_optional(tmp_path, options, message):
    directory = write_checkpoint(tmp_path / "m", **options)
    with pytest.raises(CheckpointError, match=rf"{message}.* is missing; the checkpoint is incomplete"):
        opened(directory)


@pytest.mark.parametrize(
    "shape, message",
    [((0,), r"has shape \(0,\); expected one number or more"), ((4,), r"shape \(8,\), and config.json says \(4,\)")],
)
def test_norms_of_no_or_another_length(tmp_path, shape, message):
    norm = {"model.layers.0.self_attn.q_norm.weight": torch.ones(shape).bfloat16()}
    directory = write_checkpoint(tmp_path / "m", edit=lambda tensors: tensors.update(norm))
    with pytest.raises(CheckpointError, match=message):
        opened(directory)


def test_layer_types_of_another_number_of_layers(tmp_path):
    directory = write_checkpoint(tmp_path / "m", model_type="qwen3_5", config={"layer_types": ["full_attention"]})
    with pytest.raises(CheckpointError, match="layer_types has 1 entries and num_hidden_layers is 2"):
        opened(directory)


@pytest.mark.parametrize("layers", [10**12, 10**6])
def test_plan_answers_at_once(tmp_path, checkpoint, layers):
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers, "num_experts": 8}))
    started = time.monotonic()
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "config.json")])
    assert time.monotonic() - started < 5
    assert isinstance(shown.exception, CheckpointError)
    assert f"num_hidden_layers: expected at most 16384, got {layers}" in str(shown.exception)


def test_plan_asks_for_no_more_directions_than_there_are(checkpoint):
    shapes = shapes_of(json.loads((checkpoint / "config.json").read_text()), "m")
    with pytest.raises(NumericError, match="at most 16 directions, and 17 were asked for; use --features 16"):
        work_of(shapes, 17)


def test_plan_of_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    shown = CliRunner().invoke(app, ["plan", str(tmp_path)])
    assert "it is a FIFO" in str(shown.exception) and isinstance(shown.exception, CheckpointError)


@pytest.mark.parametrize(
    "options, message",
    [
        *(({"tolerance": value}, "--tolerance .*: expected a number above 0") for value in (0, -1, float("inf"))),
        ({"tolerance": float("nan")}, "--tolerance nan: expected a number above 0"),
        ({"features": 0}, "--features 0: expected a positive integer"),
        ({"features": 2.0}, "--features 2.0: expected a positive integer"),
        ({"threads": 100_000}, "--threads 100000: expected an integer from 1 to 1024"),
        ({"threads": True}, "--threads True: expected an integer from 1"),
        ({"device": "tpu"}, "--device tpu: expected cpu, cuda or cuda:N"),
        ({"embeddings": 1}, "--embeddings 1: expected true or false"),
    ],
)
def test_options_with_which_no_build_makes_sense(options, message):
    with pytest.raises(QueryError, match=message):
        BuildOptions(**options)


@pytest.mark.parametrize("epoch", ["soon", "-1", "1e9", "253402300800", "9" * 30, " 1"])
def test_an_epoch_that_is_no_time(checkpoint, tmp_path, monkeypatch, epoch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with pytest.raises(QueryError, match="SOURCE_DATE_EPOCH is .*: expected whole seconds since 1970, at most 2534023"):
        build_quietly(checkpoint, tmp_path / "out.vindex")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "added, message",
    [
        ({"content": "<pad>", "id": -1}, "'<pad>' has id -1, not an integer"),
        ({"content": "<pad>", "id": 10**12}, "'<pad>' has id 1000000000000, not an integer"),
    ],
)
def test_a_tokenizer_of_another_model(tmp_path, added, message):
    directory = write_checkpoint(tmp_path / "m")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(added)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(VindexError, match=message):
        build_quietly(directory, tmp_path / "out.vindex")
    assert not (tmp_path / "out.vindex.partial").exists()


def test_a_licence_or_name_that_the_reader_would_refuse(tmp_path):
    directory = write_checkpoint(tmp_path / "m")
    (directory / "README.md").write_text(f"---\nlicense: {'x' * 10_001}\n---\n")
    with pytest.raises(FormatError, match="manifest.json: source.licence: expected a string or null, got 'xxx"):
        build_quietly(directory, tmp_path / "out.vindex")
    odd = write_checkpoint(tmp_path / os.fsdecode(b"m\xff"))
    with pytest.raises(FormatError, match="a name in it cannot be written as JSON .*; rename the checkpoint"):
        build_quietly(odd, tmp_path / "out.vindex")
    assert not (tmp_path / "out.vindex.partial").exists()


def test_json_and_text_of_a_checkpoint_are_bounded(tmp_path):
    directory = write_checkpoint(tmp_path / "m")
    os.truncate(directory / "README.md", 1 << 40)
    with pytest.raises(CheckpointError, match="README.md: has 1,099,511,627,776 bytes, more than .* of them holes"):
        build_quietly(directory, tmp_path / "out.vindex")
    os.truncate(directory / "config.json", 1 << 40)
    with pytest.raises(CheckpointError, match="m: config.json: has 1,099,511,627,776 bytes"):
        opened(directory)
