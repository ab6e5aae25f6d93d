"""Models to test on: tiny checkpoints, their vindex, a tiny live model, and the real 135M where it is laid out."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from extract.checkpoint import open_checkpoint
from extract.engines import in_process
from extract.pipeline import build
from tests.checkpoints import write_checkpoint, write_mixture
from tests.responses import add_made_up
from vindex.options import BuildOptions
from vindex.progress import silent
from vindex.reader import open_vindex

os.environ.setdefault("HF_HUB_OFFLINE", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background jobs ignore Ctrl-C
torch.set_num_threads(1)  # tests on small matrices are slower with more


def build_quietly(
    checkpoint: Path,
    target: Path,
    *,
    resume: bool = False,
    force: bool = False,
    stages=silent,
    engine=in_process,
    **options,
):
    """Build with few features and no output."""
    chosen = BuildOptions(**({"features": 8} | options))
    opened = open_checkpoint(str(checkpoint))
    return build(opened, target, chosen, stages, resume=resume, force=force, engine=engine)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that kill: what the kernel has outlives a process, so that nobody need wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", shards=2)


@pytest.fixture(scope="session")
def built(checkpoint, tmp_path_factory) -> Path:
    """A finished vindex of `checkpoint`; tests that change it copy it first."""
    target = tmp_path_factory.mktemp("built") / "tiny.vindex"
    build_quietly(checkpoint, target)
    return target


@pytest.fixture(scope="session")
def mixture(tmp_path_factory) -> Path:
    """A checkpoint with everything a mixture can have: a dense layer, and two of three experts and a shared one."""
    return write_mixture(tmp_path_factory.mktemp("checkpoint") / "mixture")


@pytest.fixture(scope="session")
def built_mixture(mixture, tmp_path_factory) -> Path:
    """A finished vindex of `mixture`; tests that change it copy it first."""
    target = tmp_path_factory.mktemp("built") / "mixture.vindex"
    build_quietly(mixture, target, features=4)
    return target


@pytest.fixture(scope="session")
def built_whole(built_mixture, tmp_path_factory) -> Path:
    """That vindex with responses besides: it has every file of the format; tests that change it copy it first."""
    target = shutil.copytree(built_mixture, tmp_path_factory.mktemp("built") / "whole.vindex")
    add_made_up(open_vindex(target))
    return target


def laid_out(variable: str, target: str) -> Path:
    """The directory of a real checkpoint, which `make TARGET` lays out and names in the environment."""
    directory = os.environ.get(variable)
    if not directory:
        pytest.skip(f"{variable} is not set; `make {target}` lays the real model out and runs these tests")
    path = Path(directory)
    if not (path / "config.json").is_file():
        pytest.fail(f"{variable}={directory} holds no config.json; run `make {target}`")
    return path


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The directory of the real 135M checkpoint."""
    return laid_out("VINDEX_REAL_MODEL", "test-real")


@pytest.fixture(scope="session")
def qwen_model() -> Path:
    """The directory of the real Qwen2.5-0.5B checkpoint, with its GGUF in gguf/."""
    return laid_out("VINDEX_QWEN_MODEL", "test-qwen")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded, untrained Qwen3ForCausalLM in float32: 3 layers, hidden 32, intermediate 48, one token per byte."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    directory = tmp_path_factory.mktemp("tiny") / "tiny-qwen3"
    config = Qwen3Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # transformers initialises at 0.02, where every activation is next to nothing
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.0 if "embed" in name else parameter.shape[1] ** -0.5)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def byte_tokenizer():
    """A tokenizer with one token per byte, and `<eos>`, `<pad>` after them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def tiny(tiny_checkpoint: Path):
    """The tiny model, loaded afresh so that a test may do anything to it."""
    from probes.live.load import load

    return load(tiny_checkpoint, device="cpu")
