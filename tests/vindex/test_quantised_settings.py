"""Settings of a quantisation beside tensors that bear them out, and beside such that do not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from extract.checkpoint import open_checkpoint
from probes.live.load import load
from probes.live.sites import weight
from tests.checkpoints import write_checkpoint
from tests.vindex.test_weights import GATE, SINGLE, both_refuse, change, configure
from vindex.errors import CheckpointError

LEFT_OVER = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "compressed-tensors"},
]


@pytest.mark.parametrize("settings", LEFT_OVER, ids=lambda settings: settings["quant_method"])
def test_settings_of_a_quantisation_that_is_not_there_are_read_over(model, settings):
    own = load_file(model / SINGLE)
    configure(model, quantization_config=settings)
    loaded, opened = load(model, device="cpu", dtype="float32"), open_checkpoint(str(model))
    assert torch.equal(weight(loaded.model, "gate_proj", 1), own[GATE])
    assert torch.equal(opened.tensor(GATE), own[GATE])
    assert loaded.notes == opened.notes
    assert loaded.notes == ("plain numbers: config.json has quantization_config, and no tensor is quantised",)


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_a_scale_that_no_settings_mention_is_not_applied_and_told(model, suffix):
    own = change(model, lambda tensors: tensors | {GATE + suffix: torch.tensor([2.0])})
    loaded, opened = load(model, device="cpu", dtype="float32"), open_checkpoint(str(model))
    assert torch.equal(weight(loaded.model, "gate_proj", 1), own[GATE].float())
    assert torch.equal(opened.tensor(GATE), own[GATE].float())
    said = f"{GATE}{suffix} is not applied, as no settings say so: transformers does the same"
    assert loaded.notes == opened.notes == (said,)


def test_settings_that_are_no_object_are_refused(model):
    configure(model, quantization_config=[1])
    both_refuse(model, r"config.json quantization_config: expected an object, got \[1\]")


def test_float8_that_transformers_would_read_without_its_scales_is_refused_live(model):
    def to_float8(tensors):
        return tensors | {GATE: tensors[GATE].to(torch.float8_e4m3fn), f"{GATE}_scale": torch.tensor(2.0)}

    own = change(model, to_float8)
    with pytest.raises(
        CheckpointError, match="is stored as F8_E4M3, and how it was quantised is said nowhere; use the"
    ):
        load(model, device="cpu")
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(
        CheckpointError, match="is said in hf_quant_config.json quantization, where transformers does not"
    ):
        load(model, device="cpu")
    opened = open_checkpoint(str(model))
    assert torch.equal(opened.tensor(GATE), 2.0 * own[GATE].float())
    assert [file.name for file in opened.fingerprint(1, lambda count: None)].count("hf_quant_config.json") == 1


def test_float8_settings_of_the_text_tower_are_found(tmp_path):
    def to_float8(tensors):
        for name in [name for name in tensors if "_proj" in name]:
            rows, columns = tensors[name].shape
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full((-(-rows // 16), -(-columns // 16)), 0.5)

    directory = write_checkpoint(tmp_path / "m", edit=to_float8)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "text_config": config}))
    opened = open_checkpoint(str(directory))
    stored = load_file(directory / SINGLE)
    assert torch.equal(opened.tensor(GATE), 0.5 * stored[GATE].float())
