"""How a model, gated or not, does on the panels.

Accuracy is teacher-forced: an answer counts when every one of its tokens is the most probable next one after the
prompt, and a number does not go on. That is what greedy decoding writes, at the cost of one pass for each batch.
With `generate` the model writes instead, greedily, and an answer counts when it stands in what is written as words of
its own (a number: when it is the last number written, or the last \\boxed{} result).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.gates.apply import gated, require_fit
from probes.gates.data import boxed
from probes.gates.losses import kl_sum
from probes.gates.panels import QUESTIONS, Panels, Prompt
from probes.live.chat import ask, render
from probes.live.load import Loaded
from probes.live.tokens import encode, pad_token
from probes.live.tokens import prompt as prompt_ids
from vindex.progress import Advance, unseen

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
NEUTRAL_TOKENS = 256


class Scores(NamedTuple):
    """Accuracies in 0..1, and nats per token."""

    forget: float
    oracle: float
    conflict: float
    reasoning: float
    neutral_kl: float


class Settings(NamedTuple):
    batch_size: int = 64
    generate: int = 0
    """New tokens to write and look for the answer in; 0 scores answers teacher-forced."""


def score(
    loaded: Loaded,
    panels: Panels,
    factors: Tensor | None,
    settings: Settings = Settings(),
    advance: Advance = unseen,
) -> Scores:
    """Scores of the model with these factors (L, I) on h, or of the plain model (None).

    `advance` hears of answers and texts, `work` of them in all.
    """
    forget, oracle, conflict, reasoning = (
        accuracy(loaded, getattr(panels, name), factors, settings, advance) for name in QUESTIONS
    )
    return Scores(forget, oracle, conflict, reasoning, neutral_kl(loaded, panels.neutral, factors, advance))


def work(panels: Panels, settings: Settings) -> int:
    """How many steps `score` tells of: an answer each, or with `generate` a prompt, and the neutral texts."""
    prompts = [prompt for name in QUESTIONS for prompt in getattr(panels, name)]
    return len(panels.neutral) + (len(prompts) if settings.generate else sum(len(p.answers) for p in prompts))


def accuracy(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    factors: Tensor | None,
    settings: Settings,
    advance: Advance = unseen,
) -> float:
    """Share of prompts answered right; nan where there are none."""
    if not prompts:
        return float("nan")
    right = _written if settings.generate else _forced
    return sum(right(loaded, prompts, factors, settings, advance)) / len(prompts)


def neutral_kl(loaded: Loaded, texts: Sequence[str], factors: Tensor | None, advance: Advance = unseen) -> float:
    """KL(base‖gated) in nats per predicted token, over the first NEUTRAL_TOKENS of each text."""
    if factors is None:
        advance(len(texts))
        return 0.0
    total, count = 0.0, 0
    for text in texts:
        advance(1)
        found = encode(loaded.tokenizer, text).ids[:NEUTRAL_TOKENS]
        if len(found) < 2:  # nothing is predicted
            continue
        ids = torch.tensor([found], device=loaded.model.device)
        base, changed = (_logits(loaded.model, ids, None, f) for f in (None, factors))
        total += float(kl_sum(base, changed, torch.ones(1, len(found) - 1, dtype=torch.bool)))
        count += len(found) - 1
    return total / count if count else float("nan")


def _logits(model: Any, ids: Tensor, mask: Tensor | None, factors: Tensor | None) -> Tensor:
    with torch.no_grad():
        if factors is None:
            return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        with gated(model, factors):
            return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def _forced(
    loaded: Loaded, prompts: Sequence[Prompt], factors: Tensor | None, settings: Settings, advance: Advance
) -> list[bool]:
    """Whether one of each prompt's answers is what greedy decoding writes."""
    tokenizer = loaded.tokenizer
    pairs = []
    for number, prompt in enumerate(prompts):
        head = list(prompt_ids(loaded.tokenizer, prompt.text))
        pairs += [(number, head, tokenizer(a, add_special_tokens=False)["input_ids"]) for a in prompt.answers]
    right = [False] * len(prompts)
    for batch in _batches(sorted(pairs, key=lambda p: len(p[1]) + len(p[2])), settings.batch_size):
        width = max(len(head) + len(tail) for _, head, tail in batch)
        ids = torch.full((len(batch), width), pad_token(loaded.tokenizer))
        real = torch.zeros(ids.shape, dtype=torch.long)
        for row, (_, head, tail) in enumerate(batch):
            ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
            real[row, : len(head) + len(tail)] = 1
        device = loaded.model.device
        best = _logits(loaded.model, ids.to(device), real.to(device), factors).argmax(-1).cpu()  # (B, T)
        for row, (number, head, tail) in enumerate(batch):
            first, after = len(head) - 1, len(head) + len(tail) - 1
            said = best[row, first:after].tolist() == tail
            goes_on = (
                prompts[number].answers[0][-1:].isdigit() and tokenizer.decode([int(best[row, after])])[:1].isdigit()
            )
            right[number] |= said and not goes_on
        advance(len(batch))
    return right


def _written(
    loaded: Loaded, prompts: Sequence[Prompt], factors: Tensor | None, settings: Settings, advance: Advance
) -> list[bool]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].text))
    right = [False] * len(prompts)
    for batch in _batches(order, settings.batch_size):
        texts = write(loaded, [prompts[i].text for i in batch], factors, settings.generate)
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
