"""Check everything in a vindex that can be checked without its source, whoever wrote it.

1. The directory: the files of the format and no others; checksums.
2. Every number: finite, and what its file says it is (unit directions at right angles, falling singular values, scores
   in order). Rows are taken some at a time, so that memory does not grow with what a file claims to hold.
3. What scores are judged by, and the tokens of responses, recomputed from the embeddings (vindex/recomputed.py).
4. index.json and manifest.json say the same of the model, the options and every weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vindex.checksums import sha256_of
from vindex.errors import VindexError
from vindex.format import (
    CARD,
    DOWN,
    DOWN_META,
    EMBEDDINGS,
    GATE,
    GATE_META,
    INDEX,
    MANIFEST,
    NORMS,
    RESPONSE_META,
    RESPONSE_PLACES,
    RESPONSE_STATS,
    RESPONSE_TEXTS,
    RESPONSES,
    ROUTER,
    SHARED_GATES,
    SIGMA,
    STATISTICS,
    SUMS,
    FileSpec,
    files_of,
)
from vindex.index import LayerEntry
from vindex.progress import Advance, Progress, silent
from vindex.reader import Vindex, as_vindex
from vindex.recomputed import responses, statistics
from vindex.schema import listed
from vindex.targets import is_left_over
from vindex.verification import DIRECTORY, Check, Verification

ORTHONORMALITY = 1e-3  # float16 rounding of unit rows leaves dot products within about 3e-4
COSINE_LIMIT = 1 + 1e-3  # of a score in gate_meta.bin
ROWS = 1 << 10  # rows at a time
NUMBERS = 1 << 22  # numbers at a time
OF_THE_HUB = (".gitattributes", ".cache")  # what the Hub and its client leave in a download


def verify(v: Vindex | str | Path, progress: Progress = silent) -> Verification:
    """Check everything in a vindex, opened or named; opening it has already checked structure and sizes."""
    v = as_vindex(v)
    specs = files_of(v.own_index)
    return Verification(v.path, v.id, tuple(_checks(v, specs, progress)))


def _checks(v: Vindex, specs: Sequence[FileSpec], progress: Progress) -> Iterator[Check]:
    yield Check("structure", True, f"{len(specs)} files, every size as index.json says")
    yield _directory(v)
    yield from _checksums(v, progress("checksums", v.size_bytes))
    advance = progress("numbers", sum(values.size for _, values in _arrays(v)) + v.gate.size + v.down.size)
    for spec, values in _arrays(v):
        yield _finite(spec, values, advance)
    for spec, side in ((GATE, "gate"), (DOWN, "down")):
        yield _orthonormal(v, spec, side, advance)
    yield _descending(v)
    if v.index.num_experts:
        yield _biases(v)
    for spec in (GATE_META, DOWN_META, RESPONSE_META):
        if spec.present(v.index):
            yield _tokens(v, spec)
    if v.index.has_gate_stats:
        yield from statistics(v)
    if v.index.has_responses:
        yield from responses(v)
    yield _manifest(v)


def _directory(v: Vindex) -> Check:
    """Nothing but the files of the format, what the Hub leaves in a download and what a killed write left."""
    known = {spec.name for spec in files_of(v.index)}
    try:
        entries = sorted(v.path.iterdir())
    except OSError as error:
        return Check(DIRECTORY, False, f"cannot be listed ({error.strerror}); make it readable")
    left = [entry.name for entry in entries if is_left_over(entry)]
    allowed = {*known, *OF_THE_HUB, *left}
    others = [_described(entry) for entry in entries if entry.name not in allowed]
    links = sum(entry.is_symlink() for entry in entries if entry.name in known)
    if others:
        return Check(DIRECTORY, False, f"not part of a vindex: {listed(others)}; remove it")
    linked = f"; {links} of its files are links" if links else ""
    killed = f"; {left[0]} of a write that was killed" if left else ""
    return Check(DIRECTORY, True, f"nothing else in it{linked}{killed}")


def _described(path: Path) -> str:
    kind = "a link" if path.is_symlink() else "a directory" if path.is_dir() else "" if path.is_file() else "no file"
    return ascii(path.name)[1:-1][:80] + (f" ({kind})" if kind else "")


def _checksums(v: Vindex, advance: Advance) -> Iterator[Check]:
    names = [spec.name for spec in files_of(v.index) if spec is not SUMS]
    unknown = [f"{name!r}" for name in sorted(v.digests.keys() - set(names))]
    if unknown:
        yield Check("checksums", False, f"{SUMS.name} lists what is no file of this vindex: {listed(unknown)}")
        return
    wrong = [name for name in names if sha256_of(v.path / name, advance) != v.digests[name]]
    edited = CARD.name in wrong
    damaged = [name for name in wrong if name != CARD.name]
    detail = f"{len(names) - edited} files" if not damaged else f"changed since the build: {', '.join(damaged)}"
    yield Check("checksums", not damaged, detail)
    if edited:
        yield Check(CARD.name, False, f"edited since it was written; `vindex card {v.path}` writes it anew")


def _arrays(v: Vindex) -> Iterator[tuple[FileSpec, np.ndarray]]:
    of_responses = (RESPONSES, RESPONSE_STATS, RESPONSE_TEXTS, RESPONSE_PLACES)
    for spec in (GATE, DOWN, SIGMA, EMBEDDINGS, NORMS, ROUTER, SHARED_GATES, *STATISTICS, *of_responses):
        if spec.present(v.index):
            yield spec, v.array(spec)


def _finite(spec: FileSpec, values: np.ndarray, advance: Advance) -> Check:
    flat = values.reshape(-1)
    for first in range(0, len(flat), NUMBERS):
        part = flat[first : first + NUMBERS]
        bad = np.flatnonzero(~np.isfinite(part))
        advance(len(part))
        if len(bad):
            at = first + int(bad[0])
            row, column = divmod(at, values.shape[-1])
            place = f"row {row}, column {column}" if values.ndim > 1 else f"number {at}"
            return Check(f"{spec.name} finite", False, f"{place} is {flat[at]}")
    return Check(f"{spec.name} finite", True, f"{values.size:,} numbers")


def _orthonormal(v: Vindex, spec: FileSpec, side: str, advance: Advance) -> Check:
    """Rows up to the rank have a Gram matrix within ORTHONORMALITY of the identity; the rest are zero.

    Each expert by itself. The rank of one is the number of its singular values that are not zero; index.json has the
    smallest of each layer.
    """
    what, worst, where = f"{spec.name} orthonormal", 0.0, ""
    for entry in v.own_index.layers:
        frames, stated = v.layer(entry.layer), getattr(entry.effective_rank, side)
        ranks = (getattr(frames, f"{side}_sigma") != 0).sum(axis=1)
        if ranks.min() != stated:
            detail = f"layer {entry.layer}: index.json says rank {stated}, and {ranks.min()} singular values are not 0"
            return Check(what, False, detail)
        for expert, (rank, rows) in enumerate(zip(ranks, getattr(frames, side), strict=True)):
            place = _place(entry, expert)
            error = _distance_from_orthonormal(rows, int(rank))
            if not error <= ORTHONORMALITY:
                return Check(what, False, f"|row·row − identity| {error:.1e} ({place})")
            worst, where = max((worst, where), (error, place))
            advance(rows.size)
    return Check(what, True, f"largest |row·row − identity| {worst:.1e} ({where})")


def _distance_from_orthonormal(rows: np.ndarray, rank: int) -> float:
    """max |row·row − identity| of the first `rank` of (F, H) rows; infinity where a later row is not zero.

    Some rows are multiplied by some at a time, until one product is too far off.
    """
    step = max(1, min(ROWS, NUMBERS // rows.shape[1]))
    if any(rows[first : first + step].any() for first in range(rank, len(rows), step)):
        return float("inf")
    worst = 0.0
    for first in range(0, rank, step):
        these = rows[first : min(first + step, rank)].astype(np.float32)
        for other in range(first, rank, step):
            gram = these @ rows[other : min(other + step, rank)].astype(np.float32).T
            if other == first:
                gram[np.diag_indices(len(these))] -= 1.0
            worst = float(np.maximum(worst, np.abs(gram).max()))  # np.maximum, since max drops a NaN
            if not worst <= ORTHONORMALITY:
                return worst  # with more rows than dimensions this comes soon
    return worst


def _place(entry: LayerEntry, expert: int) -> str:
    return f"layer {entry.layer}" + (f", expert {expert}" if entry.num_experts else "")


def _descending(v: Vindex) -> Check:
    """Singular values are non-negative and fall, each expert's by themselves."""
    for entry in v.own_index.layers:
        frames = v.layer(entry.layer)
        for side, sigma in (("gate", frames.gate_sigma), ("down", frames.down_sigma)):
            rises = np.argwhere(~(np.diff(sigma, axis=-1) <= 0))
            if len(rises):
                expert, feature = (int(i) for i in rises[0])
                place = _place(entry, expert) + ("," if entry.num_experts else "")
                return Check("singular values", False, f"{side} {place} rises after feature {feature}")
            if not (sigma >= 0).all():
                return Check("singular values", False, f"{side} layer {entry.layer} has a negative one")
    return Check("singular values", True, "non-negative, largest first")


