"""What `probes.respond` found: a row for each layer, the strongest responses, and the way into the vindex."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probes.records import Result, plain
from vindex import adding
from vindex.charts import COLOURS, QUIET, Curve, draw_curves
from vindex.manifest import MeasuredResponses
from vindex.reader import Vindex

RECORD = "vindex-responses/1"
SLOPE = 3
"""Which of the figures it is; where it is 0 there is no response."""
SHOWN = 10
"""Of the strongest responses, in a record."""


@dataclass(frozen=True, repr=False)
class Responses(Result):
    """The responses of all R gate directions of a vindex."""

    vindex: Vindex
    """As it was given; `add` gives the one that holds them."""
    model: dict[str, Any]
    measured: MeasuredResponses
    direction: np.ndarray
    """(R, H) float16 unit rows; zero where there is no response."""
    figures: np.ndarray
    """(R, 6) float32: the five figures of response_stats.bin, and the mean R² of random directions."""
    tokens: np.ndarray
    """(R,) records of response_meta.bin."""
    texts: np.ndarray
    """(texts, tokens) ids of what was read."""
    places: np.ndarray
    """(2, R, 2 · PLACES) of response_places.bin: where in the texts each direction is read most, and z there."""

    def add(self) -> Vindex:
        """Add them to the vindex's directory, in the place of any it has; the vindex, opened anew.

        Raises TargetError where that is not to be changed, and then it is as it was.
        """
        figures = self.figures[:, :5].T
        files = (self.direction, figures, self.tokens, self.texts, self.places)
        return adding.add_responses(self.vindex, *files, self.measured)

    def rows(self) -> list[dict[str, Any]]:
        """A layer each, over its directions with a response; None where it has none.

        tokens: the median n. r2: mean. best: the largest. random: mean R² of random directions. permuted: the mean over
        all permutations, which is 1/(n − 1). related: the share of directions that none of their permutations reached.
        beyond: the share of directions that besides reach more than 95 % of random ones. By chance both are 0.05.
        """
        return [self._row(entry.layer) for entry in self.vindex.index.layers]

    def _row(self, layer: int) -> dict[str, Any]:
        entry, first = self.vindex.index.layers[layer], self.vindex.index.first_row(layer)
        found = self.figures[first : first + entry.num_features].astype(np.float64)
        found = found[found[:, SLOPE] > 0]
        names = ("layer", "tokens", "r2", "best", "random", "permuted", "related", "beyond")
        if not len(found):
            return dict.fromkeys(names) | {"layer": layer}
        r2, null, usual, _, tokens, random = found.T
        related = r2 > null
        shares = (related.mean(), (related & (r2 > usual)).mean())
        figures = (r2.mean(), r2.max(), random.mean(), (1 / (tokens - 1)).mean(), *shares)
        return dict(zip(names, (layer, int(np.median(tokens)), *map(float, figures)), strict=True))

    def strongest(self, k: int = SHOWN) -> list[dict[str, Any]]:
        """The k responses of largest R², with the tokens that are read and those that are written then."""
        return [self._strong(int(row)) for row in np.argsort(-self.figures[:, 0], kind="stable")[:k]]

    def _strong(self, row: int) -> dict[str, Any]:
        hit, (r2, null, random, slope, tokens, _) = self.vindex.hit(row, 0.0), self.figures[row].tolist()
        found = self.vindex.feature(hit.layer, hit.feature, expert=hit.expert)
        written = [self.vindex.vocabulary.piece(int(each)) for each in self.tokens["tokens"]["token_id"][row]]
        half = len(written) // 2
        return (
            {"layer": hit.layer}
            | ({} if hit.expert is None else {"expert": hit.expert})
            | {"feature": hit.feature, "r2": r2, "null": null, "random": random, "slope": slope, "tokens": int(tokens)}
            | {"reads": [each.piece for each in found.reads or ()], "writes": written[:half]}
            | {"reads_against": [each.piece for each in found.reads_against or ()], "writes_against": written[half:]}
        )

    def record(self) -> dict[str, Any]:
        """By layer, and the strongest; every direction's figures are in the vindex."""
        measured = asdict(self.measured)
        return plain(
            {"record": RECORD, "created": measured.pop("created"), "libraries": measured.pop("versions")}
            | {"model": self.model, "vindex": self.vindex.id, "measured": measured}
            | {"layers": self.rows(), "strongest": self.strongest()}
        )

    def plot(self, path: str | Path) -> None:
        """Draw R² beside its nulls by layer, to a .html or .png. Raises TargetError."""
        draw(self.record(), Path(path))

    def __repr__(self) -> str:
        found = self.figures[self.figures[:, SLOPE] > 0]
        r2, random = found[:, (0, -1)].mean(0) if len(found) else (0.0, 0.0)
        said = f"R² {r2:.2%} in the mean, of random directions {random:.2%}"
        return f"<{len(found):,} responses of {self.model['name']}: {said}>"


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw a record of responses by layer. Raises TargetError."""
    named = {"best": "the best direction", "r2": "gate directions, mean", "random": "random directions, mean"}
    layers = [row["layer"] for row in record["layers"]]
    curves = [
        Curve(label, layers, [row[key] for row in record["layers"]], colour)
        for (key, label), colour in zip(named.items(), COLOURS, strict=False)
    ]
    curves.append(Curve("permuted, mean", layers, [row["permuted"] for row in record["layers"]], QUIET, dashed=True))
    title = f"{record['model']['name']}: what of each FFN's output follows one reading"
    draw_curves(curves, path, title, "layer", "R²", log=True)
