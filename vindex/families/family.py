"""What every family of vindexes answers: which arrays it has, under the names of our format, and what it lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vindex.checksums import OF_SUMS, parse_sums, vindex_id
from vindex.errors import FormatError, LackingError, QueryError
from vindex.format import (
    DOWN_META,
    GATE_META,
    MANIFEST,
    META_COUNT,
    META_HEADER,
    META_MAGIC,
    META_VERSION,
    MOST_TOP_K,
    OLD_META_MAGIC,
    SIGMA,
    STATISTICS,
    SUMS,
    TOKENIZER,
    FileSpec,
    meta_offset,
    meta_record,
)
from vindex.index import Index
from vindex.layout import Layout
from vindex.manifest import Manifest
from vindex.shelf import Shelf
from vindex.tokens import Vocabulary, given_vocabulary, parse_vocabulary

WIDTHS: dict[int, np.dtype] = {
    2: np.dtype("<f2"),
    4: np.dtype("<f4"),
}  # bytes of a number that a file's size can tell apart


class Lack(NamedTuple):
    """A piece that is not there: what it is, why not, and what would give it."""

    what: str
    why: str
    way_out: str


class Place(NamedTuple):
    """Where an array lies."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


class Family:
    """A vindex of one family on a shelf.

    title: the family in words, nothing for our own. index: the sizes. places and lacks: by the name that a piece has in
    our format. one_pole: whether a meta file keeps the highest scores only. neurons: whether rows are
    those of gate_proj itself.
    """

    title: str = ""
    one_pole: bool = False
    neurons: bool = False
    index: Index | Layout
    digests: dict[str, str]
    size_bytes: int
    places: dict[str, Place]
    lacks: dict[str, Lack]

    def __init__(self, shelf: Shelf, tokenizer: str | Path | None) -> None:
        self.shelf, self._tokenizer = shelf, tokenizer

    def lacking(self, spec: FileSpec) -> LackingError | None:
        """What to raise where this piece is needed; None where it is there."""
        lack = self.lacks.get(spec.name)
        return lack and LackingError(f"{self.shelf.name} {lack.why}: {lack.way_out}")

    def require(self, spec: FileSpec) -> None:
        """Raise LackingError unless the piece is there."""
        error = self.lacking(spec)
        if error:
            raise error

    def array(self, spec: FileSpec) -> np.ndarray:
        """A binary of the format, whole. Raises LackingError."""
        self.require(spec)
        return self.shelf.array(*self.places[spec.name])

    def rows(self, spec: FileSpec, rows: Sequence[int]) -> np.ndarray:
        """Some rows of one that is a matrix. Raises LackingError."""
        self.require(spec)
        name, dtype, shape = self.places[spec.name]
        return self.shelf.rows(name, dtype, (shape[0], shape[1]), rows)

    def meta(self, spec: FileSpec) -> np.ndarray:
        """The bytes of a meta file, whose header is what it must be. Raises LackingError, FormatError."""
        self.require(spec)
        size = meta_offset(self.index, self.index.num_layers)
        content = self.shelf.array(spec.name, np.dtype(np.uint8), (size,))
        require_header(
            np.frombuffer(content, META_HEADER, count=1)[0], spec, self.index.num_layers, self.index.down_top_k
        )
        return content

    def meta_records(self, content: np.ndarray, layer: int) -> tuple[int, np.ndarray]:
        """(the count that precedes them, records) of one layer."""
        place, features = meta_offset(self.index, layer), self.index.layers[layer].num_features
        count = int(np.frombuffer(content, META_COUNT, count=1, offset=place)[0])
        record = meta_record(self.index.down_top_k)
        return count, np.frombuffer(content, record, count=features, offset=place + META_COUNT.itemsize)

    @property
    def id(self) -> str:
        """That of the checksums of its payload; the directory's name where it lists none."""
        return vindex_id(self.digests) if self.digests else self.shelf.name

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Of the tokenizer.json that is there, or that was given. Raises LackingError, FormatError, QueryError."""
        if self._tokenizer is None:
            self.require(TOKENIZER)
            return parse_vocabulary(self.shelf.read(TOKENIZER.name), TOKENIZER.name)
        if TOKENIZER.name not in self.lacks:
            raise QueryError(f"{self.shelf.name} has a {TOKENIZER.name} of its own; leave out --tokenizer")
        vocabulary = given_vocabulary(str(self._tokenizer))
        if len(vocabulary) > self.index.vocab_size:
            raise QueryError(
                f"{self._tokenizer} has token ids up to {len(vocabulary) - 1}, and {self.shelf.name} only "
                f"{self.index.vocab_size} tokens: give the tokenizer of its own model"
            )
        return vocabulary

    @property
    def can_spell(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None or TOKENIZER.name not in self.lacks

    @property
    def manifest(self) -> Manifest:
        """Provenance and certificates. Raises LackingError."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What `vindex info` says, in plain values."""
        raise NotImplementedError

    def more(self) -> dict[str, Any]:
        """What only this family says."""
        return {}


