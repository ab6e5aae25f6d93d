"""Questions to a vindex whose answers stand beside chance; `Vindex` answers them (vindex/reader.py).

v.score(" Paris")            # gate directions by |z|, and what random directions reach
v.search("Paris")            # directions that hold the token at a pole
v.coherence(12, 3)           # how alike the tokens of its poles are
v.clusters(12, 3)            # directions that share its singular value
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from vindex import scoring
from vindex.chance import POLE, Statistics, alike, cluster_of, judge
from vindex.errors import FormatError, QueryError
from vindex.format import DOWN_META, GATE_META, GATE_PEAKS, GATE_STATS, MEAN_EMBEDDING, RANDOM_POLES, FileSpec
from vindex.questions import Questions
from vindex.records import Alike, Clusters, Coherence, Found
from vindex.scores import Best, Scores

SIDES = {"reads": GATE_META, "writes": DOWN_META}


class BesideChance(Questions):
    """The part of `Vindex` that judges scores."""

    @cached_property
    def statistics(self) -> Statistics:
        """What scores are judged by. Raises QueryError for a vindex that was built without."""
        stats, peaks, centre, poles = map(self.array, (GATE_STATS, GATE_PEAKS, MEAN_EMBEDDING, RANDOM_POLES))
        return Statistics(stats.reshape(2, -1), peaks, centre, poles)

    def score(self, query: Any, k: int = 10, *, by: str | None = None) -> Scores:
        """Which gate directions read a token or a vector, or each of several, beside chance (docs/scores.md).

        query: as for `cosines`. by: "z", largest |z| first, or "cosine", largest first, the published order; by default
        z, or cosine for a vindex without statistics, where hits have no z. Raises QueryError.
        """
        k, vectors = scoring.positive("k", k), self.vector(query)
        if by not in ("z", "cosine", None):
            raise QueryError(f"by {by!r}: expected 'z' or 'cosine'")
        one, batch = vectors.ndim == 1, np.atleast_2d(vectors)
        cosines = scoring.cosines(self.gate, batch)
        each = zip([query] if one else query, batch, cosines.reshape(len(batch), -1), strict=True)
        return Scores(self.id, cosines, tuple(self._best(*of, k, by) for of in each))

    def _best(self, query: Any, vector: np.ndarray, cosines: np.ndarray, k: int, by: str | None) -> Best:
        """Of one query: a token, its id, or the vector (H,) itself. cosines: (R,). Raises QueryError for a zero row."""
        if not vector.any():
            raise QueryError(f"token {self.token_id(query)} has no embedding: its row is zero; ask for another token")
        judged = judge(cosines, vector, self.statistics) if self.index.has_gate_stats or by == "z" else None
        by = by or ("z" if judged else "cosine")
        rows = scoring.largest(np.abs(judged.z) if judged and by == "z" else cosines, k)
        hits = [self.hit(row, float(cosines[row])) for row in rows]
        if judged:
            z = [float(judged.z[row]) for row in rows]
            hits = [hit._replace(z=of, chance=judged.chance(of)) for hit, of in zip(hits, z, strict=True)]
        features = tuple((self.stored_feature(hit.layer, hit.feature, expert=hit.expert), hit) for hit in hits)
        if isinstance(query, np.ndarray):
            return Best(None, None, None, features, by, judged)
        token_id = self.token_id(query)
        token = query if isinstance(query, str) else None
        return Best(token, token_id, self.piece(token_id), features, by, judged)

    def search(self, text: str, *, reads: bool = True, writes: bool = True) -> list[Found]:
        """Directions that hold a token at a pole: the text with a leading space and without, as far as each is a token.

        Reads before writes, each by |score|, largest first, as far as the vindex keeps the tokens of both. Raises
        LackingError when it keeps those of neither, QueryError when neither is a token.
        """
        wanted = [side for side, asked in zip(SIDES, (reads, writes), strict=True) if asked]
        sides = [side for side in wanted if self.has(SIDES[side])]
        if wanted and not sides:
            self.family.require(SIDES[wanted[0]])
        if not text:
            raise QueryError("expected a token, got an empty text")
        word = text.removeprefix(" ")
        ids = [found for found in map(self.vocabulary.find, (f" {word}", word)) if found is not None]
        if not ids:
            hint = self.vocabulary.hint(word) or "; try a shorter word"
            raise QueryError(f"neither {' ' + word!r} nor {word!r} is a single token of this model{hint}")
        return [found for side in sides for found in sorted(self._holding(side, ids), key=lambda one: -abs(one.score))]

    def _holding(self, side: str, ids: list[int]) -> list[Found]:
        found = []
        for entry in self.index.layers:
            tokens = self.meta_records(SIDES[side], entry.layer)[1]["tokens"]
            pole = tokens.shape[1] // (1 if self.family.one_pole else 2)
            held = np.isin(tokens["token_id"], ids)
            if self.family.one_pole:  # where LARQL leaves places free, it writes zeros
                held &= (tokens["token_id"] > 0) | (tokens["score"] != 0)
            for row, at in np.argwhere(held).tolist():
                token_id, score = tokens[row, at].tolist()
                group, feature = divmod(row, entry.features)
                sign, piece = "−" if at >= pole else "+", self.piece(token_id)
                place = Found(side, entry.layer, feature, sign, at % pole + 1, token_id, piece, score)
                found.append(place._replace(expert=group) if entry.num_experts else place)
        return found

    def clusters(self, layer: int, feature: int, *, expert: int | None = None) -> Clusters:
        """The directions whose singular values are nearly this one's, on either side: single ones are arbitrary."""
        row, entry = self.row(layer, feature, expert), self.index.layers[layer]
        sigma = self.singular_values.reshape(2, -1)[:, row - feature : row - feature + entry.features]
        sides = zip(("gate", "down"), sigma, strict=True)
        return Clusters(
            *(cluster_of(of, feature, self.certificate(layer, side, expert).max_residual) for side, of in sides)
        )

    def coherence(self, layer: int, feature: int, *, expert: int | None = None) -> Coherence:
        """How alike the tokens of the feature's four poles are. Raises QueryError without statistics or embeddings."""
        row = self.row(layer, feature, expert) - self.first_rows[layer]
        cosines, z = self.coherences(layer, slice(row, row + 1))[..., 0]
        return Coherence(*(Alike(float(cosine), float(of)) for cosine, of in zip(cosines, z, strict=True)))

    def coherences(self, layer: int, rows: slice = slice(None)) -> np.ndarray:
        """(2, 4, n) float32: mean cosines and z of the poles of a layer's rows, poles as in Coherence.

        Raises QueryError for a vindex without statistics or without embeddings.
        """
        self.family.require(GATE_STATS)
        found = []
        for side, spec in enumerate(SIDES.values()):
            ids = self.meta_records(spec, layer)[1]["tokens"]["token_id"][rows]
            mean, deviation = self._chance_coherence[side]
            for pole in (ids[:, : ids.shape[1] // 2], ids[:, ids.shape[1] // 2 :]):
                cosines = self._alike(pole, spec)
                found.append((cosines, (cosines - mean) / deviation))
        return np.stack(found, axis=1)

    @cached_property
    def _chance_coherence(self) -> np.ndarray:
        """(2, 2): of the poles of random directions, read and written, mean and standard deviation."""
        both = [self._alike(poles.reshape(-1, POLE), RANDOM_POLES) for poles in self.statistics.random_poles]
        return np.array([(of.mean(), of.std()) for of in both])

    def _alike(self, poles: np.ndarray, spec: FileSpec) -> np.ndarray:
        """(n,) mean cosine between the tokens of each pole (n, K) of a file. Raises FormatError where one is none."""
        count = len(self.embeddings)
        if poles.size and poles.max() >= count:
            raise FormatError(
                f"{spec.name} holds token id {poles.max()}, and there are {count} tokens; run vindex verify"
            )
        return alike(poles, self.embeddings, self.statistics.centre)
