"""Add responses to a whole vindex: the directory with them takes the place of the one without in one step.

1. What is there is linked into NAME.vindex.partial, or copied where the file system has no links.
2. The new files, and index.json, manifest.json, README.md and SHA256SUMS with what they say of them, are written there.
3. The directories change places (vindex/places.py). A process that is stopped before leaves the vindex as it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from vindex import places, targets
from vindex.card import with_files
from vindex.checksums import load_sums, render_sums, sha256_of, vindex_id
from vindex.errors import TargetError
from vindex.files import parse_json
from vindex.format import (
    CARD,
    FILES,
    INDEX,
    MANIFEST,
    META_COUNT,
    META_HEADER,
    META_MAGIC,
    META_VERSION,
    RESPONSE_FILES,
    RESPONSE_META,
    RESPONSE_PLACES,
    RESPONSE_STATS,
    RESPONSE_TEXTS,
    RESPONSES,
    SUMS,
    FileSpec,
)
from vindex.index import Index
from vindex.kinds import VINDEX, objection
from vindex.manifest import MeasuredResponses
from vindex.reader import Vindex, open_vindex
from vindex.schema import OF_A_VINDEX

MAKING = "vindex with responses"


def check_place(v: Vindex) -> None:
    """Raise if responses cannot be added to `v` later: LackingError if it is not ours, TargetError of its place."""
    place = v.path.resolve()
    against = v.own_index and objection(place, (VINDEX,))
    if against:
        raise TargetError(
            f"{v.path} {against}; responses go into a directory of the vindex alone: copy its files to one"
        )
    begun = places.unfinished(place)
    if begun is not None and begun["making"] != MAKING:
        raise TargetError(f"{places.partial_of(place)} is an unfinished {begun['making']}; finish or remove it first")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise TargetError(
            f"{v.path}: {place.parent} is read-only, and the vindex is made anew there; copy it elsewhere"
        )


def add_responses(
    v: Vindex,
    directions: np.ndarray,
    stats: np.ndarray,
    records: np.ndarray,
    texts: np.ndarray,
    read_at: np.ndarray,
    measured: MeasuredResponses,
) -> Vindex:
    """Add the files of docs/format.md, "Responses", in the place of any that were there; the vindex, opened anew.

    directions: (R, H). stats: (5, R). records: (R,) of format.meta_record. texts: (texts, tokens) ids. read_at: (2, R,
    2 · PLACES). Raises TargetError where the directory cannot be replaced, and then all is as it was.
    """
    check_place(v)
    place, shape = v.path.resolve(), (len(texts), texts.shape[1])
    new = dataclasses.replace(v.own_index, has_responses=True, response_texts=shape)
    content = {
        RESPONSES: np.ascontiguousarray(directions, RESPONSES.dtype),
        RESPONSE_STATS: np.ascontiguousarray(stats, RESPONSE_STATS.dtype),
        RESPONSE_META: np.frombuffer(_meta(new, records), np.uint8),
        RESPONSE_TEXTS: np.ascontiguousarray(texts, RESPONSE_TEXTS.dtype),
        RESPONSE_PLACES: np.ascontiguousarray(read_at, RESPONSE_PLACES.dtype),
    }
    for spec, values in content.items():
        assert spec.byte_size and values.nbytes == spec.byte_size(new), spec.name
    with targets.locked(place):
        digests = load_sums(place)
        if vindex_id(digests) != v.id:
            raise TargetError(f"{v.path} is another vindex than was opened; open it again")
        files = [spec.name for spec in FILES]
        with places.new_directory(place, files, making=MAKING, force=True, kinds=(VINDEX,)) as partial:
            for spec, values in content.items():
                targets.write_bytes(partial / spec.name, values.tobytes())
                digests[spec.name] = sha256_of(partial / spec.name)
            for spec, text in _texts(place, new, digests, measured).items():
                targets.write_bytes(partial / spec.name, text)
                digests[spec.name] = hashlib.sha256(text).hexdigest()
            for name in digests.keys() - set(os.listdir(partial)):
                _take_over(place / name, partial / name)
            targets.write_bytes(partial / SUMS.name, render_sums(digests).encode())
    return open_vindex(v.path)


def _texts(place: Path, new: Index, digests: Mapping[str, str], measured: MeasuredResponses) -> dict[FileSpec, bytes]:
    """index.json and manifest.json as they are, keys that we do not know included, and README.md unless it was edited,
    with what is to be said of the responses.
    """
    index, manifest, card = ((place / spec.name).read_bytes() for spec in (INDEX, MANIFEST, CARD))
    ours = {spec.name: digests[spec.name] for spec in RESPONSE_FILES}
    texts = {
        INDEX: _edited(index, INDEX, {"has_responses": True, "response_texts": new.response_texts}, checksums=ours),
        MANIFEST: _edited(manifest, MANIFEST, {"responses": dataclasses.asdict(measured)}),
    }
    if hashlib.sha256(card).hexdigest() == digests.get(CARD.name):
        texts[CARD] = with_files(card.decode(), new).encode()
    return texts


def _edited(content: bytes, spec: FileSpec, values: Mapping[str, Any], **nested: Mapping[str, Any]) -> bytes:
    found = parse_json(content, spec.name, OF_A_VINDEX)
    found |= {**values, **{key: found[key] | dict(more) for key, more in nested.items()}}
    return orjson.dumps(found, option=orjson.OPT_INDENT_2)


def _meta(index: Index, records: np.ndarray) -> bytes:
    """A meta file of (R,) records."""
    header = np.array((META_MAGIC, META_VERSION, index.num_layers, index.down_top_k), META_HEADER)
    parts = [header.tobytes()]
    for entry in index.layers:
        first = index.first_row(entry.layer)
        rows = records[first : first + entry.num_features]
        parts += [np.array(len(rows), META_COUNT).tobytes(), rows.tobytes()]
    return b"".join(parts)


def _take_over(file: Path, target: Path) -> None:
    targets.step(f"link {file.name}")
    with suppress(OSError):
        return os.link(file, target)
    with file.open("rb") as source, targets.written(target) as copy:
        shutil.copyfileobj(source, copy)
