"""Questions to a vindex that its directions answer: cosines, features and their neighbours."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from vindex import scoring
from vindex.errors import QueryError
from vindex.format import DOWN_META, EMBEDDINGS, GATE, GATE_META, META_TOP_K, FileSpec
from vindex.records import Feature, FeatureHit, TokenScore
from vindex.responses import Responding

Query = str | int | Sequence[str | int] | np.ndarray
LENGTHS = (1e-4, 1e18)  # of a vector: what float32 can square, and what EPSILON does not change


class Questions(Responding):
    """The part of `Vindex` that answers by cosines."""

    def token_id(self, token: str | int) -> int:
        """The id of a token given as its exact text (leading space included) or as an id.

        Raises QueryError when the text is not one token or the id is out of range.
        """
        token_id = self.vocabulary.id_of(token) if isinstance(token, str) else scoring.whole("token id", token)
        if not 0 <= token_id < self.index.vocab_size:
            raise QueryError(
                f"token id {token_id} is out of range: this model has ids 0 to {self.index.vocab_size - 1}"
            )
        return token_id

    def vector(self, query: Query) -> np.ndarray:
        """The query as float32 vectors: (H,) for a token or a vector, (B, H) for a list of tokens or a matrix.

        Raises QueryError for what is none of these, and for a vector that has no direction: zero or not finite.
        """
        if isinstance(query, np.ndarray) and query.dtype.kind == "f":
            return self._given(query)
        if isinstance(query, list | tuple) or (isinstance(query, np.ndarray) and query.ndim == 1):
            if not len(query):
                raise QueryError("expected a token or more, got none")
            return self._embedded(query)
        if isinstance(query, str | int | np.integer):
            return self._embedded([query])[0]
        got = f"array of {query.dtype}, shape {query.shape}" if isinstance(query, np.ndarray) else type(query).__name__
        raise QueryError(
            f"expected a token, a token id, a list of them, or float vectors of {self.index.hidden_size} numbers, "
            f"got {got}"
        )

    def _embedded(self, tokens: Sequence[str | int] | np.ndarray) -> np.ndarray:
        self.family.require(EMBEDDINGS)
        return self.embedding_rows([self.token_id(token) for token in tokens]).astype(np.float32)

    def _given(self, vectors: np.ndarray) -> np.ndarray:
        """(H,) or (B, H) as float32, each with a direction."""
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != self.index.hidden_size:
            raise QueryError(f"expected a vector of {self.index.hidden_size} numbers, got shape {vectors.shape}")
        lengths = np.linalg.norm(np.atleast_2d(vectors).astype(np.float64), axis=1)
        odd = np.flatnonzero(~((lengths >= LENGTHS[0]) & (lengths <= LENGTHS[1])))
        if len(odd):
            raise QueryError(
                f"a vector of length {lengths[odd[0]]:g} has no cosine here: expected finite numbers and a length from "
                f"{LENGTHS[0]:g} to {LENGTHS[1]:g}; scale it"
            )
        return vectors.astype(np.float32)

    def cosines(self, query: Query) -> np.ndarray:
        """Cosine of a token's embedding (or of a vector) with every gate direction.

        query: token text, token id, list of either, or float vector (H,) or (B, H).
        Returns float32 in the shape of `gate` without H, (L, F) or (R,), with B in front for a batch.
        Definition: the published `How to Use` code. Raises FormatError when a number of the vindex is not finite.
        """
        return scoring.cosines(self.gate, self.vector(query))

    def top_features(self, query: Query, k: int = 10) -> list[FeatureHit]:
        """The k features whose gate direction lies closest to the query, largest cosine first."""
        k = scoring.positive("k", k)
        vector = self.vector(query)
        if vector.ndim != 1:
            raise QueryError("top_features takes one token or vector at a time; use score() or cosines() for a batch")
        return self._hits(scoring.cosines(self.gate, vector), k)

    def nearest_features(self, layer: int, feature: int, k: int = 10, *, expert: int | None = None) -> list[FeatureHit]:
        """The k other features, of any layer and expert, whose gate directions lie closest to this one by |cosine|."""
        k, row = scoring.positive("k", k), self.row(layer, feature, expert)
        directions = self.gate.reshape(-1, self.index.hidden_size)
        scores = scoring.cosines(directions, directions[row].astype(np.float32))
        key = np.abs(scores)
        key[row] = -1.0  # comes last
        return self._hits(scores, min(k, len(key) - 1), key=key)

    def feature(self, layer: int, feature: int, *, expert: int | None = None) -> Feature:
        """One feature with both poles' tokens from gate_meta and down_meta; None for what the vindex does not have.

        What the direction reads is computed where no gate_meta.bin says it: the vocabulary's embeddings are read once.
        expert: which one, in a layer that is a mixture; E for its shared expert.
        Raises QueryError when one of them is out of range, or the layer needs an expert and none is given.
        """
        found = self.stored_feature(layer, feature, expert=expert)
        if found.reads is None:
            highest, lowest = self._read_by(self.row(layer, feature, expert))
            return found._replace(reads=highest, reads_against=lowest)
        return found

    def _read_by(self, row: int) -> tuple[list[TokenScore] | None, list[TokenScore] | None]:
        """The tokens along and against a gate direction, as gate_meta.bin has them; None without embeddings at hand."""
        try:
            tokens = self.embeddings[: len(self.vocabulary) if self.family.can_spell else None]
        except QueryError:  # it lacks them, or on the Hub they are too many to fetch
            return None, None
        direction = self.gate.reshape(-1, self.index.hidden_size)[row]
        cosines = scoring.cosines(tokens, direction, (EMBEDDINGS.name, GATE.name))
        poles = (scoring.largest(scores, META_TOP_K // 2) for scores in (cosines, -cosines))
        highest, lowest = ([TokenScore(of, self.piece(of), float(cosines[of])) for of in ids] for ids in poles)
        return highest, lowest

    def stored_feature(self, layer: int, feature: int, *, expert: int | None = None) -> Feature:
        """The same as `feature`, as far as it is stored: nothing is computed."""
        row = self.row(layer, feature, expert)
        layer, feature = int(layer), int(feature)
        poles = (*self._poles(GATE_META, layer, row), *self._poles(DOWN_META, layer, row))
        expert = None if expert is None else int(expert)
        response = self.response(layer, feature, expert=expert) if self.index.has_responses else None
        return Feature(layer, feature, *self.sigma(row), *poles, expert, response)

    def _hits(self, scores: np.ndarray, k: int, key: np.ndarray | None = None) -> list[FeatureHit]:
        found = scoring.largest(scores if key is None else key, k)
        return [self.hit(row, float(scores.flat[row])) for row in found]

    def hit(self, row: int, cosine: float) -> FeatureHit:
        """Row `row` of all R as layer, expert and rank, with a query's cosine."""
        layer = bisect_right(self.first_rows, row) - 1
        entry = self.index.layers[layer]
        group, feature = divmod(row - self.first_rows[layer], entry.features)
        return FeatureHit(layer, feature, cosine, self.sigma(row)[0], group if entry.num_experts else None)

    def _poles(self, spec: FileSpec, layer: int, row: int) -> tuple[list[TokenScore] | None, list[TokenScore] | None]:
        """None for a pole that the vindex does not keep."""
        if not self.has(spec):
            return None, None
        highest, lowest = self.poles(spec, layer, row)
        return highest, None if self.family.one_pole else lowest
