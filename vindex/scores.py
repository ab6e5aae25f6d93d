"""What `Vindex.score` gives back: the cosine of each query with every gate direction, and the largest of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vindex.records import Feature, TokenScore, to_json
from vindex.results import Result

PIECES = 4  # of a pole, in a row


class Scored(NamedTuple):
    """A query and the features that read it most, largest cosine first. A vector has neither token nor piece."""

    token: str | None
    token_id: int | None
    piece: str | None
    features: list[tuple[Feature, float]]


@dataclass(frozen=True, repr=False)
class Scores(Result):
    """Scores of one query or several.

    cosines: float32, (B, L, F) or (B, R): B queries, the rest in the shape of `Vindex.gate` without H. top: the largest
    of each.
    """

    vindex: str
    cosines: np.ndarray
    top: tuple[Scored, ...]

    def __repr__(self) -> str:
        asked = ", ".join(repr(found.piece) if found.token_id is not None else "a vector" for found in self.top[:4])
        return f"<scores of {asked}{', …' if len(self.top) > 4 else ''} in vindex {self.vindex}>"

    def rows(self) -> list[dict[str, Any]]:
        """One for each feature found: the query, where the feature stands, its cosine, what it reads and writes."""
        return [
            {"token": found.piece, "layer": of.layer}
            | ({} if of.expert is None else {"expert": of.expert})
            | {"feature": of.feature, "cosine": cosine, "gate_sigma": of.gate_sigma}
            | {"reads": _pieces(of.reads if cosine >= 0 else of.reads_against), "writes": _pieces(of.writes)}
            for found in self.top
            for of, cosine in found.features
        ]

    def record(self) -> dict[str, Any]:
        """The features found, whole; of the cosines no others."""
        return {"vindex": self.vindex, "scores": [_record(found) for found in self.top]}


def _record(found: Scored) -> dict[str, Any]:
    features = [to_json(of) | {"cosine": cosine} for of, cosine in found.features]
    return {"token": found.token, "token_id": found.token_id, "piece": found.piece, "features": features}


def _pieces(tokens: list[TokenScore]) -> list[str]:
    return [token.piece for token in tokens[:PIECES]]
