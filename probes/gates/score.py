"""How a model, gated or not, does on the panels.

Accuracy is teacher-forced (forced.py): what greedy decoding writes, at the cost of one pass for each batch. With
`generate` the model writes instead, greedily, and an answer counts when it stands in what is written as words of its
own (a number: when it is the last number written, or the last \\boxed{} result).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from probes.gates.apply import gated, require_fit
from probes.gates.data import boxed
from probes.gates.forced import Asked, answered, batches
from probes.gates.panels import QUESTIONS, Panels, Prompt
from probes.live.chat import ask, render
from probes.live.load import Loaded
from probes.live.tokens import encode
from vindex.progress import Advance, unseen

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
NEUTRAL_TOKENS = 256


class Cell(NamedTuple):
    """Prompts of one panel and kind, of what was trained on or was held out."""

    panel: str
    kind: str
    held_out: bool
    right: float
    """How many; of several masks the mean."""
    asked: int


class Share(NamedTuple):
    """So many of so many."""

    right: float
    asked: int

    @property
    def value(self) -> float:
        """nan of none."""
        return self.right / self.asked if self.asked else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval; nan of none."""
        if not self.asked:
            return float("nan"), float("nan")
        n, p, z = self.asked, self.value, 1.959964
        middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max((middle - reach) / (1 + z * z / n), 0.0), min((middle + reach) / (1 + z * z / n), 1.0)


@dataclass(frozen=True)
class Scores:
    """What a model answers right, and what it makes of neutral text."""

    cells: tuple[Cell, ...]
    neutral_kl: float
    """KL(base‖gated), nats per token."""
    perplexity: float
    """Of neutral text: e to the mean cross-entropy of its tokens."""

    def share(self, panel: str, held_out: bool | None = None) -> Share:
        """Of a panel, all of it, or what was held out or trained on."""
        cells = [c for c in self.cells if c.panel == panel and held_out in (None, c.held_out)]
        return Share(sum(c.right for c in cells), sum(c.asked for c in cells))

    def figures(self) -> dict[str, float]:
        """Accuracies in 0..1 by panel, KL and perplexity."""
        shares = {panel: self.share(panel).value for panel in QUESTIONS}
        return shares | {"neutral_kl": self.neutral_kl, "perplexity": self.perplexity}

    def record(self) -> dict[str, Any]:
        """The figures, the 95 % interval of each panel, and the cells."""
        intervals = {panel: self.share(panel).interval for panel in QUESTIONS}
        return {**self.figures(), "intervals": intervals, "cells": [cell._asdict() for cell in self.cells]}


class Neutral(NamedTuple):
    """What a model makes of neutral text."""

    kl: float
    perplexity: float


class Settings(NamedTuple):
    batch_size: int = 64
    generate: int = 0
    """New tokens to write and look for the answer in; 0 scores answers teacher-forced."""


def score(
    loaded: Loaded,
    panels: Panels,
    several: Sequence[Tensor | None],
    settings: Settings = Settings(),
    advance: Advance = unseen,
) -> Iterator[Scores]:
    """Scores of the model with each of these factors (L, I) on h, or of the plain model (None), one by one.

    `advance` hears of answers and texts, `work` of them for each. The plain model reads every neutral text once.
    """  # fmt: skip
    texts = neutral(loaded, panels.neutral, several, advance)
    asked = [_Asked.of(loaded, name, getattr(panels, name), settings) for name in QUESTIONS]
    for factors, found in zip(several, texts, strict=True):
        with nullcontext() if factors is None else gated(loaded.model, factors):
            by_panel = [panel.cells(loaded, settings, advance) for panel in asked]
        yield Scores(tuple(chain(*by_panel)), *found)


def work(panels: Panels, settings: Settings) -> int:
    """How many steps `score` tells of: an answer each, or with `generate` a prompt, and the neutral texts."""
    prompts = [prompt for name in QUESTIONS for prompt in getattr(panels, name)]
    return len(panels.neutral) + (len(prompts) if settings.generate else sum(len(p.answers) for p in prompts))


