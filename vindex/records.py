"""What questions to a vindex give back, and how it becomes JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class TokenScore(NamedTuple):
    """A token and its score: a cosine in gate_meta, a logit-lens value in down_meta."""

    token_id: int
    piece: str
    score: float


class LayerFrames(NamedTuple):
    """The directions of one layer by group: an expert each, the shared expert last; a dense layer is one group.

    gate, down: (groups, F, H) float16. gate_sigma, down_sigma: (groups, F) float32.
    """

    gate: np.ndarray
    down: np.ndarray
    gate_sigma: np.ndarray
    down_sigma: np.ndarray

    def __repr__(self) -> str:
        groups, features, hidden = self.gate.shape
        return f"<{groups} × {features} gate and down directions of {hidden} numbers>"


class Response(NamedTuple):
    """What the FFN writes when a gate direction is read: the regression of its output on the reading, over tokens.

    r2: the share of the output's variance that the reading explains. null: the largest R² of 19 permutations of the
    reading. random: what 95 % of random directions that read the same stay below. slope: what is written for each unit
    read. tokens: n. writes goes with a positive reading, writes_against with a negative one.
    """

    r2: float
    null: float
    random: float
    slope: float
    tokens: int
    writes: list[TokenScore]
    writes_against: list[TokenScore]

    @property
    def beyond(self) -> bool:
        """Whether R² is more than either null; by chance one response in twenty is."""
        return self.r2 > max(self.null, self.random)


class Snippet(NamedTuple):
    """A place in a text at which a gate direction is read most; `pole`: "+" or "−", by the sign of z.

    z: what is read there, less its mean over all texts, over its deviation. text: its name. position: of the token,
    from 0. before, token, after: what stands there.
    """

    pole: str
    z: float
    text: str
    position: int
    before: str
    token: str
    after: str


class Feature(NamedTuple):
    """Direction `feature` of one layer, on both sides, with the tokens at either pole (ten each, strongest first).

    The gate and the down direction share their rank in the spectrum, not a neuron. expert: see FeatureHit. response:
    what is written when the gate direction is read; None in a vindex without responses. None also stands for what a
    vindex of another family does not keep.
    """

    layer: int
    feature: int
    gate_sigma: float | None
    down_sigma: float | None
    reads: list[TokenScore] | None
    reads_against: list[TokenScore] | None
    writes: list[TokenScore] | None
    writes_against: list[TokenScore] | None
    expert: int | None = None
    response: Response | None = None


class FeatureHit(NamedTuple):
    """A feature found by a query: cosine with the query, and its gate singular value, None where it is not kept.

    expert: None in a dense layer; in a mixture of E experts 0 … E − 1, and E for the shared expert.
    z: the cosine beside those of the vocabulary. chance: how often as many random directions reach that |z| or more for
    this query. Both are None where they were not asked for, or the vindex has no statistics.
    """

    layer: int
    feature: int
    cosine: float
    gate_sigma: float | None
    expert: int | None = None
    z: float | None = None
    chance: float | None = None


class Found(NamedTuple):
    """A direction that holds a token at one of its poles.

    side: "reads" or "writes". pole: "+" or "−". place: from 1, its rank there. score: see TokenScore.
    """

    side: str
    layer: int
    feature: int
    pole: str
    place: int
    token_id: int
    piece: str
    score: float
    expert: int | None = None


class Alike(NamedTuple):
    """How alike the ten tokens of a pole are: the mean cosine between them, and its z among poles by chance."""

    cosine: float
    z: float


class Coherence(NamedTuple):
    """That of the four poles of a feature, named as in Feature."""

    reads: Alike
    reads_against: Alike
    writes: Alike
    writes_against: Alike


class Clusters(NamedTuple):
    """The directions with nearly the same singular value as a feature's, itself among them, on either side."""

    gate: range
    down: range


def to_json(record: Any) -> Any:
    """NamedTuples, nested, as plain dicts and lists, ready for orjson; a range as its first and last."""
    if isinstance(record, range):
        return [record.start, record.stop - 1]
    if hasattr(record, "_asdict"):
        return {key: to_json(value) for key, value in record._asdict().items()}
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    return record
