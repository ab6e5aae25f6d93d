"""What figures of one weight's directions mean, in a word: every limit and every word of `vindex audit` stands here.

The directions v (unit rows) that a vindex claims for a weight W are measured against W itself, beside what rounding
alone would do: the true directions, rounded as the claimed ones are stored, leave residuals, and `Limits.rounding`
times those are allowed. Float32 stores more than arithmetic in it gets right, which is what `Limits.bits` is for. So a
rotation among nearly equal singular values, which is legitimate, passes by itself: its residual is no larger.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np


def _limit(value: float, sentence: str) -> Any:
    return field(default=value, metadata={"sentence": sentence})


@dataclass(frozen=True)
class Limits:
    """Every free choice behind a verdict; docs/audit.md has the same table."""

    rounding: float = _limit(
        3.0, "How many times the residual of the true direction, rounded as stored, a residual may be."
    )
    bits: int = _limit(17, "Bits of each number that the true direction keeps at most, as after arithmetic in float32.")
    place: float = _limit(1e-3, "How far ‖Wv‖ may be from the singular value of that rank, relative to it.")
    sigma: float = _limit(1e-4, "How far a stated σ may be from the true one, relative to it.")
    orthonormal: float = _limit(1e-3, "How far a dot product of two rows may be from 0, and of one with itself from 1.")
    sign: float = _limit(
        1e-2, "How much smaller, in proportion, the largest positive loading may be than the largest of all."
    )
    held: float = _limit(
        1e-3, "How much less of ‖W‖² than the leading ones, in proportion, the same subspace may hold."
    )
    overlap: float = _limit(0.5, "The overlap under which directions are not of these weights.")
    lag: float = _limit(0.3, "The growth × (1 − overlap) from which on directions are those of an iteration cut off.")
    fraction: float = _limit(0.5, "F/H over which any directions fill the space, so that a subspace says nothing.")
    alike: float = _limit(
        0.9, "The median absolute cosine with the best match from which rows that fill the space are near."
    )
    neuron: float = _limit(1e-3, "How far below 1 the absolute cosine of a row with a neuron of W may be.")


LIMITS = Limits()
CORRECT, SIGNS, SIGMA, SKEW, PERMUTATION, OTHERS, ROTATED, EARLY, NEAR, NEURONS, FOREIGN = VERDICTS = (
    "correct",
    "signs only",
    "wrong σ",
    "not orthonormal",
    "a permutation",
    "others of its directions",
    "same subspace, rotated",
    "stops early",
    "near, not exact",
    "its neurons",
    "not of these weights",
)
"""From best to worst. What each means, and how it is told, stands in docs/audit.md."""


class Verdict(NamedTuple):
    """One of VERDICTS, and what there is to say of it; empty where the word is enough."""

    word: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.detail}" if self.detail else self.word


OF_A_ROW = {  # the arrays of Figures
    **dict.fromkeys(("residual", "own", "outside", "rounded", "quotient", "sigma", "stated", "cosine", "angles"), "f4"),
    "match": "i4",
    "flipped": "?",
}


@dataclass(frozen=True)
class Figures:
    """What was measured of the n directions claimed for one weight, n at most its rank. Arrays are (n,).

    beyond: rows past the rank that are not zero. residual: ‖WᵀWv − σ²v‖/σ², with the stated σ where there is one.
    own: the same with ‖Wv‖ in place of σ. outside: the part of it that lies outside the span of all rows. rounded:
    `own` of the matched true direction, rounded as the rows are stored; (σ of that/‖Wv‖)² times as large, since what
    rounding leaves grows as σ falls. quotient: ‖Wv‖. sigma, stated: σ as it is and
    as it is stated. match, cosine: the true direction, of the leading n, with the largest |cosine|. flipped: signed
    against the convention of docs/format.md. angles: principal angles (rad) with the leading n. defect: the largest
    |row·row − identity|. held, best: shares of ‖W‖², of these directions and of the leading ones. fraction: n/H.
    neuron: the least |cosine| of a row with its nearest neuron, where it was looked for.
    """

    beyond: int
    residual: np.ndarray
    own: np.ndarray
    outside: np.ndarray
    rounded: np.ndarray
    quotient: np.ndarray
    sigma: np.ndarray
    stated: np.ndarray | None
    match: np.ndarray
    cosine: np.ndarray
    flipped: np.ndarray
    angles: np.ndarray
    defect: float
    held: float
    best: float
    fraction: float
    neuron: float | None = None

    @property
    def allowed(self) -> np.ndarray:
        """The residual up to which each is a true direction, as far as the stored type can tell."""
        return LIMITS.rounding * self.rounded

    @property
    def true(self) -> np.ndarray:
        """Which rows are singular directions of the weight, at whatever place."""
        return self.own <= self.allowed

    @property
    def placed(self) -> np.ndarray:
        """Which stand where their singular value belongs, or within a cluster of nearly equal ones."""
        return _near(self.quotient, self.sigma, LIMITS.place)

    @property
    def overlap(self) -> float:
        """Mean cos² of the principal angles, 0 for what random directions have and 1 for the same subspace."""
        shared = float((np.cos(self.angles) ** 2).sum()) / len(self.residual)
        return (shared - self.fraction) / max(1 - self.fraction, 1e-9)

    @property
    def growth(self) -> float:
        """σ times what lies outside: the median of the last quarter of directions over the least of the first few.

        A perturbation of W moves all directions alike by this measure; an iteration that is cut off has left the
        leading ones behind in it.
        """
        weighted = self.outside * self.sigma
        first, last = max(1, len(weighted) // 16), max(1, len(weighted) // 4)
        return float(np.median(weighted[-last:]) / max(float(weighted[:first].min()), 1e-60))


def judge(of: Figures) -> Verdict:
    """The first word, from the top of docs/audit.md's table, that fits."""
    count, wrong = len(of.residual), int((~of.true).sum())
    if of.neuron is not None and of.neuron >= 1 - LIMITS.neuron:
        return Verdict(NEURONS, "rows are neurons of the weight, not singular directions")
    if of.beyond and not count:
        return Verdict(FOREIGN, f"{of.beyond} rows where the weight has no such direction")
    if not wrong:
        return _of_true_ones(of)
    if of.fraction > LIMITS.fraction:
        if np.median(of.cosine) >= LIMITS.alike:
            return Verdict(NEAR, f"{wrong} of {count} are turned away")
        return Verdict(FOREIGN, f"{wrong} of {count} are not its directions")
    if (of.outside <= of.allowed).all() and of.held >= of.best * (1 - LIMITS.held):
        return Verdict(ROTATED, f"{wrong} of {count} are mixtures of true ones")
    if of.overlap < LIMITS.overlap:
        return Verdict(FOREIGN, f"overlap {max(of.overlap, 0.0):.2f}")
    if of.growth * (1 - of.overlap) >= LIMITS.lag:
        return Verdict(EARLY, f"{wrong} of {count} directions have not converged")
    return Verdict(NEAR, f"{wrong} of {count} are turned away, together by up to {of.angles.max():.2g} rad")


