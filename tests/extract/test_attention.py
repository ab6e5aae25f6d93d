"""What config.json leaves out is what transformers would run with."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from extract.families import FAMILIES, find_attention
from vindex.errors import CheckpointError

HEADS = {"num_attention_heads": 8, "hidden_size": 512}
SETTINGS = [
    {"hidden_size": 4096},
    HEADS,
    HEADS | {"num_key_value_heads": 2},
    HEADS | {"head_dim": 96},
    HEADS | {"rope_theta": 77777.0},
    HEADS | {"rope_parameters": {"rope_type": "default", "rope_theta": 33333.0}},
    HEADS | {"rope_theta": 77777.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    HEADS | {"rope_theta": 77777.0, "rope_parameters": {"rope_type": "default", "rope_theta": 33333.0}},
]


def text_config(family: str, settings: dict):
    """transformers' own class of the text tower, made of `settings`."""
    whole = CONFIG_MAPPING[family]()
    return type(getattr(whole, "thinker_config", whole).get_text_config())(**settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_that_of_transformers(family, settings):
    theirs = text_config(family, dict(settings))
    ours = find_attention("m", family, settings, settings["hidden_size"])
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.heads, ours.kv_heads, ours.head_dim) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        head_dim,
    )
    assert ours.rope_base == theirs.rope_parameters["rope_theta"]
    assert ours.experts_per_token == getattr(theirs, "num_experts_per_tok", None)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_vl"])
def test_null_stands_for_what_follows_from_the_heads(family):
    settings = HEADS | {"num_key_value_heads": None}
    assert find_attention("m", family, settings, 512).kv_heads == text_config(family, settings).num_key_value_heads == 8


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_attention_heads": "8"}, "m: config.json num_attention_heads: expected a positive integer, got '8'"),
        ({"num_key_value_heads": 0}, "m: config.json num_key_value_heads: expected a positive integer, got 0"),
        ({"head_dim": 64.5}, "m: config.json head_dim: expected a positive integer, got 64.5"),
        ({"num_experts_per_tok": True}, "m: config.json num_experts_per_tok: expected a positive integer, got True"),
        ({"rope_theta": "big"}, "m: config.json rope_theta: expected a positive number, got 'big'"),
        (
            {"rope_parameters": {"rope_theta": float("inf")}},
            "config.json rope_theta: expected a positive number, got inf",
        ),
    ],
)
def test_what_is_no_number_is_refused(settings, message):
    with pytest.raises(CheckpointError, match=message):
        find_attention("m", "qwen3", settings, 512)
