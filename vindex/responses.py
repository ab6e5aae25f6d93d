"""Questions to a vindex about what the FFN writes when a gate direction is read (docs/responses.md).

v.response(12, 3)            # R² beside its null, and the tokens it writes
v.responses.shape            # (L, F, H)
v.response_stats.r2.shape    # (L, F)
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from vindex.errors import QueryError
from vindex.format import RESPONSE_META, RESPONSE_STATS, RESPONSES
from vindex.parts import Parts
from vindex.records import Response


class ResponseStats(NamedTuple):
    """The figures of every response, float32 in the shape of `Vindex.gate` without H; what they are: `Response`."""

    r2: np.ndarray
    null: np.ndarray
    random: np.ndarray
    slope: np.ndarray
    tokens: np.ndarray

    def __repr__(self) -> str:
        return f"<R², nulls, slope and tokens of {self.r2.size:,} responses>"


class Responding(Parts):
    """The part of `Vindex` that knows responses. Each of these raises QueryError where the vindex has none."""

    @cached_property
    def responses(self) -> np.ndarray:
        """float16 unit rows in the shape of `gate`: what is written when it is read; a zero row where that is none."""
        self._require_responses()
        return self.array(RESPONSES)

    @cached_property
    def response_stats(self) -> ResponseStats:
        """Their R², nulls, slope and number of tokens."""
        self._require_responses()
        return ResponseStats(*self.array(RESPONSE_STATS))

    def response(self, layer: int, feature: int, *, expert: int | None = None) -> Response:
        """What is written when one gate direction is read, with the tokens at both poles. expert: as in `feature`."""
        row = self.row(layer, feature, expert)
        r2, null, random, slope, tokens = (float(of.reshape(-1)[row]) for of in self.response_stats)
        return Response(r2, null, random, slope, int(tokens), *self.poles(RESPONSE_META, int(layer), row))

    def _require_responses(self) -> None:
        if not self.index.has_responses:
            raise QueryError(
                f"{self.name} has no responses ({RESPONSES.name} and others): `vindex respond MODEL "
                f"{self.name}` measures what its gate directions make the model write"
            )
