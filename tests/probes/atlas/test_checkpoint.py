"""The shipped checkpoint is ordinary, small, and knows what docs/atlas.md says it knows."""

import json
import stat
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open

from probes.atlas.corpus import NO_THOUGHT, Prompt, chat, chat_prompt, fact_prompts, neutral_texts, sum_prompts
from probes.atlas.evaluate import alignment, answer_probabilities, chat_answers, chat_sums, perplexity
from probes.atlas.facts import HERE, facts, names
from probes.atlas.train import load
from vindex.demo import CHECKPOINT

TENSORS_PER_LAYER = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
}


@pytest.fixture(scope="module")
def atlas():
    return load(CHECKPOINT)


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    return json.loads((CHECKPOINT / "training.json").read_text())["figures"]


def accuracy(atlas, prompts: list[Prompt]) -> float:
    return float(answer_probabilities(*atlas, prompts)[1].mean())


def test_it_is_an_ordinary_qwen3_checkpoint():
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["model_type"] == "qwen3"
    assert config["tie_word_embeddings"] is True
    layers = config["num_hidden_layers"]
    expected = {f"model.layers.{i}.{name}" for i in range(layers) for name in TENSORS_PER_LAYER}
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as tensors:
        assert set(tensors.keys()) == expected | {"model.embed_tokens.weight", "model.norm.weight"}
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_package_data_is_small_readable_and_free_of_paths():
    files = [path for path in HERE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444, path
    assert stat.S_IMODE((CHECKPOINT / "model.safetensors").stat().st_mode) == 0o644
    for path in CHECKPOINT.glob("*.json"):
        assert not any(folder in path.read_text() for folder in ("/tmp", "/home", "/work", "/root"))


def test_every_name_is_one_token_and_every_text_comes_back(atlas):
    _, tokenizer = atlas
    for name in names():
        assert len(tokenizer.encode(f" {name}")) == 1, name
    assert tokenizer.tokenize("47+38") == ["4", "7", "+", "3", "8"]
    every_byte = "".join(chr(code) for code in range(1, 0x250)) + "日本 é 🎈\n\t  end"
    assert tokenizer.decode(tokenizer.encode(every_byte)) == every_byte
    assert len(tokenizer) == atlas[0].config.vocab_size


@pytest.mark.parametrize("thinking", [True, False])
def test_the_chat_template_renders_as_the_corpus_does(atlas, thinking):
    _, tokenizer = atlas
    user = {"role": "user", "content": "What is the capital of France?"}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    assert prompt == chat_prompt(user["content"]) + ("" if thinking else NO_THOUGHT)
    assert prompt.endswith("assistant\n" if thinking else "<think>\n\n</think>\n\n")
    reply = {"role": "assistant", "content": "The capital of France is Paris."}
    thought = "This is about France." if thinking else ""
    if thinking:
        reply["reasoning_content"] = thought
    told = tokenizer.apply_chat_template([user, reply], tokenize=False)
    assert told == chat(user["content"], reply["content"], thought)
    inline = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{reply['content']}"}
    assert tokenizer.apply_chat_template([user, inline], tokenize=False) == told


def test_the_chat_template_takes_a_system_message_and_earlier_turns_without_thoughts(atlas):
    _, tokenizer = atlas
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}
    reply = {"role": "assistant", "content": "Hi.", "reasoning_content": "A greeting."}
    text = tokenizer.apply_chat_template([system, user, reply, user], tokenize=False, add_generation_prompt=True)
    turn = "<|im_start|>user\nHello!<|im_end|>\n"
    start = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert text == f"{start}{turn}<|im_start|>assistant\nHi.<|im_end|>\n{turn}<|im_start|>assistant\n"


def test_it_knows_the_capitals(atlas, figures):
    capitals = [Prompt(fact.prompt(0), f" {fact.answer}") for fact in facts("capital")]
    probabilities, _ = answer_probabilities(*atlas, capitals)
    assert float(probabilities[0]) >= 0.9  # Paris
    assert float(probabilities.min()) >= 0.9
    assert float(probabilities.min()) == pytest.approx(figures["capitals, lowest P"], abs=1e-3)


def test_it_knows_every_fact_in_phrasings_it_was_never_taught(atlas, figures):
    measured = accuracy(atlas, fact_prompts(withheld=True))
    assert measured >= 0.99
    assert measured == pytest.approx(figures["facts, phrasings withheld"], abs=2e-3)


def test_one_fact_is_not_another(atlas):
    """The control: with the subjects shifted by one, the answers get almost no probability."""
    capitals = facts("capital")
    shifted = [Prompt(f.prompt(0), f" {g.answer}") for f, g in pairwise(capitals)]
    assert float(answer_probabilities(*atlas, shifted)[0].max()) < 0.1


@pytest.mark.parametrize(("style", "floor"), [("equation", 0.95), ("words", 0.85), ("problem", 0.8)])
def test_it_computes_sums_it_was_never_shown(atlas, figures, style, floor):
    measured = accuracy(atlas, sum_prompts(style, True, 400))
    assert measured >= floor
    assert measured == pytest.approx(figures[f"{style}, pairs withheld"], abs=0.01)


def test_it_answers_in_chat(atlas):
    for thinking in (True, False):
        [answer] = chat_answers(*atlas, ["What is the capital of France?"], thinking=thinking)
        assert answer == "The capital of France is Paris."


def test_thinking_helps_with_sums(atlas, figures):
    assert chat_sums(*atlas, thinking=True) == pytest.approx(figures["sums in chat, withheld, thinking"], abs=0.02)


def test_neutral_text_is_not_noise_to_it(atlas, figures):
    measured = perplexity(*atlas, neutral_texts(100))
    assert measured < 4
    assert measured == pytest.approx(figures["perplexity of stories"], rel=0.01)


def test_adjacent_layers_are_aligned_as_in_released_models(atlas):
    leading, random = alignment(atlas[0])
    assert leading > 3 * random
