"""index.json as a frozen record: what a reader needs to map the binaries. Field names are the JSON keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vindex.format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    HALF,
    INDEX,
    LARQL_VERSION,
    MOST_COLUMNS,
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_NEURONS,
    MOST_READ,
    MOST_TOKENS,
    MOST_TOP_K,
    files_of,
    is_payload,
)
from vindex.layout import Rows
from vindex.schema import Fields, Problems, listed, parse_fields, require_plain_name, to_json
from vindex.shelf import Shelf

FINAL_NORM = "norm"


@dataclass(frozen=True)
class EffectiveRank:
    """How many leading rows of a layer are real directions; rows past it are zero. In a mixture: of every expert."""

    gate: int
    down: int


@dataclass(frozen=True)
class LayerEntry(Rows):
    """Where layer `layer` lies in gate_vectors.bin and down_features.bin. offset and length are bytes.

    The last three are None in a layer that is dense. A mixture's rows are those of its experts in order, then those of
    its shared experts, as many for each.
    """

    layer: int
    num_features: int
    offset: int
    length: int
    effective_rank: EffectiveRank
    num_experts: int | None = None
    num_features_per_expert: int | None = None
    num_shared_experts: int | None = None


@dataclass(frozen=True)
class NormEntry:
    """Where a norm's scale lies in norms.bin. offset and length are elements."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True)
class Projection:
    """Which matrix unembeds down directions in down_meta.bin."""

    down_meta: str
    final_norm: bool
    tied: bool


@dataclass(frozen=True, repr=False)
class Index:
    """index.json, validated. See docs/format.md for what each key means."""

    format: dict[str, Any]
    version: int
    model: str
    family: str
    dtype: str
    quant: str
    extract_level: str
    has_model_weights: bool
    has_embeddings: bool
    embed_scale: float
    down_top_k: int
    num_layers: int
    num_feats: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    layers: tuple[LayerEntry, ...]
    norms: tuple[NormEntry, ...]
    projection: Projection
    checksums: dict[str, str]
    source: dict[str, Any]
    model_config: dict[str, Any]
    num_experts: int | None = None
    num_features_per_expert: int | None = None
    num_shared_experts: int | None = None
    has_gate_stats: bool | None = None
    has_responses: bool | None = None
    response_texts: tuple[int, int] | None = None

    def __repr__(self) -> str:
        return f"<index of {self.model}: {self.num_layers} layers × {self.num_feats} features × {self.hidden_size}>"

    @property
    def num_rows(self) -> int:
        """R: the features of all layers."""
        return sum(entry.num_features for entry in self.layers)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """(L, F), or (R,) where a mixture has layers with different numbers of features."""
        uniform = all(entry.num_features == self.num_feats for entry in self.layers)
        return (self.num_layers, self.num_feats) if uniform else (self.num_rows,)

    def first_row(self, layer: int) -> int:
        """Which of the R features is the first of this layer."""
        return self.layers[layer].offset // (self.hidden_size * HALF)

    def router_offset(self, layer: int) -> int:
        """Where this layer's router lies in router_weights.bin, in elements; layer L gives their number."""
        return sum((entry.num_experts or 0) * (self.hidden_size + 1) for entry in self.layers[:layer])


def load_index(shelf: Shelf) -> Index:
    """Read and validate index.json. Raises FormatError listing every problem."""
    fields = parse_fields(shelf.read(INDEX.name), INDEX.name)
    index = parse_index(fields)
    fields.problems.refuse()
    return index


def require_readable(index: Index) -> None:
    """Raise FormatError unless what would be written of this index, with checksums, is what `load_index` takes."""
    payload = {spec.name: "0" * 64 for spec in files_of(index) if is_payload(spec)}
    content = to_json(dataclasses.replace(index, checksums=payload))
    fields = parse_fields(content, INDEX.name)
    parse_index(fields)
    fields.problems.refuse()


def parse_index(fields: Fields) -> Index:
    """Read an Index, noting problems in `fields.problems`; the result is only meaningful when there are none."""
    form = fields.record("format")
    if form.text("name", choices=(FORMAT_NAME,)) and form.integer("version", low=1) != FORMAT_VERSION:
        fields.problems.append(
            f"format.version: expected {FORMAT_VERSION}, got {form.integer('version')}; a newer vindex may read it"
        )
    projection = fields.record("projection")
    index = Index(
        format=fields.mapping("format"),
        version=fields.integer("version", LARQL_VERSION, LARQL_VERSION),
        model=fields.text("model"),
        family=fields.text("family"),
        dtype=fields.text("dtype", choices=("f16",)),
        quant=fields.text("quant", choices=("none",)),
        extract_level=fields.text("extract_level"),
        has_model_weights=fields.flag("has_model_weights"),
        has_embeddings=fields.flag("has_embeddings"),
        embed_scale=fields.number("embed_scale"),
        down_top_k=fields.integer("down_top_k", 2, MOST_TOP_K),
        num_layers=fields.integer("num_layers", 1, MOST_LAYERS),
        num_feats=fields.integer("num_feats", low=1),
        hidden_size=fields.integer("hidden_size", 1, MOST_COLUMNS),
        intermediate_size=fields.integer("intermediate_size", 1, MOST_NEURONS),
        vocab_size=fields.integer("vocab_size", 1, MOST_TOKENS),
        layers=tuple(_parse_layer(entry) for entry in fields.records("layers")),
        norms=tuple(
            NormEntry(entry.text("name"), entry.integer("offset"), entry.integer("length", low=1))
            for entry in fields.records("norms")
        ),
        projection=Projection(
            projection.text("down_meta", choices=("lm_head", "embed_tokens")),
            projection.flag("final_norm"),
            projection.flag("tied"),
        ),
        checksums=fields.texts("checksums"),
        source=fields.mapping("source"),
        model_config=fields.mapping("model_config"),
        num_experts=fields.optional_integer("num_experts", 1, MOST_EXPERTS),
        num_features_per_expert=fields.optional_integer("num_features_per_expert", 1, MOST_COLUMNS),
        num_shared_experts=fields.optional_integer("num_shared_experts", 1, MOST_EXPERTS),
        has_gate_stats=fields.optional_flag("has_gate_stats"),
        has_responses=fields.optional_flag("has_responses"),
        response_texts=_parse_texts(fields) if fields.has("response_texts") else None,
    )
    if not fields.problems:
        _check_layout(index, fields.problems)
    return index


