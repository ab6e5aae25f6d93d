"""The JSON record of a Gate 3 run. The layout is documented in docs/gate3.md; a reader needs nothing else.

`one` is the record of one fact, `all_facts` that of a whole relation. Floats are rounded to six significant digits.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, NamedTuple

import vindex
from probes.deletion.bench import Bench
from probes.deletion.certificate import Certificate
from probes.deletion.controls import random_suppression
from probes.deletion.experiment import FactResult, MethodResult
from probes.deletion.forward import Forward
from probes.deletion.layer import Tried
from probes.deletion.measure import GROUPS, Change, Effect, Outcome, SetChange
from probes.deletion.options import TrialOptions
from probes.deletion.verdict import STANDARDS, Verdict, not_applicable
from probes.facts.prompts import Prompt
from probes.facts.sets import Sets
from probes.live.sites import layers

ONE, ALL = "vindex-gate3/1", "vindex-gate3-all/1"
Z95 = 1.959964


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
    share, z2 = passed / of, Z95**2
    centre = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = Z95 / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    return Rate(passed, of, share, max(0.0, centre - half), min(1.0, centre + half))


def one(bench: Bench, result: FactResult, weights_sha256: Mapping[str, str]) -> dict[str, Any]:
    """The record of one fact: head of the run, its headline method's outcome, then everything."""
    main = headline_method(result)
    return plain(
        {
            "record": ONE,
            **_head(bench, weights_sha256),
            "fact": _fact(result, bench),
            "method": main,
            **_outcome(result, main),
            "methods": {
                name: {**_method(bench, found), "scan": _scan(found, bench.options.trial), "own": _own(found)}
                for name, found in result.methods.items()
            },
            "sets": _sets(result.sets),
            "seconds": result.seconds,
        }
    )


def all_facts(
    bench: Bench,
    relations: Sequence[str],
    least: float,
    results: Sequence[FactResult],
    weights_sha256: Mapping[str, str],
) -> dict[str, Any]:
    """The record of many facts: rates with intervals, and one short entry for each fact."""
    return plain(
        {
            "record": ALL,
            **_head(bench, weights_sha256),
            "relations": list(relations),
            "known_from": least,
            "rates": {
                method: {standard: rate(results, method, standard)._asdict() for standard in STANDARDS}
                for method in bench.options.methods
            },
            "facts": [
                {
                    **_fact(result, bench),
                    "methods": {name: _short(found) for name, found in result.methods.items()},
                    "seconds": result.seconds,
                }
                for result in results
            ],
            "seconds": sum(result.seconds for result in results),
        }
    )


def rate(results: Iterable[FactResult], method: str, standard: str) -> Rate:
    """How many of the facts that the model knows pass a verdict."""
    verdicts = [result.methods[method].verdicts for result in results if method in result.methods]
    found = [by_name[standard].result for by_name in verdicts if standard in by_name]
    return wilson(found.count("pass"), len(found))


def headline_method(result: FactResult) -> str | None:
    """The method that the top of the record speaks of: forward where it ran."""
    return next(iter(sorted(result.methods)), None)


