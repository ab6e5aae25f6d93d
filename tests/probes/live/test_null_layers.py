"""Layers whose weights are zero: what has no direction is null, left out of means, and said; nothing is NaN."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from probes.live.load import load
from probes.live.sites import ffns
from probes.suite import record
from probes.suite.constants import gate_coherence
from probes.suite.geometry import geometry as geometry_of
from probes.suite.plot import draw
from probes.suite.run import constants
from tests.conftest import build_quietly
from tests.probes.test_command import run
from vindex.differences import by_layer, compare
from vindex.reader import open_vindex

PLACES = {"first": [0], "middle": [1], "last": [2], "all": [0, 1, 2]}
KINDS = {"gate": ["gate"], "down": ["down"], "both": ["gate", "down"], "whole": ["gate", "up", "down"]}


def emptied(checkpoint, target, layers, sides):
    """A copy of a checkpoint in which these weights are zero."""
    shutil.copytree(checkpoint, target)
    tensors = load_file(target / "model.safetensors")
    for layer in layers:
        for side in sides:
            tensors[f"model.layers.{layer}.mlp.{side}_proj.weight"].zero_()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def no_nan(value):
    if isinstance(value, dict):
        return all(map(no_nan, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(no_nan, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_figures_of_a_layer_without_directions_are_null_and_the_rest_as_they_are(
    tiny_checkpoint, tmp_path, place, kind, dtype
):
    where, sides = PLACES[place], KINDS[kind]
    loaded = load(emptied(tiny_checkpoint, tmp_path / "null", where, sides), device="cpu", dtype=dtype)
    results = constants(loaded, texts=["factual", "code"])
    found = results.record()
    assert no_nan([constant.headline.value for constant in results])
    c1, _, c3, c4, c5 = found["constants"].values()
    no_gate = where if "gate" in sides else []
    silent = where if {"gate", "up"} & set(sides) else []
    assert found["null_layers"] == {
        "gate_proj": no_gate, "down_proj": where if "down" in sides else [], "hidden": silent, "experts": []
    }  # fmt: skip
    pairs = [pair for pair in (0, 1) if not {pair, pair + 1} & set(no_gate)]
    assert [pair for pair, cosine in enumerate(c3["per_layer"]) if cosine is not None] == pairs
    for figure in (c3, *c3["variants"].values()):
        assert figure["n"] == len(figure["samples"]) == len(pairs)
        assert (figure["value"] is None) == (not pairs) == (figure["mean"] is None)
    whole = geometry_of(ffns(load(tiny_checkpoint, device="cpu", dtype=dtype).model))
    for pair in pairs:
        cosine = abs(float(whole.directions[pair][0] @ whole.directions[pair + 1][0]))
        assert c3["per_layer"][pair] == pytest.approx(cosine, rel=1e-4)
    for side in ("gate", "down"):
        shares = found["spectra"][f"{side}_proj"]["var"]["64"]
        assert [layer for layer, share in enumerate(shares) if share is None] == (where if side in sides else [])
    for text in found["layers"]:
        for part in ("sparsity", "sparsity_no_sink"):
            relative = text[part]["below_relative"]
            assert [layer for layer, shares in enumerate(relative) if None in shares] == silent
    loud = [layer for layer in range(3) if layer not in silent]
    shares = [found["layers"][0]["sparsity"]["below_relative"][layer][0] for layer in loud]
    expected = sum(shares) / len(shares) if loud else None
    assert c1["variants"]["|h| < 1% rms"]["value"] == (pytest.approx(expected, rel=1e-4) if loud else None)
    assert isinstance(c5["value"], int) and c4["value"] is not None
    for suffix in ("png", "html"):
        draw(json.loads(json.dumps(found)), tmp_path / f"p.{suffix}")


@pytest.mark.parametrize("place", PLACES)
def test_a_vindex_of_it_is_built_verified_compared_and_gives_the_same_figures(tiny_checkpoint, tmp_path, place):
    where = PLACES[place]
    source = emptied(tiny_checkpoint, tmp_path / "null", where, ["gate", "down"])
    build_quietly(source, tmp_path / "null.vindex", features=32)
    opened = open_vindex(tmp_path / "null.vindex")
    names = [f"model.layers.{layer}.mlp.{side}_proj.weight" for layer in where for side in ("gate", "down")]
    assert [one.tensor for one in opened.manifest.certificates if one.max_residual is None] == names
    assert names[0] in opened.manifest.zero_weights
    worst = opened.manifest.worst_certificate
    assert (worst is None and opened.manifest.worst == "none") if place == "all" else worst.max_residual > 0
    loaded = load(source, device="cpu")
    one, other = (constants(loaded, vindex, ["factual"]).C3 for vindex in (None, opened))
    assert one.headline.value == pytest.approx(other.headline.value, abs=2e-3) or place == "all"
    assert [value is None for value in one.per_layer] == [value is None for value in other.per_layer]
    build_quietly(tiny_checkpoint, tmp_path / "whole.vindex", features=16)  # fewer than would span everything
    build_quietly(source, tmp_path / "half.vindex", features=16)
    half = open_vindex(tmp_path / "half.vindex")
    whole = open_vindex(tmp_path / "whole.vindex")
    for first, second in ((half, whole), (whole, half), (half, half)):
        for found in by_layer(compare(first, second)):
            for side in (found.gate, found.down):
                assert (side.largest_angle is None) == (side.mean_cosine is None) == (found.layer in where)
                assert side.stands_out == (found.layer in where and first is not second)
                if found.layer in where:
                    assert side.spectrum_drift == (None if first is second else 1)


def test_the_commands_work_and_say_which_layers(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    source = emptied(tiny_checkpoint, tmp_path / "null", [1], ["gate", "up", "down"])
    target, saved = tmp_path / "null.vindex", tmp_path / "p.json"
    assert run(monkeypatch, "build", source, "-o", target, "--features", "32") == 0
    assert "zero, without a direction: model.layers.1.mlp.gate_proj.weight" in capsys.readouterr().out
    for options in ((), ("--source", source)):
        assert run(monkeypatch, "verify", target, *options) == 0
        assert "zero, without a direction: model.layers.1.mlp.gate_proj.weight" in capsys.readouterr().out
    assert run(monkeypatch, "info", target) == 0
    assert "zero, without a direction: model.layers.1" in capsys.readouterr().out
    for options in ((), ("--vindex", target)):
        assert run(monkeypatch, "probe", source, "--text", "code", "-o", saved, *options) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "gate_proj is zero in layer 1: no direction there, left out of C3 and var@k." in shown
        assert "down_proj is zero in layer 1: no direction there, left out of var@k." in shown
        assert "h is zero in layer 1: left out of the thresholds relative to its rms." in shown
        assert "nan" not in shown.lower()
    assert run(monkeypatch, "compare", target, target) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "–: a weight is zero, or a vindex lacks it" in shown and "nan" not in shown
    assert run(monkeypatch, "card", target, "--probe", saved) == 0
    assert "zero, without a direction: model.layers.1" in (target / "README.md").read_text()


def test_a_model_of_zero_weights_alone_has_dashes_for_figures(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    source = emptied(tiny_checkpoint, tmp_path / "null", [0, 1, 2], ["gate", "down"])
    target, saved = tmp_path / "null.vindex", tmp_path / "p.json"
    assert run(monkeypatch, "build", source, "-o", target, "--features", "32") == 0
    assert run(monkeypatch, "probe", source, "--vindex", target, "--text", "code", "-o", saved) == 0
    shown = capsys.readouterr().out
    assert "C3 gate coherence – – – " in " ".join(shown.split())
    assert run(monkeypatch, "card", target, "--probe", saved) == 0
    card = (target / "README.md").read_text()
    assert "## Certificates\nNone: weights are zero" in card and "| gate coherence | C3 | not measured |" in card


def test_an_expert_whose_gate_is_zero_is_left_out_of_the_experts_figures():
    from tests.probes.mixtures import make

    model = make("qwen2_moe")
    model.model.layers[0].mlp.experts.gate_up_proj[3, :16] = 0
    geometry = geometry_of(ffns(model))
    assert not geometry.experts[0][3].any() and geometry.experts[1].any(axis=1).all()
    c3 = gate_coherence(geometry.directions, geometry.mean_rows, geometry.experts)
    kept = [expert for expert in range(8) if expert != 3]
    cosines = abs(geometry.experts[0][kept] @ geometry.experts[1].T)
    assert c3.variants["nearest expert"].samples[0] == pytest.approx(float(cosines.max(1).mean()), rel=1e-5)
    assert record.null_layers((), geometry)["experts"] == [[0, 3]]
    assert torch.isfinite(torch.tensor(c3.variants["experts of one layer"].samples)).all()
