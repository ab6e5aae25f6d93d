"""What gates do beside what chance does.

1. What is asked, and the rows that mean |h| is taken of, come from files of rows, or from the atlas.
2. The plain model and soft gates are scored on the panels.
3. At each operating point the mask of the gates is scored beside masks that turn off as many neurons of every layer
   (controls.py). Each mask's scores are kept beside the record to come (journal.py), so that a run that was stopped
   goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from probes.gates import journal
from probes.gates.apply import require_fit
from probes.gates.controls import ACTIVATION_ROWS, RANDOM_SEEDS, Magnitudes, magnitudes, masks
from probes.gates.data import read_forget, read_retain
from probes.gates.evaluation import Entry, Evaluation, retained
from probes.gates.gates import Gates
from probes.gates.masks import rescaled
from probes.gates.options import EvalOptions, to_evaluate
from probes.gates.panels import QUESTIONS, Panels, atlas, from_rows, neutral_texts
from probes.gates.score import NEUTRAL_TOKENS, Scores, Settings, score, work
from probes.live.load import Loaded, require_head
from probes.live.match import describe, weights_sha256
from probes.records import head
from vindex.errors import ProbeError
from vindex.progress import Progress, silent
from vindex.targets import check_file

Files = tuple[Path | None, Path | None, Path | None]


def evaluate_gates(
    model: Loaded,
    gates: Gates,
    *,
    forget: str | Path | None = None,
    retain: str | Path | None = None,
    neutral: str | Path | None = None,
    output: str | Path | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Evaluation:
    """Score gates, soft and at their operating points, beside random and activation masks of the same size.

    forget, retain: files of rows (docs/gates.md), both or neither; without them the atlas's held-out facts and sums.
    neutral: a .txt or .jsonl file. output: where the record is written; until then the scores of finished masks are
    kept beside it, and a run that was stopped goes on from them. options: the fields of `EvalOptions`.

    Raises PatchError unless the gates are of a model of this size, FactError, ProbeError or TargetError as its parts.
    """
    chosen = to_evaluate(**options)
    target = Path(output) if output else None
    if target:
        check_file(target)
    if (forget is None) != (retain is None):
        raise ProbeError("--forget without --retain, or the reverse: give both files, or neither for the atlas")
    require_head(model)
    require_fit(gates.logits.shape, model.model)
    chosen = replace(
        chosen,
        soft_scale_mode=chosen.soft_scale_mode or gates.scale_mode,
        thresholds=chosen.thresholds or gates.selected_thresholds(),
    )
    digests = weights_sha256(model, progress)
    files = tuple(Path(file) if file else None for file in (forget, retain, neutral))
    panels, found = _asked(model, files, chosen, progress)  # type: ignore[arg-type]
    settings = Settings(chosen.batch_size, chosen.generate)
    unfinished = journal.beside(target) if target else None
    kept = journal.Journal(unfinished, journal.context(model, digests, panels, settings))
    about = _about(model, gates, panels, chosen, digests)
    result = Evaluation(about, *_scored(model, gates, panels, found, chosen, kept, progress))
    if target:
        result.save(target)
        kept.close()
    return result


class Scored(NamedTuple):
    base: Scores
    soft: Scores
    entries: tuple[Entry, ...]
    reused: int


def _scored(
    loaded: Loaded,
    gates: Gates,
    panels: Panels,
    magnitudes: Magnitudes,
    options: EvalOptions,
    kept: journal.Journal,
    progress: Progress,
) -> Scored:
    """The plain model, soft gates, and every mask at every operating point; nothing is computed that is in `kept`."""
    points = [gates.point(threshold) for threshold in options.thresholds or ()]
    planned = [(at, *mask) for at in points for mask in masks(gates, at.threshold, magnitudes)]
    settings = Settings(options.batch_size, options.generate)

    def factors() -> Iterator[Tensor | None]:
        yield None
        yield gates.factors(options.soft_scale_mode)
        for *_, keep in planned:
            yield rescaled(keep.float(), options.mask_scale_mode)

    everything = 2 + len(planned)
    reused = sum(kept.get(one) is not None for one in factors())
    stage = f"masks ({reused} of {everything} kept from before)" if reused else "masks"
    advance = progress(stage, (everything - reused) * work(panels, settings))
    base, soft, *others = [
        kept.get(one) or kept.put(one, score(loaded, panels, one, settings, advance)) for one in factors()
    ]
    entries = [
        Entry(family, seed, at, found, retained(found.forget, base.forget), retained(found.reasoning, base.reasoning))
        for (at, family, seed, _), found in zip(planned, others, strict=True)
    ]
    return Scored(base, soft, tuple(entries), reused)


def _asked(loaded: Loaded, files: Files, options: EvalOptions, progress: Progress) -> tuple[Panels, Magnitudes]:
    """What is asked, and the mean |h| that the activation masks come from."""
    forget, retain, neutral = files
    facts, sums = read_forget(forget)[0], read_retain(retain)[0]
    chosen: dict[str, Any] = {"chat": options.chat, "count": options.count, "seed": options.seed}
    if forget is None:
        panels = atlas(loaded.tokenizer, **chosen)
        panels = replace(panels, neutral=neutral_texts(neutral)) if neutral else panels
    else:
        worked = not options.generate
        panels = from_rows(facts, sums, neutral_texts(neutral), loaded.tokenizer, worked=worked, **chosen)
    return panels, magnitudes(loaded, facts, sums, chat=options.chat, seed=options.seed, progress=progress)


def _about(
    loaded: Loaded, gates: Gates, panels: Panels, options: EvalOptions, digests: dict[str, str]
) -> dict[str, Any]:
    """The head of the record: of what the figures are, and the choices they depend on."""
    fixed = {"random_seeds": RANDOM_SEEDS, "activation_rows": ACTIVATION_ROWS, "neutral_tokens": NEUTRAL_TOKENS}
    scoring = f"written, {options.generate} tokens" if options.generate else "teacher-forced"
    counts = {name: len(getattr(panels, name)) for name in (*QUESTIONS, "neutral")}
    return {
        **head("vindex-gates-evaluation/1"),
        "model": {**describe(loaded, digests), "attn_implementation": loaded.model.config._attn_implementation},
        "gates": gates.name,
        "panels": {"source": panels.source, "counts": counts},
        "choices": {**asdict(options), "scoring": scoring, **fixed},
    }
