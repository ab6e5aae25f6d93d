"""The verdicts, on made-up effects: each criterion decides alone."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from probes.deletion import verdict
from probes.deletion.measure import Change, Effect, Outcome, SetChange
from probes.deletion.record import wilson

DOCS = Path(__file__).parents[3] / "docs" / "gate3.md"


def _change(before: float, loss: float, flipped: bool = False) -> Change:
    after = before * (1 - loss)
    return Change("made up", Outcome(before, 1, ((1, before),)), Outcome(after, 1, ((2 if flipped else 1, after),)))


def _effect(**changed) -> Effect:
    good = {
        "headline": SetChange((_change(0.9, 0.99),), 1),
        "paraphrases": SetChange((_change(0.5, 0.95), _change(0.5, 0.9), _change(0.12, 0.1)), 4),
        "reference": SetChange((_change(0.9, 0.01),), 1),
        "other_subjects": SetChange(tuple(_change(0.5, 0.01) for _ in range(20)), 30),
        "same_subject": SetChange((_change(0.5, 0.1),), 2),
        "same_answer": SetChange((_change(0.5, 0.1),), 2),
    }
    kl = changed.pop("neutral_kl", 1e-3)
    return Effect(good | changed, kl, 100)


def _judge(standard, effect, random=0.01):
    return verdict.judge(standard, verdict.figures(effect, random, 5))


def test_a_clean_deletion_passes_both_verdicts():
    assert _judge("published", _effect()).result == "pass"
    assert _judge("strict", _effect()).result == "pass"
    assert repr(_judge("published", _effect())) == "<published pass: all 2 criteria hold>"


@pytest.mark.parametrize(
    ("changed", "random", "named"),
    [
        ({"headline": SetChange((_change(0.9, 0.94),), 1)}, 0.01, "suppression of the fact"),
        ({"paraphrases": SetChange((_change(0.5, 0.69), *[_change(0.5, 1.0)] * 3), 4)}, 0.01, "each paraphrase"),
        ({"paraphrases": SetChange((_change(0.5, 0.89),), 4)}, 0.01, "paraphrases, mean"),
        ({"reference": SetChange((_change(0.9, 0.06),), 1)}, 0.01, "reference answer"),
        ({"other_subjects": SetChange((_change(0.5, 0.05), _change(0.5, -0.05)), 2)}, 0.01, "mean |loss|"),
        ({"other_subjects": SetChange((_change(0.5, 0.21), *[_change(0.5, 0.0)] * 9), 10)}, 0.01, "worst loss"),
        ({"other_subjects": SetChange((_change(0.5, 0.0, True), *[_change(0.5, 0.0)] * 9), 10)}, 0.01, "flips"),
        ({"same_subject": SetChange((_change(0.5, 0.21),), 2)}, 0.01, "other facts of the subject"),
        ({"same_answer": SetChange((_change(0.5, 0.16),), 2)}, 0.01, "other facts with the answer"),
        ({"neutral_kl": 6e-3}, 0.01, "neutral text"),
        ({}, 0.06, "random rank-1"),
    ],
)
def test_each_strict_criterion_fails_alone_and_is_named(changed, random, named):
    found = _judge("strict", _effect(**changed), random)
    assert found.result == "fail"
    [failed] = [criterion for criterion in found.criteria if criterion.holds is False]
    assert named in failed.name
    assert named in found.reason


@pytest.mark.parametrize(
    "changed", [{"headline": SetChange((_change(0.9, 0.69),), 1)}, {"reference": SetChange((_change(0.9, 0.31),), 1)}]
)
def test_published_fails_below_seventy_or_above_thirty(changed):
    assert _judge("published", _effect(**changed)).result == "fail"


def test_a_set_without_known_prompts_is_said_not_to_be_measured():
    found = _judge("strict", _effect(same_answer=SetChange((), 4)))
    assert found.result == "pass"
    assert "not measured" in found.reason


def test_the_documented_table_is_the_one_in_the_code():
    signs = {">=": "≥", "<=": "≤"}
    rows = [
        f"| `{row.standard}` | {row.criterion} | {signs[row.relation]} {row.limit:g} | {row.compared} |".replace(
            "|loss|", r"\|loss\|"
        ).replace("|suppression|", r"\|suppression\|")
        for row in verdict.LIMITS
    ]
    shown = [
        line for line in DOCS.read_text(encoding="utf-8").splitlines() if re.match(r"\| `\w+` \| .* \| [≥≤] ", line)
    ]
    assert shown == rows
    assert tuple(dict.fromkeys(row.standard for row in verdict.LIMITS)) == verdict.STANDARDS


@pytest.mark.parametrize(("passed", "of"), [(0, 10), (7, 10), (10, 10), (29, 31)])
def test_the_interval_is_wilsons(passed, of):
    """Its ends p are those that the share found is 1.96 standard errors of p away from."""
    found, share = wilson(passed, of), passed / of
    for end in (found.low, found.high):
        assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / of, abs=1e-7)
    assert found.low <= share <= found.high and found.low < found.high


def test_no_facts_no_rate():
    assert math.isnan(wilson(0, 0).share)