class Foreign(Family):
    """A vindex that others made: no provenance that is certain, and no certificates."""

    index: Layout

    @property
    def manifest(self) -> Manifest:
        raise self.lacking(MANIFEST) or FormatError(f"{self.shelf.name}: its {MANIFEST.name} is not in our form")

    def facts(self) -> dict[str, Any]:
        i = self.index
        mixture = {"experts_per_layer": i.num_experts, "features_per_expert": i.num_features_per_expert}
        return {
            "family": self.title,
            "model": i.model,
            "layers": i.num_layers,
            "features_per_layer": i.num_feats,
            **(mixture if i.num_experts else {}),
            "hidden_size": i.hidden_size,
            **({} if i.tokens is None else {"vocab_size": i.tokens}),
            "numbers": ", ".join(f"{name} {place.dtype.name}" for name, place in self.places.items()),
            **self.more(),
            "lacks": [lack._asdict() for lack in dict.fromkeys(self.lacks.values())],
        }

    def settle(self, names: frozenset[str], index: str, lacks: dict[FileSpec, Lack]) -> None:
        """Note checksums, size and what is missing. names: of all its files. index: of the one with the sizes."""
        self.digests = {}
        if SUMS.name in names:
            self.digests = parse_sums(self.shelf.read(SUMS.name, OF_SUMS), f"{self.shelf.place}/{SUMS.name}")
        else:
            lacks |= {SUMS: Lack("checksums", f"has no {SUMS.name}", "ask who published it, to tell a changed file")}
        self.lacks = {spec.name: lack for spec, lack in (usual_lacks(self.title) | lacks).items()}
        there = {index, *(name for name in (SUMS.name, TOKENIZER.name, DOWN_META.name) if name in names)}
        self.size_bytes = sum(self.shelf.size(name) for name in there | self.places.keys())

    def with_down_meta(self, layout: Layout) -> Layout:
        """With the tokens that down_meta.bin, in the layout of LARQL, keeps of each row. Raises FormatError."""
        if self.shelf.size(DOWN_META.name) < META_HEADER.itemsize:
            raise FormatError(f"{self.shelf.place}: {DOWN_META.name}: expected a header of 16 bytes; download it again")
        header = self.shelf.array(DOWN_META.name, META_HEADER, (1,))[0]
        require_header(header, DOWN_META, layout.num_layers, min(int(header["top_k"]), MOST_TOP_K))
        found = replace(layout, down_top_k=int(header["top_k"]))
        expected, size = meta_offset(found, found.num_layers), self.shelf.size(DOWN_META.name)
        if size != expected:
            raise FormatError(
                f"{self.shelf.place}: {DOWN_META.name}: expected {expected:,} bytes, {found.down_top_k} tokens "
                f"for each of {found.num_rows:,} rows, got {size:,}; download it again"
            )
        return found


BUILD = "build a vindex of the model with `vindex build`"
TOKENS = "ask by --id, or give the model's with --tokenizer DIR or HUB_ID"


def usual_lacks(title: str) -> dict[FileSpec, Lack]:
    """What no family but ours keeps."""
    kept = f", which {title} does not keep"
    statistics = Lack("z and chance", f"has no statistics of the vocabulary{kept}, so there is no z", BUILD)
    return {
        SIGMA: Lack("singular values", f"has no singular values{kept}", BUILD),
        GATE_META: Lack("the tokens that directions read", f"has no {GATE_META.name}{kept}", BUILD),
        **dict.fromkeys(STATISTICS, statistics),
        MANIFEST: Lack(
            "certificates", f"has no certificates{kept}", "measure it with `vindex audit DIR --source MODEL`"
        ),
    }


def sized(shelf: Shelf, spec: FileSpec, shape: tuple[int, ...]) -> Place:
    """A file that must hold this many numbers; its size says of how many bytes each. Raises FormatError."""
    count, size = math.prod(shape), shelf.size(spec.name)
    for width, dtype in WIDTHS.items():
        if size == count * width:
            return Place(spec.name, dtype, shape)
    raise FormatError(
        f"{shelf.place}: {spec.name}: expected {count * 2:,} bytes (float16) or {count * 4:,} (float32) for "
        f"{' × '.join(map(str, shape))} numbers, got {size:,}; download it again"
    )


def require_header(header: Any, spec: FileSpec, layers: int, top_k: int) -> None:
    """Raise FormatError unless a meta file begins as it must."""
    expected = (META_MAGIC, META_VERSION, layers, top_k)
    if tuple(header) not in (expected, (OLD_META_MAGIC, *expected[1:])):
        raise FormatError(f"{spec.name}: expected header {expected}, got {tuple(map(int, header))}; run vindex verify")
