"""The suite on the real 135M model: orders of magnitude, estimators that part ways, and hooks that change nothing."""

import json

import orjson
import pytest
import torch

from probes.live.hooks import capture, same_bits
from probes.live.load import load
from probes.live.sites import ROLES, sites
from probes.suite.run import constants

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def found(real_model):
    loaded = load(real_model, dtype="float32", device="cpu")
    return json.loads(orjson.dumps(constants(loaded, texts=["factual", "story"]).record()))


def test_the_constants_have_the_size_found_before_on_another_text(found):
    constants = found["constants"]
    earlier = {"|h| < 0.001": 0.023, "|h| < 0.05": 0.405, "|h| < 0.1": 0.589}
    assert constants["C1"]["value"] == pytest.approx(0.138, rel=0.3)
    for name, value in earlier.items():
        assert constants["C1"]["variants"][name]["value"] == pytest.approx(value, rel=0.3)
    assert 0.6 < constants["C2"]["value"] < 0.95
    assert 1 < constants["C4"]["value"] < 3
    assert constants["C4"]["variants"]["no_sink"]["value"] == pytest.approx(0.36, rel=0.3)
    assert 3 <= constants["C5"]["value"] <= 8
    assert constants["C5"]["variants"]["debiased CKA < 0.99"]["value"] > 15
    assert constants["C3"]["value"] > 10 * constants["C3"]["null"]


def test_every_spectrum_is_above_its_floor(found):
    for projection in ("gate_proj", "down_proj"):
        entry = found["spectra"][projection]
        for rank, values in entry["var"].items():
            assert min(values) > entry["marchenko_pastur"][rank]


def test_the_record_is_small(found):
    assert len(orjson.dumps(found)) < 300_000


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hooks_change_nothing(real_model, dtype, attn):
    loaded = load(real_model, dtype=dtype, device="cpu", attn=attn)
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        bare = loaded.model(ids).logits
        with capture(loaded.model, sites(loaded.model, *ROLES)):
            hooked = loaded.model(ids).logits
    assert same_bits(bare, hooked)


def test_bfloat16_agrees_with_float32(real_model, found):
    loaded = load(real_model, dtype="bfloat16", device="cpu", attn="eager")
    for constant in constants(loaded, texts=["factual", "story"], batch_size=2):
        if constant.symbol != "C5":  # a count; one pair near 0.9 may fall on either side
            assert constant.headline.value == pytest.approx(found["constants"][constant.symbol]["value"], rel=0.02)