def _parse_texts(fields: Fields) -> tuple[int, int]:
    texts, tokens = fields.integers("response_texts", 2)
    if texts * tokens > MOST_READ:
        fields.problems.append(f"response_texts: expected {MOST_READ:,} tokens or fewer, got {texts} × {tokens}")
    return texts, tokens


def _parse_layer(entry: Fields) -> LayerEntry:
    ranks = entry.record("effective_rank")
    return LayerEntry(
        layer=entry.integer("layer"),
        num_features=entry.integer("num_features", low=1),
        offset=entry.integer("offset"),
        length=entry.integer("length"),
        effective_rank=EffectiveRank(ranks.integer("gate"), ranks.integer("down")),
        num_experts=entry.optional_integer("num_experts", 1, MOST_EXPERTS),
        num_features_per_expert=entry.optional_integer("num_features_per_expert", 1, MOST_COLUMNS),
        num_shared_experts=entry.optional_integer("num_shared_experts", 1, MOST_EXPERTS),
    )


def _check_layout(index: Index, problems: Problems) -> None:
    """Parts that agree one by one must also agree with each other: no holes, no overlaps, no file left out."""

    def expect(path: str, expected: Any, got: Any) -> None:
        if got != expected:
            problems.append(f"{path}: expected {expected}, got {got}")

    _check_layers(index, expect, problems)
    end = 0
    for at, norm in enumerate(index.norms):
        expect(f"norms[{at}].offset", end, norm.offset)
        end = norm.offset + norm.length
    names = [norm.name for norm in index.norms]
    if len(set(names)) < len(names):
        problems.append("norms: expected every name once, got one twice")
    expect("norms (the last one)", FINAL_NORM, names[-1] if names else None)
    for name in index.checksums:
        require_plain_name(name, f"{INDEX.name} checksums")
    payload = {spec.name for spec in files_of(index) if is_payload(spec)}
    wrong = [f"no {name}" for name in sorted(payload - index.checksums.keys())]
    wrong += [f"{name!r}" for name in sorted(index.checksums.keys() - payload)]
    if wrong:
        problems.append(f"checksums (its files): expected each binary and the tokenizer, got {listed(wrong)}")


def _check_layers(index: Index, expect: Callable[[str, Any, Any], None], problems: Problems) -> None:
    expect("layers (their number)", index.num_layers, len(index.layers))
    if index.num_experts and not any(entry.num_experts for entry in index.layers):
        problems.append(f"num_experts: expected a layer with {index.num_experts} experts, got none")
    offset = 0
    for at, entry in enumerate(index.layers):
        features = _features_expected(index, entry)
        wanted = layer_entry(at, features, offset, index.hidden_size, entry.effective_rank)
        for name in ("layer", "num_features", "offset", "length"):
            expect(f"layers[{at}].{name}", getattr(wanted, name), getattr(entry, name))
        if entry.num_experts:
            for name in ("num_experts", "num_features_per_expert", "num_shared_experts"):
                expect(f"layers[{at}].{name}", getattr(index, name), getattr(entry, name))
        for side, rank in dataclasses.asdict(entry.effective_rank).items():
            if rank > entry.features:
                problems.append(f"layers[{at}].effective_rank.{side}: expected at most {entry.features}, got {rank}")
        offset = wanted.offset + wanted.length
    expect("num_feats", max((entry.num_features for entry in index.layers), default=0), index.num_feats)


def _features_expected(index: Index, entry: LayerEntry) -> int:
    """Rows of a layer: those of a mixture follow from its experts; its dense layers keep as many as one expert."""
    if entry.num_experts:
        return entry.groups * (entry.num_features_per_expert or 0)
    return index.num_features_per_expert or index.num_feats


def layer_entry(layer: int, num_features: int, offset: int, hidden_size: int, rank: EffectiveRank) -> LayerEntry:
    """The entry of a dense layer of num_features·H half-precision numbers at a byte offset."""
    return LayerEntry(layer, num_features, offset, num_features * hidden_size * HALF, rank)
