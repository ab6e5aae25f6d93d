"""What a trace found, as tables of plain values, as a record, and as a page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from probes.records import Result, head, plain
from probes.tracing.causal import Tested
from probes.tracing.directions import Along, Generic, largest
from probes.tracing.stream import Seen
from probes.tracing.target import check_target
from vindex import scoring, targets
from vindex.errors import ProbeError, QueryError
from vindex.reader import Vindex
from vindex.records import TokenScore
from vindex.tokens import Vocabulary

RECORD = "vindex-trace/1"
STRONGEST = 10
"""Directions of each layer and side that the record and the page keep."""
SHOWN = 10
"""The lens shows the target where it is among so many tokens."""
POLE = 5
"""Tokens of a direction that stand in a table."""


class Token(NamedTuple):
    position: int
    id: int
    piece: str
    sink: bool


class Directions(NamedTuple):
    """What was found with a vindex."""

    vindex: Vindex
    generic: Generic
    along: Along
    tested: tuple[Tested, ...]
    responses: np.ndarray | None
    """(L, F) what usually goes with the reads, as it reaches the target's logit; None in a vindex without responses."""


class Fate(NamedTuple):
    """What a patch did to the target, by the lens; stages are numbered as in `rows`."""

    dies: int | None
    """The first stage that shows it before the patch and not after; None where there is none."""
    later: tuple[int, ...]
    """The stages from there on that show it in spite of the patch."""


