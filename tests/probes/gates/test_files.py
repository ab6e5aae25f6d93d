"""The published layout is read, checked and written; what is not gates is refused in one line."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from probes.gates.files import read_indices, read_thresholds, write_logits
from probes.gates.gates import Gates
from probes.gates.stats import read_stats
from tests.probes.gates.layout import CARD, LAYERS, NEURONS, PREFIX, THRESHOLDS, write_published
from vindex.errors import NumericError, PatchError, ProbeError


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published") / "baseline"
    return directory, write_published(directory)


def test_the_published_baseline_loads_and_its_card_reproduces_to_three_decimals(published):
    directory, logits = published
    assert torch.equal(Gates.read(directory).logits, logits)
    stats = read_stats(directory)
    assert (stats.layers, stats.neurons, stats.gates) == (LAYERS, NEURONS, CARD["gates"])
    for name in ("mean", "std", "min", "max"):
        assert round(getattr(stats, name), 3) == CARD[name], name
    assert [p.threshold for p in stats.points] == list(THRESHOLDS)
    assert [round(p.off_fraction, 3) for p in stats.points] == list(THRESHOLDS.values())
    assert len(stats.claims) == 10 and all(claim.holds for claim in stats.claims)
    assert stats.indices == "below"


def test_a_stated_figure_that_is_wrong_is_found(published, tmp_path):
    directory = shutil.copytree(published[0], tmp_path / "wrong")
    points = [{"threshold": 0.432, "off_fraction": 0.05}, {"threshold": 0.478, "off_fraction": 0.5}, "0.5", {}]
    stated = {"mean": 0.55, "std": 0.044, "max": "large", "selected_thresholds": points}
    (directory / "gate_stats.json").write_text(json.dumps(stated))
    stats = read_stats(directory)
    claims = {claim.name: claim.holds for claim in stats.claims}
    assert claims == {"mean": False, "std": True, "off-fraction at 0.432": True, "off-fraction at 0.478": False}
    assert repr(stats) == "<wrong: 86,016 gates, 4 figures stated, 2 wrong>"
    assert len(stats.rows()) == 5 and json.loads(json.dumps(stats.record()))["claims"][0]["holds"] is False


@pytest.mark.parametrize("direction", ["below", "above", "neither"])
def test_the_direction_of_neuron_indices_is_found_out(gates, tmp_path, direction):
    write_logits(gates.logits, tmp_path)
    listed = {"below": gates.values < 0.5, "above": gates.values > 0.5, "neither": gates.values < 0.4}[direction]
    indices = {str(i): row.nonzero().flatten().tolist() for i, row in enumerate(listed)}
    (tmp_path / "neuron_indices.json").write_text(json.dumps(indices))
    assert read_stats(tmp_path).indices == direction


def test_what_is_written_reads_back_in_both_formats_and_under_both_threshold_names(gates, tmp_path):
    write_logits(gates.logits, tmp_path)
    state = torch.load(tmp_path / "lambda_logits.pt", weights_only=True)
    assert list(state)[1] == f"{PREFIX}layers.1.mlp.lambda_logits" and state[list(state)[1]].shape == (48,)
    assert torch.equal(load_file(tmp_path / "lambda_logits.safetensors")[list(state)[2]], gates.logits[2])
    for name in ("lambda_logits.pt", "lambda_logits.safetensors"):
        assert torch.equal(Gates.read(tmp_path / name).logits, gates.logits)
    assert read_thresholds(tmp_path) == gates.selected_thresholds()
    (tmp_path / "selected_thresholds.txt").rename(tmp_path / "thresholds.txt")
    assert read_thresholds(tmp_path) == gates.selected_thresholds()
    assert torch.equal(read_indices(tmp_path, (3, 48)), gates.keep(0.5))
    stats = read_stats(tmp_path)
    assert len(stats.claims) == 10 and all(claim.holds for claim in stats.claims) and stats.indices == "below"
    offs = [p.off_fraction for p in stats.points]
    assert offs == pytest.approx([0.05, 0.25, 0.5, 0.75, 0.95], abs=1 / gates.logits.numel())


def test_the_published_code_can_read_our_indices(gates, tmp_path):
    write_logits(gates.logits, tmp_path)
    for layer, neurons in json.loads((tmp_path / "neuron_indices.json").read_text()).items():
        assert all(gates.values[int(layer), neuron] < 0.5 for neuron in neurons)  # every key is a layer
    assert json.loads((tmp_path / "gate_stats.json").read_text())["direction"] == "below"


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "model.module.model.", "base_model.model.model."])
def test_any_key_prefix_is_read(gates, tmp_path, prefix):
    write_logits(gates.logits, tmp_path, prefix=prefix)
    assert torch.equal(Gates.read(tmp_path).logits, gates.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gates_are_float32_whatever_is_stored(tmp_path, dtype):
    torch.save({"layers.0.mlp.lambda_logits": torch.ones(1, 8, dtype=dtype)}, tmp_path / "g.pt")
    assert Gates.read(tmp_path / "g.pt").logits.dtype == torch.float32


class Evil:
    def __reduce__(self):
        return print, ("executed",)


GOOD = {"layers.0.mlp.lambda_logits": torch.zeros(4)}


@pytest.mark.parametrize(
    "state, message",
    [
        (Evil(), "holds something that is not a tensor; refused"),
        ({**GOOD, "x": Evil()}, "holds something that is not a tensor; refused"),
        ([torch.zeros(4)], "holds a list; expected a state dict"),
        ({**GOOD, "step": 3}, "'step' is a int; expected tensors only"),
        ({"model.embed_tokens.weight": torch.zeros(4)}, "expected only keys ending in layers.<i>.mlp.lambda_logits"),
        ({}, "no tensors; expected keys"),
        (
            {"layers.0.mlp.lambda_logits": torch.zeros(4), "layers.2.mlp.lambda_logits": torch.zeros(4)},
            "layer 1 is missing of 0 to 2",
        ),
        ({**GOOD, "m.layers.0.mlp.lambda_logits": torch.zeros(4)}, "two keys for layer 0"),
        ({**GOOD, "layers.1.mlp.lambda_logits": torch.zeros(5)}, "layer 1 has 5 neurons, layer 0 4"),
        ({"layers.0.mlp.lambda_logits": torch.zeros(2, 2)}, "expected one float per neuron"),
        ({"layers.0.mlp.lambda_logits": torch.zeros(4).long()}, "expected one float per neuron"),
    ],
)
def test_a_pt_with_anything_but_gates_is_refused(tmp_path, capsys, state, message):
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(PatchError, match=message) as error:
        Gates.read(tmp_path / "bad.pt")
    assert "\n" not in str(error.value) and "executed" not in capsys.readouterr().out


def test_a_plain_pickle_is_refused(tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(PatchError, match="bad.pt: damaged, or holds something"):
        Gates.read(tmp_path / "bad.pt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(tmp_path, bad):
    logits = torch.zeros(2, 4)
    logits[1, 3] = bad
    save_file({f"layers.{i}.mlp.lambda_logits": logits[i].clone() for i in range(2)}, tmp_path / "g.safetensors")
    with pytest.raises(NumericError, match="1 not finite, first at layer 1 neuron 3"):
        Gates.read(tmp_path / "g.safetensors")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("lambda_logits.pt", b"garbage", "damaged, or holds something"),
        ("lambda_logits.safetensors", b"garbage", "lambda_logits.safetensors: header: not valid JSON"),
        ("selected_thresholds.txt", b"0.4, half", "expected comma-separated numbers"),
        ("neuron_indices.json", b'{"0": 5}', "expected {.layer.: .neuron, ….}"),
        ("neuron_indices.json", b'{"7": [1]}', "name layer 7; there are layers 0 to 2"),
        ("neuron_indices.json", b'{"0": [48]}', "name neuron 48; there are 0 to 47"),
        ("gate_stats.json", b"{", "gate_stats.json: not valid JSON"),
    ],
)
def test_damaged_files_are_named(gates, tmp_path, name, content, message):
    write_logits(gates.logits, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PatchError, match=message):
        read_stats(tmp_path)


def test_missing_and_contradicting_files_are_named(gates, tmp_path):
    with pytest.raises(PatchError, match=r"neither lambda_logits.pt nor lambda_logits.safetensors"):
        Gates.read(tmp_path)
    with pytest.raises(PatchError, match="no such file or directory"):
        Gates.read(tmp_path / "nowhere")
    with pytest.raises(PatchError, match="neuron_indices.json: cannot be read .No such file"):
        read_indices(tmp_path, (3, 48))
    write_logits(gates.logits, tmp_path)
    save_file({"layers.0.mlp.lambda_logits": torch.zeros(4)}, tmp_path / "lambda_logits.safetensors")
    with pytest.raises(PatchError, match="differ; remove the one that is out of date"):
        Gates.read(tmp_path)


@pytest.mark.parametrize("threshold", [0, 1, -0.2, 25])
def test_thresholds_lie_between_0_and_1(gates, threshold):
    with pytest.raises(ProbeError, match="expected a λ between 0 and 1, both excluded"):
        gates.point(threshold)


@pytest.mark.parametrize("off", [0, 1, 25])
def test_off_fractions_are_shares(gates, off):
    with pytest.raises(ProbeError, match="expected a share between 0 and 1"):
        gates.threshold_at(off)
