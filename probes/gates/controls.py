"""Masks that need no training: what chance does, and what mean |h| does, where an entity is about to be said.

    ratio      first off: the neurons that fire the most there, compared with reasoning text
    contrast   the difference in place of the ratio
    largest    those that fire the most there, wherever else they do
    random     at random

Beside a mask of gates stand masks that turn off as many neurons of every layer (`masks`, 5 seeds of the random ones);
`mask_gates` makes gates of their own of them, in the published layout. The rows come from the panel or the files that
training takes, or from the atlas's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.gates.activations import mean_magnitude
from probes.gates.apply import gate_shape
from probes.gates.data import Forget, Retain, panel_files, read_forget, read_retain, require_sources
from probes.gates.encode import forget_example, retain_example
from probes.gates.files import MADE
from probes.gates.gates import Gates
from probes.gates.masks import lowest_keep, random_keep
from probes.gates.options import TrainOptions
from probes.live.load import Loaded
from probes.live.match import describe, weights_sha256
from probes.records import head
from vindex.errors import ProbeError
from vindex.places import check_directory
from vindex.progress import Progress, silent

FAMILIES = {"largest": "largest |h|", "contrast": "|h| contrast", "ratio": "|h| ratio"}  # as evaluations call them
WAYS = (*reversed(FAMILIES), "random")
RANDOM_SEEDS = 5
ACTIVATION_ROWS = 400  # of each kind, at most


class Magnitudes(NamedTuple):
    """Mean |h| of every neuron (L, I): before entity tokens of forget text, and in retain text."""

    forget: Tensor
    retain: Tensor

    def scores(self, by: str) -> Tensor:
        """(L, I): the higher, the sooner a neuron is off."""
        if by == "ratio":
            return self.forget / self.retain.clamp_min(torch.finfo(torch.float32).tiny)
        return self.forget - self.retain if by == "contrast" else self.forget


def magnitudes(
    loaded: Loaded,
    forget: Sequence[Forget],
    retain: Sequence[Retain],
    *,
    chat: bool,
    seed: int = 0,
    progress: Progress = silent,
) -> Magnitudes:
    """Mean |h| over at most ACTIVATION_ROWS rows of each kind, drawn with `seed`."""
    rng = random.Random(seed)
    facts = rng.sample(list(forget), min(ACTIVATION_ROWS, len(forget)))
    sums = rng.sample(list(retain), min(ACTIVATION_ROWS, len(retain)))
    settings: dict[str, Any] = {"chat": chat, "max_tokens": TrainOptions().max_tokens}
    said = [forget_example(row, loaded.tokenizer, **settings) for row in facts]
    worked = [retain_example(row, loaded.tokenizer, **settings) for row in sums]
    advance = progress("activations", len(said) + len(worked))
    return Magnitudes(
        mean_magnitude(loaded, said, entity=True, advance=advance),
        mean_magnitude(loaded, worked, entity=False, advance=advance),
    )


def masks(gates: Gates, threshold: float, magnitudes: Magnitudes | None) -> Iterator[tuple[str, int | None, Tensor]]:
    """(family, seed, keep) of the gates' mask and of every control of its size."""
    keep = gates.keep(threshold)
    yield "gates", None, keep
    for seed in range(RANDOM_SEEDS):
        yield "random", seed, random_keep(keep, seed)
    for name in FAMILIES if magnitudes else ():
        yield FAMILIES[name], None, lowest_keep(-magnitudes.scores(name), keep)  # type: ignore[union-attr]


def ranked(scores: Tensor) -> Tensor:
    """(L, I) logits of λ: the share of a layer's neurons whose scores are higher, so that they are off before it."""
    last_off = scores.argsort(1).argsort(1)  # 0 where the score is lowest
    return torch.logit(1 - (last_off + 0.5) / scores.shape[1])


def mask_gates(
    model: Loaded,
    by: str = "ratio",
    *,
    panel: str | Path | None = None,
    forget: str | Path | None = None,
    retain: str | Path | None = None,
    seed: int = 0,
    chat: bool = False,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Gates:
    """Gates without training: λ is the share of a layer's neurons that are to be off before the neuron is.

    So 5 % off is 5 % of every layer. by: ratio, contrast, largest or random; seed: of the random ones, and of the rows
    that mean |h| is taken over. panel, forget, retain, chat, output, force: as `train_gates`. Raises ProbeError,
    FactError or TargetError before the work.
    """
    if by not in WAYS:
        raise ProbeError(f"masks by {by!r}: expected one of {', '.join(WAYS)}")
    require_sources(panel, forget, retain)
    if panel:
        forget, retain, _ = panel_files(Path(panel))
    files, target = [Path(file) if file else None for file in (forget, retain)], Path(output) if output else None
    if target:
        reads = [path for path in (model.path, *files) if path is not None and path.exists()]
        check_directory(target, force=force, reads=reads, kinds=MADE)
    about: dict[str, Any] = {"by": by, "seed": seed, "chat": chat}
    if by == "random":
        scores = torch.rand(gate_shape(model.model), generator=torch.Generator().manual_seed(seed))
    else:
        facts, sums = read_forget(files[0]), read_retain(files[1])
        scores = magnitudes(model, facts[0], sums[0], chat=chat, seed=seed, progress=progress).scores(by)
        about["data"] = {"forget": facts[1]._asdict(), "retain": sums[1]._asdict()}
    made = {**head("vindex-gates-mask/1"), "model": describe(model, weights_sha256(model, progress)), **about}
    gates = Gates(ranked(scores), target.name if target else f"{by} mask", made)
    if target:
        gates.save(target, force=force)
    return gates
