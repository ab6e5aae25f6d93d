"""The format's one table of files: names, dtypes and shapes. Everything else is derived from it. See docs/format.md.

Dimension names used everywhere: L layers, F features per layer, H hidden size, I intermediate size, V rows of the
embedding matrix, K tokens kept per feature in a meta file; in a mixture of experts E experts and S shared experts per
layer; R features of all layers together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

FORMAT_NAME, FORMAT_VERSION = "vindex", 1
LARQL_VERSION = 2
META_MAGIC, META_VERSION = 0x444D4554, 1
OLD_META_MAGIC = 0x54454D44  # of early files of LARQL, whose loader takes both
HALF = 2  # bytes of a half-precision number
META_TOP_K = 20  # ten highest scores, then ten lowest
SAMPLE = 1 << 12  # tokens, evenly spread over the vocabulary, whose largest |z| is kept
RANDOM_DIRECTIONS = 1 << 8  # whose poles are kept, to judge the poles of the model's own
PLACES = 3  # in texts, at which a gate direction is read most, of either sign

# No model has as many by far; a count past these is damage, and is refused before anything is made of it.
MOST_LAYERS, MOST_EXPERTS, MOST_COLUMNS = 1 << 14, 1 << 16, 1 << 20
MOST_NEURONS, MOST_TOKENS, MOST_TOP_K = 1 << 24, 1 << 26, 1 << 10
MOST_READ = 1 << 24  # tokens of texts; a float32 holds every whole number up to it

META_HEADER = np.dtype([("magic", "<u4"), ("version", "<u4"), ("layers", "<u4"), ("top_k", "<u4")])
TOKEN_SCORE = np.dtype([("token_id", "<u4"), ("score", "<f4")])


META_COUNT = np.dtype("<u4")  # precedes the records of each layer


def meta_record(top_k: int) -> np.dtype:
    """One feature in a meta file: its top token, then K scored tokens."""
    return np.dtype([("top_token_id", "<u4"), ("top_score", "<f4"), ("tokens", TOKEN_SCORE, (top_k,))])


def meta_offset(index: Dims, layer: int) -> int:
    """Where layer's count lies in a meta file, in bytes; its records follow. layer L gives the size of the file."""
    features = index.first_row(layer) if layer < index.num_layers else index.num_rows
    return META_HEADER.itemsize + layer * META_COUNT.itemsize + features * meta_record(index.down_top_k).itemsize


