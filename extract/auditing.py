"""Hold every direction of a vindex against the weights that it is said to be of, one weight at a time.

1. A weight W of the source is read.
2. The claimed rows are measured against W and beside its own directions (extract/measuring.py).
3. vindex/verdicts.py says in a word what the figures mean.
4. Rows that are said to be neurons and no directions are held against W's own, bit by bit, instead of 2. and 3.

Nothing of one weight is kept but its figures, and room for those is taken before the first, so that memory does not
grow from weight to weight: small arrays made among large ones would keep the places of these from being used again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from extract.ahead import ahead
from extract.checkpoint import Checkpoint, open_checkpoint
from extract.contents import Neurons, compare_contents, is_ours, unless_lacking
from extract.ffn import Weight
from extract.layouts import Layout, find_layout
from extract.measuring import measure
from extract.rederive import evenly
from extract.run import build
from vindex import scoring
from vindex.audits import Audit, audited, require_directions
from vindex.demo import or_bundled
from vindex.errors import QueryError
from vindex.progress import Progress, silent
from vindex.reader import Vindex, as_vindex
from vindex.verdicts import OF_A_ROW, Figures

SIDES = ("gate", "down")


class Claim(NamedTuple):
    """Directions that a vindex claims for one weight: (F, H) rows as stored, and σ (F,) where it is stated."""

    layer: int
    side: str
    expert: int | None
    weight: Weight
    rows: np.ndarray
    sigma: np.ndarray | None

    @property
    def place(self) -> str:
        """The layer, and the expert, in words."""
        return f"layer {self.layer}" + ("" if self.expert is None else f", expert {self.expert}")


def audit(
    v: Vindex | str | Path, source: str | Path, *, layers: int | None = None, progress: Progress = silent
) -> Audit:
    """Compare all that a vindex says of a model with the model's weights.

    v: an opened vindex or its directory. source: the checkpoint it is said to be of, as `build` takes it: a directory,
    a GGUF file, a Hub id, hf://ID to read it by byte range. layers: so many, evenly spread; None for all.
    Raises FormatError, CheckpointError, QueryError where the two have other shapes, or NumericError.
    """
    v, layers = as_vindex(v), None if layers is None else scoring.positive("layers", layers)
    checkpoint = open_checkpoint(or_bundled(str(source)))
    layout = find_layout(checkpoint)
    _require_fit(v, checkpoint, layout)
    there = [entry.layer for entry in v.index.layers if entry.num_features]
    chosen = there if layers is None else [there[at] for at in evenly(len(there), layers)]
    claims = list(_claims(v, layout, chosen))
    advance, room, found = progress("audit", len(claims)), _Room(sum(len(claim.rows) for claim in claims)), []
    neurons = Neurons() if v.family.neurons else None
    for of, by_neuron in ahead((claim, claim.weight.by_neuron(checkpoint)) for claim in claims):
        if neurons:
            neurons.update(of.place, of.rows, by_neuron, of.weight.name)
        else:
            figures = room.moved(measure(of.rows, of.sigma, by_neuron.to(torch.float32), of.weight.name))
            found.append(audited(of.layer, of.side, of.expert, of.weight.name, figures))
        del by_neuron  # or it would be kept while the next but one is read
        advance(1, f"{of.place}, {of.side}: {'compared' if neurons else found[-1].verdict.word}")
    beside = compare_contents(v, checkpoint, layout, progress)
    return Audit(
        name=v.name,
        id=v.id,
        source=str(source),
        model=checkpoint.model,
        revision=checkpoint.revision,
        features=v.index.layers[there[0]].features,
        embeddings=v.index.has_embeddings,
        stated=claims[0].sigma is not None,
        signed=is_ours(v),
        weights=tuple(found),
        contents=(*([neurons.check()] if neurons else []), *beside),
    )


def repair(
    found: Audit, target: str | Path, *, resume: bool = False, force: bool = False, progress: Progress = silent
) -> Vindex:
    """Build a certified vindex with as many directions of each weight, and embeddings where there were some.

    It is of the source of the audit. resume, force: as of `build`. Raises as that does, and LackingError where rows are
    neurons.
    """
    require_directions(found.name, bool(found.weights))
    return build(
        found.source,
        target,
        features=found.features,
        embeddings=found.embeddings,
        resume=resume,
        force=force,
        progress=progress,
    )


class _Room:
    """Memory for the figures of so many rows."""

    def __init__(self, rows: int) -> None:
        self._places = {name: np.empty(rows, dtype) for name, dtype in OF_A_ROW.items()}
        self._used = 0

    def moved(self, figures: Figures) -> Figures:
        """The same figures, lying here."""
        moved: dict[str, Any] = {}
        for name, places in self._places.items():
            values = getattr(figures, name)
            if values is not None:
                moved[name] = places[self._used : self._used + len(values)]
                moved[name][:] = values
        self._used += len(figures.residual)
        return replace(figures, **moved)


def _claims(v: Vindex, layout: Layout, layers: list[int]) -> Iterator[Claim]:
    """What v claims of each weight of these layers, gate before down; maps, of which nothing is read yet."""
    hidden, firsts = v.index.hidden_size, [0, *accumulate(entry.num_features for entry in v.index.layers)]
    frames = {"gate": v.gate, "down": unless_lacking(lambda: v.down)}
    sigma = unless_lacking(lambda: v.singular_values.reshape(2, -1))
    for layer in layers:
        entry, ffn = v.index.layers[layer], layout.ffns[layer]
        for at in range(entry.groups):
            for row, (side, stored) in enumerate(frames.items()):
                if stored is not None:
                    first = firsts[layer] + at * entry.features
                    rows = slice(first, first + entry.features)
                    weight, expert = getattr(ffn, side)[at], at if entry.num_experts else None
                    values = None if sigma is None else sigma[row, rows]
                    yield Claim(layer, side, expert, weight, stored.reshape(-1, hidden)[rows], values)


def _require_fit(v: Vindex, checkpoint: Checkpoint, layout: Layout) -> None:
    """Raise QueryError where the source has other layers, experts or a hidden size than v was made from.

    A family that is not ours may leave out layers, and shared experts.
    """
    experts = [len(ffn.gate) for ffn in layout.ffns]
    claimed = [entry.groups for entry in v.index.layers]
    routed = [{len(ffn.gate), ffn.num_experts or 1} for ffn in layout.ffns]
    fits = all(not of.num_features or of.groups in known for of, known in zip(v.index.layers, routed, strict=False))
    as_many = len(claimed) == len(experts) if is_ours(v) else len(claimed) <= len(experts)
    if not (fits and as_many and layout.hidden_size == v.index.hidden_size):
        theirs, ours = (
            f"{len(each)} layers of width {width}" + (f", {max(each)} experts" if max(each) > 1 else "")
            for each, width in ((experts, layout.hidden_size), (claimed, v.index.hidden_size))
        )
        raise QueryError(f"{checkpoint.model} has {theirs}, and {v.name} {ours}; give the source that it is of")
