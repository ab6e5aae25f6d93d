"""What transformers saves of every family is found, weight by weight, with the scale its norms really have."""

from __future__ import annotations

import json

import pytest
import torch

import vindex
from extract.checkpoint import open_checkpoint
from extract.families import FAMILIES
from extract.ffn import Weight
from extract.layouts import find_layout
from extract.rederive import rederive, sample_blocks
from tests.checkpoints import tokenizer_json
from tests.conftest import build_quietly

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
SHARED = {"shared_expert_intermediate_size": 10}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 16,
    "patch_size": 2,
    "num_position_embeddings": 16,
}
DEEP = VISION | {"deepstack_visual_indexes": [0]}
WINDOWS = {key: VISION[key] for key in list(VISION)[:-1]} | {"fullatt_block_indexes": [0]}
QWEN2_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 2}
AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "output_dim": 16,
}
OMNI_AUDIO = AUDIO | {"downsample_hidden_size": 8}
SPARSE = TEXT | HEADS | EXPERTS
HYBRID = TEXT | HEADS | LINEAR
HYBRID_MOE = {key: value for key, value in HYBRID.items() if key != "intermediate_size"} | EXPERTS | SHARED

# family: model class, config class, its settings
MODELS = {
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", TEXT | EXPERTS | SHARED),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", SPARSE | {"mlp_only_layers": [1]}),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", SPARSE | LINEAR | SHARED | {"decoder_sparse_step": 2}),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", {"text_config": HYBRID, "vision_config": VISION}),
    "qwen3_5 text": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", HYBRID),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {"text_config": HYBRID_MOE, "vision_config": VISION},
    ),
    "qwen3_5_moe text": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", HYBRID_MOE),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {"text_config": TEXT | HEADS, "vision_config": DEEP, "tie_word_embeddings": True},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {"text_config": SPARSE, "vision_config": DEEP},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {"text_config": TEXT, "vision_config": QWEN2_VISION},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": TEXT, "vision_config": WINDOWS},
    ),
    "qwen3_omni_moe": (
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "Qwen3OmniMoeThinkerConfig",
        {"text_config": SPARSE, "vision_config": DEEP, "audio_config": OMNI_AUDIO},
    ),
    "qwen2_5_omni": (
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen2_5OmniThinkerConfig",
        {"text_config": TEXT, "vision_config": WINDOWS, "audio_config": AUDIO},
    ),
}


def save(directory, family):
    """A random tiny model of the family, saved as transformers saves it; gives back its text decoder too."""
    import transformers

    model_class, config_class, settings = MODELS[family]
    config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json(36)))
    inner = model.model
    return inner.language_model if hasattr(inner, "language_model") else inner


def live_weights(mlp) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(gate_proj (I, H), down_proj (H, I)) of every expert, then of the shared one; of the MLP itself when dense."""
    if not hasattr(mlp, "experts"):
        return [(mlp.gate_proj.weight, mlp.down_proj.weight)]
    experts = mlp.experts
    found = [(up.chunk(2)[0], down) for up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True)]
    shared = getattr(mlp, "shared_expert", None)
    return found + ([(shared.gate_proj.weight, shared.down_proj.weight)] if shared else [])


@pytest.mark.parametrize("family", MODELS)
def test_what_transformers_saves_is_understood(tmp_path, family):
    decoder = save(tmp_path / "m", family)
    source = open_checkpoint(str(tmp_path / "m"))
    layout = find_layout(source)
    assert layout.family == family.removesuffix(" text")
    for layer, ffn in zip(decoder.layers, layout.ffns, strict=True):
        live = live_weights(layer.mlp)
        assert len(live) == len(ffn.gate) == len(ffn.down)
        for (gate, down), read, write in zip(live, ffn.gate, ffn.down, strict=True):
            assert isinstance(read, Weight) and read.by_neuron(source).equal(gate)
            assert write.by_neuron(source).equal(down.T)
        if ffn.router:
            assert source.tensor(ffn.router).equal(layer.mlp.gate.weight)
    assert source.tensor(layout.embeddings).equal(decoder.embed_tokens.weight)
    ones = torch.ones(16)  # of root mean square 1: a norm gives back its scale
    torch.testing.assert_close(layout.final_norm.scale(source), decoder.norm(ones), atol=1e-5, rtol=1e-5)
    first = {norm.name: norm.scale(source) for norm in layout.norms}["layers.0.input_layernorm"]
    torch.testing.assert_close(first, decoder.layers[0].input_layernorm(ones), atol=1e-5, rtol=1e-5)
    build_quietly(tmp_path / "m", tmp_path / "out.vindex", features=4)
    v = vindex.open(tmp_path / "out.vindex")
    assert all(found.holds for found in rederive(v, source, sample_blocks(v, source, [0, 1, 2, 3], experts=9)))
    seen = {part for part in layout.ignored if part.rpartition(".")[2] in ("visual", "audio_tower")}
    assert bool(seen) == ("vision_config" in MODELS[family][2])


def test_every_family_has_its_model():
    plain = {"qwen3", "qwen2", "llama", "mistral"}  # tests/extract/test_checkpoint.py
    assert plain | {family.removesuffix(" text") for family in MODELS} == set(FAMILIES)


def test_the_norm_of_linear_attention_gives_its_own_scale(tmp_path):
    decoder = save(tmp_path / "m", "qwen3_next")
    source = open_checkpoint(str(tmp_path / "m"))
    norms = {norm.name: norm for norm in find_layout(source).norms}
    inside = decoder.layers[0].linear_attn.norm
    gate = torch.full((8,), 20.0)  # SiLU(20) is 20 to within 1e-7
    torch.testing.assert_close(
        norms["layers.0.linear_attn_norm"].scale(source) * 20, inside(torch.ones(8), gate), rtol=1e-4, atol=1e-4
    )
