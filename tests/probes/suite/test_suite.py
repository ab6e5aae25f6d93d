"""The whole suite: its record can be recomputed from, with or without a vindex, and bad input is one line."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from probes import texts
from probes.live import match
from probes.live.load import load
from probes.suite import definition
from probes.suite import run as suite
from vindex.errors import ProbeError, VindexError
from vindex.reader import open_vindex

FLOAT = {"rel": 2e-5, "abs": 1e-9}  # the record keeps six significant digits


@pytest.fixture(scope="module")
def made(tiny_checkpoint):
    """Model, results and record of a run over two bundled texts."""
    loaded = load(tiny_checkpoint, device="cpu")
    results = suite.constants(loaded, texts=["factual", "code"])
    return loaded, results, json.loads(orjson.dumps(results.record()))


def test_the_record_says_what_a_reader_needs(made, tiny_checkpoint):
    loaded, _, found = made
    assert found["record"] == "vindex-probe/1"
    assert found["definition"] == "v1"
    assert found["choices"]["tokens"] == 256
    model = found["model"]
    assert (model["name"], model["dtype"], model["attn_implementation"]) == ("tiny-qwen3", "float32", "sdpa")
    assert (model["num_layers"], model["hidden_size"], model["intermediate_size"]) == (3, 32, 48)
    assert list(model["weights_sha256"]) == ["model.safetensors"]
    assert set(found["libraries"]) >= {"python", "torch", "transformers", "vindex"}
    for entry, name in zip(found["texts"], ("factual", "code"), strict=True):
        assert entry["name"] == name
        assert entry["token_ids"] == loaded.tokenizer(texts.read(name))["input_ids"][:256]
    assert found["published"]["status"] == "definition unpublished"
    assert found["published"]["constants"]["Qwen3-8B"]["C5"] == 4
    for symbol in ("C1", "C2", "C3", "C4", "C5"):
        entry = found["constants"][symbol]
        assert entry["symbol"] == symbol
        assert entry["interval"][0] <= entry["mean"] <= entry["interval"][1]
        assert entry["null"] is not None
        assert entry["variants"]
        assert entry["definition"] and entry["unit"] and entry["n"] == 2


def test_every_constant_can_be_recomputed_from_the_record_alone(made):
    _, _, found = made
    constants, curves = found["constants"], found["layers"]
    headline = found["choices"]["sparsity_thresholds"].index(found["choices"]["sparsity_headline"])
    for text, layers in enumerate(curves):
        c1 = np.mean([layer[headline] for layer in layers["sparsity"]["below"]])
        assert constants["C1"]["samples"][text] == pytest.approx(c1, **FLOAT)
        assert constants["C2"]["samples"][text] == pytest.approx(np.mean(layers["top_mass"]), **FLOAT)
        assert constants["C4"]["samples"][text] == pytest.approx(np.mean(layers["temperature"]["all_tokens"]), **FLOAT)
        below = np.array(layers["adjacent_cka"]) < found["choices"]["stage_threshold"]
        assert constants["C5"]["samples"][text] == 1 + below.sum()
    assert constants["C3"]["value"] == pytest.approx(np.mean(constants["C3"]["per_layer"]), **FLOAT)
    debiased = np.array(found["cka"]["debiased"])
    np.testing.assert_allclose(np.diagonal(debiased, 1), constants["C5"]["per_layer"], rtol=1e-5)
    np.testing.assert_allclose(np.diagonal(debiased), 1, atol=1e-6)
    gate = found["spectra"]["gate_proj"]
    for layer, values in enumerate(gate["singular_values"]):
        assert gate["var"]["64"][layer] == pytest.approx(
            np.square(values[:64]).sum() / gate["squared_norm"][layer], rel=1e-4
        )
    assert constants["C5"]["variants"]["optimal segmentation"]["value"] == len(found["cka"]["segmentation"]["starts"])


def test_the_texts_run_again_give_the_same_figures(made):
    loaded, results, found = made
    ids = torch.tensor([found["texts"][0]["token_ids"]])
    with torch.inference_mode():
        logits = loaded.model(ids).logits[0]
    assert np.mean(results.readings[0].top_mass) == pytest.approx(
        float(logits.softmax(-1).topk(8).values.sum(-1).mean()), rel=1e-5
    )


def test_batches_change_nothing(made):
    loaded, results, _ = made
    again = suite.constants(loaded, texts=["factual", "code"], batch_size=2)
    for one, other in zip(results, again, strict=True):
        assert one.headline.samples == pytest.approx(other.headline.samples, rel=1e-4)


def test_c3_and_spectra_from_the_vindex_are_those_of_the_weights(made, tiny_vindex):
    loaded, results, found = made
    opened = open_vindex(tiny_vindex)
    match.require_match(loaded, opened, found["model"]["weights_sha256"])
    fresh = suite.constants(loaded, opened, ["factual"])
    assert fresh.geometry.source == f"vindex {opened.id}"
    c3, exact = fresh.C3, results.C3
    assert c3.headline.samples == pytest.approx(exact.headline.samples, abs=2e-3)
    for name, variant in exact.variants.items():
        assert c3.variants[name].value == pytest.approx(variant.value, abs=2e-3)
    for part in ("gate", "down"):
        for one, other in zip(getattr(fresh.geometry, part), getattr(results.geometry, part), strict=True):
            np.testing.assert_allclose(one.singular_values, other.singular_values, rtol=1e-3)
            assert one.energy == pytest.approx(other.energy, rel=1e-6)


def one_line(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 250


def test_a_vindex_of_another_shape_is_refused(made, tiny_vindex):
    loaded, _, found = made
    for wrong in ("num_layers", "hidden_size", "intermediate_size"):
        opened = open_vindex(tiny_vindex)
        opened.index = opened.index.__class__(**{**vars(opened.index), wrong: 7})
        with pytest.raises(ProbeError, match=rf"has {wrong} 7, the model \(tiny-qwen3\)") as error:
            match.require_match(loaded, opened, found["model"]["weights_sha256"])
        assert one_line(error)


def test_a_vindex_of_other_weights_is_refused(tiny_checkpoint, tiny_vindex, tmp_path):
    copy = tmp_path / "tuned"
    shutil.copytree(tiny_checkpoint, copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.gate_proj.weight"][0, 0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    loaded = load(copy, device="cpu")
    with pytest.raises(ProbeError, match=r"model\.safetensors of the model \(tuned\) has SHA-256") as error:
        match.require_match(loaded, open_vindex(tiny_vindex), match.weights_sha256(loaded))
    assert one_line(error)


def test_a_vindex_with_too_few_directions_is_refused(made, tiny_vindex):
    opened = open_vindex(tiny_vindex)
    opened.index = opened.index.__class__(**{**vars(opened.index), "num_feats": 8})
    with pytest.raises(ProbeError, match="keeps 8 directions per layer") as error:
        suite.constants(made[0], opened, ["factual"])
    assert one_line(error)


def test_every_bundled_text_is_long_enough(made):
    for name in texts.BUNDLED:
        text = texts.read(name)
        assert texts.encode(name, text, made[0].tokenizer, tokens=definition.TOKENS, vocabulary=258).name == name
        assert len(text) > 6 * definition.TOKENS  # English and code run at 3 to 5 characters a token


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"too short", "9 tokens with this tokenizer, 256 needed; use a longer text"),
        (b"\xff" * 300, "byte 0 is not UTF-8"),
        (None, r"No such file or directory\); expected a UTF-8 text file or a bundled text \(factual"),
    ],
)
def test_a_bad_text_is_one_line(made, tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProbeError, match=message) as error:
        suite.encode(made[0], [str(path)])
    assert "\n" not in str(error.value)


class _Limited:
    """A tokenizer of whole words that knows only some."""

    unk_token, unk_token_id = "<unk>", 0

    def __init__(self):
        self.words = {"the": 1, "cat": 2, "sat": 3, "far": 900}

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[self.words.get(word, 0) for word in text.split()])

    def decode(self, ids):
        return " ".join(word for number in ids for word, known in self.words.items() if known == number)


def test_a_text_the_tokenizer_has_no_token_for_is_named():
    with pytest.raises(ProbeError, match="text t: token 3, after 'the cat sat', is <unk>"):
        texts.encode("t", "the cat sat zyx " + "the " * 300, _Limited(), tokens=256, vocabulary=10)


def test_a_token_the_model_does_not_embed_is_named():
    with pytest.raises(ProbeError, match="text t: token id 900, but the model embeds 10 tokens"):
        texts.encode("t", "far " * 300, _Limited(), tokens=256, vocabulary=10)


def test_a_model_of_one_layer_is_refused(tiny):
    del tiny.model.model.layers[1:]
    with pytest.raises(VindexError, match="the model has one layer"):
        suite.constants(tiny, texts=["factual"])
