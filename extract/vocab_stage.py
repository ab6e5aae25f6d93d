"""The blocks of a build that read the vocabulary: cast the embeddings and find every direction's tokens.

Gate directions meet the embeddings, down directions the unembedding. The layers are taken in runs (extract/vocab.py),
each a block that passes once over the matrix, so that an hour of projecting a mixture's experts is not lost to a stop
and runs can be computed apart. They read the directions as they are stored, so the blocks of directions come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from extract.ahead import ahead
from extract.blocks import BlockFiles, Method, cast_report
from extract.cast import require_finite, to_half
from extract.checkpoint import Checkpoint
from extract.device import wide
from extract.job import Job
from extract.layouts import Norm
from extract.vocab import STEP, Sample, Spread, TopTokens, peaks_of, runs_of, scores_of, unit_rows
from vindex import format as form
from vindex.chance import random_directions
from vindex.format import RANDOM_DIRECTIONS
from vindex.index import Index
from vindex.options import BuildOptions

KEPT_BYTES = 1 << 28  # of directions in float32 that a pass over the vocabulary keeps in memory


@dataclass(frozen=True)
class VocabularyBlock:
    """One side of a run of layers and the matrix it meets, as plain data that travels.

    tokens: rows of the matrix that are tokens; those past them are padding. first: whether this is the block that
    checks the matrix, casts the embeddings and writes the header of the meta file.
    """

    name: str
    side: str
    tensor: str
    layers: range
    tokens: int
    first: bool
    final_norm: Norm
    index: Index


def vocabulary_blocks(job: Job) -> list[VocabularyBlock]:
    """The blocks of one build, gate before down."""
    matrices = (("gate", job.layout.embeddings), ("down", job.layout.unembedding))
    return [
        VocabularyBlock(
            name=f"{side} tokens of layers {run.start} to {run.stop - 1}",
            side=side,
            tensor=tensor,
            layers=run,
            tokens=min(len(job.vocabulary), job.index.vocab_size),
            first=run.start == 0,
            final_norm=job.layout.final_norm,
            index=job.index,
        )
        for side, tensor in matrices
        for run in runs_of(job.index)
    ]


Material = tuple[torch.Tensor, Iterator[tuple[int, torch.Tensor]]]


def read_vocabulary(checkpoint: Checkpoint, block: VocabularyBlock, options: BuildOptions) -> Material:
    """The final norm's scale (H,) and the rows of the matrix, read as they are taken; float32, on the device."""
    rows = ((first, wide(stored, options.device)) for first, stored in checkpoint.row_blocks(block.tensor))
    return block.final_norm.scale(checkpoint).to(options.device), rows


def project_vocabulary(
    block: VocabularyBlock,
    material: Material,
    options: BuildOptions,
    files: BlockFiles,
    advance: Callable[[int], object],
) -> dict[str, Any]:
    """Pass once over the matrix and write the run's records. `advance` is told the rows of each step."""
    final_norm, row_blocks = material
    gate, features = block.side == "gate", sum(block.index.layers[layer].num_features for layer in block.layers)
    top_tokens, casts = TopTokens(features + RANDOM_DIRECTIONS * block.first, options.device), []
    spread, sample = Spread(features + RANDOM_DIRECTIONS * block.first, options.device), Sample(block.tokens)
    chance = torch.from_numpy(random_directions(block.index.hidden_size)).to(options.device) if block.first else None
    directions = _Directions(block, files, chance, final_norm)
    for first, rows in ahead(row_blocks):
        if block.first and gate and options.embeddings:
            half = to_half(rows, block.tensor, first)
            files.write(form.EMBEDDINGS.name, first * rows.shape[1] * form.HALF, half.values.numpy())
            casts.append(asdict(cast_report(block.tensor, half)))
        elif block.first:
            require_finite(rows, block.tensor, first)
        candidates = rows[: max(0, block.tokens - first)]
        if len(candidates):
            tokens = unit_rows(candidates) if gate else candidates
            if gate:
                sample.update(first, tokens)
            for feature, some in directions:
                scores = scores_of(some, tokens)
                if gate:
                    spread.update(feature, scores)
                top_tokens.update(feature, scores, first)
        advance(len(rows))
    records = top_tokens.records()
    _write_meta(block, files, records[:features])
    if block.first:
        poles = records[features:]["tokens"]["token_id"]
        files.write(form.RANDOM_POLES.name, 0 if gate else poles.nbytes, np.ascontiguousarray(poles))
    if gate:
        _write_statistics(block, files, spread, sample, directions)
    return {"casts": casts}


