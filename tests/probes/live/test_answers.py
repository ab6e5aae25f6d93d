from __future__ import annotations

import pytest

from probes.live.answers import given, goes_on
from probes.live.load import load
from vindex.demo import CHECKPOINT


@pytest.fixture(scope="module")
def atlas():
    return load(CHECKPOINT, dtype="float32")


def pairs(tokenizer, *texts: str) -> list[tuple[list[int], list[int]]]:
    return [tuple(tokenizer(part).input_ids for part in text.split("|")) for text in texts]


def test_an_answer_is_given_where_greedy_decoding_writes_it(atlas):
    texts = ("The capital of France is| Paris", "The capital of France is| Rome", "70+83=|153")
    paris, rome, total = given(atlas.model, atlas.tokenizer, pairs(atlas.tokenizer, *texts), batch_size=2)
    assert paris.greedy and total.greedy and not rome.greedy
    assert paris.probability > 0.9 and rome.probability < 0.01


def test_a_number_that_goes_on_is_not_given(atlas):
    (part,) = given(atlas.model, atlas.tokenizer, pairs(atlas.tokenizer, "70+83=|15"))
    assert part.probability > 0.9 and not part.greedy


class Metaspace:
    """As SentencePiece's decoders do it: a piece that begins with ▁ loses its space in first place alone."""

    def decode(self, ids):
        return "".join(("▁3", "▁7", "7", ".")[one] for one in ids).replace("▁", " ").removeprefix(" ")


def test_a_digit_after_a_space_is_another_number():
    assert [goes_on(Metaspace(), [0], after) for after in (1, 2, 3)] == [False, True, False]
    assert not goes_on(Metaspace(), [3], 2)
