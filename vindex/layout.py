"""The rows of a vindex by layer and expert: what is certain of one that others made, whose index.json says less."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from vindex.errors import LackingError


class Rows:
    """The rows of one layer: of a mixture those of its experts in order, then those of its shared experts."""

    layer: int
    num_features: int
    num_experts: int | None
    num_shared_experts: int | None

    @property
    def groups(self) -> int:
        """How many weights the rows come from: experts and shared experts, or 1."""
        return (self.num_experts or 0) + (self.num_shared_experts or 0) or 1

    @property
    def features(self) -> int:
        """F: rows of each group."""
        return self.num_features // self.groups


@dataclass(frozen=True)
class LayerShape(Rows):
    """How many rows layer `layer` has; none where it was left out."""

    layer: int
    num_features: int
    num_experts: int | None = None
    num_shared_experts = None


@dataclass(frozen=True)
class Layout:
    """What an `Index` holds, as far as it is certain. Asking for anything else raises LackingError.

    name: the vindex. tokens: V, None where it does not say. down_top_k: 0 without a down_meta.bin that can be read.
    """

    name: str
    model: str | None
    hidden_size: int
    tokens: int | None
    layers: tuple[LayerShape, ...]
    has_embeddings: bool
    down_top_k: int = 0
    norms = ()
    num_shared_experts = None
    has_gate_stats = None
    has_responses = None
    response_texts = None

    def __getattr__(self, what: str) -> Any:
        if what.startswith("__"):
            raise AttributeError(what)
        raise LackingError(f"{self.name} does not say its {what}; a vindex that `vindex build` makes does")

    @property
    def vocab_size(self) -> int:
        """V. Raises LackingError."""
        if self.tokens is None:
            raise LackingError(f"{self.name} does not say how many tokens the model has; `vindex build` does")
        return self.tokens

    @property
    def num_layers(self) -> int:
        """L: layers of the model, as far as the vindex goes."""
        return len(self.layers)

    @property
    def num_feats(self) -> int:
        """The most rows that a layer has."""
        return max(entry.num_features for entry in self.layers)

    @property
    def num_experts(self) -> int | None:
        return max((entry.num_experts or 0 for entry in self.layers), default=0) or None

    @property
    def num_features_per_expert(self) -> int | None:
        return max(entry.features for entry in self.layers) if self.num_experts else None

    @property
    def num_rows(self) -> int:
        """R: the rows of all layers."""
        return self._ends[-1]

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """(L, F), or (R,) where layers have different numbers of rows."""
        uniform = all(entry.num_features == self.num_feats for entry in self.layers)
        return (self.num_layers, self.num_feats) if uniform else (self.num_rows,)

    def first_row(self, layer: int) -> int:
        """Which of the R rows is the first of this layer."""
        return self._ends[layer] - self.layers[layer].num_features

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(entry.num_features for entry in self.layers))

    def router_offset(self, layer: int) -> int:
        """There is no router in any of these."""
        raise LackingError(f"{self.name} has no router of layer {layer}; `vindex build` keeps it")
