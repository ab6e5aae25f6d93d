"""What a Python user sees of probes/: public names, loaded when they are used, and a model to hold."""

import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch

import probes
from vindex.errors import ProbeError, QueryError


@pytest.fixture(scope="module")
def atlas():
    return probes.load("atlas", device="cpu")


def test_dir_shows_the_public_names_and_each_of_them_is_there():
    assert dir(probes) == sorted(probes.__all__)
    for name, (module, own) in probes.FACE.items():
        assert getattr(probes, name) is getattr(import_module(module), own)


def test_a_name_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(AttributeError, match="module 'probes' has no attribute 'laod'; it has .*load"):
        _ = probes.laod


def test_looking_loads_no_torch():
    code = "import probes, sys; dir(probes); print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_model_says_in_one_line_what_it_is(atlas):
    assert repr(atlas) == "<atlas: Qwen3ForCausalLM, 4 layers of width 128, bfloat16, cpu>"


def test_a_model_goes_on_with_the_most_probable_tokens(atlas):
    prompt = "The capital of France is"
    ids = atlas.tokenizer(prompt).input_ids
    written = []
    with torch.no_grad():
        for _ in range(3):
            written.append(int(atlas.model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    assert atlas.generate(prompt, tokens=3) == atlas.tokenizer.decode(written)
    assert atlas.generate(prompt).startswith(" Paris")


def test_several_prompts_at_once_give_what_each_gives_alone(atlas):
    prompts = ["The capital of France is", "Berlin is the capital of"]
    assert atlas.write(prompts, 5) == [atlas.generate(prompt, 5) for prompt in prompts]


def test_what_cannot_be_gone_on_from_is_one_line(atlas):
    with pytest.raises(ProbeError, match="prompt '': no tokens; expected some text to go on from"):
        atlas.generate("")
    with pytest.raises(QueryError, match="tokens 0: expected a positive integer"):
        atlas.generate("The", tokens=0)
    with pytest.raises(ProbeError, match="atlas: no head is stored"):
        replace(atlas, head=False).generate("The")
