"""Build a vindex from a checkpoint: plan, then independent blocks, then one pass over the vocabulary, then commit.

Every number kept is derived from one tensor at a time, so memory does not grow with the number of layers, and a
finished block is never redone (vindex/writer.py keeps the journal).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson
import torch

from extract.blocks import DIRECTIONS, Method, cast_report
from extract.cast import to_half
from extract.checkpoint import TOKENIZER, Checkpoint
from extract.device import page_locked, whole_products
from extract.engines import Engine, in_process
from extract.job import Job
from extract.layouts import find_layout
from extract.planning import direction_blocks, plan_index, total_size
from extract.provenance import hash_source, index_source, library_versions, now, peak_memory
from extract.vocab_stage import VOCABULARY, vocabulary_blocks
from extract.watch import SourceWatch, local_paths
from vindex import format as form
from vindex.card import render_card
from vindex.checksums import sha256_of, sha256_of_all
from vindex.errors import CheckpointError, QueryError, TargetError
from vindex.index import EffectiveRank, Index, LayerEntry
from vindex.index import require_readable as index_is_readable
from vindex.manifest import CastReport, Certificate, Dequantised, Manifest, Source, parse_cast, parse_certificate
from vindex.manifest import require_readable as manifest_is_readable
from vindex.options import BuildOptions
from vindex.progress import Progress
from vindex.schema import Fields, Problems, to_json
from vindex.tokens import Vocabulary, parse_vocabulary
from vindex.writer import START_OVER, open_writer, refuse_taken

NO_CERTIFICATE = Certificate(0, "gate", "", 0.0, 0.0, None, 0, "")  # before there is one


def build(
    checkpoint: Checkpoint,
    target: Path,
    options: BuildOptions,
    progress: Progress,
    *,
    resume: bool,
    force: bool,
    engine: Engine = in_process,
) -> Manifest:
    """Build `target` from a checkpoint and return its manifest.

    engine: what runs the blocks (extract/engines.py); the bytes do not depend on it.
    Raises CheckpointError, NumericError or TargetError; whatever was finished by then can be resumed.
    """
    started, clock = now(), time.monotonic()
    reads = local_paths(checkpoint)
    refuse_taken(target, resume=resume, force=force, reads=reads)
    layout = find_layout(checkpoint)
    index = plan_index(checkpoint, layout, options)
    index_is_readable(index)
    options = replace(options, features=index.num_features_per_expert or index.num_feats)
    tokenizer = checkpoint.tokenizer()
    vocabulary = parse_vocabulary(tokenizer, form.TOKENIZER.name)
    notes = (*checkpoint.notes, *layout.notes, *_tokens_note(checkpoint, index, vocabulary))
    _prepare_device(options)
    if options.device.startswith("cuda"):
        checkpoint = checkpoint.reading_into(page_locked)
    source = hash_source(checkpoint, options.threads, progress)
    manifest_is_readable(
        Manifest(source, (), options, (NO_CERTIFICATE,), (), library_versions(), started, started, 0, 0)
    )
    _require_hashed(tokenizer, checkpoint, source)
    fingerprint = {"source": asdict(source), "options": asdict(options), "versions": library_versions()}
    fingerprint = orjson.loads(orjson.dumps(fingerprint))
    size = total_size(index, len(tokenizer))
    with open_writer(target, fingerprint, size, resume=resume, force=force, reads=reads) as writer:
        job = Job(checkpoint, layout, options, index, writer, tokenizer, vocabulary, SourceWatch(checkpoint, source))
        _require_planned(job)
        for spec in form.files_of(index):
            if spec.byte_size:
                writer.allocate(spec, spec.byte_size(index))
        with whole_products():
            _run(job, engine, progress, "directions", DIRECTIONS, direction_blocks(layout, index))
            _extract_norms(job)
            _extract_routers(job)
            _run(job, engine, progress, "vocabulary", VOCABULARY, vocabulary_blocks(job))
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        manifest = Manifest(
            source=source,
            dequantised=_dequantised(job),
            options=options,
            certificates=tuple(Certificate(**record["certificate"]) for record in _direction_records(job)),
            casts=_casts(_records(job)),
            versions=library_versions(),
            started_at=started,
            finished_at=now(),
            wall_seconds=None if epoch else round(time.monotonic() - clock, 3),
            peak_memory_bytes=None if epoch else peak_memory(),
            notes=notes or None,
        )
        _commit(job, manifest, progress, force)
    return manifest


def _tokens_note(checkpoint: Checkpoint, index: Index, vocabulary: Vocabulary) -> tuple[str, ...]:
    """What to say of added tokens that have no embedding, as where a fine-tune added one and did not resize.

    Raises CheckpointError when other ids are past the embeddings, or there are too few for either pole.
    """
    rows = index.vocab_size
    if vocabulary.trained > rows or len(vocabulary) < form.META_TOP_K // 2:
        raise CheckpointError(
            f"{checkpoint.model}: {form.TOKENIZER.name} has ids up to {len(vocabulary) - 1} and the embeddings have "
            f"{rows} rows; expected at least {form.META_TOP_K // 2} ids, and past the rows none but added tokens; give "
            "the model's own with --tokenizer"
        )
    past = len(vocabulary) - rows
    return (f"added tokens with ids from {rows} to {len(vocabulary) - 1} have no embedding",) if past > 0 else ()


def _require_hashed(tokenizer: bytes, checkpoint: Checkpoint, source: Source) -> None:
    """Raise CheckpointError when the tokenizer was read from other bytes than were hashed."""
    name = checkpoint.own_tokenizer.name if checkpoint.own_tokenizer else TOKENIZER
    for file in source.files:
        if file.name == name and file.sha256 != hashlib.sha256(tokenizer).hexdigest():
            raise CheckpointError(f"{checkpoint.model}: {name} changed while it was being read; call this again")


def _require_planned(job: Job) -> None:
    """Raise TargetError when the journal has a block that this build has not, or a record that cannot be its."""
    directions = {block.name for block in direction_blocks(job.layout, job.index)}
    others = {"norms", "routers", *(block.name for block in vocabulary_blocks(job))}
    problems = Problems("the journal")
    for name, record in job.writer.finished.items():
        fields = Fields(record, name, problems)
        for cast in fields.records("casts"):
            parse_cast(cast)
        if name in directions:
            parse_certificate(fields.record("certificate"))
            fields.integer("rank")
        elif name not in others:
            problems.append(f"{name}: no such block")
    if problems:
        raise TargetError(f"the journal in {job.writer.partial} is not of this build ({problems[0]}); {START_OVER}")


def _run(job: Job, engine: Engine, progress: Progress, what: str, method: Method, blocks: Sequence[Any]) -> None:
    """Run the blocks that no earlier build finished."""
    advance = progress(what, sum(method.steps(block) for block in blocks))
    left = [block for block in blocks if block.name not in job.writer.finished]
    advance(sum(method.steps(block) for block in blocks if block.name in job.writer.finished))
    engine(job, method, left, advance)


def _extract_norms(job: Job) -> None:
    if "norms" in job.writer.finished:
        return
    halves = [to_half(norm.scale(job.checkpoint), norm.tensor) for norm in job.layout.norms]
    job.writer.write(form.NORMS.name, 0, torch.cat([half.values for half in halves]).numpy())
    job.finish("norms", {"casts": [asdict(cast_report("norms", half)) for half in halves]})


def _extract_routers(job: Job) -> None:
    """The router of every mixture, followed by zeros where LARQL's loader expects a bias, and shared experts' gates."""
    if "routers" in job.writer.finished or job.layout.mixture is None:
        return
    casts, shared_gates = [], []
    for layer, ffn in enumerate(job.layout.ffns):
        if ffn.router:
            half = to_half(job.checkpoint.tensor(ffn.router), ffn.router)
            place = job.index.router_offset(layer) * form.HALF
            biases = torch.zeros(len(half.values), dtype=torch.float16)
            job.writer.write(form.ROUTER.name, place, torch.cat([half.values.flatten(), biases]).numpy())
            casts.append(cast_report("routers", half))
        if ffn.shared_gate:
            shared_gates.append(to_half(job.checkpoint.tensor(ffn.shared_gate), ffn.shared_gate))
    if shared_gates:
        job.writer.write(form.SHARED_GATES.name, 0, torch.cat([half.values for half in shared_gates]).numpy())
        casts += [cast_report("shared expert gates", half) for half in shared_gates]
    job.finish("routers", {"casts": [asdict(cast) for cast in casts]})


def _commit(job: Job, manifest: Manifest, progress: Progress, force: bool) -> None:
    """Checksums, index, manifest and card; then the directory appears under its name."""
    writer = job.writer
    writer.require_covered()
    job.source.require_unchanged(at_the_end=True)
    writer.write_text(form.TOKENIZER, job.tokenizer)
    payload = [spec.name for spec in form.files_of(job.index) if form.is_payload(spec)]
    advance = progress("checksums", sum((writer.partial / name).stat().st_size for name in payload))
    digests = sha256_of_all([writer.partial / name for name in payload], job.options.threads, advance)
    index = replace(
        job.index,
        layers=_with_ranks(job),
        checksums=digests,
        source=index_source(job.checkpoint, manifest),
    )
    texts = {
        form.INDEX: to_json(index),
        form.MANIFEST: to_json(manifest),
        form.CARD: render_card(index, manifest, digests, job.vocabulary).encode(),
    }
    for spec, content in texts.items():
        writer.write_text(spec, content)
        digests[spec.name] = sha256_of(writer.partial / spec.name)
    writer.commit(digests, force)


def _with_ranks(job: Job) -> tuple[LayerEntry, ...]:
    """The layers with the rank that their blocks found: in a mixture the smallest of any expert."""
    ranks = {(entry.layer, side): entry.features for entry in job.index.layers for side in ("gate", "down")}
    for block, record in zip(direction_blocks(job.layout, job.index), _direction_records(job), strict=True):
        place = (block.layer, block.side)
        ranks[place] = min(ranks[place], record["rank"])
    return tuple(
        replace(entry, effective_rank=EffectiveRank(ranks[entry.layer, "gate"], ranks[entry.layer, "down"]))
        for entry in job.index.layers
    )


def _records(job: Job) -> list[dict[str, Any]]:
    """What the journal holds, in the plan's order: which block was finished first does not show."""
    directions = {block.name for block in direction_blocks(job.layout, job.index)}
    others = [record for name, record in sorted(job.writer.finished.items()) if name not in directions]
    return _direction_records(job) + others


