"""Our own format, docs/format.md: every file is there, of its exact size, or the vindex is refused."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vindex.checksums import OF_SUMS, parse_sums, vindex_id
from vindex.families.family import Family, Lack, Place
from vindex.format import EMBEDDINGS, FILES, GATE_STATS, STATISTICS, SUMS
from vindex.index import Index, load_index
from vindex.info import facts_of
from vindex.manifest import Manifest, load_manifest
from vindex.shelf import Shelf
from vindex.whole import check_files


class Own(Family):
    """See above."""

    def __init__(self, shelf: Shelf, tokenizer: str | Path | None) -> None:
        super().__init__(shelf, tokenizer)
        self.digests = parse_sums(shelf.read(SUMS.name, OF_SUMS), f"{shelf.place}/{SUMS.name}")
        self.index: Index = load_index(shelf)
        index = self.index
        self.size_bytes = check_files(shelf, index, self.digests)
        self.places = {
            spec.name: Place(spec.name, np.dtype(spec.dtype), spec.shape(index))
            for spec in FILES
            if spec.dtype and spec.shape and spec.present(index)
        }
        self.lacks = {}
        if not index.has_embeddings:
            way_out = f"pass a vector of {index.hidden_size} numbers, or rebuild without that option"
            self.lacks[EMBEDDINGS.name] = Lack("embeddings", "was built with --no-embeddings", way_out)
        if not index.has_gate_stats:
            why = f"has no statistics ({GATE_STATS.name} and others), so there is no z"
            statistics = Lack("z and chance", why, "build it again with this version")
            self.lacks |= {spec.name: statistics for spec in STATISTICS}

    @property
    def id(self) -> str:
        return vindex_id(self.digests)

    @cached_property
    def manifest(self) -> Manifest:
        return load_manifest(self.shelf)

    def facts(self) -> dict[str, Any]:
        return facts_of(self.index, self.manifest)
