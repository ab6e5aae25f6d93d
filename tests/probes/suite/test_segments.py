"""Optimal segmentation: planted stages are found, and the dynamic programme agrees with trying everything."""

import itertools

import numpy as np
import pytest

from probes.suite.segments import segment


def planted(lengths, within, between):
    labels = np.repeat(np.arange(len(lengths)), lengths)
    similarity = np.where(labels[:, None] == labels, within, between)
    np.fill_diagonal(similarity, 1.0)
    return similarity


@pytest.mark.parametrize("lengths", [(6,), (3, 5), (2, 7, 3), (1, 4, 4, 1)])
def test_planted_stages_are_found(lengths):
    found = segment(planted(lengths, 0.99, 0.5), 0.9)
    assert found.starts == tuple(int(start) for start in np.cumsum((0, *lengths[:-1])))


def test_the_penalty_means_the_threshold_for_one_odd_layer_beside_a_long_stage():
    for similarity, stages in ((0.88, 2), (0.92, 1)):
        assert len(segment(planted((1, 200), 1.0, similarity), 0.9).starts) == stages


def scatter(similarity, starts):
    total = 0.0
    for start, end in itertools.pairwise((*starts, len(similarity))):
        block = similarity[start:end, start:end]
        total += np.trace(block) - block.sum() / (end - start)
    return total


def test_it_is_the_best_of_all_segmentations():
    layers = 9
    vectors = np.random.default_rng(0).standard_normal((layers, 4)).cumsum(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    found = segment(similarity, 0.9)
    cuts = [(0, *rest) for size in range(layers) for rest in itertools.combinations(range(1, layers), size)]
    best = min(cuts, key=lambda starts: scatter(similarity, starts) + found.penalty * len(starts))
    assert found.starts == best
    for stages in range(1, layers + 1):
        least = min(scatter(similarity, starts) for starts in cuts if len(starts) == stages)
        assert found.scatter[stages - 1] == pytest.approx(least, abs=1e-12)
