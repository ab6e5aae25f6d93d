"""What a vindex holds beside directions, held against a source: embeddings, tokens at the poles, norms, routers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch

from extract.cast import to_half
from extract.checkpoint import Checkpoint
from extract.layouts import Layout
from extract.rederive import evenly
from extract.vocab import POLE, TopTokens, scores_of, unit_rows
from vindex import format as form
from vindex.errors import LackingError
from vindex.progress import Progress, unseen
from vindex.reader import Vindex
from vindex.verification import Check

SAMPLE = 256  # directions of each side whose tokens are found anew
SCORES = 2e-3  # how far a stored score may be from the same found anew, in the largest of its direction
Part = TypeVar("Part")


def unless_lacking(read: Callable[[], Part]) -> Part | None:
    """What `read` gives, or None where the vindex has no such part."""
    try:
        return read()
    except LackingError:
        return None


def is_ours(v: Vindex) -> bool:
    """Whether v is of our own format, which fixes signs, layers and what a score is; others' families do not."""
    return not v.family.title


def compare_contents(v: Vindex, checkpoint: Checkpoint, layout: Layout, progress: Progress) -> Iterator[Check]:
    """A check of each part that v has; what it lacks is left out.

    The vocabulary is read once for each side that something is said of, a block of rows at a time. Raises
    CheckpointError or NumericError.
    """
    stored = unless_lacking(lambda: v.embeddings)
    sides = {"gate": layout.embeddings, "down": layout.unembedding}
    wanted = [side for side in sides if is_ours(v) or (side == "gate" and stored is not None)]
    advance = progress("vocabulary", len(wanted) * layout.vocab_size) if wanted else unseen
    tokens = min(layout.vocab_size, unless_lacking(lambda: len(v.vocabulary)) or layout.vocab_size)
    scale = layout.final_norm.scale(checkpoint)
    for side in wanted:
        poles, other = _Poles(v, side, scale) if is_ours(v) else None, []
        for first, rows in checkpoint.row_blocks(sides[side]):
            if side == "gate" and stored is not None:
                other += _other_rows(stored, first, rows, sides[side])
            if poles:
                poles.update(first, rows[: max(0, tokens - first)].float())
            advance(len(rows))
        if side == "gate" and stored is not None:
            yield _embeddings(stored, layout.vocab_size, other)
        if poles:
            yield poles.check()
    yield from _norms(v, checkpoint, layout)
    yield from _routers(v, checkpoint, layout)


def _other_rows(stored: np.ndarray, first: int, rows: torch.Tensor, name: str) -> list[int]:
    """The rows that are not the source's, cast as they are stored, to the bit."""
    ours = np.asarray(stored[first : first + len(rows)])
    fresh = (to_half(rows, name, first).values if ours.dtype == np.float16 else rows.float()).numpy()[: len(ours)]
    return (first + np.flatnonzero((fresh != ours).any(axis=1))).tolist()


class Neurons:
    """Rows that are said to be neurons of gate_proj, each beside the one in its place."""

    def __init__(self) -> None:
        self._rows, self._other, self._first, self._cosine = 0, 0, "", 1.0

    def update(self, where: str, stored: np.ndarray, weight: torch.Tensor, name: str) -> None:
        """stored: (F, H) of one weight (I, H), which is called `name`. where: its layer and expert."""
        both = min(len(stored), len(weight))
        other = _other_rows(stored, 0, weight[:both], name)
        if other:
            unit = (unit_rows(rows.float()) for rows in (torch.from_numpy(stored[other]), weight[other]))
            self._cosine = min(self._cosine, float(torch.stack([*unit]).prod(dim=0).sum(dim=1).nan_to_num(0.0).min()))
        if len(stored) != len(weight):
            other, self._cosine = [*other, both], 0.0
        if other and not self._other:
            self._first = f"{where}, row {other[0]}"
        self._rows, self._other = self._rows + len(stored), self._other + len(other)

    def check(self) -> Check:
        """Whether each row is the source's, cast as it is stored, to the bit."""
        said = f"{self._rows:,} rows, each the source's in its place"
        if self._other:
            said = (
                f"{self._other:,} of {self._rows:,} rows are not the source's in their place, cosine down to "
                f"{self._cosine:.4f}; first {self._first}"
            )
        return Check("neurons", not self._other, said)


