"""The stage of a build that reads the vocabulary: casts the embeddings and finds every direction's tokens.

The layers are taken in runs (extract/vocab.py), each in one pass over a matrix and each a block of the journal, so
that an hour of projecting a mixture's experts is not lost to a stop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from extract.blocks import cast_report
from extract.cast import require_finite, to_half
from extract.job import Job, Stages
from extract.vocab import STEP, TopTokens, down_scores, gate_scores, runs_of
from vindex import format as form


def read_vocabulary(job: Job, stages: Stages) -> None:
    """Cast the embeddings and project every direction on the vocabulary: one pass over each matrix for each run."""
    runs = runs_of(job.index)
    for tensor in dict.fromkeys((job.layout.embeddings, job.layout.unembedding)):
        label = tensor.removeprefix(job.layout.prefix).removesuffix(".weight")
        advance = stages(f"vocabulary ({label})", job.layout.vocab_size * len(runs))
        for run in runs:
            block = f"{tensor} with layers {run.start} to {run.stop - 1}"
            if block in job.writer.finished:
                advance(job.layout.vocab_size)
            else:
                casts = _read_for_run(job, tensor, run, advance)
                job.writer.finish_block(block, {"casts": casts})


def _read_for_run(job: Job, tensor: str, run: range, advance: Callable[[int], object]) -> list[dict[str, Any]]:
    """One pass over a vocabulary matrix for one run of layers; the first also checks it, and casts the embeddings."""
    embeds = tensor == job.layout.embeddings
    sides = [side for side, used in (("gate", embeds), ("down", tensor == job.layout.unembedding)) if used]
    features = sum(job.index.layers[layer].num_features for layer in run)
    poles = {side: TopTokens(features) for side in sides}
    casts = []
    for first, rows in job.checkpoint.row_blocks(tensor):
        if run.start == 0 and embeds and job.options.embeddings:
            half = to_half(rows, tensor, first)
            job.writer.write(form.EMBEDDINGS.name, first * job.layout.hidden_size * form.HALF, half.values.numpy())
            casts.append(asdict(cast_report(tensor, half)))
        elif run.start == 0:
            require_finite(rows, tensor, first)
        candidates = rows[: max(0, len(job.vocabulary) - first)].to(job.options.device)
        if len(candidates):
            _project(job, candidates, first, run, poles)
        advance(len(rows))
    for side, top_tokens in poles.items():
        _write_meta(job, form.GATE_META if side == "gate" else form.DOWN_META, run, top_tokens.records())
    return casts


def _project(job: Job, rows: torch.Tensor, first: int, run: range, poles: dict[str, TopTokens]) -> None:
    """Score one block of vocabulary rows (n, H) against the run's layers, from the directions as they are stored."""
    final_norm = job.layout.final_norm.scale(job.checkpoint).to(rows.device)
    width = job.layout.hidden_size * form.HALF
    start = job.index.layers[run.start].offset
    for entry in job.index.layers[run.start : run.stop]:
        for step in range(0, entry.num_features, STEP):
            offset, length = entry.offset + step * width, min(STEP, entry.num_features - step) * width
            for side, top_tokens in poles.items():
                stored = job.writer.read((form.GATE if side == "gate" else form.DOWN).name, offset, length)
                half = torch.frombuffer(bytearray(stored), dtype=torch.float16).view(-1, job.layout.hidden_size)
                directions = half.to(rows.device, torch.float32)
                scores = gate_scores(directions, rows) if side == "gate" else down_scores(final_norm * directions, rows)
                top_tokens.update((offset - start) // width, scores, first)


def _write_meta(job: Job, spec: form.FileSpec, run: range, records: np.ndarray) -> None:
    """The run's layers in a meta file, each a count and its records; the header before the first."""
    if run.start == 0:
        header = (form.META_MAGIC, form.META_VERSION, job.index.num_layers, form.META_TOP_K)
        job.writer.write(spec.name, 0, np.array(header, form.META_HEADER).tobytes())
    for layer in run:
        count = job.index.layers[layer].num_features
        of_layer, records = records[:count], records[count:]
        content = np.array(count, form.META_COUNT).tobytes() + of_layer.tobytes()
        job.writer.write(spec.name, form.meta_offset(job.index, layer), content)
