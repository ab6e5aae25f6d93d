"""What the neurons that a mask turns off read: their rows of gate_proj beside the gate directions of a vindex.

1. a = cos(w, v)² for the row w of every neuron and the gate directions v of its layer. The rows come from the model: a
   vindex holds the directions and not the rows.
2. A direction's loading is the mean of a over the neurons of its layer that are off. Rows are taken at unit length, so
   that strong neurons do not speak for all.
3. Beside it stand RANDOM sets of as many neurons of the layer, from the seed. A direction stands out when it is loaded
   more than by every random set, which of those that mean nothing one in RANDOM + 1 is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from probes.gates.apply import require_fit
from probes.gates.gates import Mask
from probes.live.load import Loaded
from probes.live.match import require_match, weights_sha256
from probes.live.sites import layers
from probes.records import Result, head, plain
from vindex import scoring
from vindex.progress import Progress, silent
from vindex.reader import Vindex, as_vindex

RANDOM = 99
TOKENS = 5


class Loading(NamedTuple):
    """A gate direction that the neurons that are off load on."""

    layer: int
    feature: int
    loading: float
    """Mean cos² of their rows with it."""
    chance: float
    """The same of random sets of as many neurons, the mean."""
    highest: float
    """The largest of them."""
    z: float
    """(loading − chance) over the spread of the random sets; nan where there is none."""
    positive: float
    """Share of the loading from rows with a positive cosine: near 1 the neurons read `tokens`."""
    tokens: tuple[str, ...]
    """The strongest tokens at the pole that most of the loading reads."""


@dataclass(frozen=True, repr=False)
class Link(Result):
    """The gate directions that stand out, by z, and how many would by chance."""

    about: dict[str, Any]
    directions: int
    """In layers with neurons that are off."""
    beyond: int
    """Directions loaded more than by every random set."""
    loadings: tuple[Loading, ...]

    @property
    def expected(self) -> float:
        """How many would be by chance."""
        return self.directions / (RANDOM + 1)

    def record(self) -> dict[str, Any]:
        found = {"directions": self.directions, "beyond": self.beyond, "expected": self.expected}
        return plain({**self.about, **found, "loadings": self.rows()})

    def rows(self) -> list[dict[str, Any]]:
        return [loading._asdict() for loading in self.loadings]

    def __repr__(self) -> str:
        return f"<{self.about['mask']}: {self.beyond} of {self.directions} directions, {self.expected:.0f} by chance>"


def link_gates(
    model: Loaded,
    mask: Mask,
    vindex: Vindex | str | Path,
    *,
    count: int = 20,
    seed: int = 0,
    progress: Progress = silent,
) -> Link:
    """The `count` gate directions of a vindex on which the neurons that `mask` turns off load most, beside chance.

    mask: as `gates.off(0.05)`. vindex: opened or named. Raises PatchError unless the mask is of a model of this size,
    ProbeError unless the vindex is of this model.
    """
    count, vindex = scoring.positive("count", count), as_vindex(vindex)
    require_fit(mask.keep.shape, model.model)
    require_match(model, vindex, weights_sha256(model, progress))
    generator, found, directions, beyond = np.random.default_rng(seed), [], 0, 0
    advance = progress("layers", len(mask.keep))
    for number, (layer, keep) in enumerate(zip(layers(model.model), mask.keep.numpy(), strict=True)):
        off, frame = np.flatnonzero(~keep), vindex.layer(number).gate[0].astype(np.float32)
        advance(1)
        if not len(off):
            continue
        rows = torch.nn.functional.normalize(layer.gate_proj.weight.detach().float().cpu(), dim=1).numpy()
        cosines = rows @ frame.T  # (I, F)
        loading, chance = _beside(np.square(cosines), off, generator)
        directions, beyond = directions + len(loading), beyond + int((loading > chance.max(0)).sum())
        mean, spread = chance.mean(0), chance.std(0)
        z = np.divide(loading - mean, spread, out=np.full_like(loading, np.nan), where=spread > 0)
        for feature in np.argsort(-np.nan_to_num(z), kind="stable")[:count].tolist():
            own = cosines[off, feature]
            positive = float(np.square(own[own > 0]).sum() / np.square(own).sum()) if own.any() else np.nan
            pole = vindex.feature(number, feature)
            tokens = (pole.reads_against if positive < 0.5 else pole.reads) or []
            found.append(
                Loading(
                    number, feature, float(loading[feature]), float(mean[feature]), float(chance[:, feature].max()),
                    float(z[feature]), positive, tuple(one.piece for one in tokens[:TOKENS]),
                )
            )  # fmt: skip
    found.sort(key=lambda one: -np.nan_to_num(one.z))
    about = {
        **head("vindex-gates-link/1"), "model": model.name, "vindex": vindex.path.name, "gates": mask.gates,
        "mask": mask.what, "neurons_off": mask.neurons_off, "random_sets": RANDOM, "seed": seed,
    }  # fmt: skip
    return Link(about, directions, beyond, tuple(found[:count]))


def _beside(squares: np.ndarray, off: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(F,) the mean over the rows `off` of squares (I, F), and (RANDOM, F) that over as many rows at random."""
    drawn = generator.random((RANDOM, len(squares))).argpartition(len(off) - 1, axis=1)[:, : len(off)]
    return squares[off].mean(0), np.stack([squares[rows].mean(0) for rows in drawn])
