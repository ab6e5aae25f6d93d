"""The statistics of a vindex, computed another way than the build does: a sample of them, from the embeddings it holds.

The build accumulates in float32, block by block, from the embeddings as the source stores them. Here a few directions
meet all embeddings at once in float64, a few tokens meet all directions, and a few random directions are sorted. The
float16 of embeddings.bin is the difference that may remain.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vindex.chance import POLE, Statistics, random_directions, sampled_tokens
from vindex.errors import VindexError
from vindex.format import (
    GATE_PEAKS,
    GATE_STATS,
    MEAN_EMBEDDING,
    PLACES,
    RANDOM_POLES,
    RESPONSE_META,
    RESPONSE_PLACES,
    RESPONSE_STATS,
    RESPONSE_TEXTS,
    RESPONSES,
    SAMPLE,
)
from vindex.index import FINAL_NORM
from vindex.reader import Vindex
from vindex.verification import Check

DIRECTIONS, TOKENS, RANDOM = 12, 8, 4  # how many are recomputed
EMBEDDED = "embed_tokens"  # of index.json projection.down_meta: the vindex holds the matrix itself
UNIT = 2e-3  # how far float16 rounding leaves a length from 1
ROWS = 1 << 13  # embeddings at a time
TOLERANCE = 2e-3  # of a mean, a deviation or a |z|, in deviations; of a component of the mean embedding, in its length


def statistics(v: Vindex) -> Iterator[Check]:
    """Checks of the optional files; of a vindex without embeddings only what needs none."""
    try:
        tokens, found = min(v.index.vocab_size, len(v.vocabulary)), v.statistics
    except VindexError as error:
        yield Check("statistics in range", False, str(error))
        return
    sane = _in_range(found, tokens)
    yield sane
    if not sane.holds or not v.index.has_embeddings:
        return
    gate = v.gate.reshape(-1, v.index.hidden_size)
    rows = np.unique(np.linspace(0, len(gate) - 1, DIRECTIONS).astype(int))
    directions = np.concatenate([gate[rows], random_directions(v.index.hidden_size)[:RANDOM]]).astype(np.float64)
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    directions = np.divide(directions, lengths, out=np.zeros_like(directions), where=lengths > 0)
    cosines, centre = np.empty((len(directions), tokens), np.float32), np.zeros(v.index.hidden_size)
    for first in range(0, tokens, ROWS):
        unit = _unit(v.embeddings[first : min(first + ROWS, tokens)])
        cosines[:, first : first + len(unit)] = directions @ unit.T
        centre += unit.sum(axis=0) / tokens
    yield _means(found, rows, cosines[: len(rows)].astype(np.float64))
    away = float(np.abs(found.centre - centre).max() / max(np.linalg.norm(centre), 1e-30))
    yield Check(f"{MEAN_EMBEDDING.name} recomputed", away <= TOLERANCE, f"largest difference {away:.1e} of its length")
    yield _peaks(v, found, tokens)
    yield _poles(found, cosines[len(rows) :])


def responses(v: Vindex) -> Iterator[Check]:
    """Checks of the responses' files; their tokens only where the vindex holds what makes them."""
    yield _response_stats(v)
    if v.index.projection.down_meta == EMBEDDED and v.index.has_embeddings:
        yield _response_tokens(v)
    if v.index.response_texts is not None:
        yield _response_places(v)


def _response_stats(v: Vindex) -> Check:
    what, found = RESPONSE_STATS.name, v.response_stats
    shares = np.stack(found[:3])
    if (shares < 0).any() or (shares > 1).any():
        return Check(what, False, "an R² is not from 0 to 1")
    if (found.slope < 0).any() or (found.tokens < 0).any() or (found.tokens % 1).any():
        return Check(what, False, "a slope is negative, or a number of tokens is none")
    rows, slope = v.responses.reshape(-1, v.index.hidden_size), found.slope.reshape(-1)
    for first in range(0, len(rows), ROWS):
        lengths = np.linalg.norm(rows[first : first + ROWS].astype(np.float32), axis=1)
        wrong = np.flatnonzero(np.abs(lengths - (slope[first : first + ROWS] > 0)) > UNIT)
        if len(wrong):
            return Check(what, False, f"{RESPONSES.name} row {first + wrong[0]} has length {lengths[wrong[0]]:.3g}")
    return Check(what, True, f"{(slope > 0).sum():,} responses, every one of length 1")


def _response_tokens(v: Vindex) -> Check:
    """Of a few responses: the tokens at a pole score what the best of all score."""
    what, tokens = f"{RESPONSE_META.name} recomputed", min(v.index.vocab_size, len(v.vocabulary))
    try:
        layers = [v.meta_records(RESPONSE_META, layer)[1]["tokens"] for layer in range(v.index.num_layers)]
    except VindexError as error:
        return Check(what, False, str(error))
    stored = np.concatenate(layers)
    if (stored["token_id"] >= tokens).any():
        return Check(what, False, f"expected token ids below {tokens}")
    rows = np.unique(np.linspace(0, len(stored) - 1, DIRECTIONS).astype(int))
    scaled = v.responses.reshape(-1, v.index.hidden_size)[rows] * v.norms[FINAL_NORM].astype(np.float32)
    scores = np.concatenate(
        [v.embeddings[at : min(at + ROWS, tokens)].astype(np.float32) @ scaled.T for at in range(0, tokens, ROWS)]
    ).T
    worst, half = 0.0, stored.shape[1] // 2
    for found, own in zip(scores, stored[rows], strict=True):
        order = np.sort(found)
        best = np.concatenate([order[::-1][:half], order[: stored.shape[1] - half]])
        gap = np.abs(np.stack([own["score"], found[own["token_id"]]]) - best).max()
        worst = float(np.maximum(worst, gap / max(found.std(), 1e-6)))  # max would drop a NaN
    return Check(what, worst <= 5 * TOLERANCE, f"{len(rows)} responses; largest difference {worst:.1e} deviations")


