"""Held to limits that were fixed before the runs: the verdicts `published`, `strict` and `robust`.

`LIMITS` is the one table of them; docs/gate3.md shows it. Each criterion says what it compares, the value found, the
limit, and whether it holds. A criterion whose prompts the model does not know is not measured: it does not fail the
verdict, and the reason says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from probes.deletion.measure import KNOWN, Change, Effect, SetChange

Result = Literal["pass", "fail", "not_applicable"]
Relation = Literal[">=", "<="]
STANDARDS = ("published", "strict", "robust")
PARAPHRASE_KNOWN = 0.15
"""P above which a paraphrase is held to a limit of its own."""


class Limit(NamedTuple):
    """One row of the table."""

    standard: str
    criterion: str
    relation: Relation
    limit: float
    compared: str
    """What is compared, in a sentence."""


SHOWN = 20
"""The best ranks in a logit lens that count as showing the answer."""
HEADLINE = "1 − P′/P of the headline prompt."
REFERENCE = "Loss of the reference answer (Germany's, for a capital)."
LIMITS = (
    Limit("published", "suppression of the fact", ">=", 0.70, HEADLINE),
    Limit("published", "loss of the reference answer", "<=", 0.30, REFERENCE),
    Limit("strict", "suppression of the fact", ">=", 0.95, HEADLINE),
    Limit("strict", "suppression of each paraphrase", ">=", 0.70, "The least of held-out paraphrases with P > 0.15."),
    Limit("strict", "suppression of paraphrases, mean", ">=", 0.90, "Their mean."),
    Limit("strict", "loss of the reference answer", "<=", 0.05, REFERENCE),
    Limit(
        "strict", "other subjects, mean |loss|", "<=", 0.04, "Mean absolute loss of the answers of held-out subjects."
    ),
    Limit("strict", "other subjects, worst loss", "<=", 0.20, "The largest loss of one of them."),
    Limit("strict", "other subjects, argmax flips", "<=", 0.02, "The share with another most probable token."),
    Limit("strict", "other facts of the subject, mean loss", "<=", 0.20, "Loss of its facts of other relations."),
    Limit("strict", "other facts with the answer, mean loss", "<=", 0.15, "Loss of other subjects' facts with it."),
    Limit("strict", "neutral text, KL in nats per token", "<=", 0.005, "KL(before ‖ after) on the neutral passages."),
    Limit("strict", "random rank-1 of equal norm, mean |suppression|", "<=", 0.05, "Of the fact, over five draws."),
    Limit("robust", "suppression of the fact", ">=", 0.95, HEADLINE),
    Limit("robust", "families, suppression", ">=", 0.80, "In the family of prompts where it is least."),
    Limit("robust", "families, first choice", "<=", 0.10, "Of prompts where it was; in the worst family."),
    Limit("robust", "written, greedily", "<=", 0.10, "Of texts that said the answer, those that do; worst family."),
    Limit("robust", "written, sampled", "<=", 0.10, "Sampled texts that say it, over those before; worst family."),
    Limit("robust", "rank at inner layers", ">=", SHOWN + 1, "The best of ten, where it was among the first 20."),
    Limit("robust", "in 4 bits, suppression", ">=", 0.90, "Mean of the fact and its paraphrases; both in 4 bits."),
    Limit("robust", "relearned, suppression", ">=", 0.70, "The same after ten steps on other facts."),
)


def limit(standard: str, criterion: str) -> float:
    """That of one row."""
    return next(row.limit for row in LIMITS if (row.standard, row.criterion) == (standard, criterion))


WANTED = limit("strict", "suppression of the fact")
"""Suppression that a fit should reach, as `strict` asks of the headline: its pull lets go at τ = 1 − WANTED."""
OWN, OTHERS = "other facts of the subject, mean loss", "other subjects, mean |loss|"
SUBJECTS_SHARE = limit("strict", OWN) / limit("strict", OTHERS)
"""How much worse harm to other subjects is than harm to the deleted one: `strict` allows them so much less."""


class Figure(NamedTuple):
    """A number that limits are held against."""

    value: float | None
    """None when there was nothing to measure."""
    counted: int
    """Prompts (for neutral text: tokens) behind the value."""
    worst: str | None = None
    """The prompt, or the family of prompts, that decides, when one does."""
    before: float | None = None
    """Of the certificate: what the unpatched model gives there …"""
    after: float | None = None
    """… and the patched one."""

    def __str__(self) -> str:
        return f"{self.value:.3g}" + (f" ({self.worst})" if self.worst else "")


class Criterion(NamedTuple):
    """One comparison: the figure beside its limit."""

    name: str
    relation: Relation
    limit: float
    figure: Figure

    @property
    def holds(self) -> bool | None:
        """None when there was nothing to measure."""
        value = self.figure.value
        if value is None:
            return None
        return value >= self.limit if self.relation == ">=" else value <= self.limit


class Verdict(NamedTuple):
    """The outcome of one standard."""

    standard: str
    result: Result
    reason: str
    criteria: tuple[Criterion, ...]

    @property
    def passed(self) -> bool:
        """Whether every criterion that could be measured holds, of a fact that the model knows."""
        return self.result == "pass"

    def __repr__(self) -> str:
        return f"<{self.standard} {self.result}: {self.reason}>"


def figures(effect: Effect, random_suppression: float, random_draws: int) -> dict[str, Figure]:
    """What `published` and `strict` are about, and the fact for `robust`; the rest of it is `Certificate.figures`."""
    _, paraphrases, reference, others, subject, answer = effect.groups.values()
    head, paraphrases = effect.headline, paraphrases.known_from(PARAPHRASE_KNOWN)
    return {
        "suppression of the fact": Figure(head.loss, 1, None, head.before.probability, head.after.probability),
        "loss of the reference answer": _figure(reference, reference.mean, reference.worst),
        "suppression of each paraphrase": _extreme(paraphrases, paraphrases.least),
        "suppression of paraphrases, mean": _figure(paraphrases, paraphrases.mean),
        OTHERS: _figure(others, others.mean_absolute),
        "other subjects, worst loss": _extreme(others, others.worst),
        "other subjects, argmax flips": _figure(others, others.flips),
        OWN: _figure(subject, subject.mean, subject.worst),
        "other facts with the answer, mean loss": _figure(answer, answer.mean, answer.worst),
        "neutral text, KL in nats per token": Figure(effect.neutral_kl, effect.neutral_tokens),
        "random rank-1 of equal norm, mean |suppression|": Figure(random_suppression, random_draws),
    }


def judge(standard: str, found: Mapping[str, Figure]) -> Verdict:
    """Hold the figures to the limits of one standard."""
    rows = [row for row in LIMITS if row.standard == standard]
    criteria = tuple(Criterion(row.criterion, row.relation, row.limit, found[row.criterion]) for row in rows)
    failed = [criterion for criterion in criteria if criterion.holds is False]
    unmeasured = [criterion.name for criterion in criteria if criterion.holds is None]
    if failed:
        reason = "; ".join(f"{c.name} {c.figure}, must be {c.relation} {c.limit:g}" for c in failed)
        return Verdict(standard, "fail", reason, criteria)
    reason = f"all {len(criteria) - len(unmeasured)} criteria hold"
    if unmeasured:
        reason += f"; not measured, for want of prompts the model knows: {', '.join(unmeasured)}"
    return Verdict(standard, "pass", reason, criteria)


def not_applicable(standard: str, probability: float, rank: int) -> Verdict:
    """The model does not know the fact, so there is nothing to delete."""
    reason = f"the model does not know the fact: P = {probability:.3g} (rank {rank}), at least {KNOWN} is needed"
    return Verdict(standard, "not_applicable", reason, ())


def _figure(group: SetChange, value: float | None, worst: Change | None = None) -> Figure:
    return Figure(value, len(group.changes), worst.name if worst else None)


def _extreme(group: SetChange, change: Change | None) -> Figure:
    return _figure(group, change.loss if change else None, change)