@dataclass(frozen=True, repr=False)
class Trace(Result):
    """A prompt's way through a model; L layers, 1 + 2L stages: the start, then attention and FFN of each layer."""

    model: dict[str, Any]
    prompt: str
    against: str | None
    patch: str | None
    """The patch file's name."""
    tokens: tuple[Token, ...]
    position: int
    vocabulary: Vocabulary
    target: int
    adds: np.ndarray
    """(1 + 2L,) what each stage adds to the target's logit, of two prompts the difference."""
    seen: Seen
    other: Seen | None
    """The lens on the other prompt, or with the patch."""
    sums: dict[str, float]
    """Largest differences of what must add up, in units of the logit."""
    directions: Directions | None

    def __repr__(self) -> str:
        word = repr(self.vocabulary.piece(self.target))
        return f"<trace of {self.model['name']}, {self.prompt[:40]!r}: {word} has rank {self.seen.rank[-1]}>"

    def rows(self) -> list[dict[str, Any]]:
        """The trajectory: a row for each stage. Of another prompt, or with a patch, three more columns."""
        beside = "patched" if self.patch else "against"
        return [
            {"layer": None if not stage else (stage - 1) // 2, "after": _stage(stage), **self._seen(self.seen, stage)}
            | ({f"{key}_{beside}": value for key, value in self._seen(self.other, stage).items()} if self.other else {})
            | {"adds": float(self.adds[stage])}
            for stage in range(len(self.adds))
        ]

    def reads(self, layer: int | None = None, k: int = STRONGEST) -> list[dict[str, Any]]:
        """The k gate directions of largest |z|, of one layer or of all.

        response: what usually goes with such a read in text, as it reaches the target's logit; r2: how much of what the
        FFN writes that explains. None in a vindex without responses.
        """
        found = self._directions()
        responses = found.responses
        r2 = None if responses is None else found.vindex.response_stats.r2
        return [
            {
                "layer": at,
                "feature": feature,
                "z": float(found.along.z[at, feature]),
                "read": float(found.along.read[at, feature]),
                "response": None if responses is None else float(responses[at, feature]),
                "r2": None if r2 is None else float(r2[at, feature]),
                "tokens": self._pole(at, feature, "reads", found.along.excess[at, feature]),
                "causal": self._causal("reads", at, feature),
            }
            for at, feature in self._largest(found.along.z, layer, k)
        ]

    def writes(self, layer: int | None = None, k: int = STRONGEST) -> list[dict[str, Any]]:
        """The k down directions that add most to the target's logit or take most from it, of one layer or of all.

        Two rows follow, the other directions and what lies outside them: `adds` sums to what the FFN added.
        """
        along = self._directions().along
        rows: list[dict[str, Any]] = [
            {
                "layer": at,
                "feature": feature,
                "what": "direction",
                "coefficient": float(along.coefficient[at, feature]),
                "adds": float(along.adds[at, feature]),
                "tokens": self._pole(at, feature, "writes", along.coefficient[at, feature]),
                "causal": self._causal("writes", at, feature),
            }
            for at, feature in self._largest(along.adds, layer, k)
        ]
        whole = slice(None) if layer is None else layer
        others = float(along.adds[whole].sum()) - sum(row["adds"] for row in rows)
        rest = {
            f"other {along.adds[whole].size - len(rows):,} directions": others,
            f"outside the {along.adds.shape[1]} directions": float(along.outside[whole].sum()),
        }
        blank: dict[str, Any] = {"layer": layer, "feature": None, "coefficient": None, "tokens": [], "causal": None}
        return rows + [blank | {"what": what, "adds": adds} for what, adds in rest.items()]

    def layers(self) -> list[dict[str, Any]]:
        """Of each layer: shares of ‖x‖² and ‖y‖² inside the F directions, what the FFN adds inside and outside, and
        below what the largest |z| stays at 95 % of generic tokens: nan of a difference of two prompts, and at a sink,
        as generic text is taken without its sinks."""
        along, about = self._directions().along, self._directions().generic
        unknown = self.against or self.tokens[self.position].sink
        usual = np.full(len(about.usual), np.nan) if unknown else about.usual
        columns = along.read_share, along.write_share, along.adds.sum(1), along.outside, usual
        names = "read_share", "write_share", "adds_inside", "adds_outside", "usual_z"
        return [
            {"layer": layer} | dict(zip(names, map(float, row), strict=True))
            for layer, row in enumerate(zip(*columns, strict=True))
        ]

    def checks(self) -> list[dict[str, Any]]:
        """The directions that were taken out of the live model: what each read, wrote and did."""
        return [
            test._asdict() | {"tokens": self._pole(test.layer, test.feature, test.side, self._sign(test))}
            for test in self._directions().tested
        ]

    @property
    def chance(self) -> float:
        """F / H: the share of a random vector's square inside F directions."""
        count, width = self._directions().vindex.gate.shape[1:]
        return count / width

    @property
    def fate(self) -> Fate | None:
        """What the patch did to the target; None without a patch."""
        if not self.patch or self.other is None:
            return None
        before, after = self.seen.rank <= SHOWN, self.other.rank <= SHOWN
        gone = np.flatnonzero(before & ~after)
        dies = int(gone[0]) if len(gone) else None
        return Fate(dies, () if dies is None else tuple(int(each) for each in np.flatnonzero(after) if each > dies))

    def fate_in_words(self) -> str:
        """The same as sentences. Raises ProbeError without a patch."""
        if self.fate is None:
            raise ProbeError("no patch was given; trace with one to see what it did")
        rows, (dies, later) = self.rows(), self.fate
        end = f"In the end its rank is {rows[-1]['rank']:,} before and {rows[-1]['rank_patched']:,} after the patch."
        if dies is None:
            return (
                f"The patch hides the target nowhere: where the lens had it among {SHOWN} tokens, it still has. {end}"
            )
        names = [f"{row['layer']} {row['after']}" if row["layer"] is not None else "the start" for row in rows]
        return (
            f"The answer dies at {names[dies]}: the lens had it among {SHOWN} tokens there, no longer. "
            f"Later the lens still shows it at: {', '.join(names[at] for at in later) or 'nowhere'}. {end}"
        )

    def record(self) -> dict[str, Any]:
        """Everything, with the STRONGEST directions of each layer."""
        found, every = self.directions, range(self.model["num_layers"])
        generic = found and {"texts": found.generic.names, "tokens": found.generic.tokens}
        return plain(
            {
                **head(RECORD),
                "model": self.model,
                "vindex": found and found.vindex.id,
                "prompt": self.prompt,
                "against": self.against,
                "patch": self.patch,
                "tokens": [token._asdict() for token in self.tokens],
                "position": self.position,
                "target": {"id": self.target, "piece": self.vocabulary.piece(self.target)},
                "sums": self.sums,
                "trajectory": self.rows(),
                "fate": self.fate and self.fate._asdict() | {"words": self.fate_in_words()},
                "generic": generic,
                "chance": found and self.chance,
                "layers": found and self.layers(),
                "reads": found and [self.reads(layer) for layer in every],
                "writes": found and [self.writes(layer) for layer in every],
                "checks": found and self.checks(),
            }
        )

    def save(self, path: str | Path) -> None:
        """Write the page (.html) or the record (.json). Raises TargetError where it cannot be written."""
        check_target(Path(path))
        if Path(path).suffix == ".html":
            from vindex.report.page import trace_page

            targets.write_bytes(Path(path), trace_page(self.record()).encode())
        else:
            super().save(path)

    def _seen(self, seen: Seen, stage: int) -> dict[str, Any]:
        top = self.vocabulary.piece(int(seen.top[stage]))
        return {"rank": int(seen.rank[stage]), "log_prob": float(seen.log_prob[stage]), "top": top}

    def _directions(self) -> Directions:
        if self.directions is None:
            raise ProbeError("no vindex was given; trace with one to see what the FFNs read and write")
        return self.directions

    def _largest(self, values: np.ndarray, layer: int | None, k: int) -> Iterable[tuple[int, int]]:
        k = scoring.positive("k", k)
        if layer is None:
            return largest(values, k)
        layer = scoring.whole("layer", layer)
        if not 0 <= layer < len(values):
            raise QueryError(f"layer {layer}: the model has layers 0 to {len(values) - 1}")
        return ((layer, feature) for _, feature in largest(values[layer : layer + 1], k))

    def _pole(self, layer: int, feature: int, side: str, sign: float) -> list[str]:
        """The tokens at the pole that a direction is at."""
        found = self._directions().vindex.feature(layer, feature)
        tokens: list[TokenScore] = getattr(found, side if sign >= 0 else f"{side}_against")
        return [token.piece for token in tokens[:POLE]]

    def _sign(self, test: Tested) -> float:
        along = self._directions().along
        return float((along.excess if test.side == "reads" else along.coefficient)[test.layer, test.feature])

    def _causal(self, side: str, layer: int, feature: int) -> float | None:
        """What was measured of a direction; None where it was not tested."""
        tested = self._directions().tested
        return next((test.causal for test in tested if test[:3] == (side, layer, feature)), None)


def _stage(stage: int) -> str:
    return ("FFN", "attention")[stage % 2] if stage else "embeddings"