def _response_places(v: Vindex) -> Check:
    what, texts = RESPONSE_PLACES.name, v.array(RESPONSE_TEXTS)
    if (texts >= v.index.vocab_size).any():
        return Check(what, False, f"{RESPONSE_TEXTS.name}: expected token ids below {v.index.vocab_size}")
    place, z = v.array(RESPONSE_PLACES).reshape(2, -1, 2, PLACES)
    if not ((place >= -1) & (place < texts.size) & (place % 1 == 0)).all():
        return Check(what, False, f"a place is none of the texts' {texts.size:,} tokens")
    size = z * np.array([[1.0], [-1.0]])
    if ((size > 0) != (place >= 0)).any() or (np.diff(size) > 0).any():
        return Check(what, False, "a z is of the other sign, or not the strongest first")
    ordered = np.sort(place.reshape(len(place), -1))
    if ((np.diff(ordered) == 0) & (ordered[:, 1:] >= 0)).any():
        return Check(what, False, "a place stands twice")
    return Check(what, True, f"{(place >= 0).sum():,} places in {len(texts)} texts of {texts.shape[1]} tokens")


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _in_range(found: Statistics, tokens: int) -> Check:
    what = "statistics in range"
    if (np.abs(found.gate) > 1.001).any() or (found.gate[1] < 0).any():
        return Check(what, False, f"{GATE_STATS.name}: a mean or a deviation is none of cosines")
    if (found.peaks < 0).any():
        return Check(what, False, f"{GATE_PEAKS.name}: a largest |z| is negative")
    if (found.random_poles >= tokens).any():
        return Check(what, False, f"{RANDOM_POLES.name}: expected token ids below {tokens}")
    return Check(what, True, f"{found.gate.shape[1]:,} directions, {SAMPLE:,} tokens")


def _means(found: Statistics, rows: np.ndarray, cosines: np.ndarray) -> Check:
    """cosines: (n, T) of the rows with every token."""
    what, fresh = f"{GATE_STATS.name} recomputed", np.stack([cosines.mean(axis=1), cosines.std(axis=1)])
    off = np.abs(found.gate[:, rows] - fresh) / np.maximum(fresh[1], 1e-6)
    wrong = np.flatnonzero((off > TOLERANCE).any(axis=0))
    if len(wrong):
        stored, expected = found.gate[:, rows[wrong[0]]], fresh[:, wrong[0]]
        said = ", ".join(
            f"{name} {a:.4g} and not {b:.4g}"
            for name, a, b in zip(("mean", "deviation"), stored, expected, strict=True)
        )
        return Check(what, False, f"row {rows[wrong[0]]} has {said}")
    return Check(what, True, f"{len(rows)} directions; largest difference {off.max():.1e} deviations")


def _peaks(v: Vindex, found: Statistics, tokens: int) -> Check:
    """A few tokens with every direction; the largest |z| by layer."""
    what, places = f"{GATE_PEAKS.name} recomputed", np.linspace(0, SAMPLE - 1, TOKENS).astype(int)
    unit, worst = _unit(v.embeddings[sampled_tokens(tokens)[places]]).astype(np.float32), 0.0
    for layer, entry in enumerate(v.own_index.layers):
        first = v.index.first_row(layer)
        mean, deviation = found.gate[:, first : first + entry.num_features]
        size = np.abs(v.layer(layer).gate.reshape(entry.num_features, -1).astype(np.float32) @ unit.T - mean[:, None])
        fresh = np.divide(size, deviation[:, None], out=np.zeros_like(size), where=deviation[:, None] > 0).max(axis=0)
        off = np.abs(found.peaks[layer, places] - fresh) / np.maximum(fresh, 1.0)
        if not off.max() <= 5 * TOLERANCE:  # directions in float16 are of length one to 5e-4, and z may be ten
            at = places[off.argmax()]
            return Check(
                what,
                False,
                f"layer {layer}, token {at} has {found.peaks[layer, at]:.4g} and not {fresh[off.argmax()]:.4g}",
            )
        worst = max(worst, float(off.max()))
    return Check(what, True, f"{TOKENS} tokens in every layer; largest relative difference {worst:.1e}")


def _poles(found: Statistics, cosines: np.ndarray) -> Check:
    """Of the first random directions, (n, T) cosines: a pole's tokens score what the ten best of all score."""
    ids = found.random_poles[0, : len(cosines)]
    worst = 0.0
    for scores, of in zip(cosines, ids, strict=True):
        for sign, pole in ((1, of[:POLE]), (-1, of[POLE:])):
            best = np.sort(sign * scores)[::-1][: len(pole)]
            worst = max(worst, float(np.abs(sign * scores[pole] - best).max() / max(scores.std(), 1e-6)))
    held = worst <= 5 * TOLERANCE
    return Check(
        f"{RANDOM_POLES.name} recomputed", held, f"{len(cosines)} directions; largest difference {worst:.1e} deviations"
    )