def _embeddings(stored: np.ndarray, rows: int, other: list[int]) -> Check:
    if len(stored) != rows:
        return Check("embeddings", False, f"{len(stored):,} rows, and the source has {rows:,}")
    if other:
        return Check("embeddings", False, f"{len(other):,} of {rows:,} rows are not the source's, first {other[0]}")
    return Check("embeddings", True, f"{rows:,} rows, each as the source's")


class _Poles:
    """Some directions of one side of our format, evenly spread, as they meet the vocabulary again."""

    def __init__(self, v: Vindex, side: str, final_norm: torch.Tensor) -> None:
        directions = (v.gate if side == "gate" else v.down).reshape(-1, v.index.hidden_size)
        chosen = evenly(len(directions), SAMPLE)
        self.side, self.name = side, (form.GATE_META if side == "gate" else form.DOWN_META).name
        self.stored = _records(v, side, chosen)
        self.directions = torch.from_numpy(directions[chosen].astype(np.float32))
        self.directions = unit_rows(self.directions) if side == "gate" else self.directions * final_norm
        self.found = TopTokens(len(chosen))

    def update(self, first: int, rows: torch.Tensor) -> None:
        if len(rows):
            tokens = unit_rows(rows) if self.side == "gate" else rows
            self.found.update(0, scores_of(self.directions, tokens), first)

    def check(self) -> Check:
        """Whether at each pole the scores are those found anew, and so are the tokens, but for equal scores."""
        fresh, wrong = self.found.records()["tokens"], 0
        for ours, theirs in zip(self.stored, fresh, strict=True):
            allowed = SCORES * float(np.abs(theirs["score"]).max())
            known = {int(one): float(score) for one, score in zip(theirs["token_id"], theirs["score"], strict=True)}
            cuts = np.repeat(theirs["score"][[POLE - 1, -1]], POLE)
            expected = [known.get(int(one), cut) for one, cut in zip(ours["token_id"], cuts, strict=True)]
            alike = np.abs(ours["score"] - theirs["score"]).max() <= allowed
            wrong += not (alike and np.abs(ours["score"] - expected).max() <= allowed)
        if wrong:
            detail = f"{wrong} of {len(fresh)} directions have other tokens or scores than the source gives them"
            return Check(self.name, False, detail)
        return Check(self.name, True, f"the tokens of {len(fresh)} directions, found anew")


def _records(v: Vindex, side: str, rows: list[int]) -> np.ndarray:
    """(n, K) tokens and scores of so many of the R directions."""
    spec = form.GATE_META if side == "gate" else form.DOWN_META
    ends = list(accumulate(entry.num_features for entry in v.index.layers))
    of_layer = np.searchsorted(ends, rows, side="right")
    return np.stack(
        [
            v.meta_records(spec, int(layer))[1]["tokens"][row - ends[layer]]  # counted from the layer's end
            for layer, row in zip(of_layer, rows, strict=True)
        ]
    )


def _norms(v: Vindex, checkpoint: Checkpoint, layout: Layout) -> Iterator[Check]:
    stored = unless_lacking(lambda: v.norms)
    if stored is None:
        return
    if set(stored) != {norm.name for norm in layout.norms}:
        yield Check("norms", False, f"{len(stored)} of them, and the source has {len(layout.norms)} of other names")
        return
    fresh = {norm.name: to_half(norm.scale(checkpoint), norm.tensor).values.numpy() for norm in layout.norms}
    other = [name for name, values in fresh.items() if not np.array_equal(values, stored[name])]
    said = f"{len(other)} of {len(fresh)} are not the source's, first {other[0]}" if other else f"{len(fresh)} scales"
    yield Check("norms", not other, said)


def _routers(v: Vindex, checkpoint: Checkpoint, layout: Layout) -> Iterator[Check]:
    """Routers and shared experts' gates, layer by layer."""
    compared, other = 0, []
    for layer, ffn in enumerate(layout.ffns if v.has(form.ROUTER) else ()):
        for name, read in ((ffn.router, v.router), (ffn.shared_gate, v.shared_expert_gate)):
            if name:
                stored = read(layer)
                fresh = to_half(checkpoint.tensor(name), name).values.numpy()
                compared += 1
                other += [name] if not np.array_equal(fresh.reshape(stored.shape), stored) else []
    if compared:
        said = f"{len(other)} of {compared} are not the source's, first {other[0]}" if other else f"{compared} matrices"
        yield Check("routers", not other, said)