def _direction_records(job: Job) -> list[dict[str, Any]]:
    return [job.writer.finished[block.name] for block in direction_blocks(job.layout, job.index)]


def _dequantised(job: Job) -> tuple[Dequantised, ...]:
    """Of the tensors this vindex is made from, those that were not stored as plain floats."""
    layout = job.layout
    weights = [weight.tensor for ffn in layout.ffns for weight in (*ffn.gate, *ffn.down)]
    routers = [name for ffn in layout.ffns for name in (ffn.router, ffn.shared_gate) if name]
    others = [layout.embeddings, layout.unembedding, *(norm.tensor for norm in layout.norms)]
    return job.checkpoint.dequantised(dict.fromkeys(weights + routers + others))


def _prepare_device(options: BuildOptions) -> None:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise QueryError("--device cuda: this machine has no CUDA device that torch can use; leave the option out")
    if int(options.device.partition(":")[2] or 0) >= max(torch.cuda.device_count(), 1):
        raise QueryError(f"--device {options.device}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    torch.set_num_threads(options.threads)


def _casts(records: Iterable[dict[str, Any]]) -> tuple[CastReport, ...]:
    """What was cast, piece by piece, as one report for each block name."""
    merged: dict[str, CastReport] = {}
    for cast in (CastReport(**cast) for record in records for cast in record["casts"]):
        other = merged.get(cast.block, CastReport(cast.block, 0, 0, 0.0))
        values, flushed = other.values + cast.values, other.flushed_to_zero + cast.flushed_to_zero
        error = max(other.max_relative_error, cast.max_relative_error)
        merged[cast.block] = CastReport(cast.block, values, flushed, error)
    return tuple(merged.values())
