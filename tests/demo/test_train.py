"""Retraining works, learns, and gives the same bytes for the same seed."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch

from vindex.demo.facts import CHECKPOINT
from vindex.demo.train import Options, batches, load, rate, save, train

SHORT = Options(steps=12, rows=4, warm_up=0.2, long_share=0.2)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return load(CHECKPOINT)[1]


def weights_after(options: Options, tokenizer, out) -> str:
    save(train(options, tokenizer, show=False).model, tokenizer, out)
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def test_a_few_steps_lower_the_loss(tokenizer):
    losses = train(replace(SHORT, steps=20), tokenizer, show=False).losses
    assert len(losses) == 20
    assert losses[0] == pytest.approx(torch.log(torch.tensor(len(tokenizer))).item(), abs=0.3)  # knows nothing yet
    assert sum(losses[-3:]) / 3 < losses[0] - 1


def test_the_same_seed_gives_the_same_bytes(tokenizer, tmp_path):
    first = weights_after(SHORT, tokenizer, tmp_path / "a")
    assert weights_after(SHORT, tokenizer, tmp_path / "b") == first
    assert weights_after(replace(SHORT, seed=1), tokenizer, tmp_path / "c") != first


def test_what_is_saved_loads(tokenizer, tmp_path):
    model = train(replace(SHORT, steps=2), tokenizer, show=False).model
    save(model, tokenizer, tmp_path)
    again, same_tokenizer = load(tmp_path)
    assert same_tokenizer.get_vocab() == tokenizer.get_vocab()
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a.float(), b), name
    shipped = {path.name for path in CHECKPOINT.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} | {"training.json"} == shipped


def test_rows_start_with_a_document_and_the_last_are_twice_as_long(tokenizer):
    options = Options(steps=10, rows=4, long_share=0.2)
    shapes = [tuple(ids.shape) for ids in islice(batches(options, tokenizer), 10)]
    assert shapes == [(4, 128)] * 8 + [(2, 256)] * 2


def test_the_rate_warms_up_and_falls():
    options = Options(steps=100, warm_up=0.1)
    rates = [rate(options, step) for step in range(100)]
    assert rates[0] == pytest.approx(options.learning_rate / 10)
    assert max(rates) == rates[10] == options.learning_rate
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(options.learning_rate * options.final_rate, rel=0.05)


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vindex.demo.train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_refuses_a_directory_that_is_not_empty(tmp_path):
    (tmp_path / "mine").write_text("keep")
    done = run_script("--out", tmp_path)
    assert done.returncode == 2
    assert "exists and is not an empty directory; name a new one" in done.stderr
    assert (tmp_path / "mine").read_text() == "keep"


def test_the_script_refuses_to_train_for_no_steps(tmp_path):
    done = run_script("--out", tmp_path, "--steps", 0)
    assert done.returncode == 2
    assert "--steps and --rows must be at least 2" in done.stderr
