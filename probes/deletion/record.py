"""The JSON records of Gate 3. The layout is documented in docs/gate3.md; a reader needs nothing else.

`one` is the record of one fact, `all_facts` that of whole relations, from an `entry` for each fact. Floats are rounded
to six significant digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from scipy.stats import binomtest

from probes.deletion.bench import Bench
from probes.deletion.certificate import Certificate
from probes.deletion.experiment import FactResult, MethodResult, random_suppression
from probes.deletion.layer import Tried
from probes.deletion.measure import GROUPS, Change, Outcome, SetChange
from probes.deletion.verdict import STANDARDS, Criterion, Verdict
from probes.facts.prompts import Prompt
from probes.facts.sets import Sets
from probes.live.match import describe
from probes.records import head, plain

ONE, ALL = "vindex-gate3/1", "vindex-gate3-all/1"
Entry = dict[str, Any]
"""One fact in the record of many."""


class Rate(NamedTuple):
    """A share with its 95 % Wilson interval."""

    passed: int
    of: int
    share: float
    low: float
    high: float


def wilson(passed: int, of: int) -> Rate:
    """Wilson score interval at 95 % (Wilson 1927)."""
    if not of:
        return Rate(0, 0, math.nan, 0.0, 1.0)
    interval = binomtest(passed, of).proportion_ci(0.95, method="wilson")
    return Rate(passed, of, passed / of, float(interval.low), float(interval.high))


def rate(entries: Iterable[Entry], method: str, standard: str) -> Rate:
    """How many of the facts that the model knows pass a verdict."""
    verdicts = [entry["methods"][method]["verdicts"] for entry in entries if method in entry["methods"]]
    found = [by_name[standard]["result"] for by_name in verdicts if standard in by_name]
    return wilson(found.count("pass"), len(found))


def one(result: FactResult) -> dict[str, Any]:
    """The record of one fact: head of the run, its headline method's outcome, then everything."""
    methods = {name: _method(result.bench, found) for name, found in result.methods.items()}
    return {
        **head(ONE),
        **choices(result.bench),
        **plain({"fact": _fact(result), "method": result.main, **_outcome(result), "methods": methods}),
        **plain({"sets": _sets(result.sets), "seconds": result.seconds}),
    }


