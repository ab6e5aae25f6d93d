"""LARQL's vindexes at their `browse` level, as its loader reads them (crates/larql-vindex/src/format/load.rs).

Rows are neurons, the rows of gate_proj, and no singular directions. index.json says for each layer how many there are
and where they begin; down_meta.bin holds the tokens that each neuron writes, the highest only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vindex.families.family import BUILD, TOKENS, WIDTHS, Foreign, Lack, sized
from vindex.format import (
    DOWN,
    DOWN_META,
    EMBEDDINGS,
    GATE,
    INDEX,
    MOST_COLUMNS,
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_NEURONS,
    MOST_TOKENS,
    NORMS,
    ROUTER,
    TOKENIZER,
)
from vindex.layout import LayerShape, Layout
from vindex.schema import Fields
from vindex.shelf import Shelf

NAMED = {"f16": 2, "f32": 4}


class Browse(Foreign):
    """See above. A layer that index.json leaves out has no rows."""

    title = "LARQL's browse form"
    one_pole, neurons = True, True

    @staticmethod
    def recognises(_: frozenset[str], index: dict[str, Any]) -> bool:
        """Whether this is the index.json of one."""
        return isinstance(index.get("layers"), list) and "down_top_k" in index

    def __init__(self, shelf: Shelf, names: frozenset[str], fields: Fields, tokenizer: str | Path | None) -> None:
        super().__init__(shelf, tokenizer)
        count, hidden = fields.integer("num_layers", 1, MOST_LAYERS), fields.integer("hidden_size", 1, MOST_COLUMNS)
        tokens, model = fields.integer("vocab_size", 1, MOST_TOKENS), fields.optional_text("model")
        entries = [(entry, _shape(entry, count)) for entry in fields.records("layers")]
        shapes = {shape.layer: shape for _, shape in entries}
        if [shape.layer for _, shape in entries] != sorted(shapes) or not any(
            one.num_features for one in shapes.values()
        ):
            fields.problems.append("layers: expected each layer once and in order, and rows in one of them")
        fields.problems.refuse()
        layers = tuple(shapes.get(layer, LayerShape(layer, 0)) for layer in range(count))
        self.index = Layout(shelf.name, model, hidden, tokens, layers, EMBEDDINGS.name in names)
        self.places = {GATE.name: sized(shelf, GATE, (*self.index.feature_shape, hidden))}
        if EMBEDDINGS.name in names:
            self.places[EMBEDDINGS.name] = sized(shelf, EMBEDDINGS, (tokens, hidden))
        self._check_places(fields, entries)
        if DOWN_META.name in names:
            self.index = self.with_down_meta(self.index)
        missing = {
            EMBEDDINGS: Lack(
                "embeddings", f"has no {EMBEDDINGS.name}", f"pass a vector of {hidden} numbers, or {BUILD}"
            ),
            DOWN_META: Lack("the tokens that neurons write", f"has no {DOWN_META.name}", BUILD),
            TOKENIZER: Lack("a tokenizer", f"has no {TOKENIZER.name}", TOKENS),
        }
        lacks = {spec: lack for spec, lack in missing.items() if spec.name not in names}
        lacks[DOWN] = Lack(
            "down directions", "holds the rows of gate_proj, neuron by neuron, and none of down_proj", BUILD
        )
        lacks[NORMS] = Lack("norm scales", "has no norm scales at its browse level", BUILD)
        lacks[ROUTER] = Lack("routers", "has no routers that this version reads", BUILD)
        self.settle(names, INDEX.name, lacks)

    def _check_places(self, fields: Fields, entries: list[tuple[Fields, LayerShape]]) -> None:
        """Layers lie one after the other, in numbers as wide as the file's size says, and `dtype` agrees."""
        width, offset = self.places[GATE.name].dtype.itemsize, 0
        for at, (entry, shape) in enumerate(entries):
            for key, expected in (("offset", offset), ("length", shape.num_features * self.index.hidden_size * width)):
                if entry.integer(key) != expected:
                    fields.problems.append(f"layers[{at}].{key}: expected {expected}, got {entry.integer(key)}")
            offset += shape.num_features * self.index.hidden_size * width
        stated = fields.optional_text("dtype")
        if stated is not None and NAMED.get(stated) != width:
            fields.problems.append(f"dtype: {GATE.name} holds {WIDTHS[width].name} by its size, and it says {stated!r}")
        fields.problems.refuse()


def _shape(entry: Fields, layers: int) -> LayerShape:
    """Rows of a layer; of a mixture they must be as many for each expert."""
    rows, experts = (
        entry.integer("num_features", 0, MOST_NEURONS * 64),
        entry.optional_integer("num_experts", 1, MOST_EXPERTS),
    )
    shape = LayerShape(entry.integer("layer", 0, layers - 1), rows, experts)
    each = entry.optional_integer("num_features_per_expert", 1, MOST_NEURONS)
    if each and not experts:
        entry.problems.append(f"num_features_per_expert: {each}, and no num_experts says of how many")
    if (experts and shape.features * experts != rows) or (experts and each not in (None, shape.features)):
        entry.problems.append(f"layers of {experts} experts: expected as many rows for each, got {rows} in all")
    return shape