def _of_true_ones(of: Figures) -> Verdict:
    """Every row is a singular direction."""
    count, moved, orthonormal = len(of.sigma), int((~of.placed).sum()), of.defect <= LIMITS.orthonormal
    if of.beyond:
        return Verdict(OTHERS, f"{of.beyond} rows past the rank, {count}, where there is no direction")
    if moved and orthonormal and _near(np.sort(of.quotient)[::-1], of.sigma, LIMITS.place).all():
        return Verdict(PERMUTATION, f"{moved} of {count} at another's place")
    if moved:
        return Verdict(OTHERS, f"{moved} of {count} repeated or not among the leading {count}")
    if not orthonormal:
        return Verdict(SKEW, f"|row·row − identity| up to {of.defect:.1e}")
    wrong = 0 if of.stated is None else int((~_near(of.stated, of.sigma, LIMITS.sigma)).sum())
    if wrong:
        return Verdict(SIGMA, f"{wrong} of {count} stated σ are not ‖Wv‖")
    if of.flipped.any():
        return Verdict(SIGNS, f"{of.flipped.sum()} of {count} against the convention")
    return Verdict(CORRECT)


def _near(values: np.ndarray, expected: np.ndarray, tolerance: float) -> np.ndarray:
    return np.abs(values - expected) <= tolerance * expected


def choices() -> dict[str, float]:
    """All limits by name, for the record."""
    return asdict(LIMITS)


def sentences() -> dict[str, str]:
    """{limit: what it is}, for the documentation."""
    return {one.name: one.metadata["sentence"] for one in fields(Limits)}