class _Directions:
    """The run's directions as they are multiplied, as often as one goes through them: (number, (n, H) float32) pieces.

    Gate directions are made unit rows, down directions scaled by the final norm's weight. The first block's are
    followed by the random ones, `chance`. They are kept where that takes at most KEPT_BYTES, else read again each time.
    """

    def __init__(
        self, block: VocabularyBlock, files: BlockFiles, chance: torch.Tensor | None, final_norm: torch.Tensor
    ) -> None:
        self._block, self._files, self._chance, self._final_norm = block, files, chance, final_norm
        start, stop = _extent(block)
        self._kept = list(self._read()) if stop - start <= KEPT_BYTES * form.HALF // 4 or final_norm.is_cuda else None

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        return iter(self._kept) if self._kept else self._read()

    def _read(self) -> Iterator[tuple[int, torch.Tensor]]:
        file = (form.GATE if self._block.side == "gate" else form.DOWN).name
        (start, stop), hidden = _extent(self._block), self._block.index.hidden_size
        width = hidden * form.HALF
        for offset in range(start, stop, STEP * width):
            stored = bytearray(self._files.read(file, offset, min(STEP * width, stop - offset)))
            yield (offset - start) // width, self._ready(torch.frombuffer(stored, dtype=torch.float16).view(-1, hidden))
        if self._chance is not None:
            yield (stop - start) // width, self._ready(self._chance)

    def _ready(self, some: torch.Tensor) -> torch.Tensor:
        there = some.to(self._final_norm.device).to(torch.float32)
        return unit_rows(there) if self._block.side == "gate" else self._final_norm * there


def _extent(block: VocabularyBlock) -> tuple[int, int]:
    """First byte of the run's directions in their file, and the first one past them."""
    entries = [block.index.layers[layer] for layer in block.layers]
    return entries[0].offset, entries[-1].offset + entries[-1].length


def _write_statistics(
    block: VocabularyBlock,
    files: BlockFiles,
    spread: Spread,
    sample: Sample,
    directions: Iterable[tuple[int, torch.Tensor]],
) -> None:
    """The run's part of what scores are judged by; the sampled tokens meet its directions once more."""
    counts = [block.index.layers[layer].num_features for layer in block.layers]
    stats, rows = spread.result(), sample.rows()
    layer_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(rows.device)
    own = ((first, piece[: len(layer_of) - first]) for first, piece in directions)
    peaks = peaks_of(((first, piece) for first, piece in own if len(piece)), stats, rows, layer_of)
    row, width = _extent(block)[0] // (block.index.hidden_size * form.HALF), peaks.element_size()
    for which, values in enumerate(stats[:, : len(layer_of)].cpu().numpy()):
        files.write(form.GATE_STATS.name, (which * block.index.num_rows + row) * width, np.ascontiguousarray(values))
    files.write(form.GATE_PEAKS.name, block.layers.start * form.SAMPLE * width, peaks.cpu().numpy())
    if block.first:
        files.write(form.MEAN_EMBEDDING.name, 0, sample.mean().cpu().numpy())


def _write_meta(block: VocabularyBlock, files: BlockFiles, records: np.ndarray) -> None:
    """The run's layers in a meta file, each a count and its records; the header before the first."""
    file = (form.GATE_META if block.side == "gate" else form.DOWN_META).name
    if block.first:
        header = (form.META_MAGIC, form.META_VERSION, block.index.num_layers, form.META_TOP_K)
        files.write(file, 0, np.array(header, form.META_HEADER).tobytes())
    for layer in block.layers:
        count = block.index.layers[layer].num_features
        of_layer, records = records[:count], records[count:]
        content = np.array(count, form.META_COUNT).tobytes() + of_layer.tobytes()
        files.write(file, form.meta_offset(block.index, layer), content)


def _rows(block: VocabularyBlock) -> int:
    return block.index.vocab_size


VOCABULARY = Method(read_vocabulary, project_vocabulary, _rows)
