"""Do two sets of gates mark the same neurons?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from probes.gates.gates import Gates
from probes.gates.masks import OFF_FRACTIONS
from probes.records import Result, plain
from vindex.errors import PatchError


class Overlap(NamedTuple):
    """Neurons off in both sets at one off-fraction, each at its own threshold."""

    off_fraction: float
    first_off: int
    second_off: int
    both: int
    jaccard: float
    chance: float
    """Jaccard index expected of random masks with as many off in each layer."""


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Two sets of gates side by side."""

    first: str
    second: str
    correlation: float
    """Pearson, of λ over all neurons; nan where one is constant."""
    layers: tuple[float, ...]
    """The same within each layer."""
    overlaps: tuple[Overlap, ...]

    def record(self) -> dict[str, Any]:
        return plain(asdict(self) | {"record": "vindex-gates-comparison/1", "overlaps": self.rows()})

    def rows(self) -> list[dict[str, Any]]:
        return [overlap._asdict() for overlap in self.overlaps]

    def __repr__(self) -> str:
        return f"<{self.first} and {self.second}: correlation of λ {self.correlation:.3f}>"


def compare(first: Gates, second: Gates) -> Comparison:
    """Compare two sets of gates of one shape. Raises PatchError when the shapes differ."""
    if first.logits.shape != second.logits.shape:
        shapes = [" × ".join(map(str, gates.logits.shape)) for gates in (first, second)]
        raise PatchError(f"one set of gates is {shapes[0]}, the other {shapes[1]}; compare gates of one model")
    rows = [_pearson(a, b) for a, b in zip(first.values, second.values, strict=True)]
    overlaps = tuple(_overlap(first, second, off) for off in OFF_FRACTIONS)
    return Comparison(
        first.name, second.name, _pearson(first.values.flatten(), second.values.flatten()), tuple(rows), overlaps
    )


def _pearson(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def _overlap(first: Gates, second: Gates, off: float) -> Overlap:
    a, b = (~gates.keep(gates.threshold_at(off)) for gates in (first, second))
    both, either = int((a & b).sum()), int((a | b).sum())
    expected = float((a.sum(1).double() * b.sum(1).double() / a.shape[1]).sum())  # of both, hypergeometric mean
    chance = expected / (int(a.sum()) + int(b.sum()) - expected)
    return Overlap(off, int(a.sum()), int(b.sum()), both, both / either if either else 1.0, chance)
