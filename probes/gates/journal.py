"""Scores of finished masks, kept beside a record until it is written, so that a stopped evaluation goes on.

Each is kept under the SHA-256 of everything that decides it: the model and how it runs, what is asked and how, and the
factors on h. Another run finds nothing under its own keys, so that no score is ever taken for another's.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import orjson
from torch import Tensor

from probes.gates.panels import Panels
from probes.gates.score import Cell, Scores, Settings
from probes.live.load import Loaded
from probes.records import libraries
from vindex.checksums import sha256_of
from vindex.errors import TargetError, VindexError
from vindex.schema import load_record
from vindex.targets import written

KIND = "vindex-gates-stopped-evaluation/2"
OF_A_CELL = [str, str, bool, int, int]
BESIDE_WEIGHTS = (".json", ".jinja", ".model", ".txt")  # configuration, tokenizer and chat template


def beside(record: Path) -> Path:
    """Where the scores are kept while the evaluation of `record` is not done."""
    return record.with_name(f"{record.name}.unfinished")


def context(loaded: Loaded, weights_sha256: dict[str, str], panels: Panels, settings: Settings) -> str:
    """SHA-256 of everything but the factors that decides a score."""
    model, names = loaded.model, (name for name in loaded.files.sizes if name.endswith(BESIDE_WEIGHTS))
    said = {
        "weights": weights_sha256,
        "files": {name: sha256_of(loaded.path / name) for name in names},
        "runs": [str(model.dtype), str(model.device), model.config._attn_implementation, libraries()],
        "panels": {name: getattr(panels, name) for name in ("forget", "oracle", "conflict", "reasoning", "neutral")},
        "settings": settings,
    }
    return hashlib.sha256(orjson.dumps(said, default=list, option=orjson.OPT_SORT_KEYS)).hexdigest()


class Journal:
    """The scores of one evaluation; without a path nothing is kept."""

    def __init__(self, path: Path | None, context: str) -> None:
        """Raises TargetError when something else stands at `path`."""
        self.path, self._context, self._scores = path, context, _read(path) if path and os.path.lexists(path) else {}

    def get(self, factors: Tensor | None) -> Scores | None:
        """What this run, stopped before, found for these factors; None is the plain model."""
        found = self._scores.get(self._key(factors))
        if found is None:
            return None
        *texts, cells = found
        return Scores(tuple(Cell(*cell) for cell in cells), *(math.nan if value is None else value for value in texts))

    def put(self, factors: Tensor | None, scores: Scores) -> Scores:
        """Keep a finished mask's scores, and return them."""
        self._scores[self._key(factors)] = [scores.neutral_kl, scores.perplexity, [[*cell] for cell in scores.cells]]
        if self.path:
            with written(self.path) as file:
                file.write(orjson.dumps({"record": KIND, "scores": self._scores}))
        return scores

    def close(self) -> None:
        """The record is written; what was kept for it goes."""
        if self.path:
            self.path.unlink(missing_ok=True)

    def _key(self, factors: Tensor | None) -> str:
        content = b"" if factors is None else factors.contiguous().numpy().tobytes()
        return hashlib.sha256(self._context.encode() + content).hexdigest()


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        record = load_record(path)
    except VindexError as error:
        raise TargetError(f"{error}; remove it to evaluate from the beginning") from error
    scores = record.get("scores")
    if record.get("record") != KIND or not isinstance(scores, dict) or not all(map(_is_scores, scores.values())):
        raise TargetError(f"{path}: is no stopped evaluation; move it away, or choose another place")
    return scores


def _is_scores(value: Any) -> bool:
    if not (isinstance(value, list) and len(value) == 3 and isinstance(value[2], list)):
        return False
    numbers = all(one is None or type(one) in (int, float) for one in value[:2])
    return numbers and all(isinstance(cell, list) and [*map(type, cell)] == OF_A_CELL for cell in value[2])
