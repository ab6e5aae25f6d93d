"""The dense form that is published on the Hub: index.json with four sizes, and matrices whose size says their dtype.

num_layers, num_feats, hidden_size and vocab_size are certain, and nothing else in index.json. Rows are the leading
singular directions of gate_proj and down_proj, [L, F, H], with their singular values left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vindex.errors import FormatError
from vindex.families.family import BUILD, TOKENS, Foreign, Lack, Place, sized
from vindex.format import (
    DOWN,
    DOWN_META,
    EMBEDDINGS,
    GATE,
    INDEX,
    META_HEADER,
    META_MAGIC,
    MOST_COLUMNS,
    MOST_LAYERS,
    MOST_NEURONS,
    MOST_TOKENS,
    NORMS,
    OLD_META_MAGIC,
    TOKENIZER,
    FileSpec,
)
from vindex.layout import LayerShape, Layout
from vindex.schema import Fields
from vindex.shelf import Shelf


class Published(Foreign):
    """See above."""

    title = "the published dense form"
    one_pole = True

    @staticmethod
    def recognises(_: frozenset[str], index: dict[str, Any]) -> bool:
        """Whether this is the index.json of one."""
        return "num_feats" in index

    def __init__(self, shelf: Shelf, names: frozenset[str], fields: Fields, tokenizer: str | Path | None) -> None:
        super().__init__(shelf, tokenizer)
        layers, features = fields.integer("num_layers", 1, MOST_LAYERS), fields.integer("num_feats", 1, MOST_NEURONS)
        hidden, tokens = fields.integer("hidden_size", 1, MOST_COLUMNS), fields.integer("vocab_size", 1, MOST_TOKENS)
        if (fields.optional_integer("num_experts") or 1) > 1:
            fields.problems.append("num_experts: expected none, since nothing says which rows are whose")
        fields.problems.refuse()
        shapes = {GATE: (layers, features, hidden), DOWN: (layers, features, hidden), EMBEDDINGS: (tokens, hidden)}
        there: dict[FileSpec, Place] = {
            spec: sized(shelf, spec, shape) for spec, shape in shapes.items() if spec is GATE or spec.name in names
        }
        self.places = {spec.name: place for spec, place in there.items()}
        shape = tuple(LayerShape(layer, features) for layer in range(layers))
        self.index = Layout(shelf.name, fields.optional_text("model"), hidden, tokens, shape, EMBEDDINGS in there)
        lacks = {
            spec: Lack(what, f"has no {spec.name}", way_out)
            for spec, what, way_out in (
                (DOWN, "down directions", BUILD),
                (EMBEDDINGS, "embeddings", f"pass a vector of {hidden} numbers, or {BUILD}"),
                (TOKENIZER, "a tokenizer", TOKENS),
                (DOWN_META, "the tokens that directions write", BUILD),
            )
            if spec.name not in names
        }
        lacks[NORMS] = Lack("norm scales by name", f"does not say which numbers of {NORMS.name} are whose", BUILD)
        if DOWN_META.name in names and self._is_larqls():
            self.index = self.with_down_meta(self.index)
        elif DOWN_META.name in names:
            why = f"keeps a {DOWN_META.name} that is not in LARQL's layout"
            lacks[DOWN_META] = Lack("the tokens that directions write", why, BUILD)
        self._require_one_width()
        self.settle(names, INDEX.name, lacks)

    def _require_one_width(self) -> None:
        """Twice the bytes are float32, or float16 of twice the layers: a file of other sizes must say the same."""
        widths = {name: place.dtype.name for name, place in self.places.items()}
        odd = [name for name, width in widths.items() if width != widths[GATE.name]]
        if odd:
            raise FormatError(
                f"{self.shelf.place}: by their sizes {GATE.name} is {widths[GATE.name]} and {odd[0]} {widths[odd[0]]}, "
                f"so that one of them is not of the sizes in {INDEX.name}; download it again"
            )
        if widths[GATE.name] != "float16" and EMBEDDINGS.name not in widths and not self.index.down_top_k:
            raise FormatError(
                f"{self.shelf.place}: {GATE.name} is float32, or float16 of twice the layers, and no other file tells "
                f"which; put its {EMBEDDINGS.name} beside it"
            )

    def _is_larqls(self) -> bool:
        """Whether down_meta.bin begins as LARQL's do; the cards do not say how it is laid out."""
        if self.shelf.size(DOWN_META.name) < META_HEADER.itemsize:
            return False
        return int(self.shelf.array(DOWN_META.name, META_HEADER, (1,))[0]["magic"]) in (META_MAGIC, OLD_META_MAGIC)
