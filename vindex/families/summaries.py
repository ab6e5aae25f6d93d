"""Research summaries of mixtures: what each routed expert reads, and nothing else.

gate_vectors.bin is [layers, experts, 64, H] in one piece, float32: of each expert the leading right singular vectors of
gate_proj. gate_vectors_index.json has for each layer of the model that is in it, by its number, `file_offset` (bytes),
`shape` and shares of ‖W‖² such as `median_var64`; and `model_config.moe.n_routed_experts`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vindex.families.family import BUILD, Foreign, Lack, sized
from vindex.format import (
    DOWN,
    DOWN_META,
    EMBEDDINGS,
    GATE,
    MOST_COLUMNS,
    MOST_EXPERTS,
    MOST_LAYERS,
    NORMS,
    ROUTER,
    TOKENIZER,
)
from vindex.layout import LayerShape, Layout
from vindex.schema import Fields
from vindex.shelf import Shelf

SUMMARY = "gate_vectors_index.json"
VAR64 = "median_var64"


class Summaries(Foreign):
    """See above. A layer that is not in it has no rows."""

    title = "a research summary of a mixture"

    @staticmethod
    def recognises(names: frozenset[str], _: dict[str, Any]) -> bool:
        """Whether these are the files of one."""
        return SUMMARY in names

    def __init__(self, shelf: Shelf, names: frozenset[str], fields: Fields, tokenizer: str | Path | None) -> None:
        super().__init__(shelf, tokenizer)
        experts = fields.record("model_config").record("moe").integer("n_routed_experts", 1, MOST_EXPERTS)
        entries = {
            name: Fields(entry, f"layers.{name}", fields.problems) for name, entry in fields.mapping("layers").items()
        }
        shapes = {name: entry.integers("shape", 3) for name, entry in entries.items()}
        self._var64 = [entry.share(VAR64) for entry in entries.values() if VAR64 in entry.values]
        for name, shape in shapes.items():
            if not _is_layer(name):
                fields.problems.append(f"layers.{name}: expected the number of a layer below {MOST_LAYERS}")
            first = next(iter(shapes.values()))
            if shape != (experts, *first[1:]) or shape[2] > MOST_COLUMNS:
                expected = f"{experts} experts × 64 × hidden size, the same in each"
                fields.problems.append(f"layers.{name}.shape: expected {expected}, got {list(shape)}")
        if not entries:
            fields.problems.append("layers: expected one or more, got none")
        fields.problems.refuse()
        _, features, hidden = first
        layers = sorted(entries, key=int)
        self.places = {GATE.name: sized(shelf, GATE, (len(layers) * experts * features, hidden))}
        stride = experts * features * hidden * self.places[GATE.name].dtype.itemsize
        for at, name in enumerate(layers):
            offset = entries[name].integer("file_offset")
            if offset != at * stride:
                expected = f"{at * stride}, right after the layer before it"
                fields.problems.append(f"layers.{name}.file_offset: expected {expected}, got {offset}")
        if len(layers) == 1 and self.places[GATE.name].dtype.name != "float32":
            expected = f"{2 * stride:,} bytes, float32, in {GATE.name}"
            fields.problems.append(
                f"layers: of one layer expected {expected}, got {stride:,}, which half of it has too"
            )
        fields.problems.refuse()
        rows = {int(name): LayerShape(int(name), experts * features, experts) for name in layers}
        shape_of = tuple(rows.get(layer, LayerShape(layer, 0)) for layer in range(max(rows) + 1))
        self.index = Layout(shelf.name, fields.optional_text("model"), hidden, None, shape_of, False)
        self.settle(
            names,
            SUMMARY,
            {
                DOWN: Lack("down directions", "has gate directions only", BUILD),
                EMBEDDINGS: Lack("embeddings", "has no embeddings", f"pass a vector of {hidden} numbers, or {BUILD}"),
                DOWN_META: Lack("the tokens that directions write", f"has no {DOWN_META.name}", BUILD),
                ROUTER: Lack("routers", "has no routers", BUILD),
                NORMS: Lack("norm scales", f"has no {NORMS.name}", BUILD),
                TOKENIZER: Lack("a tokenizer", f"has no {TOKENIZER.name}", BUILD),
            },
        )

    def more(self) -> dict[str, Any]:
        """The share of ‖W‖² that the 64 directions hold, as it is stated for each layer: the median of its experts."""
        if not self._var64:
            return {}
        return {VAR64: f"{min(self._var64):.3g} to {max(self._var64):.3g} by layer, as {SUMMARY} says"}


def _is_layer(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name[:9])) == name and int(name) < MOST_LAYERS