class _Asked(NamedTuple):
    """A panel's prompts, in tokens once for all masks."""

    panel: str
    prompts: Sequence[Prompt]
    batches: list[list[Asked]]

    @classmethod
    def of(cls, loaded: Loaded, panel: str, prompts: Sequence[Prompt], settings: Settings) -> _Asked:
        return cls(panel, prompts, [] if settings.generate else batches(loaded, prompts, settings.batch_size))

    def cells(self, loaded: Loaded, settings: Settings, advance: Advance) -> list[Cell]:
        if settings.generate:
            right = _written(loaded, self.prompts, settings, advance)
        else:
            right = answered(loaded, self.prompts, self.batches, advance)
        found: dict[tuple[str, bool], list[bool]] = {}
        for prompt, good in zip(self.prompts, right, strict=True):
            found.setdefault((prompt.kind, prompt.held_out), []).append(good)
        return [Cell(self.panel, *key, sum(good), len(good)) for key, good in sorted(found.items())]


def neutral(
    loaded: Loaded, texts: Sequence[str], several: Sequence[Tensor | None], advance: Advance = unseen
) -> list[Neutral]:
    """KL(base‖gated) and perplexity over the first NEUTRAL_TOKENS of each text, for each of several factors."""
    kl, surprise, count = [0.0] * len(several), [0.0] * len(several), 0
    for text in texts:
        ids = torch.tensor([encode(loaded.tokenizer, text).ids[:NEUTRAL_TOKENS]], device=loaded.model.device)
        if ids.shape[1] < 2:  # nothing is predicted
            advance(len(several))
            continue
        base, count = _log_probabilities(loaded, ids, None), count + ids.shape[1] - 1
        probable = base.exp()
        for number, factors in enumerate(several):
            changed = base if factors is None else _log_probabilities(loaded, ids, factors)
            kl[number] += 0.0 if factors is None else float((base - changed).mul_(probable).sum())
            surprise[number] += float(F.nll_loss(changed, ids[0, 1:], reduction="sum"))
            advance(1)
    if not count:
        return [Neutral(math.nan, math.nan)] * len(several)
    return [Neutral(k / count, math.exp(min(s / count, 700.0))) for k, s in zip(kl, surprise, strict=True)]


def _log_probabilities(loaded: Loaded, ids: Tensor, factors: Tensor | None) -> Tensor:
    """(T - 1, V) of the token after each of `ids` (1, T) but the last."""
    with torch.no_grad(), nullcontext() if factors is None else gated(loaded.model, factors):
        return F.log_softmax(loaded.model(input_ids=ids, use_cache=False).logits[0, :-1].float(), -1)


def _written(loaded: Loaded, prompts: Sequence[Prompt], settings: Settings, advance: Advance) -> list[bool]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].whole))
    right = [False] * len(prompts)
    for batch in _batches(order, settings.batch_size):
        texts = loaded.write([prompts[i].whole for i in batch], settings.generate)
        for number, text in zip(batch, texts, strict=True):
            right[number] = any(stands_in(answer.strip(), text) for answer in prompts[number].answers)
        advance(len(batch))
    return right


def write(loaded: Loaded, prompts: Sequence[str], factors: Tensor | None, tokens: int) -> list[str]:
    """What the model goes on to write after each prompt, greedily, up to `tokens` tokens or the end of its turn."""
    with nullcontext() if factors is None else gated(loaded.model, factors):
        return loaded.write(prompts, tokens)


class Written(NamedTuple):
    """What a model goes on to write after a prompt, without gates and with them."""

    prompt: str
    base: str
    gated: str


def beside(loaded: Loaded, prompts: Sequence[str], factors: Tensor, tokens: int, *, chat: bool) -> list[Written]:
    """Write on from each prompt with the plain model and with these factors; `chat`: in the chat template."""
    require_fit(factors.shape, loaded.model)
    asked = [render(loaded.tokenizer, ask(text), prompt=True).text if chat else text for text in prompts]
    written = ([write(loaded, [text], given, tokens)[0] for given in (None, factors)] for text in asked)
    return [Written(prompt, *both) for prompt, both in zip(prompts, written, strict=True)]


def stands_in(answer: str, text: str) -> bool:
    """Whether a written text gives the answer: as words, or as its last number or boxed result for a number."""
    if NUMBER.fullmatch(answer):
        found = boxed(text) or next(reversed(NUMBER.findall(text)), "")
        return found.replace(",", "") == answer.replace(",", "")
    if boxed(text) is not None:
        return str(boxed(text)).strip() == answer
    return re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", text.lower()) is not None


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