def all_facts(bench: Bench, asked: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """The record of many facts: which were `asked` for, rates with intervals, and one short entry for each fact."""
    rates = {
        method: {standard: rate(entries, method, standard)._asdict() for standard in STANDARDS}
        for method in bench.options.methods
    }
    seconds = sum(entry["seconds"] for entry in entries)
    more = {"rates": rates, "facts": list(entries), "seconds": seconds}
    return {**head(ALL), **choices(bench), **plain({**asked, **more})}


def entry(result: FactResult) -> Entry:
    """What the record of many facts says of one."""
    methods = {name: _short(found) for name, found in result.methods.items()}
    return plain({**_fact(result), "methods": methods, "seconds": result.seconds})


def rows(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """A row for each fact and method: the losses that decide `strict`, means all of them, and the verdicts."""
    return [
        {
            "fact": fact["name"],
            "answer": fact["answer"],
            "method": name,
            "layer": found["layer"],
            "loss": found["suppression"],
            "paraphrases": found["sets"]["paraphrases"]["mean"],
            "other subjects": found["sets"]["other_subjects"]["mean_absolute"],
            "its other facts": found["sets"]["same_subject"]["mean"],
            "same answer": found["sets"]["same_answer"]["mean"],
            "neutral KL": found["neutral_kl"],
            **{standard: verdict["result"] for standard, verdict in found["verdicts"].items()},
        }
        for fact in entries
        for name, found in fact["methods"].items()
    ]


def choices(bench: Bench) -> dict[str, Any]:
    """What was run, with every free choice."""
    about = {
        "patch_rounded_to": ", ".join(sorted({str(bench.stored(at)).removeprefix("torch.") for at in bench.layers})),
        "threads": torch.get_num_threads(),
    }
    return plain(
        {
            "model": describe(bench.loaded, bench.weights_sha256) | about,
            "activation": bench.activation,
            "null_layers": bench.null_layers,
            "facts_file": bench.panel.name,
            "vindex": bench.vindex and bench.vindex.id,
            "options": asdict(bench.options),
        }
    )


def _fact(result: FactResult) -> dict[str, Any]:
    fact, headline = result.sets.fact, result.sets.headline
    return {
        "name": fact.name,
        "subject": fact.subject,
        "relation": fact.relation,
        "answer": fact.answer,
        "prompt": headline.text,
        "prompt_ids": headline.ids,
        "answer_ids": headline.answer,
        "before": _answer(result.bench, result.before),
    }


def _outcome(result: FactResult) -> dict[str, Any]:
    """The few keys that a model card shows."""
    found = result.methods[result.main] if result.main else None
    effect = found.effect if found else None
    return {
        "layer": found.delta.layer if found else None,
        "before": result.before.probability,
        "after": effect.headline.after.probability if effect else None,
        "suppression": effect.headline.loss if effect else None,
        "reference_loss": effect.groups["reference"].mean if effect else None,
        "verdicts": _verdicts(result.verdicts),
    }


def _method(bench: Bench, found: MethodResult) -> dict[str, Any]:
    effect = found.effect
    return {
        "layer": found.delta.layer,
        "projection": found.delta.projection,
        "norm": found.delta.norm,
        "relative_norm": found.relative_norm,
        "headline": _change(effect.headline),
        "top_before": _answer(bench, effect.headline.before)["top"],
        "top_after": _answer(bench, effect.headline.after)["top"],
        "sets": {name: _set(group) for name, group in effect.groups.items() if name in GROUPS},
        "neutral_kl": effect.neutral_kl,
        "neutral_tokens": effect.neutral_tokens,
        "controls": [control._asdict() for control in found.controls],
        "certificate": found.certificate and _certificate(found.certificate),
        "verdicts": _verdicts(found.verdicts),
        "seconds": found.seconds,
        "scan": [_tried(row) for row in found.found.scan],
        "own": [prompt.text for prompt in found.found.own],
    }


def _certificate(found: Certificate) -> dict[str, Any]:
    """Every attack, prompt by prompt; a text has what was written before and after."""
    return {
        "families": {name: {**_set(group), "still_first": group.still_first} for name, group in found.families.items()},
        "texts": [
            {
                "question": question.text,
                "family": question.family,
                "draw": draw,
                "before": before._asdict(),
                "after": after._asdict(),
            }
            for (question, draw), (before, after) in found.texts.items()
        ],
        "ranks": {place: {"before": before, "after": after} for place, (before, after) in found.ranks.items()},
        "four_bit": _set(found.four_bit),
        "relearned": _set(found.relearned),
    }


def _short(found: MethodResult) -> dict[str, Any]:
    effect = found.effect
    return {
        "layer": found.delta.layer,
        "relative_norm": found.relative_norm,
        "suppression": effect.headline.loss,
        "neutral_kl": effect.neutral_kl,
        "random_suppression": random_suppression(found.controls),
        "sets": {name: _summary(group) for name, group in effect.groups.items() if name in GROUPS},
        "verdicts": {name: {"result": one.result, "reason": one.reason} for name, one in found.verdicts.items()},
        "seconds": found.seconds,
    }


def _summary(group: SetChange) -> dict[str, Any]:
    worst, least = group.worst, group.least
    return {
        "known": len(group.changes),
        "asked": group.asked,
        "mean": group.mean,
        "mean_absolute": group.mean_absolute,
        "max": worst.loss if worst else None,
        "worst": worst.name if worst else None,
        "min": least.loss if least else None,
        "flips": group.flips,
    }


def _set(group: SetChange) -> dict[str, Any]:
    return {**_summary(group), "prompts": [_change(change) for change in group.changes]}


def _change(change: Change) -> dict[str, Any]:
    sides = {"before": change.before.probability, "after": change.after.probability}
    return {"name": change.name, **sides, "loss": change.loss, "flipped": change.flipped}


def _verdicts(found: Mapping[str, Verdict]) -> dict[str, Any]:
    return {
        name: {
            "result": verdict.result,
            "reason": verdict.reason,
            "criteria": [_criterion(one) for one in verdict.criteria],
        }
        for name, verdict in found.items()
    }


def _criterion(one: Criterion) -> dict[str, Any]:
    limit = {"name": one.name, "relation": one.relation, "limit": one.limit}
    return limit | one.figure._asdict() | {"holds": one.holds}


def _answer(bench: Bench, outcome: Outcome) -> dict[str, Any]:
    decode = bench.loaded.tokenizer.decode
    top = [{"token": decode([token]), "id": token, "probability": share} for token, share in outcome.top]
    return {"probability": outcome.probability, "rank": outcome.rank, "top": top}


def _tried(row: Any) -> dict[str, Any]:
    """A layer that the method looked at, with the harm of its trial where one was made."""
    return row._asdict() | ({"harm": row.harm} if isinstance(row, Tried) else {})


def _sets(sets: Sets) -> dict[str, Any]:
    """Every prompt by name, so that a reader sees that fit and held-out are disjoint."""
    fit, held_out = sets.fit, sets.held_out
    neutral = {"passages": len(held_out.neutral), "tokens": sum(map(len, held_out.neutral))}
    return {
        "seed": sets.seed,
        "fit": {
            "phrasings": _texts(fit.phrasings),
            "other_subjects": [prompt.name for prompt in fit.others],
            "about": [prompt.text for prompt in fit.about],
        },
        "held_out": {
            "paraphrases": _texts(held_out.paraphrases),
            **{name: [prompt.name for prompt in getattr(held_out, name)] for name in GROUPS if name != "paraphrases"},
            "neutral": neutral,
        },
    }


def _texts(prompts: Sequence[Prompt]) -> list[dict[str, str]]:
    return [{"name": prompt.name, "text": prompt.text} for prompt in prompts]
