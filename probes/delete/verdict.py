"""Held to thresholds that were fixed before the runs: the `seed` verdict and the `strict` one.

Each criterion says what it compares, the value found, the limit, and whether it holds. A criterion whose set has no
prompt that the model knows is `not_measured`: it does not fail the verdict, and the record says so.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from probes.delete.measure import KNOWN, Change, Effect, SetChange

Result = Literal["pass", "fail", "not_applicable"]
PARAPHRASE_KNOWN = 0.15


class Criterion(NamedTuple):
    """One comparison."""

    name: str
    relation: Literal[">=", "<="]
    limit: float
    value: float | None
    """None when there was nothing to measure."""
    counted: int
    """Prompts (for neutral text: tokens) behind the value."""
    worst: str | None = None
    """The prompt that decides, when one does."""

    @property
    def holds(self) -> bool | None:
        """None when there was nothing to measure."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.relation == ">=" else self.value <= self.limit


class Verdict(NamedTuple):
    """The outcome of one standard."""

    standard: str
    result: Result
    reason: str
    criteria: tuple[Criterion, ...]


def seed(effect: Effect) -> Verdict:
    """The published criterion: P(Paris) falls by at least 70 %, P(Berlin) by at most 30 %."""
    reference = effect.reference
    criteria = (
        Criterion("suppression of the fact", ">=", 0.70, effect.headline.loss, 1),
        Criterion(
            "loss of the reference answer", "<=", 0.30, reference.mean, len(reference.changes), _name(reference.worst)
        ),
    )
    return _verdict("seed", criteria)


def strict(effect: Effect, random_suppression: float, random_draws: int) -> Verdict:
    """All of a deletion: it generalises, and nothing else goes. Thresholds: docs/gate3.md."""
    paraphrases = _known(effect.paraphrases, PARAPHRASE_KNOWN)
    reference, others = effect.reference, effect.other_subjects
    subject, answer = effect.same_subject, effect.same_answer
    least, worst = paraphrases.least, others.worst
    criteria = (
        Criterion("suppression of the fact", ">=", 0.95, effect.headline.loss, 1),
        Criterion(
            "suppression of each paraphrase",
            ">=",
            0.70,
            least.loss if least else None,
            len(paraphrases.changes),
            _name(least),
        ),
        Criterion("suppression of paraphrases, mean", ">=", 0.90, paraphrases.mean, len(paraphrases.changes)),
        Criterion(
            "loss of the reference answer", "<=", 0.05, reference.mean, len(reference.changes), _name(reference.worst)
        ),
        Criterion("other subjects, mean |loss|", "<=", 0.04, others.mean_absolute, len(others.changes)),
        Criterion(
            "other subjects, worst loss", "<=", 0.20, worst.loss if worst else None, len(others.changes), _name(worst)
        ),
        Criterion("other subjects, argmax flips", "<=", 0.02, others.flips, len(others.changes)),
        Criterion(
            "other facts of the subject, mean loss",
            "<=",
            0.20,
            subject.mean,
            len(subject.changes),
            _name(subject.worst),
        ),
        Criterion(
            "other facts with the answer, mean loss", "<=", 0.15, answer.mean, len(answer.changes), _name(answer.worst)
        ),
        Criterion("neutral text, KL in nats per token", "<=", 5e-3, effect.neutral_kl, effect.neutral_tokens),
        Criterion("random rank-1 of equal norm, mean |suppression|", "<=", 0.05, random_suppression, random_draws),
    )
    return _verdict("strict", criteria)


def not_applicable(standard: str, probability: float, rank: int) -> Verdict:
    """The model does not know the fact, so there is nothing to delete."""
    reason = f"the model does not know the fact: P = {probability:.3g} (rank {rank}), at least {KNOWN} is needed"
    return Verdict(standard, "not_applicable", reason, ())


def _verdict(standard: str, criteria: tuple[Criterion, ...]) -> Verdict:
    failed = [criterion for criterion in criteria if criterion.holds is False]
    unmeasured = [criterion.name for criterion in criteria if criterion.holds is None]
    if failed:
        reason = "; ".join(f"{c.name} {c.value:.3g}, must be {c.relation} {c.limit:g}" for c in failed)
        return Verdict(standard, "fail", reason, criteria)
    reason = f"all {len(criteria) - len(unmeasured)} criteria hold"
    if unmeasured:
        reason += f"; not measured, for want of prompts the model knows: {', '.join(unmeasured)}"
    return Verdict(standard, "pass", reason, criteria)


def _known(group: SetChange, least: float) -> SetChange:
    return SetChange(tuple(c for c in group.changes if c.before.probability > least), group.asked)


def _name(change: Change | None) -> str | None:
    return change.name if change else None
