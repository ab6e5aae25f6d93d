"""Loading a model and finding its sites, and every way that can fail."""

import json
import shutil

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from probes.gates.score import write
from probes.live.load import load
from probes.live.sites import Site, layers, locate, sites, weight
from vindex.errors import CheckpointError, ProbeError


def test_load_gives_a_frozen_model_in_the_dtype_asked_for(tiny_checkpoint):
    for dtype, expected in [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]:
        loaded = load(tiny_checkpoint, dtype=dtype, device="cpu", attn="eager")
        assert loaded.model.dtype == expected
        assert not loaded.model.training
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
        assert loaded.model.config._attn_implementation == "eager"
        assert loaded.name == "tiny-qwen3"
        assert loaded.revision is None


def test_sites_are_the_modules_they_are_named_for(tiny):
    first = tiny.model.model.layers[0]
    assert locate(tiny.model, ("residual", 0)) == (first, "output")
    assert locate(tiny.model, ("mlp_in", 0)) == (first.mlp, "input")
    assert locate(tiny.model, ("mlp_out", 0)) == (first.mlp, "output")
    assert locate(tiny.model, ("gate", 0)) == (first.mlp.gate_proj, "output")
    assert locate(tiny.model, ("up", 0)) == (first.mlp.up_proj, "output")
    assert locate(tiny.model, ("hidden", 0)) == (first.mlp.down_proj, "input")
    assert sites(tiny.model, "hidden", only=[1]) == (("hidden", 1),)
    assert sites(tiny.model, "hidden", "gate") == tuple(Site(r, l) for r in ("hidden", "gate") for l in range(3))
    assert weight(tiny.model, "down_proj", 2) is tiny.model.model.layers[2].mlp.down_proj.weight
    assert len(layers(tiny.model)) == 3


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: locate(model, ("nothing", 0)), "site 'nothing': expected one of stream"),
        (lambda model: locate(model, ("hidden", 3)), "layer 3: the model has layers 0 to 2"),
        (lambda model: weight(model, "q_proj", 0), "projection 'q_proj': expected one of gate_proj"),
    ],
)
def test_an_unknown_place_is_named(tiny, ask, message):
    with pytest.raises(ProbeError, match=message):
        ask(tiny.model)


def test_an_mlp_without_down_proj_is_refused(tiny):
    del tiny.model.model.layers[1].mlp.down_proj
    with pytest.raises(ProbeError, match=r"layers\.1\.mlp: Qwen3MLP has no down_proj"):
        layers(tiny.model)


def test_a_block_without_an_mlp_is_refused(tiny):
    del tiny.model.model.layers[2].mlp
    with pytest.raises(ProbeError, match=r"layers\.2: Qwen3DecoderLayer has no mlp"):
        layers(tiny.model)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ProbeError, match="Linear: no decoder layers found"):
        layers(torch.nn.Linear(2, 2))


def test_a_mixture_of_experts_is_refused_with_the_reason():
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with pytest.raises(ProbeError, match="mixture of experts, whose fused experts a hook cannot see"):
        layers(Qwen3MoeForCausalLM(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8': expected auto"),
        ({"attn": "magic"}, "attention implementation 'magic': expected sdpa"),
        ({"device": "abacus"}, "device 'abacus': expected auto"),
    ],
)
def test_bad_options_are_one_line(tiny_checkpoint, options, message):
    with pytest.raises(ProbeError, match=message) as error:
        load(tiny_checkpoint, **options)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here, so asking for one is no error")
def test_cuda_without_a_device_is_one_line(tiny_checkpoint):
    with pytest.raises(ProbeError, match="torch sees no CUDA device"):
        load(tiny_checkpoint, device="cuda")


def test_a_missing_model_is_one_line(tmp_path):
    for source in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(CheckpointError, match="no such directory"):
            load(source)
    with pytest.raises(CheckpointError, match=r"config\.json is missing; is"):
        load(tmp_path)


def test_offline_a_hub_id_that_is_not_cached_is_one_line():
    with pytest.raises(CheckpointError, match="nobody/nothing-here: no such directory, not in the Hub cache") as error:
        load("nobody/nothing-here")
    assert "\n" not in str(error.value)


def test_code_in_a_checkpoint_never_runs(tiny_checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(copy)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_read(tiny_checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="found PyTorch .bin weights"):
        load(copy)


def edited(tiny_checkpoint, tmp_path, file: str, **changes):
    """The tiny model with other entries in one of its JSON files."""
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "edited")
    path = directory / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    return directory


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "config.json",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1], "long_factor": "x", "rope_theta": 1}},
            "cannot be loaded: ",
        ),
        ("config.json", {"num_labels": 10**9}, "config.json num_labels: expected at most 65536"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "cannot be loaded: '>' not supported"),
    ],
)
def test_what_does_not_fit_together_fails_as_the_model_is_loaded(tiny_checkpoint, tmp_path, file, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load(edited(tiny_checkpoint, tmp_path, file, **changes), device="cpu")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"return_dict": False}),
        ("config.json", {"output_attentions": True}),
        ("generation_config.json", {"num_beams": 4, "repetition_penalty": 9.0, "max_length": 1}),
        ("generation_config.json", {"eos_token_id": ["x", 10**30], "return_dict_in_generate": True}),
        ("generation_config.json", {"stop_strings": "x", "bad_words_ids": [[1]], "forced_eos_token_id": "x"}),
    ],
)
def test_what_a_model_writes_is_its_greedy_answer_whatever_its_files_ask_for(
    tiny, tiny_checkpoint, tmp_path, file, changes, capfd
):
    other = load(edited(tiny_checkpoint, tmp_path, file, **changes), device="cpu")
    assert write(other, ["Hello"], None, 4) == write(tiny, ["Hello"], None, 4)
    assert capfd.readouterr().err == ""


def test_the_end_of_a_turn_is_still_the_checkpoints(tiny, tiny_checkpoint, tmp_path):
    first = int(tiny.model(torch.tensor([[72]])).logits[0, -1].argmax())
    other = load(edited(tiny_checkpoint, tmp_path, "generation_config.json", eos_token_id=[first, 256]), device="cpu")
    assert other.model.generation_config.eos_token_id == [first, 256]


def test_a_token_without_an_embedding_is_one_line(tiny_checkpoint, tmp_path):
    token = {"900": {"content": "Hi", "special": False}}
    loaded = load(edited(tiny_checkpoint, tmp_path, "tokenizer_config.json", added_tokens_decoder=token), device="cpu")
    with pytest.raises(ProbeError, match=r"token id \d+, but the model embeds 258 tokens; leave that token out"):
        write(loaded, ["Hi there"], None, 1)


def test_a_tokenizer_of_any_size_is_not_read(tiny_checkpoint, tmp_path):
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "large")
    with (directory / "chat_template.jinja").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="large: chat_template.jinja: has 1,099,511,627,776 bytes, at most"):
        load(directory, device="cpu")
