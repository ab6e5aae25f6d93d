"""What a model writes, on models made by hand and on some whose layers do more than attend to all before."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config

from probes.facts import writing
from probes.facts.prompts import Prompt
from probes.facts.writing import write
from tests.probes.deletion.test_hybrids import HYBRIDS, make
from vindex.demo import CHECKPOINT


class Chain:
    """A model that says after each token the one that its table names, or after others what is in `odds`."""

    def __init__(self, table, odds=()):
        self.table, self.odds, self.rows, self.device = table, dict(odds), [], "cpu"
        self.config = Qwen3Config(num_hidden_layers=1)
        self.generation_config = SimpleNamespace(eos_token_id=[9])

    def __call__(self, ids, **_):
        self.rows.append(len(ids))
        logits = torch.full((*ids.shape, 10), -torch.inf)
        for row, tokens in enumerate(ids.tolist()):
            for at, token in enumerate(tokens):
                for follower, share in self.odds.get(token, {self.table.get(token, 0): 1.0}).items():
                    logits[row, at, follower] = float(np.log(share))
        return SimpleNamespace(logits=logits)


class Words:
    """A tokenizer of ten words."""

    words = ("?", " is", " Paris", " the", " city", " of", ".", "ian", " Rome", "")

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.words[token] for token in ids)


QUESTION = Prompt("q", "… is", (5, 1), (), (0,))


def test_draws_have_the_models_shares_and_do_not_hang_on_who_is_drawn_beside(monkeypatch):
    monkeypatch.setattr(writing, "BATCH_TOKENS", 300)
    model = Chain({}, {1: {2: 0.7, 8: 0.3}})
    draws = [(QUESTION, draw) for draw in range(1, 601)]
    found = write(model, Words(), draws, 1, seed=5)
    assert 0.64 < list(found.values()).count(" Paris") / 600 < 0.76
    assert max(model.rows) == 1 and len(model.rows) == 6  # one question, in batches of a hundred texts
    assert found == write(model, Words(), draws, 1, seed=5)
    assert [found[draw] for draw in draws[7:9]] == list(write(model, Words(), draws[7:9], 1, seed=5).values())
    assert found != write(model, Words(), draws, 1, seed=6)


def test_what_is_done_leaves_the_batch_and_a_question_is_run_once_for_its_draws():
    other = QUESTION._replace(name="other", ids=(5, 5, 5, 3))
    model = Chain({1: 2, 2: 6, 3: 4, 4: 5})
    write(model, Words(), [(QUESTION, 0), (QUESTION, 1), (other, 0)], 4, lambda _, text: "Paris." in text)
    assert model.rows == [2, 3, 1, 1]


@pytest.mark.parametrize("kind", HYBRIDS)
def test_padding_and_shared_questions_change_no_text(kind):
    """Each is what the model writes after that question alone, also with linear attention or a window."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = make(kind, **HYBRIDS[kind])
    model.generation_config.eos_token_id = [7]
    draw = torch.Generator().manual_seed(3)
    asked = [
        Prompt(str(length), "", tuple(torch.randint(3, 1900, (length,), generator=draw).tolist()), (), (0,))
        for length in (5, 19, 11)
    ]
    draws = [(prompt, number) for prompt in asked for number in range(3)]
    together = write(model, tokenizer, draws, 8)
    for one in draws:
        assert write(model, tokenizer, [one], 8)[one] == together[one]
    for prompt in asked:
        ids = torch.tensor([prompt.ids])
        own = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        greedy = tokenizer.decode(own[0, len(prompt.ids) :], skip_special_tokens=True)
        assert greedy == together[prompt, 0]
