"""Build a vindex from a checkpoint: plan, then independent blocks, then one pass over the vocabulary, then commit.

Every number kept is derived from one tensor at a time, so memory does not grow with the number of layers, and a
finished block is never redone (vindex/writer.py keeps the journal).
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
import torch

from extract.blocks import cast_report
from extract.cast import require_finite, to_half
from extract.checkpoint import Checkpoint
from extract.engines import Engine, in_process
from extract.layouts import Layout, find_layout
from extract.plan import direction_blocks, plan_index, total_size
from extract.vocab import TopTokens, down_scores, gate_scores
from vindex import format as form
from vindex.card import render_card
from vindex.checksums import render_sums, sha256_of, sha256_of_all
from vindex.errors import QueryError
from vindex.index import EffectiveRank, Index
from vindex.manifest import CastReport, Certificate, Dequantised, Manifest, Source
from vindex.options import BuildOptions
from vindex.tokens import Vocabulary, parse_vocabulary
from vindex.writer import Writer, open_writer, refuse_taken

# Called with a stage's name and its number of steps; gives back what is called with each step done.
Stages = Callable[[str, int], Callable[[int], object]]


@dataclass(frozen=True)
class _Job:
    """Everything the stages of one build share."""

    checkpoint: Checkpoint
    layout: Layout
    options: BuildOptions
    index: Index
    writer: Writer
    tokenizer: bytes
    vocabulary: Vocabulary


def build(
    checkpoint: Checkpoint,
    target: Path,
    options: BuildOptions,
    stages: Stages,
    *,
    resume: bool,
    force: bool,
    engine: Engine = in_process,
) -> Manifest:
    """Build `target` from a checkpoint and return its manifest.

    engine: what runs the direction blocks (extract/engines.py); the bytes do not depend on it.
    Raises CheckpointError, NumericError or TargetError; whatever was finished by then can be resumed.
    """
    started, clock = _now(), time.monotonic()
    layout = find_layout(checkpoint)
    index = plan_index(checkpoint, layout, options)
    tokenizer = checkpoint.tokenizer()
    vocabulary = parse_vocabulary(tokenizer, form.TOKENIZER.name)
    _prepare_device(options)
    refuse_taken(target, resume=resume, force=force)
    source = _hash_source(checkpoint, options.threads, stages)
    fingerprint = {"source": asdict(source), "options": asdict(options), "versions": _versions()}
    fingerprint = orjson.loads(orjson.dumps(fingerprint))
    with open_writer(target, fingerprint, total_size(index, len(tokenizer)), resume=resume, force=force) as writer:
        job = _Job(checkpoint, layout, options, index, writer, tokenizer, vocabulary)
        for spec in form.files_of(index):
            if spec.byte_size:
                writer.allocate(spec, spec.byte_size(index))
        _extract_directions(job, engine, stages)
        _extract_norms(job)
        _read_vocabulary(job, stages)
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        manifest = Manifest(
            source=source,
            dequantised=_dequantised(job),
            options=options,
            certificates=tuple(Certificate(**record["certificate"]) for record in _direction_records(job)),
            casts=tuple(CastReport(**cast) for record in writer.finished.values() for cast in record["casts"]),
            versions=_versions(),
            started_at=started,
            finished_at=_now(),
            wall_seconds=None if epoch else round(time.monotonic() - clock, 3),
            peak_memory_bytes=None if epoch else peak_memory(),
        )
        _commit(job, manifest, stages, force)
    return manifest


def _extract_directions(job: _Job, engine: Engine, stages: Stages) -> None:
    """The singular directions of every gate_proj and down_proj, each with its certificate."""
    blocks = direction_blocks(job.layout, job.index)
    advance = stages("directions", len(blocks))
    left = [block for block in blocks if block.name not in job.writer.finished]
    advance(len(blocks) - len(left))
    for _ in engine(job.checkpoint, left, job.options, job.writer):
        advance(1)


def _extract_norms(job: _Job) -> None:
    if "norms" in job.writer.finished:
        return
    halves = [to_half(job.checkpoint.tensor(tensor), tensor) for _, tensor in job.layout.norms]
    job.writer.write(form.NORMS.name, 0, torch.cat([half.values for half in halves]).numpy())
    job.writer.finish_block("norms", {"casts": _merged([cast_report("norms", half) for half in halves])})


def _read_vocabulary(job: _Job, stages: Stages) -> None:
    """Cast the embeddings and project every direction on the vocabulary, reading each matrix once."""
    for tensor in dict.fromkeys((job.layout.embeddings, job.layout.unembedding)):
        advance = stages(f"vocabulary ({tensor.removeprefix('model.').removesuffix('.weight')})", job.layout.vocab_size)
        if tensor in job.writer.finished:
            advance(job.layout.vocab_size)
            continue
        embeds = tensor == job.layout.embeddings
        sides = [side for side, used in (("gate", embeds), ("down", tensor == job.layout.unembedding)) if used]
        poles = {side: TopTokens(job.index.num_layers, job.index.num_feats) for side in sides}
        casts: list[CastReport] = []
        for first, rows in job.checkpoint.row_blocks(tensor):
            if embeds and job.options.embeddings:
                half = to_half(rows, tensor, first)
                job.writer.write(form.EMBEDDINGS.name, first * job.layout.hidden_size * 2, half.values.numpy())
                casts.append(cast_report(tensor, half))
            else:
                require_finite(rows, tensor, first)
            candidates = rows[: max(0, len(job.vocabulary) - first)].to(job.options.device)
            if len(candidates):
                _project(job, candidates, first, poles)
            advance(len(rows))
        for side, top_tokens in poles.items():
            file = form.GATE_META if side == "gate" else form.DOWN_META
            job.writer.write(file.name, 0, top_tokens.to_bytes())
        job.writer.finish_block(tensor, {"casts": _merged(casts)})


def _project(job: _Job, rows: torch.Tensor, first: int, poles: dict[str, TopTokens]) -> None:
    """Score one block of vocabulary rows (n, H) against every layer, from the directions as they are stored."""
    final_norm = job.checkpoint.tensor(job.layout.final_norm).to(rows.device)
    for entry in job.index.layers:
        for side, top_tokens in poles.items():
            stored = job.writer.read((form.GATE if side == "gate" else form.DOWN).name, entry.offset, entry.length)
            half = torch.frombuffer(bytearray(stored), dtype=torch.float16).view(job.index.num_feats, -1)
            directions = half.to(rows.device, torch.float32)
            scores = gate_scores(directions, rows) if side == "gate" else down_scores(final_norm * directions, rows)
            top_tokens.update(entry.layer, scores, first)


def _commit(job: _Job, manifest: Manifest, stages: Stages, force: bool) -> None:
    """Checksums, index, manifest and card; then the directory appears under its name."""
    writer = job.writer
    writer.write_text(form.TOKENIZER, job.tokenizer)
    payload = [spec.name for spec in form.files_of(job.index) if form.is_payload(spec)]
    advance = stages("checksums", sum((writer.partial / name).stat().st_size for name in payload))
    digests = sha256_of_all([writer.partial / name for name in payload], job.options.threads, advance)
    ranks = [record["rank"] for record in _direction_records(job)]
    index = replace(
        job.index,
        layers=tuple(
            replace(entry, effective_rank=EffectiveRank(gate, down))
            for entry, gate, down in zip(job.index.layers, ranks[::2], ranks[1::2], strict=True)
        ),
        checksums=digests,
        source=_index_source(job.checkpoint, manifest),
    )
    texts = {
        form.INDEX: orjson.dumps(index, option=orjson.OPT_INDENT_2),
        form.MANIFEST: orjson.dumps(manifest, option=orjson.OPT_INDENT_2),
        form.CARD: render_card(index, manifest, digests, job.vocabulary).encode(),
    }
    for spec, content in texts.items():
        writer.write_text(spec, content)
        digests[spec.name] = sha256_of(writer.partial / spec.name)
    writer.commit(digests, force)


def _direction_records(job: _Job) -> list[dict[str, Any]]:
    return [job.writer.finished[block.name] for block in direction_blocks(job.layout, job.index)]


def _index_source(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, Any]:
    """LARQL's source keys. One weight file gives its own SHA-256; several, that of their sorted SHA256SUMS lines."""
    import hashlib

    shards = {file.name: file.sha256 for file in manifest.source.files if file.name.endswith(".safetensors")}
    several = hashlib.sha256(render_sums(shards).encode()).hexdigest() if shards else None
    return {
        "huggingface_repo": checkpoint.model if checkpoint.revision else None,
        "huggingface_revision": checkpoint.revision,
        "safetensors_sha256": next(iter(shards.values())) if len(shards) == 1 else several,
        "extracted_at": manifest.finished_at,
        "larql_version": None,
    }


