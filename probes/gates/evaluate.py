"""What gates do beside what chance does.

1. What is asked, and the rows that mean |h| is taken of, come from files of rows, or from the atlas.
2. The plain model and soft gates are scored on the panels.
3. At each operating point the mask of the gates is scored beside masks that turn off as many neurons of every layer
   (controls.py). Each mask's scores are kept beside the record to come (journal.py), so that a run that was stopped
   goes on where it was.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor

from probes.gates import journal
from probes.gates.apply import require_fit
from probes.gates.controls import ACTIVATION_ROWS, RANDOM_SEEDS, Magnitudes, magnitudes, masks
from probes.gates.data import panel_files, read_forget, read_retain, require_sources
from probes.gates.evaluation import Entry, Evaluation, kept_of
from probes.gates.gates import Gates
from probes.gates.masks import rescaled
from probes.gates.options import EvalOptions, to_evaluate
from probes.gates.panels import QUESTIONS, Panels, atlas, from_rows, neutral_texts, read_asked
from probes.gates.score import NEUTRAL_TOKENS, Scores, Settings, score, work
from probes.live.load import Loaded, require_head
from probes.live.match import describe, weights_sha256
from probes.records import head
from vindex.progress import Progress, silent
from vindex.targets import check_file


class Files(NamedTuple):
    """Where what is asked comes from."""

    panel: Path | None
    forget: Path | None
    retain: Path | None
    neutral: Path | None


def evaluate_gates(
    model: Loaded,
    gates: Gates,
    *,
    panel: str | Path | None = None,
    forget: str | Path | None = None,
    retain: str | Path | None = None,
    neutral: str | Path | None = None,
    output: str | Path | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Evaluation:
    """Score gates, soft and at their operating points, beside random and activation masks of the same size.

    panel: a directory that `make_panel` made for this model. forget, retain: files of rows (docs/gates.md), both or
    neither; without panel and files the atlas's held-out facts and sums.
    neutral: a .txt or .jsonl file. output: where the record is written; until then the scores of finished masks are
    kept beside it, and a run that was stopped goes on from them. options: the fields of `EvalOptions`.

    Raises PatchError unless the gates are of a model of this size, FactError, ProbeError or TargetError as its parts.
    """
    chosen = to_evaluate(**options)
    target = Path(output) if output else None
    if target:
        check_file(target)
    require_sources(panel, forget, retain)
    require_head(model)
    require_fit(gates.logits.shape, model.model)
    chosen = replace(
        chosen,
        soft_scale_mode=chosen.soft_scale_mode or gates.scale_mode,
        thresholds=chosen.thresholds or gates.selected_thresholds(),
    )
    digests = weights_sha256(model, progress)
    files = Files(*(Path(file) if file else None for file in (panel, forget, retain, neutral)))
    panels, found = _asked(model, files, chosen, progress)
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

    several: list[Tensor | None] = [None, gates.factors(options.soft_scale_mode)]
    several += [rescaled(keep.float(), options.mask_scale_mode) for *_, keep in planned]
    left = [one for one in several if kept.get(one) is None]
    reused = len(several) - len(left)
    stage = f"masks ({reused} of {len(several)} kept from before)" if reused else "masks"
    advance = progress(stage, len(left) * work(panels, settings))
    for one, found in zip(left, score(loaded, panels, left, settings, advance), strict=True):
        kept.put(one, found)
    base, soft, *others = (cast(Scores, kept.get(one)) for one in several)
    entries = [
        Entry(family, seed, at, found, *kept_of(found, base))
        for (at, family, seed, _), found in zip(planned, others, strict=True)
    ]
    return Scored(base, soft, tuple(entries), reused)


def _asked(loaded: Loaded, files: Files, options: EvalOptions, progress: Progress) -> tuple[Panels, Magnitudes]:
    """What is asked, and the mean |h| that the activation masks come from."""
    made = panel_files(files.panel) if files.panel else None
    rows = (made.forget, made.retain) if made else (files.forget, files.retain)
    facts, sums = read_forget(rows[0])[0], read_retain(rows[1])[0]
    chosen: dict[str, Any] = {"count": options.count, "seed": options.seed}
    if made:
        panels = read_asked(made.asked, neutral_texts(files.neutral), **chosen)
    elif files.forget is None:
        panels = atlas(loaded.tokenizer, chat=options.chat, **chosen)
        panels = replace(panels, neutral=neutral_texts(files.neutral)) if files.neutral else panels
    else:
        texts, worked = neutral_texts(files.neutral), not options.generate
        panels = from_rows(facts, sums, texts, loaded.tokenizer, chat=options.chat, worked=worked, **chosen)
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