def _biases(v: Vindex) -> Check:
    """What follows each router, where LARQL expects a bias, is zero."""
    routers = v.array(ROUTER)
    for entry in v.index.layers:
        end = v.index.router_offset(entry.layer + 1)
        if routers[end - (entry.num_experts or 0) : end].any():
            return Check("router biases", False, f"layer {entry.layer} has one that is not zero")
    return Check("router biases", True, "all zero")


def _tokens(v: Vindex, spec: FileSpec) -> Check:
    """A meta file: header, counts, ids of tokens, scores that are finite and in order, the top token first."""
    what = f"{spec.name} tokens"
    try:
        tokens = min(v.index.vocab_size, len(v.vocabulary))
        for entry in v.index.layers:
            count, records = v.meta_records(spec, entry.layer)
            if count != entry.num_features:
                return Check(what, False, f"layer {entry.layer}: expected {entry.num_features} records, got {count}")
            for first in range(0, len(records), ROWS):
                for wrong, why in _wrong_records(records[first : first + ROWS], tokens, spec is GATE_META):
                    if wrong.any():
                        feature = first + int(wrong.argmax())
                        return Check(what, False, f"layer {entry.layer}, row {feature}: {why}")
    except VindexError as error:
        return Check(what, False, str(error))
    return Check(what, True, f"{v.index.num_rows:,} records of {v.index.down_top_k} tokens")