def _prepare_device(options: BuildOptions) -> None:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise QueryError("--device cuda: this machine has no CUDA device that torch can use; leave the option out")
    torch.set_num_threads(options.threads)


def _hash_source(checkpoint: Checkpoint, threads: int, stages: Stages) -> Source:
    files = checkpoint.fingerprint(threads, stages("hash source", checkpoint.source_bytes))
    return Source(checkpoint.model, checkpoint.revision, checkpoint.licence, files)


def _dequantised(job: _Job) -> tuple[Dequantised, ...]:
    """Of the tensors this vindex is made from, those that were not stored as plain floats."""
    projections = [block.tensor for block in direction_blocks(job.layout, job.index)]
    others = [job.layout.embeddings, job.layout.unembedding, *(tensor for _, tensor in job.layout.norms)]
    return job.checkpoint.dequantised(dict.fromkeys([*projections, *others]))


def _merged(casts: list[CastReport]) -> list[CastReport]:
    """The pieces of one tensor as one report; nothing when nothing was cast."""
    if not casts:
        return []
    values, flushed = sum(cast.values for cast in casts), sum(cast.flushed_to_zero for cast in casts)
    return [CastReport(casts[0].block, values, flushed, max(cast.max_relative_error for cast in casts))]


def _versions() -> dict[str, str]:
    packages = ("vindex", "torch", "numpy", "safetensors")
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _now() -> str:
    """UTC to the second; SOURCE_DATE_EPOCH stands in for the clock when set."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes.

    Linux carries ru_maxrss over from the parent when a program is started, so the kernel's own mark is read there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
