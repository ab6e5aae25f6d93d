"""What an audit found: how far the directions of a vindex are from those of the weights it is said to be of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vindex.charts import COLOURS, Curve, draw_curves
from vindex.errors import LackingError
from vindex.results import Result
from vindex.verdicts import CORRECT, SIGNS, VERDICTS, Figures, Verdict, choices, judge
from vindex.verification import Check

RECORD = "vindex-audit/1"
DIGITS = 4  # of figures in the record


class Audited(NamedTuple):
    """One weight: where its directions stand, the tensor they are said to be of, what was measured, what it means."""

    layer: int
    side: str
    expert: int | None
    tensor: str
    figures: Figures
    verdict: Verdict


def audited(layer: int, side: str, expert: int | None, tensor: str, figures: Figures) -> Audited:
    """The figures of one weight, judged."""
    return Audited(layer, side, expert, tensor, figures, judge(figures))


def require_directions(name: str, there: bool) -> None:
    """Raise LackingError unless a vindex has directions, to be drawn or built again."""
    if not there:
        raise LackingError(
            f"{name} holds rows of gate_proj, neuron by neuron: there are no residuals to draw, and no number of "
            "directions to build again; choose one, `vindex build MODEL --features F`"
        )


@dataclass(frozen=True, repr=False)
class Audit(Result):
    """Every direction of a vindex beside a source's weights, and its embeddings, norms and tokens beside theirs.

    name, id: of the vindex. model, revision: of the source, which `source` names as it was given. stated: whether the
    vindex states σ; where it does not, ‖Wv‖ stands in for it. signed: whether its format fixes the signs of directions.
    weights: none where rows are neurons, which `contents` then compares. contents: what was compared beside directions.
    """

    name: str
    id: str
    source: str
    model: str
    revision: str | None
    features: int
    embeddings: bool
    stated: bool
    signed: bool
    weights: tuple[Audited, ...]
    contents: tuple[Check, ...]

    def __repr__(self) -> str:
        return f"<audit of {self.name} beside {self.model}: {self.summary}>"

    def __iter__(self) -> Iterator[Audited]:
        return iter(self.weights)

    @property
    def holds(self) -> bool:
        """Every direction is right, in its place and signed as its format says, and so is all else."""
        right = {CORRECT} if self.signed else {CORRECT, SIGNS}
        return all(one.verdict.word in right for one in self.weights) and all(check.holds for check in self.contents)

    @property
    def missed(self) -> float:
        """What share of the ‖W‖² that the leading directions hold these ones miss, over all weights."""
        held, best = (sum(getattr(one.figures, name) for one in self.weights) for name in ("held", "best"))
        return max(0.0, 1 - held / best) if best else 0.0

    @property
    def summary(self) -> str:
        """In one line: the verdicts with the number of weights of each, what is missed, what else differs."""
        counts = Counter(one.verdict.word for one in self.weights)
        said = ", ".join(f"{counts[word]} {word}" for word in VERDICTS if counts[word])
        wrong = [check.what for check in self.contents if not check.holds]
        missed = f"; {self.missed:.1%} of what ‖W‖² the leading directions hold is missed" if self.missed > 5e-4 else ""
        other = f"; other {', '.join(wrong)}" if wrong else ""
        if not self.weights:
            return "rows are neurons, not directions" + (other or "; all that was compared is the source's")
        return f"{len(self.weights)} weights: {said}{missed}{other}"

    def rows(self) -> list[dict[str, Any]]:
        """One for each layer and side: of a mixture's experts the worst verdict, and figures over all of them.

        residual: the median; worst: the largest. cosine: the median |cosine| with the best match. angle: the largest,
        rad. held: share of ‖W‖², best: that of the leading directions; means over experts.
        """
        ordered = sorted(self.weights, key=lambda one: (one.layer, one.side != "gate"))
        return [_row(*place, list(ones)) for place, ones in groupby(ordered, lambda one: (one.layer, one.side))]

    def record(self) -> dict[str, Any]:
        return {
            "record": RECORD,
            "name": self.name,
            "id": self.id,
            "source": {"model": self.model, "revision": self.revision},
            "features": self.features,
            "sigma": "stated" if self.stated else "‖Wv‖",
            "signs": "fixed" if self.signed else "free",
            "limits": choices(),
            "holds": self.holds,
            "summary": self.summary,
            "missed": self.missed,
            "weights": [_weight(one) for one in self.weights],
            "contents": [check._asdict() for check in self.contents],
        }

    def plot(self, path: str | Path) -> None:
        """Draw the residuals by rank to a .html or .png. Raises TargetError, and LackingError where there are none."""
        require_directions(self.name, bool(self.weights))
        draw(self.record(), Path(path))


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw an audit's record: the median residual of each rank over all weights, beside what is allowed."""
    curves = []
    for side, colour in zip(("gate", "down"), COLOURS, strict=False):
        weights = [one["directions"] for one in record["weights"] if one["side"] == side]
        for label, key, dashed in (("", "residual", False), (": allowed", "allowed", True)):
            ranks = [
                [value for value in values if value is not None]
                for values in zip_longest(*(one[key] for one in weights))
            ]
            medians = [float(np.median(values)) or None for values in ranks]
            if medians:
                curves.append(Curve(f"{side}_proj{label}", range(len(medians)), medians, colour, dashed))
    title = f"{record['name']} beside {record['source']['model']}: residual by rank, median over weights"
    draw_curves(curves, path, title, "rank of the direction", "‖WᵀWv − σ²v‖ / σ²", log=True)


def _row(layer: int, side: str, ones: list[Audited]) -> dict[str, Any]:
    worst = max(ones, key=lambda one: VERDICTS.index(one.verdict.word))
    alike = sum(one.verdict.word == worst.verdict.word for one in ones)
    figures = [one.figures for one in ones]
    residuals, cosines, angles = (
        np.concatenate([getattr(one, name) for one in figures]) for name in ("residual", "cosine", "angles")
    )
    return {
        "layer": layer,
        "side": side,
        "verdict": worst.verdict.word,
        "detail": worst.verdict.detail + (f" ({alike} of {len(ones)} experts)" if len(ones) > 1 else ""),
        "residual": _of(np.median, residuals),
        "worst": _of(np.max, residuals),
        "cosine": _of(np.median, cosines),
        "angle": _of(np.max, angles),
        "held": float(np.mean([one.held for one in figures])),
        "best": float(np.mean([one.best for one in figures])),
        "defect": max(one.defect for one in figures),
        "flipped": int(sum(one.flipped.sum() for one in figures)),
    }


def _of(statistic: Any, values: np.ndarray) -> float | None:
    return float(statistic(values)) if len(values) else None


def _weight(one: Audited) -> dict[str, Any]:
    of = one.figures
    stated = None if of.stated is None else _digits(of.stated)
    return {
        **{"layer": one.layer, "side": one.side, "expert": one.expert, "tensor": one.tensor},
        **one.verdict._asdict(),
        "held": of.held,
        "best": of.best,
        "overlap": of.overlap,
        "growth": of.growth,
        "defect": of.defect,
        "angles": _digits(of.angles),
        "directions": {
            **{name: _digits(getattr(of, name)) for name in ("residual", "allowed", "outside", "quotient", "sigma")},
            "stated": stated,
            "match": of.match.tolist(),
            "cosine": _digits(of.cosine),
            "flipped": np.flatnonzero(of.flipped).tolist(),
        },
    }


def _digits(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
