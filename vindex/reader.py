"""Open a vindex: check that it is whole, then map. Nothing is guessed, copied or filled in.

v = vindex.open("qwen3-0.6b.vindex")
v.gate.shape                     # (L, F, H) float16, read-only memory map
v.layer(3).gate.shape            # (groups, F, H): groups are a mixture's experts, else 1
v.score(" Paris").shape          # (L, F) cosines
v.top_features(" Paris", k=5)
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np

from vindex import scoring, targets
from vindex.checksums import load_sums, settle, vindex_id
from vindex.errors import FormatError, QueryError
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
    SUMS,
    TOKENIZER,
    FileSpec,
    files_of,
    meta_offset,
    meta_record,
)
from vindex.index import Index, LayerEntry, load_index
from vindex.manifest import Manifest, load_manifest
from vindex.records import Feature, FeatureHit, LayerFrames, TokenScore
from vindex.tokens import Vocabulary, load_vocabulary

Query = str | int | list[int] | np.ndarray


class Vindex:
    """A vindex on disk, as read-only memory maps. Use `vindex.open(path)`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digests = load_sums(path)
        self.index: Index = load_index(path)
        _check_files(path, self.index, self.digests)

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

    @cached_property
    def gate(self) -> np.ndarray:
        """(L, F, H) float16 unit rows: what gate_proj reads, largest singular value first.

        In a mixture F counts the rows of all experts of a layer; `layer` gives them by expert. Where some layers have
        other numbers of rows (dense ones in a mixture) the shape is (R, H), all layers' rows in order.
        """
        return self._map(GATE)

    @cached_property
    def down(self) -> np.ndarray:
        """float16 unit rows: what down_proj writes, largest singular value first; in the shape of `gate`."""
        return self._map(DOWN)

    @cached_property
    def singular_values(self) -> np.ndarray:
        """(2, L, F) or (2, R) float32: row 0 gate_proj, row 1 down_proj."""
        return self._map(SIGMA)

    def layer(self, layer: int) -> LayerFrames:
        """One layer's directions and singular values, by expert. Raises QueryError when out of range."""
        self._check_range("layer", layer, self.index.num_layers)
        entry, first = self.index.layers[layer], self.index.first_row(layer)
        rows = slice(first, first + entry.num_features)
        gate, down = (frames.reshape(-1, self.index.hidden_size)[rows] for frames in (self.gate, self.down))
        sigma = self.singular_values.reshape(2, -1)[:, rows].reshape(2, entry.groups, entry.features)
        shape = (entry.groups, entry.features, self.index.hidden_size)
        return LayerFrames(gate.reshape(shape), down.reshape(shape), *sigma)

    def router(self, layer: int) -> np.ndarray:
        """(E, H) float16 router weights of one layer. Raises QueryError when the layer has no experts."""
        entry = self._mixture(layer)
        first, size = self.index.router_offset(layer), (entry.num_experts or 0) * self.index.hidden_size
        return self._map(ROUTER)[first : first + size].reshape(-1, self.index.hidden_size)

    def shared_expert_gate(self, layer: int) -> np.ndarray:
        """(H,) float16 vector whose sigmoid scales the shared expert. Raises QueryError when there is none."""
        if not self._mixture(layer).num_shared_experts:
            raise QueryError(f"layer {layer} of {self.path.name} has no shared expert")
        before = sum(bool(entry.num_shared_experts) for entry in self.index.layers[:layer])
        return self._map(SHARED_GATES)[before]

    def _mixture(self, layer: int) -> LayerEntry:
        self._check_range("layer", layer, self.index.num_layers)
        entry = self.index.layers[layer]
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
        return self._map(EMBEDDINGS)

    @cached_property
    def norms(self) -> MappingProxyType[str, np.ndarray]:
        """Norm scales by name, float16, e.g. norms["layers.0.input_layernorm"]; the last is "norm".

        They are what the normalised vector is multiplied by: 1 + weight in families that store it zero-centred.
        """
        flat = self._map(NORMS)
        return MappingProxyType({n.name: flat[n.offset : n.offset + n.length] for n in self.index.norms})

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Token pieces and ids of the model's tokenizer.json."""
        return load_vocabulary(self.path / TOKENIZER.name)

    def token_id(self, token: str | int) -> int:
        """The id of a token given as its exact text (leading space included) or as an id.

        Raises QueryError when the text is not one token or the id is out of range.
        """
        if isinstance(token, str):
            return self.vocabulary.id_of(token)
        if not 0 <= token < self.index.vocab_size:
            raise QueryError(f"token id {token} is out of range: this model has ids 0 to {self.index.vocab_size - 1}")
        return int(token)

    def vector(self, query: Query) -> np.ndarray:
        """The query as float32 vectors: (H,) for a token or a vector, (B, H) for a list of ids or a matrix."""
        if isinstance(query, np.ndarray) and query.dtype.kind == "f":
            if query.shape[-1] != self.index.hidden_size or query.ndim > 2:
                raise QueryError(f"expected a vector of {self.index.hidden_size} numbers, got shape {query.shape}")
            return query.astype(np.float32)
        if isinstance(query, str | int | np.integer):
            return self.embeddings[self.token_id(query if isinstance(query, str) else int(query))].astype(np.float32)
        ids = [self.token_id(int(token)) for token in query]
        return self.embeddings[ids].astype(np.float32)

    def score(self, query: Query) -> np.ndarray:
        """Cosine of a token's embedding (or of a vector) with every gate direction.

        query: token text, token id, list of ids, or float vector (H,) or (B, H).
        Returns float32 in the shape of `gate` without H, (L, F) or (R,), with B in front for a batch.
        Definition: the published `How to Use` code.
        """
        return scoring.cosines(self.gate, self.vector(query))

    def top_features(self, query: Query, k: int = 10) -> list[FeatureHit]:
        """The k features whose gate direction lies closest to the query, largest cosine first."""
        vector = self.vector(query)
        if vector.ndim != 1:
            raise QueryError("top_features takes one token or vector at a time; use score() for a batch")
        return self._hits(scoring.cosines(self.gate, vector), k)

    def nearest_features(self, layer: int, feature: int, k: int = 10, *, expert: int | None = None) -> list[FeatureHit]:
        """The k other features, of any layer and expert, whose gate directions lie closest to this one by |cosine|."""
        row = self._row(layer, feature, expert)
        directions = self.gate.reshape(-1, self.index.hidden_size)
        scores = scoring.cosines(directions, directions[row].astype(np.float32))
        scores[row] = 0.0
        return self._hits(scores, k, key=np.abs(scores))

    def feature(self, layer: int, feature: int, *, expert: int | None = None) -> Feature:
        """One feature with both poles' tokens from gate_meta and down_meta.

        expert: which one, in a layer that is a mixture; E for its shared expert.
        Raises QueryError when one of them is out of range, or the layer needs an expert and none is given.
        """
        row = self._row(layer, feature, expert)
        poles = (*self._poles(self._gate_meta, layer, row), *self._poles(self._down_meta, layer, row))
        gate_sigma, down_sigma = (float(sigma) for sigma in self.singular_values.reshape(2, -1)[:, row])
        return Feature(layer, feature, gate_sigma, down_sigma, *poles, expert)

    def _hits(self, scores: np.ndarray, k: int, key: np.ndarray | None = None) -> list[FeatureHit]:
        sigma = self.singular_values[0].reshape(-1)
        found = scoring.largest(scores if key is None else key, k)
        return [self._hit(row, float(scores.flat[row]), float(sigma[row])) for row in found]

    def _hit(self, row: int, cosine: float, sigma: float) -> FeatureHit:
        """Row `row` of all R as layer, expert and rank."""
        layer = bisect_right(self._first_rows, row) - 1
        entry = self.index.layers[layer]
        group, feature = divmod(row - self._first_rows[layer], entry.features)
        return FeatureHit(layer, feature, cosine, sigma, group if entry.num_experts else None)

    @cached_property
    def _first_rows(self) -> list[int]:
        return [self.index.first_row(layer) for layer in range(self.index.num_layers)]

    def _row(self, layer: int, feature: int, expert: int | None) -> int:
        """Which of the R rows a feature is."""
        self._check_range("layer", layer, self.index.num_layers)
        entry = self.index.layers[layer]
        self._check_range("feature", feature, entry.features)
        if expert is None and entry.num_experts:
            shared = f", {entry.num_experts} for the shared one" if entry.num_shared_experts else ""
            raise QueryError(
                f"layer {layer} of {self.path.name} has experts: say which one, 0 to {entry.num_experts - 1}{shared}"
            )
        if expert is not None:
            self._mixture(layer)
            self._check_range("expert", expert, entry.groups)
        return self._first_rows[layer] + (expert or 0) * entry.features + feature

    def _check_range(self, what: str, value: int, count: int) -> None:
        if not 0 <= value < count:
            raise QueryError(f"{what} {value} is out of range: {self.path.name} has {what}s 0 to {count - 1}")

    def _poles(self, meta: np.ndarray, layer: int, row: int) -> tuple[list[TokenScore], list[TokenScore]]:
        record = meta_record(self.index.down_top_k)
        place = meta_offset(self.index, layer) + META_COUNT.itemsize
        place += (row - self._first_rows[layer]) * record.itemsize
        tokens = [
            TokenScore(int(token_id), self.vocabulary.piece(int(token_id)), float(score))
            for token_id, score in np.frombuffer(meta, record, count=1, offset=place)[0]["tokens"]
        ]
        return tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]

    @cached_property
    def _gate_meta(self) -> np.ndarray:
        return self._map_meta(GATE_META)

    @cached_property
    def _down_meta(self) -> np.ndarray:
        return self._map_meta(DOWN_META)

    def _map(self, spec: FileSpec) -> np.ndarray:
        assert spec.dtype and spec.shape
        return np.memmap(self.path / spec.name, dtype=spec.dtype, mode="r", shape=spec.shape(self.index))

    def _map_meta(self, spec: FileSpec) -> np.ndarray:
        path, i = self.path / spec.name, self.index
        header = np.fromfile(path, META_HEADER, count=1)[0]
        expected = (META_MAGIC, META_VERSION, i.num_layers, i.down_top_k)
        if tuple(header) != expected:
            raise FormatError(
                f"{spec.name}: expected header {expected}, got {tuple(map(int, header))}; run vindex verify"
            )
        return np.memmap(path, np.uint8, mode="r")


