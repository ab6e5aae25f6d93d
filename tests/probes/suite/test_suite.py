"""The whole suite: its record can be recomputed from, with or without a vindex, and bad input is one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from probes import texts
from probes.live import match
from probes.live.load import load
from probes.suite import definition
from probes.suite import run as suite
from probes.suite.words import choice_of_stages, meanings
from vindex.errors import ProbeError, QueryError, VindexError
from vindex.reader import Vindex, open_vindex

FLOAT = {"rel": 2e-5, "abs": 1e-9}  # the record keeps six significant digits


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
        assert entry["null"] is not None
        assert entry["variants"]
        assert entry["definition"] and entry["unit"] and entry["n"] == 2


def test_the_result_is_what_a_user_wants_to_hold(made, tmp_path):
    _, found, record = made
    assert [constant.symbol for constant in found] == ["C1", "C2", "C3", "C4", "C5"]
    for constant in found:
        entry = record["constants"][constant.symbol]
        assert constant is found[constant.symbol] is getattr(found, constant.symbol)
        for field in ("value", "mean", "null"):
            assert getattr(constant, field) == pytest.approx(entry[field], **FLOAT)
        assert list(constant.interval) == pytest.approx(entry["interval"], **FLOAT)
    with pytest.raises(ProbeError, match="'C6': no such constant; expected C1, C2, C3, C4, C5"):
        found["C6"]
    assert repr(found).startswith("<tiny-qwen3: C1 = ") and "\n" not in repr(found)
    assert repr(found.C1) == f"<C1 FFN sparsity: {found.C1.value:.3g}, null {found.C1.null:.3g}>"
    rows, more = found.rows(), found.rows(variants=True)
    assert [row["constant"] for row in rows] == ["C1", "C2", "C3", "C4", "C5"]
    assert {row["constant"]: row["meaning"] for row in rows} == meanings(record)
    assert len(more) == 5 + sum(len(constant.variants) for constant in found)
    assert all(row.keys() == rows[0].keys() for row in more)
    assert found.C5.definition and "<td>circuit stages</td>" in found._repr_html_()
    found.save(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text()) == record
    found.plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_undefined_is_said_and_not_counted(made):
    record = json.loads(json.dumps(made[2]))
    for symbol in ("C2", "C3"):
        record["constants"][symbol]["value"] = None
    said = meanings(record)
    assert said["C2"] == "No head is stored: nothing is predicted."
    assert said["C3"] == "No two adjacent layers have a leading direction."


def test_the_sentences_say_the_numbers_of_a_record_made_before():
    record = json.loads((Path(__file__).parents[3] / "docs" / "records" / "smollm2-135m.json").read_text())
    said = meanings(record)
    assert said["C1"].startswith("14 % of what FFN neurons give out") and said["C1"].endswith("same size, 3.2 %.")
    assert "hold 89 % of the probability; if all tokens were alike, 0.016 %." in said["C2"]
    assert "at |cos| 0.67; random directions, at 0.0333." in said["C3"]
    assert "variance 1.68 over tokens" in said["C4"]
    assert "(CKA < 0.9) at 4 of the 29 steps from layer to layer; with tokens shuffled, at 29." in said["C5"]
    assert choice_of_stages(record).endswith("Its other variants give 2 to 24 here.")


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


def test_a_vindex_of_another_shape_is_refused(made, tiny_vindex, monkeypatch):
    loaded, _, found = made
    opened = open_vindex(tiny_vindex)
    own = opened.index
    for wrong in ("num_layers", "hidden_size", "intermediate_size"):
        monkeypatch.setattr(Vindex, "index", replace(own, **{wrong: 7}))
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


def test_a_vindex_with_too_few_directions_is_refused(made, tiny_vindex, monkeypatch):
    opened = open_vindex(tiny_vindex)
    monkeypatch.setattr(Vindex, "index", replace(opened.index, num_feats=8))
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
        texts.encoded(made[0], str(path), definition.TOKENS)
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


def test_a_batch_is_one_text_or_more(tiny):
    with pytest.raises(QueryError, match="batch_size 0: expected a positive integer"):
        suite.constants(tiny, batch_size=0)


def test_a_text_that_is_given_twice_is_no_second_observation(tiny, tmp_path):
    (tmp_path / "copy.txt").write_text(texts.read("story"))
    for again in ("story", tmp_path / "copy.txt"):
        with pytest.raises(ProbeError, match="given twice, and each counts once; leave one out"):
            suite.constants(tiny, texts=["story", str(again)])
    assert suite.constants(tiny, texts="story").C1.value == suite.constants(tiny, texts=["story"]).C1.value