class Dims(Protocol):
    """The sizes that a vindex's files follow from: what `vindex.index.Index` holds of them."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def feature_shape(self) -> tuple[int, ...]: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def down_top_k(self) -> int: ...
    @property
    def has_embeddings(self) -> bool: ...
    @property
    def has_gate_stats(self) -> bool | None: ...
    @property
    def has_responses(self) -> bool | None: ...
    @property
    def response_texts(self) -> Sequence[int] | None: ...
    @property
    def num_experts(self) -> int | None: ...
    @property
    def num_shared_experts(self) -> int | None: ...
    @property
    def norms(self) -> Sequence[Any]: ...
    @property
    def layers(self) -> Sequence[Any]: ...
    def first_row(self, layer: int) -> int: ...
    def router_offset(self, layer: int) -> int: ...


class FileSpec(NamedTuple):
    """One file of a vindex. `byte_size` is None for text, whose size no header fixes.

    optional: a vindex has the same id with it and without it.
    """

    name: str
    content: str
    dtype: str | None = None
    shape: Callable[[Dims], tuple[int, ...]] | None = None
    byte_size: Callable[[Dims], int] | None = None
    present: Callable[[Dims], bool] = lambda index: True
    optional: bool = False


def _array(
    name: str,
    dtype: str,
    shape: Callable,
    content: str,
    present: Callable = lambda index: True,
    optional: bool = False,
) -> FileSpec:
    def byte_size(index: Dims) -> int:
        return math.prod(shape(index)) * np.dtype(dtype).itemsize

    return FileSpec(name, content, dtype, shape, byte_size, present, optional)


def _statistic(name: str, dtype: str, shape: Callable, content: str) -> FileSpec:
    """One of the files that scores are judged by; a vindex has all of them or none."""
    return _array(name, dtype, shape, content, lambda index: bool(index.has_gate_stats), optional=True)


def _has_responses(index: Dims) -> bool:
    return bool(index.has_responses)


def _has_places(index: Dims) -> bool:
    return index.response_texts is not None


def _meta_size(index: Dims) -> int:
    return meta_offset(index, index.num_layers)


def _frames(index: Dims) -> tuple[int, ...]:
    return *index.feature_shape, index.hidden_size


GATE = _array(
    "gate_vectors.bin", "<f2", _frames, "unit directions gate_proj reads, largest singular value first [L, F, H]"
)
DOWN = _array("down_features.bin", "<f2", _frames, "unit directions down_proj writes, largest first [L, F, H]")
SIGMA = _array(
    "singular_values.bin",
    "<f4",
    lambda index: (2, *index.feature_shape),
    "their singular values: row 0 gate, row 1 down [2, L, F]",
)
EMBEDDINGS = _array(
    "embeddings.bin",
    "<f2",
    lambda index: (index.vocab_size, index.hidden_size),
    "token embedding matrix [V, H]",
    present=lambda index: index.has_embeddings,
)
NORMS = _array(
    "norms.bin", "<f2", lambda index: (sum(n.length for n in index.norms),), "norm weight vectors, listed in index.json"
)
ROUTER = _array(
    "router_weights.bin",
    "<f2",
    lambda index: (index.router_offset(index.num_layers),),
    "router of each mixture layer: weights [E, H], then E zeros",
    present=lambda index: bool(index.num_experts),
)
SHARED_GATES = _array(
    "shared_expert_gates.bin",
    "<f2",
    lambda index: (sum(bool(entry.num_shared_experts) for entry in index.layers), index.hidden_size),
    "vector that gates the shared expert of each layer that has one",
    present=lambda index: bool(index.num_shared_experts),
)
GATE_STATS = _statistic(
    "gate_stats.bin",
    "<f4",
    lambda index: (2, *index.feature_shape),
    "mean and standard deviation over the vocabulary of each gate direction's cosines [2, L, F]",
)
GATE_PEAKS = _statistic(
    "gate_peaks.bin",
    "<f4",
    lambda index: (index.num_layers, SAMPLE),
    f"largest |z| that {SAMPLE} tokens reach in each layer [L, {SAMPLE}]",
)
MEAN_EMBEDDING = _statistic(
    "mean_embedding.bin", "<f4", lambda index: (index.hidden_size,), "mean of the embeddings at length one [H]"
)
RANDOM_POLES = _statistic(
    "random_poles.bin",
    "<u4",
    lambda index: (2, RANDOM_DIRECTIONS, META_TOP_K),
    f"tokens at the poles of {RANDOM_DIRECTIONS} random directions: row 0 read, row 1 written",
)
RESPONSES = _array(
    "responses.bin",
    "<f2",
    _frames,
    "unit directions the FFN writes when a gate direction is read [L, F, H]",
    _has_responses,
    optional=True,
)
RESPONSE_STATS = _array(
    "response_stats.bin",
    "<f4",
    lambda index: (5, *index.feature_shape),
    "of each response R², two nulls, slope and number of tokens [5, L, F]",
    _has_responses,
    optional=True,
)
RESPONSE_META = FileSpec(
    "response_meta.bin",
    "tokens each response pushes up and down",
    byte_size=_meta_size,
    present=_has_responses,
    optional=True,
)
RESPONSE_TEXTS = _array(
    "response_texts.bin",
    "<u4",
    lambda index: tuple(index.response_texts or ()),
    "token ids of the texts that responses were measured over [texts, tokens]",
    _has_places,
    optional=True,
)
RESPONSE_PLACES = _array(
    "response_places.bin",
    "<f4",
    lambda index: (2, *index.feature_shape, 2 * PLACES),
    f"the {PLACES} places in these texts at which each gate direction is read most, of either sign, and z there",
    _has_places,
    optional=True,
)
DOWN_META = FileSpec("down_meta.bin", "tokens each down feature pushes up and down", byte_size=_meta_size)
GATE_META = FileSpec("gate_meta.bin", "tokens along and against each gate direction", byte_size=_meta_size)
TOKENIZER = FileSpec("tokenizer.json", "the model's tokenizer, byte for byte")
INDEX = FileSpec("index.json", "shape, layout, definitions, checksums")
MANIFEST = FileSpec("manifest.json", "provenance: source, options, certificates, versions")
CARD = FileSpec("README.md", "model card")
SUMS = FileSpec("SHA256SUMS", "one line for every other file, written last")

TEXTS = (TOKENIZER, INDEX, MANIFEST, CARD, SUMS)
STATISTICS = (GATE_STATS, GATE_PEAKS, MEAN_EMBEDDING, RANDOM_POLES)
RESPONSE_FILES = (RESPONSES, RESPONSE_STATS, RESPONSE_META, RESPONSE_TEXTS, RESPONSE_PLACES)
OWN = (GATE, DOWN, SIGMA, EMBEDDINGS, NORMS, ROUTER, SHARED_GATES, DOWN_META, GATE_META)
FILES = (*OWN, *STATISTICS, *RESPONSE_FILES, *TEXTS)


def files_of(index: Dims) -> list[FileSpec]:
    """The files that a vindex with this index holds, in the table's order."""
    return [spec for spec in FILES if spec.present(index)]


def is_payload(spec: FileSpec) -> bool:
    """Whether the file is content (a .bin or the tokenizer), which index.json's checksums cover.

    The vindex id covers those that are not optional.
    """
    return spec.byte_size is not None or spec is TOKENIZER
