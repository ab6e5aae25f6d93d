"""What search and cards need of every direction, as compact as JSON can hold it.

Directions are numbered as rows, 0 … R − 1. Tokens stand in one table of strings; arrays are base64 of little-endian
numbers, uint32 (`tokens`, `rows`), int32 (`place`) and float32 (the rest).
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vindex.beside import SIDES
from vindex.chance import cluster_of
from vindex.errors import QueryError
from vindex.format import GATE, META_TOP_K, PLACES, RESPONSE_META, RESPONSE_TEXTS, SIGMA
from vindex.progress import Progress, silent
from vindex.reader import Vindex
from vindex.responses import AFTER, BEFORE
from vindex.untrained import untrained

MOST_TOKENS = 2_000_000  # in the page; with more directions than that allows, poles are shortened
MOST_PLACES = 500_000  # of either sign
MOST_COMPARED = 12_000  # directions whose neighbours are found beforehand
NEAREST = 5
NO_TOKEN = (1 << 32) - 1
BLOCK = 256


def directions(v: Vindex, progress: Progress = silent) -> dict[str, Any]:
    """Layers, spectra, tokens of every pole, coherence, clusters, neighbours; what is missing, in one line each."""
    advance = progress("directions", v.index.num_layers)
    missing: dict[str, str] = {}

    def unless_missing(name: str, made: Callable[[], Any]) -> Any:
        try:
            return made()
        except QueryError as error:
            missing[name] = str(error)
            return None

    coherence = unless_missing("coherence", lambda: _coherence(v, advance))
    response = unless_missing("response", lambda: _responses(v))
    snippets = unless_missing("snippets", lambda: _snippets(v))
    ids, scores = _poles(v)
    if snippets:
        ids["texts"] = v.array(RESPONSE_TEXTS)
    known = np.unique(np.concatenate([np.empty(0, np.uint32), *(of.reshape(-1) for of in ids.values())]))
    tokens = {name: _base64(np.searchsorted(known, of).astype("<u4")) for name, of in ids.items()}
    poles = 1 if v.family.one_pole else 2
    return {
        "name": v.path.name,
        "neurons": v.family.neurons,
        "rows": v.index.num_rows,
        "layers": [[v.index.first_row(e.layer), e.groups, e.features, e.num_experts or 0] for e in v.index.layers],
        "strings": ["" if one == NO_TOKEN else v.piece(int(one)) for one in known],
        "sides": {side: {"tokens": tokens[side], "scores": _base64(of)} for side, of in scores.items()},
        "poles": poles,
        "pole": max((of.shape[1] // poles for of in scores.values()), default=0),
        "sigma": _base64(v.singular_values.astype("<f4")) if v.has(SIGMA) else None,
        "coherence": coherence,
        "untrained": _untrained(v, known) if coherence else [],
        "response": response,
        "snippets": snippets and {**snippets, "texts": tokens["texts"]},
        "clusters": _clusters(v) if v.has(SIGMA) else {side: [] for side in ("gate", "down")},
        "nearest": unless_missing("nearest", lambda: _nearest(v, progress)),
        "missing": missing if not v.family.title else {"more": "the top of the page says what this vindex lacks"},
    }


def _base64(numbers: np.ndarray) -> str:
    return b64encode(numbers.tobytes()).decode()


def _poles(v: Vindex) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Ids of tokens and their scores, of each side: (R, kept), or (R, 2 · kept) where the vindex has both poles."""
    sides = {side: spec for side, spec in SIDES.items() if v.has(spec)}
    sides |= {"response": RESPONSE_META} if v.index.has_responses else {}
    poles = 1 if v.family.one_pole else 2
    ids, scores = {}, {}
    for side, spec in sides.items():
        records = np.concatenate([v.meta_records(spec, entry.layer)[1]["tokens"] for entry in v.index.layers])
        pole = records.shape[1] // poles
        kept = max(1, min(META_TOP_K // 2, pole, MOST_TOKENS // (2 * len(sides) * v.index.num_rows)))
        shown = np.concatenate([records[:, at * pole : at * pole + kept] for at in range(poles)], axis=1)
        ids[side], scores[side] = shown["token_id"], shown["score"].astype("<f4")
        if v.family.one_pole:  # where LARQL leaves places free, it writes zeros
            ids[side] = np.where((ids[side] == 0) & (scores[side] == 0), NO_TOKEN, ids[side])
    return ids, scores


def _coherence(v: Vindex, advance: Callable[[int], object]) -> str:
    """(R, 4) z of the coherence of each pole, in the order of `Coherence`."""
    found = []
    for layer in range(v.index.num_layers):
        found.append(v.coherences(layer)[1].T)
        advance(1)
    return _base64(np.concatenate(found).astype("<f4"))


def _untrained(v: Vindex, known: np.ndarray) -> list[int]:
    """The places among the known tokens of those that training never met."""
    at = np.flatnonzero(known < len(v.embeddings))
    never = v.vocabulary.in_no_text(len(v.embeddings))
    found = untrained(known[at], v.embeddings, v.statistics.centre, never)
    return [int(place) for place in at[found]]


def _responses(v: Vindex) -> dict[str, str]:
    """R² of every response and the larger of its two nulls, each (R,)."""
    stats = v.response_stats
    figures = {"r2": stats.r2, "null": np.maximum(stats.null, stats.random)}
    return {name: _base64(np.nan_to_num(figure.reshape(-1)).astype("<f4")) for name, figure in figures.items()}


def _snippets(v: Vindex) -> dict[str, Any]:
    """Where in the texts each direction is read most, (R, 2 · kept), + before −; without the texts' tokens."""
    found = v.places
    kept = max(1, min(PLACES, MOST_PLACES // v.index.num_rows))
    shown = [*range(kept), *range(PLACES, PLACES + kept)]
    return {
        "names": [Path(name).stem for name in found.names],
        "tokens": found.texts.shape[1],
        "window": [BEFORE, AFTER],
        "place": _base64(found.place[:, shown].astype("<i4")),
        "z": _base64(found.z[:, shown].astype("<f4")),
    }


def _clusters(v: Vindex) -> dict[str, list[list[int]]]:
    """First and last row of every two or more directions of nearly equal σ, by side."""
    found: dict[str, list[list[int]]] = {"gate": [], "down": []}
    for entry in v.index.layers:
        sigmas = v.layer(entry.layer)
        for side, group in ((side, group) for side in found for group in range(entry.groups)):
            certificate = v.certificate(entry.layer, side, group if entry.num_experts else None)
            sigma, first = (
                getattr(sigmas, f"{side}_sigma")[group],
                v.index.first_row(entry.layer) + group * entry.features,
            )
            at = 0
            while at < len(sigma):
                together = cluster_of(sigma, at, certificate.max_residual)
                if len(together) > 1:
                    found[side].append([first + together[0], first + together[-1]])
                at = together.stop
    return found


def _nearest(v: Vindex, progress: Progress) -> dict[str, str]:
    """Of each gate direction the NEAREST others by |cosine|: rows and cosines, each (R, NEAREST)."""
    count = v.index.num_rows
    if count > MOST_COMPARED:
        raise QueryError(f"{count:,} directions are too many to compare each with each: vindex feature compares one")
    every = v.gate.reshape(count, -1).astype(np.float32)
    if not np.isfinite(every).all():
        raise QueryError(f"{GATE.name} holds a number that is not finite")
    every /= np.maximum(np.linalg.norm(every, axis=1, keepdims=True), 1e-30)
    kept = min(NEAREST, count - 1)
    rows, cosines = np.empty((count, kept), "<u4"), np.empty((count, kept), "<f4")
    advance = progress("neighbours", count)
    for first in range(0, count, BLOCK):
        block = every[first : first + BLOCK] @ every.T
        at = np.arange(len(block))
        block[at, first + at] = 0.0
        best = np.argpartition(-np.abs(block), kept - 1, axis=1)[:, :kept] if kept else np.empty((len(block), 0), int)
        best = np.take_along_axis(best, np.argsort(-np.abs(np.take_along_axis(block, best, axis=1)), axis=1), axis=1)
        rows[first : first + BLOCK], cosines[first : first + BLOCK] = best, np.take_along_axis(block, best, axis=1)
        advance(len(block))
    return {"rows": _base64(rows), "cosines": _base64(cosines)}
