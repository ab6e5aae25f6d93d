from __future__ import annotations

import numpy as np
import pytest
import torch

from extract.vocab import POLE, TopTokens, scores_of, unit_rows


@pytest.mark.parametrize("vocabulary, piece", [(15, 15), (300, 70), (5000, 1999), (4096, 4096)])
def test_running_extremes_equal_a_full_sort(vocabulary, piece):
    random = torch.Generator().manual_seed(vocabulary)
    scores = torch.randn(2, 5, vocabulary, generator=random)  # (L, F, V)
    top = TopTokens(10)
    for first in range(0, vocabulary, piece):
        for layer in range(2):
            top.update(5 * layer, scores[layer, :, first : first + piece], first)
    tokens = top.records()["tokens"].reshape(2, 5, -1)
    order = np.argsort(-scores.numpy(), axis=-1)
    np.testing.assert_array_equal(tokens["token_id"][..., :POLE], order[..., :POLE])
    np.testing.assert_array_equal(tokens["token_id"][..., POLE:], order[..., ::-1][..., :POLE])
    np.testing.assert_array_equal(tokens["score"][..., 0], scores.numpy().max(-1))
    np.testing.assert_array_equal(tokens["score"][..., POLE], scores.numpy().min(-1))


def test_equal_scores_give_the_lower_id_first():
    top = TopTokens(1)
    top.update(0, torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0] + [-1.0] * POLE]), 0)
    assert top.records()["tokens"]["token_id"][0, :5].tolist() == [1, 2, 4, 0, 3]


def test_scores_are_cosines_and_logits():
    directions, rows = torch.randn(3, 8), torch.randn(5, 8)
    expected = torch.nn.functional.cosine_similarity(directions[:, None], rows[None], dim=-1)
    torch.testing.assert_close(scores_of(unit_rows(directions), unit_rows(rows)), expected)
    torch.testing.assert_close(scores_of(directions, rows), torch.einsum("fh,nh->fn", directions, rows))
    assert not unit_rows(torch.zeros(1, 8)).any()
    assert not scores_of(unit_rows(torch.zeros(1, 8)), unit_rows(rows)).any()
