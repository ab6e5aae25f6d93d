"""Questions to a vindex about what the FFN writes when a gate direction is read (docs/responses.md).

v.response(12, 3)            # R² beside its null, and the tokens it writes
v.responses.shape            # (L, F, H)
v.response_stats.r2.shape    # (L, F)
v.snippets(12, 3)            # where in the texts it is read most
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from vindex.errors import FormatError, QueryError
from vindex.format import RESPONSE_META, RESPONSE_PLACES, RESPONSE_STATS, RESPONSE_TEXTS, RESPONSES
from vindex.parts import Parts
from vindex.records import Response, Snippet

BEFORE, AFTER = 8, 3
"""Tokens of a snippet, beside the one that is read."""


class ResponseStats(NamedTuple):
    """The figures of every response, float32 in the shape of `Vindex.gate` without H; what they are: `Response`."""

    r2: np.ndarray
    null: np.ndarray
    random: np.ndarray
    slope: np.ndarray
    tokens: np.ndarray

    def __repr__(self) -> str:
        return f"<R², nulls, slope and tokens of {self.r2.size:,} responses>"


class Places(NamedTuple):
    """Places in texts at which R gate directions are read most: of each the strongest of +, then those of −."""

    names: tuple[str, ...]
    texts: np.ndarray
    """(texts, tokens) ids of tokens."""
    place: np.ndarray
    """(R, 2 · PLACES) which token of all; −1 where there are no more."""
    z: np.ndarray
    """(R, 2 · PLACES) what is read there, less its mean, over its deviation."""

    def __repr__(self) -> str:
        return f"<places in {len(self.names)} texts at which {len(self.place):,} directions are read most>"


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

    @cached_property
    def places(self) -> Places:
        """Where in which texts every gate direction is read most. Raises QueryError where the vindex does not say."""
        if self.own_index.response_texts is None:
            raise QueryError(
                f"{self.name} keeps no places in texts ({RESPONSE_PLACES.name} and another): `vindex respond MODEL "
                f"{self.name}` finds where its gate directions are read most"
            )
        texts, measured = self.array(RESPONSE_TEXTS), self.manifest.responses
        place, z = self.array(RESPONSE_PLACES).reshape(2, self.index.num_rows, -1)
        if not measured or len(measured.texts) != len(texts) or not (place < texts.size).all():
            raise FormatError(f"{self.name}: {RESPONSE_PLACES.name} has places in none of its texts; run vindex verify")
        return Places(tuple(measured.texts), texts, place.astype(np.int64), z)

    def snippets(self, layer: int, feature: int, *, expert: int | None = None) -> list[Snippet]:
        """Where one gate direction is read most, + first, by |z|; expert: as in `feature`. Raises QueryError."""
        row = self.row(layer, feature, expert)
        found = self.places
        each = zip(found.place[row].tolist(), found.z[row].tolist(), strict=True)
        return [self._snippet(place, z) for place, z in each if place >= 0]

    def _snippet(self, place: int, z: float) -> Snippet:
        names, texts, *_ = self.places
        text, at = divmod(place, texts.shape[1])
        first = max(at - BEFORE, 0)
        pieces = [self.piece(int(token)) for token in texts[text, first : at + AFTER + 1]]
        before, after = "".join(pieces[: at - first]), "".join(pieces[at - first + 1 :])
        return Snippet("+" if z > 0 else "−", z, names[text], at, before, pieces[at - first], after)

    def _require_responses(self) -> None:
        if not self.own_index.has_responses:
            raise QueryError(
                f"{self.name} has no responses ({RESPONSES.name} and others): `vindex respond MODEL "
                f"{self.name}` measures what its gate directions make the model write"
            )
