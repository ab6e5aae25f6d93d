"""Open a vindex: check that it is whole, then map. Nothing is guessed, copied or filled in.

v = vindex.open("qwen3-0.6b.vindex")
v.gate.shape                     # (L, F, H) float16, read-only memory map
v.layer(3).gate.shape            # (groups, F, H): groups are a mixture's experts, else 1
v.score([" Paris", " Berlin"])   # which features read them: .rows(), .record(), .cosines
v.cosines(" Paris").shape        # (L, F)
v.top_features(" Paris", k=5)
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vindex import places, scoring
from vindex.beside import BesideChance
from vindex.checksums import load_sums, settle, vindex_id
from vindex.errors import FormatError, QueryError
from vindex.files import opened
from vindex.format import (
    DOWN,
    DOWN_META,
    EMBEDDINGS,
    GATE,
    GATE_META,
    META_COUNT,
    META_HEADER,
    META_MAGIC,
    META_VERSION,
    NORMS,
    ROUTER,
    SHARED_GATES,
    SIGMA,
    TOKENIZER,
    FileSpec,
    meta_offset,
    meta_record,
)
from vindex.index import Index, LayerEntry, load_index
from vindex.info import facts_of
from vindex.manifest import Certificate, Manifest, load_manifest
from vindex.norms import Norms
from vindex.records import Feature, FeatureHit, LayerFrames, TokenScore
from vindex.responses import Responding
from vindex.tokens import Vocabulary, load_vocabulary
from vindex.whole import OF_NUMBERS, check_files

Query = str | int | Sequence[str | int] | np.ndarray
LENGTHS = (1e-4, 1e18)  # of a vector: what float32 can square, and what EPSILON does not change


class Vindex(BesideChance, Responding):
    """A vindex on disk, as read-only memory maps. Use `vindex.open(path)`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digests = load_sums(path)
        self.index: Index = load_index(path)
        self.size_bytes = check_files(path, self.index, self.digests)
        """Of all its files."""
        self._meta = cache(self._map_meta)

    def __repr__(self) -> str:
        i = self.index
        experts = f"{i.num_experts} experts × " if i.num_experts else ""
        features = f"{i.num_features_per_expert or i.num_feats} features"
        return f"<vindex {self.id} of {i.model}: {i.num_layers} layers × {experts}{features} × {i.hidden_size}>"

    @property
    def id(self) -> str:
        """First 8 hex digits of the SHA-256 over the payload's checksum lines."""
        return vindex_id(self.digests)

    @cached_property
    def manifest(self) -> Manifest:
        """Provenance: source, options, certificates, versions."""
        return load_manifest(self.path)

    def info(self) -> dict[str, Any]:
        """What `vindex info --json` prints: shape, source, certificates and size as plain values."""
        return {"id": self.id, **facts_of(self.index, self.manifest), "size_bytes": self.size_bytes}

    @cached_property
    def _certificates(self) -> dict[tuple[int, str, int | None], Certificate]:
        return {(of.layer, of.projection, of.expert): of for of in self.manifest.certificates}

    def certificate(self, layer: int, side: str, expert: int | None = None) -> Certificate:
        """How well the directions of one weight are known. side: "gate" or "down". Raises QueryError."""
        found = self._certificates.get((layer, side, expert))
        if found is None:
            raise QueryError(
                f"{self.path.name} has no certificate of {side} of layer {layer}"
                + ("" if expert is None else f", expert {expert}")
            )
        return found

    @cached_property
    def gate(self) -> np.ndarray:
        """(L, F, H) float16 unit rows: what gate_proj reads, largest singular value first.

        In a mixture F counts the rows of all experts of a layer; `layer` gives them by expert. Where some layers have
        other numbers of rows (dense ones in a mixture) the shape is (R, H), all layers' rows in order.
        """
        return self.array(GATE)

    @cached_property
    def down(self) -> np.ndarray:
        """float16 unit rows: what down_proj writes, largest singular value first; in the shape of `gate`."""
        return self.array(DOWN)

    @cached_property
    def singular_values(self) -> np.ndarray:
        """(2, L, F) or (2, R) float32: row 0 gate_proj, row 1 down_proj."""
        return self.array(SIGMA)

    def layer(self, layer: int) -> LayerFrames:
        """One layer's directions and singular values, by expert. Raises QueryError when out of range."""
        layer = self._in_range("layer", layer, self.index.num_layers)
        entry, first = self.index.layers[layer], self.index.first_row(layer)
        rows = slice(first, first + entry.num_features)
        gate, down = (frames.reshape(-1, self.index.hidden_size)[rows] for frames in (self.gate, self.down))
        sigma = self.singular_values.reshape(2, -1)[:, rows].reshape(2, entry.groups, entry.features)
        shape = (entry.groups, entry.features, self.index.hidden_size)
        return LayerFrames(gate.reshape(shape), down.reshape(shape), *sigma)

    def router(self, layer: int) -> np.ndarray:
        """(E, H) float16 router weights of one layer. Raises QueryError when the layer has no experts."""
        entry = self._mixture(layer)
        first, size = self.index.router_offset(entry.layer), (entry.num_experts or 0) * self.index.hidden_size
        return self.array(ROUTER)[first : first + size].reshape(-1, self.index.hidden_size)

    def shared_expert_gate(self, layer: int) -> np.ndarray:
        """(H,) float16 vector whose sigmoid scales the shared expert. Raises QueryError when there is none."""
        mixture = self._mixture(layer)
        if not mixture.num_shared_experts:
            raise QueryError(f"layer {layer} of {self.path.name} has no shared expert")
        before = sum(bool(entry.num_shared_experts) for entry in self.index.layers[: mixture.layer])
        return self.array(SHARED_GATES)[before]

    def _mixture(self, layer: int) -> LayerEntry:
        entry = self.index.layers[self._in_range("layer", layer, self.index.num_layers)]
        if not entry.num_experts:
            raise QueryError(f"layer {layer} of {self.path.name} is dense: it has no experts and no router")
        return entry

    @cached_property
    def embeddings(self) -> np.ndarray:
        """(V, H) float16 token embeddings. Raises QueryError when the vindex was built without them."""
        if not self.index.has_embeddings:
            raise QueryError(
                f"{self.path.name} was built with --no-embeddings: pass a vector of {self.index.hidden_size} numbers, "
                "or rebuild without that option"
            )
        return self.array(EMBEDDINGS)

    @cached_property
    def norms(self) -> Norms:
        """Norm scales by name, float16, e.g. norms["layers.0.input_layernorm"]; the last is "norm".

        They are what the normalised vector is multiplied by: 1 + weight in families that store it zero-centred.
        """
        return Norms(self.array(NORMS), self.index.norms)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Token pieces and ids of the model's tokenizer.json."""
        return load_vocabulary(self.path / TOKENIZER.name)

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
            return self.embeddings[[self.token_id(token) for token in query]].astype(np.float32)
        if isinstance(query, str | int | np.integer):
            return self.embeddings[self.token_id(query)].astype(np.float32)
        got = f"array of {query.dtype}, shape {query.shape}" if isinstance(query, np.ndarray) else type(query).__name__
        raise QueryError(
            f"expected a token, a token id, a list of them, or float vectors of {self.index.hidden_size} numbers, "
            f"got {got}"
        )

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
        Definition: the published `How to Use` code.
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
        scores[row] = 0.0
        return self._hits(scores, k, key=np.abs(scores))

    def feature(self, layer: int, feature: int, *, expert: int | None = None) -> Feature:
        """One feature with both poles' tokens from gate_meta and down_meta.

        expert: which one, in a layer that is a mixture; E for its shared expert.
        Raises QueryError when one of them is out of range, or the layer needs an expert and none is given.
        """
        row = self.row(layer, feature, expert)
        layer, feature = int(layer), int(feature)
        poles = (*self.poles(GATE_META, layer, row), *self.poles(DOWN_META, layer, row))
        gate_sigma, down_sigma = (float(sigma) for sigma in self.singular_values.reshape(2, -1)[:, row])
        expert = None if expert is None else int(expert)
        response = self.response(layer, feature, expert=expert) if self.index.has_responses else None
        return Feature(layer, feature, gate_sigma, down_sigma, *poles, expert, response)

    def _hits(self, scores: np.ndarray, k: int, key: np.ndarray | None = None) -> list[FeatureHit]:
        found = scoring.largest(scores if key is None else key, k)
        return [self.hit(row, float(scores.flat[row])) for row in found]

    def hit(self, row: int, cosine: float) -> FeatureHit:
        """Row `row` of all R as layer, expert and rank, with a query's cosine."""
        layer = bisect_right(self._first_rows, row) - 1
        entry = self.index.layers[layer]
        group, feature = divmod(row - self._first_rows[layer], entry.features)
        sigma = float(self.singular_values.reshape(2, -1)[0, row])
        return FeatureHit(layer, feature, cosine, sigma, group if entry.num_experts else None)

    @cached_property
    def _first_rows(self) -> list[int]:
        return [self.index.first_row(layer) for layer in range(self.index.num_layers)]

    def row(self, layer: int, feature: int, expert: int | None) -> int:
        """Which of the R rows a feature is."""
        layer = self._in_range("layer", layer, self.index.num_layers)
        entry = self.index.layers[layer]
        feature = self._in_range("feature", feature, entry.features)
        if expert is None and entry.num_experts:
            shared = f", {entry.num_experts} for the shared one" if entry.num_shared_experts else ""
            raise QueryError(
                f"layer {layer} of {self.path.name} has experts: say which one, 0 to {entry.num_experts - 1}{shared}"
            )
        if expert is not None:
            self._mixture(layer)
            expert = self._in_range("expert", expert, entry.groups)
        return self._first_rows[layer] + (expert or 0) * entry.features + feature

    def _in_range(self, what: str, value: Any, count: int) -> int:
        number = scoring.whole(what, value)
        if not 0 <= number < count:
            raise QueryError(f"{what} {number} is out of range: {self.path.name} has {what}s 0 to {count - 1}")
        return number

    def meta_records(self, spec: FileSpec, layer: int) -> tuple[int, np.ndarray]:
        """(the count that precedes them, records) of one layer in a meta file; see format.meta_record."""
        content, place = self._meta(spec), meta_offset(self.index, layer)
        count = np.frombuffer(content, META_COUNT, count=1, offset=place)[0]
        features, record = self.index.layers[layer].num_features, meta_record(self.index.down_top_k)
        return int(count), np.frombuffer(content, record, count=features, offset=place + META_COUNT.itemsize)

    def poles(self, spec: FileSpec, layer: int, row: int) -> tuple[list[TokenScore], list[TokenScore]]:
        """The tokens that a meta file has of one of all R rows, at its one pole and at the other."""
        _, records = self.meta_records(spec, layer)
        tokens = [
            TokenScore(int(token_id), self.vocabulary.piece(int(token_id)), float(score))
            for token_id, score in records[row - self._first_rows[layer]]["tokens"]
        ]
        return tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]

    def array(self, spec: FileSpec) -> np.ndarray:
        """A binary of the format, mapped in the dtype and shape it has there."""
        assert spec.dtype and spec.shape
        return self._map_file(spec, np.dtype(spec.dtype), spec.shape(self.index))

    def _map_meta(self, spec: FileSpec) -> np.ndarray:
        i = self.index
        content = self._map_file(spec, np.dtype(np.uint8), (meta_offset(i, i.num_layers),))
        header = np.frombuffer(content, META_HEADER, count=1)[0]
        expected = (META_MAGIC, META_VERSION, i.num_layers, i.down_top_k)
        if tuple(header) != expected:
            raise FormatError(
                f"{spec.name}: expected header {expected}, got {tuple(map(int, header))}; run vindex verify"
            )
        return content

    def _map_file(self, spec: FileSpec, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        path = self.path / spec.name
        with opened(path, OF_NUMBERS) as file:
            try:
                return np.memmap(file, dtype=dtype, mode="r", shape=shape)
            except ValueError as error:  # it was cut after it was opened
                raise OF_NUMBERS.refusal(path, f"cannot be mapped ({error})") from error


def open_vindex(path: str | Path) -> Vindex:
    """Open a vindex directory.

    Checks the index, the presence and exact size of every file, and that the checksum lists agree; it does not
    re-hash (`vindex verify` does). Raises FormatError when anything is missing, malformed or of the wrong size.
    """
    directory = Path(path)
    if not os.path.isdir(directory):  # which, unlike Path.is_dir, says no to a name that is too long
        found = places.whereabouts(directory) or "; give the path of a vindex, as built by `vindex build`"
        raise FormatError(f"{directory} is not a directory{found}")
    settle(directory)
    return Vindex(directory)
