"""What `Vindex.score` gives back: the gate directions that read a query most, beside what random ones reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vindex.chance import CHANCE, Judged
from vindex.records import Feature, FeatureHit, TokenScore, to_json
from vindex.results import Result

PIECES = 4  # of a pole, in a row


@dataclass(frozen=True)
class Best:
    """A query and the gate directions that read it most. A vector has neither token nor piece.

    by: "z", largest |z| first, or "cosine", largest cosine first. judged: None for a vindex without statistics.
    """

    token: str | None
    token_id: int | None
    piece: str | None
    features: tuple[tuple[Feature, FeatureHit], ...]
    by: str
    judged: Judged | None

    @property
    def hits(self) -> tuple[FeatureHit, ...]:
        return tuple(hit for _, hit in self.features)

    @property
    def summary(self) -> str:
        """The largest |z|, how many tokens reach it, and what random directions reach; in words."""
        if self.judged is None:
            return "no z: the vindex has no statistics"
        said = f"largest |z| {self.judged.reached:.1f}: {self.judged.token_share:.1%} of tokens reach that; "
        return (
            said + f"{self.judged.directions:,} random directions reach {self.judged.chance_reach:.1f} in {CHANCE:.0%}"
        )

    def record(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        figures = self.judged and {name: value for name, value in self.judged._asdict().items() if name != "z"}
        named = {"token": self.token, "token_id": self.token_id, "piece": self.piece}
        features = [to_json(of) | {"cosine": hit.cosine, "z": hit.z, "chance": hit.chance} for of, hit in self.features]
        return named | {"by": self.by, "judged": figures, "features": features}


@dataclass(frozen=True, repr=False)
class Scores(Result):
    """Scores of one query or several.

    cosines: float32, (B, L, F) or (B, R): B queries, the rest in the shape of `Vindex.gate` without H. top: the best
    of each.
    """

    vindex: str
    cosines: np.ndarray
    top: tuple[Best, ...]

    def __repr__(self) -> str:
        asked = ", ".join(repr(found.piece) if found.token_id is not None else "a vector" for found in self.top[:4])
        return f"<scores of {asked}{', …' if len(self.top) > 4 else ''} in vindex {self.vindex}>"

    def rows(self) -> list[dict[str, Any]]:
        """One for each feature found: the query, where the feature stands, its cosine beside chance, what it reads."""
        return [
            {"token": found.piece, "layer": hit.layer}
            | ({} if hit.expert is None else {"expert": hit.expert})
            | {"feature": hit.feature, "cosine": hit.cosine, "z": hit.z, "chance": hit.chance}
            | {"gate_sigma": hit.gate_sigma, "reads": pieces_of(read(of, hit))}
            | ({"r2": of.response.r2, "writes": pieces_of(written(of, hit))} if of.response else {})
            for found in self.top
            for of, hit in found.features
        ]

    def record(self) -> dict[str, Any]:
        """The features found, whole; of the cosines no others."""
        return {"vindex": self.vindex, "scores": [found.record() for found in self.top]}


def pieces_of(tokens: list[TokenScore] | None) -> list[str] | None:
    """The first of a pole, as text."""
    return None if tokens is None else [token.piece for token in tokens[:PIECES]]


def read(feature: Feature, hit: FeatureHit) -> list[TokenScore] | None:
    """The tokens at the pole of the feature that a hit is on: by the sign of z, or of the cosine without z."""
    return feature.reads if _positive(hit) else feature.reads_against


def written(feature: Feature, hit: FeatureHit) -> list[TokenScore]:
    """The tokens that are written when a hit is read, by the feature's response; none without one."""
    response = feature.response
    return [] if response is None else response.writes if _positive(hit) else response.writes_against


def _positive(hit: FeatureHit) -> bool:
    return (hit.cosine if hit.z is None else hit.z) >= 0
