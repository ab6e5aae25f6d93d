"""The plan counts what a build does, from config.json alone."""

from __future__ import annotations

import json

import pytest
from gguf import GGMLQuantizationType
from typer.testing import CliRunner

import extract
import vindex
from extract.estimate import hours, seconds_of, shapes_of, work_of
from tests.checkpoints import write_checkpoint
from tests.gguf_files import write_gguf
from vindex.__main__ import app
from vindex.errors import CheckpointError

LARGE = {  # Qwen3-235B-A22B
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "vocab_size": 151936,
    "dtype": "bfloat16",
}


def test_a_mixture_has_a_block_for_each_expert_and_side():
    gate, down, gate_tokens, down_tokens = work_of(shapes_of(LARGE, "m"), None)
    assert gate.blocks == down.blocks == 94 * 128 and gate.features == 32
    assert gate.read + down.read == 2 * 94 * 128 * 1536 * 4096 * 2
    directions = 94 * 128 * 32
    assert down_tokens.flop == 2 * 4096 * 151936 * (directions + 256)
    assert gate_tokens.flop == down_tokens.flop + 2 * 4096 * 4096 * directions
    assert gate_tokens.blocks * gate_tokens.features >= 94 * 128 * 32 > (gate_tokens.blocks - 1) * gate_tokens.features


def test_dense_layers_and_shared_experts_of_a_mixture_are_counted():
    config = LARGE | {"mlp_only_layers": [0, 1], "shared_expert_intermediate_size": 512}
    assert shapes_of({"text_config": config}, "m").ffns == {1536: 92 * 128, 512: 92, 12288: 2}


@pytest.mark.parametrize("size", ["checkpoint", "mixture"])
def test_what_is_planned_is_what_is_built(size, request):
    source = request.getfixturevalue(size)
    v = vindex.open(request.getfixturevalue({"checkpoint": "built", "mixture": "built_mixture"}[size]))
    kept = v.manifest.options.features
    work = work_of(shapes_of(json.loads((source / "config.json").read_text()), "m"), kept)
    assert sum(of.blocks for of in work if "proj" in of.kind) == len(v.manifest.certificates)
    small = {"norms.bin", "router_weights.bin", "shared_expert_gates.bin"}  # which no block writes
    written = {file.name: file.stat().st_size for file in v.path.glob("*.bin") if file.name not in small}
    assert sum(of.written for of in work) == sum(written.values()) and "gate_peaks.bin" in written


def test_a_missing_size_is_named():
    with pytest.raises(CheckpointError, match="m: config.json hidden_size: expected a positive integer, got None"):
        shapes_of({key: value for key, value in LARGE.items() if key != "hidden_size"}, "m")


def test_hours_are_waves_of_measured_blocks():
    work = work_of(shapes_of(LARGE | {"hidden_size": 64, "moe_intermediate_size": 48, "vocab_size": 500}, "m"), 8)
    assert all(seconds_of(of, 1) > 0 for of in work)
    assert hours(work, [3.0, 3.0, 60.0, 60.0], 1) == pytest.approx((2 * 12032 * 3 + 2 * 6 * 60) / 3600)
    assert hours(work, [3.0, 3.0, 60.0, 60.0], 8) == pytest.approx((2 * 1504 * 3 + 2 * 60) / 3600)


def test_the_command(checkpoint, tmp_path):
    shown = CliRunner().invoke(app, ["plan", str(checkpoint), "--features", "8", "--measure"])
    assert (
        shown.exit_code == 0 and "Wall time by workers, each 1 thread" in shown.output and "gate tokens" in shown.output
    )
    record = json.loads(
        CliRunner().invoke(app, ["plan", str(checkpoint / "config.json"), "--features", "8", "--json"]).output
    )
    assert [of["kind"] for of in record["work"]] == ["gate_proj", "down_proj", "gate tokens", "down tokens"]
    (tmp_path / "config.json").write_text("[]")
    assert "does not hold a JSON object" in str(CliRunner().invoke(app, ["plan", str(tmp_path)]).exception)
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in str(CliRunner().invoke(app, ["plan", str(tmp_path)]).exception)
    nowhere = CliRunner().invoke(app, ["plan", str(tmp_path / "none")]).exception
    assert "no such directory here and no such model on the Hub" in str(nowhere)


def test_a_gguf_is_planned_from_its_header(tmp_path):
    """The config of a quantised model stands in its metadata, and its weights take less than a byte each."""
    (tmp_path / "g").mkdir()
    source = write_checkpoint(tmp_path / "m", hidden=256, neurons=512)
    file = tmp_path / "g" / "m-Q4_0.gguf"
    write_gguf(source, file, lambda name: GGMLQuantizationType.Q4_0)
    found, plain = extract.plan(file), extract.plan(source)
    assert found.record() == extract.plan(tmp_path / "g").record() and "m-Q4_0.gguf" in repr(found)
    assert [of.blocks for of in found.work] == [of.blocks for of in plain.work]
    assert found.work[0].read < 0.3 * plain.work[0].shape[0] * plain.work[0].shape[1] * 4 * plain.work[0].blocks