def _wrong_records(records: np.ndarray, tokens: int, cosines: bool) -> Iterator[tuple[Any, str]]:
    """(which of the records are wrong, in what way)."""
    ids, scores = records["tokens"]["token_id"], records["tokens"]["score"]
    pole = ids.shape[1] // 2
    yield (ids >= tokens).any(axis=1), f"expected token ids below {tokens}"
    yield ~np.isfinite(scores).all(axis=1), "a score is not finite"
    yield (np.diff(scores[:, :pole]) > 0).any(axis=1), "the highest scores do not stand highest first"
    yield (np.diff(scores[:, pole:]) < 0).any(axis=1), "the lowest scores do not stand lowest first"
    for half in (ids[:, :pole], ids[:, pole:]):
        yield (np.diff(np.sort(half)) == 0).any(axis=1), "a token stands twice at one pole"
    yield records["top_token_id"] != ids[:, 0], "top_token_id is not the first token"
    yield records["top_score"] != scores[:, 0], "top_score is not the first score"
    if cosines:
        yield (np.abs(scores) > COSINE_LIMIT).any(axis=1), "a cosine is larger than 1"


def _manifest(v: Vindex) -> Check:
    """manifest.json is valid and says what index.json says."""
    try:
        wrong = _disagreements(v)
    except VindexError as error:
        return Check(MANIFEST.name, False, str(error))
    worst, zero = v.manifest.worst_certificate, v.manifest.zero_weights
    if wrong:
        return Check(MANIFEST.name, False, f"{INDEX.name} and it differ: {listed(wrong)}")
    limit = v.manifest.options.tolerance
    if worst and not (worst.max_residual or 0.0) <= limit:
        return Check(MANIFEST.name, False, f"{worst.tensor}: certificate {worst.max_residual:.1e}, limit {limit:.1e}")
    said = f"worst certificate {worst.max_residual:.1e}" if worst else "no certificate"
    return Check(MANIFEST.name, True, f"{said}; {zero}" if zero else said)


def _disagreements(v: Vindex) -> list[str]:
    index, manifest = v.own_index, v.manifest
    pairs = {
        "model": (index.model, manifest.source.model),
        "revision": (index.source.get("huggingface_revision") or None, manifest.source.revision),
        "features": (index.num_features_per_expert or index.num_feats, manifest.options.features),
        "embeddings": (index.has_embeddings, manifest.options.embeddings),
        "end": (index.source.get("extracted_at") or None, manifest.finished_at),
        "weights": (index.source.get("safetensors_sha256") or None, manifest.source.weights_sha256),
    }
    wrong = [
        f"{what} is {ours!r} there and {theirs!r} here" for what, (ours, theirs) in pairs.items() if ours != theirs
    ]
    if bool(index.has_responses) != (manifest.responses is not None):
        wrong.append(f"responses are {'there' if index.has_responses else 'not there'} and not so here")
    texts = manifest.responses and (len(manifest.responses.texts), manifest.responses.tokens)
    if index.response_texts not in (None, texts):
        wrong.append(f"texts of responses are {index.response_texts} there and {texts} here")
    weights = {
        (entry.layer, side, at if entry.num_experts else None)
        for entry in index.layers
        for at in range(entry.groups)
        for side in ("gate", "down")
    }
    certified = [(one.layer, one.projection, one.expert) for one in manifest.certificates]
    if len(certified) != len(weights) or set(certified) != weights:
        covered = len(weights & set(certified))
        wrong.append(
            f"there are {len(weights)} weights there, and {len(certified)} certificates of {covered} of them here"
        )
    return wrong
