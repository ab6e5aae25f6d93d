"""The pieces of an opened vindex: arrays, layers, norms, tokens and certificates, as its family has them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from vindex import scoring
from vindex.errors import LackingError, QueryError
from vindex.families.family import Family, Lack
from vindex.format import DOWN, EMBEDDINGS, GATE, NORMS, ROUTER, SHARED_GATES, SIGMA, FileSpec
from vindex.index import Index
from vindex.layout import Layout, Rows
from vindex.manifest import Certificate, Manifest
from vindex.norms import Norms
from vindex.records import LayerFrames, TokenScore
from vindex.tokens import Vocabulary


class Parts:
    """A vindex's pieces. One that it does not have raises LackingError, which says what would give it."""

    def __init__(self, family: Family) -> None:
        self.family, self.shelf = family, family.shelf
        self._meta = cache(family.meta)

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.shelf.name

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.shelf.path

    @property
    def id(self) -> str:
        """First 8 hex digits of the SHA-256 over the payload's checksum lines; without checksums its name."""
        return self.family.id

    @property
    def index(self) -> Index | Layout:
        """The sizes; of ours all of index.json."""
        return self.family.index

    @property
    def own_index(self) -> Index:
        """The index.json of a vindex in our own format. Raises LackingError for one of another family."""
        if isinstance(self.index, Index):
            return self.index
        raise LackingError(
            f"{self.name} is {self.family.title}, and this needs a vindex that `vindex build` made; "
            "`vindex audit DIR --source MODEL` checks it against its weights"
        )

    @property
    def digests(self) -> dict[str, str]:
        """{file name: SHA-256} of SHA256SUMS."""
        return self.family.digests

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return self.family.size_bytes

    @property
    def lacks(self) -> tuple[Lack, ...]:
        """What it does not have, each with what would give it."""
        return tuple(dict.fromkeys(self.family.lacks.values()))

    def has(self, spec: FileSpec) -> bool:
        """Whether it has a piece of our format."""
        return spec.name not in self.family.lacks

    @property
    def manifest(self) -> Manifest:
        """Provenance: source, options, certificates, versions."""
        return self.family.manifest

    @cached_property
    def _certificates(self) -> dict[tuple[int, str, int | None], Certificate]:
        return {(of.layer, of.projection, of.expert): of for of in self.manifest.certificates}

    def certificate(self, layer: int, side: str, expert: int | None = None) -> Certificate:
        """How well the directions of one weight are known. side: "gate" or "down". Raises QueryError."""
        found = self._certificates.get((layer, side, expert))
        if found is None:
            raise QueryError(
                f"{self.name} has no certificate of {side} of layer {layer}"
                + ("" if expert is None else f", expert {expert}")
            )
        return found

    @cached_property
    def gate(self) -> np.ndarray:
        """(L, F, H) float16 unit rows: what gate_proj reads, largest singular value first.

        In a mixture F counts the rows of all experts of a layer; `layer` gives them by expert. Where some layers have
        other numbers of rows (dense ones in a mixture) the shape is (R, H), all layers' rows in order. What others
        published may be float32, of any length, or neurons in no order (docs/families.md).
        """
        return self.array(GATE).reshape(*self.index.feature_shape, self.index.hidden_size)

    @cached_property
    def down(self) -> np.ndarray:
        """float16 unit rows: what down_proj writes, largest singular value first; in the shape of `gate`."""
        return self.array(DOWN)

    @cached_property
    def singular_values(self) -> np.ndarray:
        """(2, L, F) or (2, R) float32: row 0 gate_proj, row 1 down_proj."""
        return self.array(SIGMA)

    def sigma(self, row: int) -> tuple[float | None, float | None]:
        """The gate and the down singular value of one of the R rows; None where the vindex has none."""
        if not self.has(SIGMA):
            return None, None
        gate, down = self.singular_values.reshape(2, -1)[:, row]
        return float(gate), float(down)

    def layer(self, layer: int) -> LayerFrames:
        """One layer's directions and singular values, by expert. Raises QueryError."""
        shape = self.side(layer, "gate").shape
        rows = slice(self.first_rows[layer], self.first_rows[layer + 1])
        sigma = self.singular_values.reshape(2, -1)[:, rows].reshape(2, *shape[:2])
        return LayerFrames(self.side(layer, "gate"), self.side(layer, "down"), *sigma)

    def side(self, layer: int, side: str) -> np.ndarray:
        """(groups, F, H): one layer's directions of one side, "gate" or "down". Raises QueryError."""
        layer = self.in_range("layer", layer, self.index.num_layers)
        frames = (self.gate if side == "gate" else self.down).reshape(-1, self.index.hidden_size)
        entry, rows = self.index.layers[layer], slice(self.first_rows[layer], self.first_rows[layer + 1])
        return frames[rows].reshape(entry.groups, entry.features, self.index.hidden_size)

    def router(self, layer: int) -> np.ndarray:
        """(E, H) float16 router weights of one layer. Raises QueryError when the layer has no experts."""
        entry = self._mixture(layer)
        first, size = self.index.router_offset(entry.layer), (entry.num_experts or 0) * self.index.hidden_size
        return self.array(ROUTER)[first : first + size].reshape(-1, self.index.hidden_size)

    def shared_expert_gate(self, layer: int) -> np.ndarray:
        """(H,) float16 vector whose sigmoid scales the shared expert. Raises QueryError when there is none."""
        mixture = self._mixture(layer)
        if not mixture.num_shared_experts:
            raise QueryError(f"layer {layer} of {self.name} has no shared expert")
        before = sum(bool(entry.num_shared_experts) for entry in self.index.layers[: mixture.layer])
        return self.array(SHARED_GATES)[before]

    def _mixture(self, layer: int) -> Rows:
        entry = self.index.layers[self.in_range("layer", layer, self.index.num_layers)]
        if not entry.num_experts:
            raise QueryError(f"layer {layer} of {self.name} is dense: it has no experts and no router")
        return entry

    @cached_property
    def embeddings(self) -> np.ndarray:
        """(V, H) float16 token embeddings. Raises QueryError when the vindex was built without them."""
        return self.array(EMBEDDINGS)

    def embedding_rows(self, ids: Sequence[int]) -> np.ndarray:
        """(n, H): those of some tokens, and nothing else is read."""
        return self.family.rows(EMBEDDINGS, ids)

    @cached_property
    def norms(self) -> Norms:
        """Norm scales by name, float16, e.g. norms["layers.0.input_layernorm"]; the last is "norm".

        They are what the normalised vector is multiplied by: 1 + weight in families that store it zero-centred.
        """
        return Norms(self.array(NORMS), self.index.norms)

    @property
    def vocabulary(self) -> Vocabulary:
        """Token pieces and ids of the model's tokenizer.json."""
        return self.family.vocabulary

    def piece(self, token_id: int) -> str:
        """The text of a token, or <id N> where it has none or there is no tokenizer."""
        return self.vocabulary.piece(token_id) if self.family.can_spell else f"<id {token_id}>"

    def meta_records(self, spec: FileSpec, layer: int) -> tuple[int, np.ndarray]:
        """(the count that precedes them, records) of one layer in a meta file; see format.meta_record."""
        return self.family.meta_records(self._meta(spec), layer)

    def poles(self, spec: FileSpec, layer: int, row: int) -> tuple[list[TokenScore], list[TokenScore]]:
        """The tokens that a meta file has of one of all R rows, at its one pole and at the other."""
        _, records = self.meta_records(spec, layer)
        tokens = [
            TokenScore(int(token_id), self.piece(int(token_id)), float(score))
            for token_id, score in records[row - self.first_rows[layer]]["tokens"]
        ]
        if self.family.one_pole:  # where LARQL leaves places free, it writes zeros
            return [token for token in tokens if token.token_id or token.score], []
        return tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]

    def array(self, spec: FileSpec) -> np.ndarray:
        """A binary of the format, mapped in the dtype and shape it has there."""
        return self.family.array(spec)

    @cached_property
    def first_rows(self) -> list[int]:
        """Which of the R rows each layer begins with, and R."""
        return [0, *accumulate(entry.num_features for entry in self.index.layers)]

    def row(self, layer: int, feature: int, expert: int | None) -> int:
        """Which of the R rows a feature is."""
        layer = self.in_range("layer", layer, self.index.num_layers)
        entry = self.index.layers[layer]
        if not entry.num_features:
            there = [of.layer for of in self.index.layers if of.num_features]
            raise QueryError(f"layer {layer} is not in {self.name}: it has layers {there[0]} to {there[-1]}")
        feature = self.in_range("feature", feature, entry.features)
        if expert is None and entry.num_experts:
            shared = f", {entry.num_experts} for the shared one" if entry.num_shared_experts else ""
            raise QueryError(
                f"layer {layer} of {self.name} has experts: say which one, 0 to {entry.num_experts - 1}{shared}"
            )
        if expert is not None:
            self._mixture(layer)
            expert = self.in_range("expert", expert, entry.groups)
        return self.first_rows[layer] + (expert or 0) * entry.features + feature

    def in_range(self, what: str, value: Any, count: int) -> int:
        """A number below `count`. Raises QueryError."""
        number = scoring.whole(what, value)
        if not 0 <= number < count:
            raise QueryError(f"{what} {number} is out of range: {self.name} has {what}s 0 to {count - 1}")
        return number