def plain(value: Any) -> Any:
    """JSON values with floats rounded to six significant digits; NaN becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _head(bench: Bench, weights_sha256: Mapping[str, str]) -> dict[str, Any]:
    model, config = bench.model, bench.model.config
    gate = layers(model)[0].gate_proj.weight
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "libraries": {
            "python": platform.python_version(),
            "vindex": vindex.__version__,
            **{name: metadata.version(name) for name in ("torch", "transformers")},
        },
        "model": {
            "name": bench.loaded.name,
            "revision": bench.loaded.revision,
            "weights_sha256": dict(weights_sha256),
            "architecture": type(model).__name__,
            "num_layers": len(layers(model)),
            "hidden_size": gate.shape[1],
            "intermediate_size": gate.shape[0],
            "vocab_size": config.vocab_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "patch_rounded_to": str(bench.stored or model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "threads": _threads(),
        },
        "activation": bench.activation,
        "null_layers": {str(layer): list(names) for layer, names in bench.null_layers.items()},
        "facts_file": bench.panel.name,
        "options": {**asdict(bench.options), "methods": list(bench.options.methods)},
    }


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _fact(result: FactResult, bench: Bench) -> dict[str, Any]:
    fact, headline = result.sets.fact, result.sets.headline
    return {
        "name": fact.name,
        "subject": fact.subject,
        "relation": fact.relation,
        "answer": fact.answer,
        "prompt": headline.text,
        "prompt_ids": list(headline.ids),
        "answer_ids": list(headline.answer),
        "before": _answer(bench, result.before),
    }


def _outcome(result: FactResult, method: str | None) -> dict[str, Any]:
    """The few keys that a model card shows."""
    if method is None:
        nothing = {name: not_applicable(name, *result.before[:2]) for name in STANDARDS}
        return {
            "layer": None,
            "before": result.before.probability,
            "after": None,
            "suppression": None,
            "reference_loss": None,
            "verdicts": {name: _verdict(found) for name, found in nothing.items()},
        }
    found = result.methods[method]
    return {
        "layer": found.delta.layer,
        "before": found.effect.headline.before.probability,
        "after": found.effect.headline.after.probability,
        "suppression": found.effect.headline.loss,
        "reference_loss": found.effect.reference.mean,
        "verdicts": {name: _verdict(reached) for name, reached in found.verdicts.items()},
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
        "sets": {name: _set(group) for name, group in groups(effect).items()},
        "neutral_kl": effect.neutral_kl,
        "neutral_tokens": effect.neutral_tokens,
        "controls": [control._asdict() for control in found.controls],
        "certificate": found.certificate and _certificate(found.certificate),
        "verdicts": {name: _verdict(reached) for name, reached in found.verdicts.items()},
        "seconds": found.seconds,
    }


def groups(effect: Effect) -> dict[str, SetChange]:
    """The held-out sets of prompts by name."""
    return {name: getattr(effect, name) for name in GROUPS}


def _certificate(found: Certificate) -> dict[str, Any]:
    """Every attack, prompt by prompt; a text has what was written before and after."""
    texts = [
        {"question": question.text, "family": question.family, "draw": draw, "before": before._asdict(),
         "after": after._asdict()}
        for (question, draw), (before, after) in found.texts.items()
    ]  # fmt: skip
    return {
        "families": {name: {**_set(group), "still_first": group.still_first} for name, group in found.families.items()},
        "texts": texts,
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
        "sets": {name: _summary(group) for name, group in groups(effect).items()},
        "verdicts": {
            name: {"result": reached.result, "reason": reached.reason} for name, reached in found.verdicts.items()
        },
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
    return {
        "name": change.name,
        "before": change.before.probability,
        "after": change.after.probability,
        "loss": change.loss,
        "flipped": change.flipped,
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    criteria = [{**criterion._asdict(), "holds": criterion.holds} for criterion in verdict.criteria]
    return {"result": verdict.result, "reason": verdict.reason, "criteria": criteria}


def _answer(bench: Bench, outcome: Outcome) -> dict[str, Any]:
    decode = bench.loaded.tokenizer.decode
    return {
        "probability": outcome.probability,
        "rank": outcome.rank,
        "top": [{"token": decode([token]), "id": token, "probability": share} for token, share in outcome.top],
    }


def _scan(found: MethodResult, rule: TrialOptions) -> list[dict[str, Any]]:
    """A row for each layer that the method looked at, with the harm of its trial where one was made."""
    return [row._asdict() | ({"harm": row.harm(rule)} if isinstance(row, Tried) else {}) for row in found.found.scan]


def _own(found: MethodResult) -> list[str]:
    """Texts that the forward method's patched model came to by itself, on which it was fitted as well."""
    return [prompt.text for prompt in found.found.own] if isinstance(found.found, Forward) else []


def _sets(sets: Sets) -> dict[str, Any]:
    """Every prompt by name, so that a reader sees that fit and held-out are disjoint."""

    def names(prompts: Sequence[Prompt]) -> list[str]:
        return [prompt.name for prompt in prompts]

    held_out = sets.held_out
    return {
        "seed": sets.seed,
        "fit": {
            "phrasings": [{"name": prompt.name, "text": prompt.text} for prompt in sets.fit.phrasings],
            "other_subjects": names(sets.fit.others),
            "about": [prompt.text for prompt in sets.fit.about],
        },
        "held_out": {
            "paraphrases": [{"name": prompt.name, "text": prompt.text} for prompt in held_out.paraphrases],
            "reference": names(held_out.reference),
            "other_subjects": names(held_out.other_subjects),
            "same_subject": names(held_out.same_subject),
            "same_answer": names(held_out.same_answer),
            "neutral": {"passages": len(held_out.neutral), "tokens": sum(map(len, held_out.neutral))},
        },
    }