def _check_files(path: Path, index: Index, digests: dict[str, str]) -> None:
    """Every file of the table is there with its exact size, and SHA256SUMS lists the same files."""
    problems: list[str] = []
    for spec in files_of(index):
        file = path / spec.name
        if not file.is_file():
            problems.append(f"{spec.name}: missing")
        elif spec.byte_size and file.stat().st_size != spec.byte_size(index):
            problems.append(f"{spec.name}: expected {spec.byte_size(index)} bytes, got {file.stat().st_size}")
        if spec is not SUMS and spec.name not in digests:
            problems.append(f"{spec.name}: not listed in SHA256SUMS")
    for name, digest in index.checksums.items():
        if digests.get(name) not in (None, digest):
            problems.append(f"{name}: index.json and SHA256SUMS give different checksums")
    if problems:
        raise FormatError(f"{path}: " + "; ".join(problems) + "; rebuild the vindex or download it again")


def open_vindex(path: str | Path) -> Vindex:
    """Open a vindex directory.

    Checks the index, the presence and exact size of every file, and that the checksum lists agree; it does not
    re-hash (`vindex verify` does). Raises FormatError when anything is missing, malformed or of the wrong size.
    """
    directory = Path(path)
    if not directory.is_dir():
        found = targets.whereabouts(directory) or "; give the path of a vindex, as built by `vindex build`"
        raise FormatError(f"{directory} is not a directory{found}")
    settle(directory)
    return Vindex(directory)
