"""A trace of the atlas and a patch of it, which the tests of this room share."""

import pytest
import torch

import probes
from probes.live.tokens import encode
from probes.weights import patches
from probes.weights.delta import Delta
from tests.conftest import build_quietly
from vindex.demo import CHECKPOINT
from vindex.reader import open_vindex

PROMPT, OTHER = "The capital of France is", "The capital of Germany is"


F = 16


@pytest.fixture(scope="session")
def v(tmp_path_factory):
    target = tmp_path_factory.mktemp("traced") / "atlas.vindex"
    build_quietly(CHECKPOINT, target, features=F)
    return open_vindex(target)


@pytest.fixture(scope="session")
def t(loaded, v):
    return probes.trace(loaded, PROMPT, vindex=v, check=2)


def ids_of(loaded, prompt=PROMPT):
    return torch.tensor([encode(loaded.tokenizer, prompt).ids])


def logits_of(loaded, prompt=PROMPT):
    with torch.no_grad():
        return loaded.model(ids_of(loaded, prompt)).logits[0]


def seen_at(loaded, module, side="output", prompt=PROMPT):
    """What a module takes or gives out, (tokens, width), by a hook of our own."""
    kept = []

    def keep(module, args, output):
        kept.append((output if side == "output" else args[0]).detach()[0])

    handle = module.register_forward_hook(keep)
    logits_of(loaded, prompt)
    handle.remove()
    return kept[0]


@pytest.fixture(scope="session")
def patch(loaded, tmp_path_factory):
    """A patch of layer 1 that turns its gates down where the prompt ends."""
    x = seen_at(loaded, loaded.model.model.layers[1].mlp, "input")[-1]
    write = torch.randn(loaded.model.config.intermediate_size, generator=torch.Generator().manual_seed(0)) * 12
    path = tmp_path_factory.mktemp("patch") / "p.safetensors"
    patches.save(path, Delta(1, write, x / (x @ x), "forward"), CHECKPOINT, {})
    return path
