"""The whole probe suite on one model.

1. Encode the texts (`probes.texts`); a text that is too short or foreign to the tokenizer is an error before any work.
2. Hash the weight files: the record says which weights it is of, and a vindex has to be of the same.
3. One forward pass per batch of texts (`probes.suite.readings`): C1, C2, C4 and C5 need nothing else. Statistics
   stream, so memory does not grow with the number of texts.
4. Leading gate directions and spectra, from a vindex when given, else from the weights (`probes.suite.geometry`): C3.
5. The constants (`probes.suite.constants`), and the record of it all (`probes.suite.record`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from probes import texts as probe_texts
from probes.live import match
from probes.live.load import Loaded
from probes.live.sites import ffns
from probes.records import Result
from probes.suite import constants as define
from probes.suite import plot, readings, record
from probes.suite.constants import Constant
from probes.suite.definition import TOKENS
from probes.suite.geometry import Geometry, geometry
from probes.suite.readings import Reading
from probes.suite.words import meanings
from probes.texts import ProbeText
from vindex import scoring
from vindex.errors import ProbeError
from vindex.progress import Advance, Progress, silent
from vindex.reader import Vindex, as_vindex


@dataclass(frozen=True, repr=False)
class Constants(Result):
    """C1–C5 of one model, each a `Constant`: `c.C1.value`, `c["C5"].interval`."""

    C1: Constant
    C2: Constant
    C3: Constant
    C4: Constant
    C5: Constant
    readings: tuple[Reading, ...]
    """What each text left behind; the first is the headline text's."""
    geometry: Geometry
    """What the weights alone say."""
    made: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """As docs/probes.md lays it out."""
        return self.made

    def rows(self, variants: bool = False) -> list[dict[str, Any]]:
        """C1–C5, a row each with what it means for this model; with `variants`, a row for each of these besides."""
        said, rows = meanings(self.made), []
        for constant in self:
            rows.append(_row(constant.symbol, constant.name, constant.headline) | {"meaning": said[constant.symbol]})
            more = constant.variants.items() if variants else ()
            rows.extend(_row(constant.symbol, name, figure) | {"meaning": None} for name, figure in more)
        return rows

    def plot(self, path: str | Path) -> None:
        """Draw curves, CKA and spectra to an .html or a .png. Raises TargetError where that cannot be written."""
        plot.draw(self.made, Path(path))

    def __getitem__(self, symbol: str) -> Constant:
        found = {constant.symbol: constant for constant in self}
        if symbol not in found:
            raise ProbeError(f"{symbol!r}: no such constant; expected {', '.join(found)}")
        return found[symbol]

    def __iter__(self) -> Iterator[Constant]:
        return iter((self.C1, self.C2, self.C3, self.C4, self.C5))

    def __repr__(self) -> str:
        return f"<{plot.title_of(self.made)}>"


def constants(
    model: Loaded,
    vindex: Vindex | str | Path | None = None,
    texts: Iterable[str] | str | None = None,
    batch_size: int = 1,
    progress: Progress = silent,
) -> Constants:
    """Measure C1–C5 of `model`.

    vindex: one of the same weights, opened or named, for C3's directions and the spectra; without it they are computed.
    texts: names of bundled ones or UTF-8 files, the first of which gives the headline values; by default the
    eight bundled ones. batch_size: texts to a forward pass.
    Raises ProbeError for a text, a vindex or a model that does not do, and where an activation is not finite.
    """
    batch_size = scoring.positive("batch_size", batch_size)
    found = ffns(model.model)
    if len(found) < 2:
        raise ProbeError("the model has one layer; C3 and C5 compare adjacent layers and need at least two")
    encoded = probe_texts.encoded(model, texts, TOKENS)
    digests = match.weights_sha256(model, progress)
    vindex = None if vindex is None else as_vindex(vindex)
    if vindex is not None:
        match.require_match(model, vindex, digests)
    taken = read_texts(model, encoded, batch_size, progress)
    shape = geometry(found, vindex, progress)
    measured = (
        define.ffn_sparsity(taken),
        define.top_mass(taken, model.model.config.vocab_size),
        define.gate_coherence(shape.directions, shape.mean_rows, shape.experts),
        define.layer_temperature(taken),
        define.circuit_stages(taken),
    )
    return Constants(*measured, taken, shape, record.build(model, encoded, taken, shape, measured, digests))


def read_texts(
    model: Loaded, encoded: Sequence[ProbeText], batch_size: int = 1, progress: Progress = silent
) -> tuple[Reading, ...]:
    """One Reading per text, `batch_size` texts to a forward pass. A step is a layer of one text."""
    advance = progress("texts", len(encoded) * len(ffns(model.model)))
    taken: list[Reading] = []
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        names = ", ".join(Path(text.name).stem for text in batch)
        ids = torch.tensor([text.token_ids for text in batch], device=model.model.device)
        step = partial(_noted, advance, names)
        taken.extend(readings.read(model.model, ids, head=model.head, advance=step))
    return tuple(taken)


def _noted(advance: Advance, note: str, count: int) -> None:
    advance(count, note)


def _row(symbol: str, name: str, figure: Any) -> dict[str, Any]:
    low, high = figure.interval or (None, None)
    return {
        "constant": symbol, "name": name, "value": figure.value, "mean": figure.mean, "low": low, "high": high,
        "null": figure.null, "unit": figure.unit,
    }  # fmt: skip
