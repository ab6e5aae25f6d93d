"""What a model writes after prompts: greedily, or sampled at temperature 1 by random numbers that any model shares.

Prompts stand padded on the left, each run once for all the texts that grow from it; a text that is over leaves the
batch, so that it costs nothing more.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from probes.facts import Fact
from probes.facts.prompts import Prompt

Draw = tuple[Prompt, int]
"""A prompt and the number of a text after it: 0 is the greedy one, the others are sampled."""
BATCH_TOKENS = 4096
"""Tokens of texts that are written at once; bounds the memory of their keys and values."""


class Text(NamedTuple):
    """What the model writes after a question, up to the answer where it says it."""

    text: str
    says: bool


def write_on(model: Any, tokenizer: Any, draws: Sequence[Draw], fact: Fact, seed: int, tokens: int) -> dict[Draw, Text]:
    """What the model writes, until it has said the answer and the word has ended."""

    def over(draw: Draw, text: str) -> bool:
        found = find_answer(fact, draw[0].family, text)
        return found is not None and found.end() < len(text)

    texts = write(model, tokenizer, draws, tokens, over, seed)
    return {draw: Text(text, find_answer(fact, draw[0].family, text) is not None) for draw, text in texts.items()}


def find_answer(fact: Fact, family: str, text: str) -> re.Match[str] | None:
    """The answer in `text` as a whole word, in its own case; in a family of another language also as spelled there."""
    names = {fact.answer, *(name.answer for language, name in fact.translations.items() if language == family)}
    return re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)", text)


@torch.no_grad()
def write(
    model: Any,
    tokenizer: Any,
    draws: Sequence[Draw],
    length: int,
    over: Callable[[Draw, str], bool] = lambda _draw, _text: False,
    seed: int = 0,
) -> dict[Draw, str]:
    """The text of each draw: at most `length` tokens, fewer where the model ends it or `over` says that it is enough.

    A sampled text's random numbers depend on `seed` and its number alone.
    """
    chances = {number: random.Random(f"{seed}/{number}") for _, number in draws if number}
    chance = {number: [draw.random() for _ in range(length)] for number, draw in chances.items()}
    ends, texts = model.generation_config.eos_token_id or (), dict.fromkeys(draws, "")
    for some in _batches(draws, length):
        prompts = list(dict.fromkeys(prompt for prompt, _ in some))
        step = pad_sequence([torch.tensor(prompt.ids) for prompt in prompts], True, -1, "left").to(model.device)
        mask, step = (step >= 0).long(), step.clamp_min(0)
        places, cache = (mask.cumsum(-1) - 1).clamp_min(0), DynamicCache(config=model.config)
        rows = torch.tensor([prompts.index(prompt) for prompt, _ in some], device=step.device)
        written: dict[Draw, list[int]] = {draw: [] for draw in some}
        for turn in range(length):
            out = model(step, attention_mask=mask, position_ids=places, past_key_values=cache, logits_to_keep=1)
            tokens = _choose(out.logits[rows, -1], [chance[number][turn] if number else None for _, number in some])
            for draw, token in zip(some, tokens.tolist(), strict=True):
                written[draw].append(token)
                texts[draw] = tokenizer.decode(written[draw], skip_special_tokens=True)
            going = [
                at for at, draw in enumerate(some) if written[draw][-1] not in ends and not over(draw, texts[draw])
            ]
            if not going:
                break
            rows, some = rows[going], [some[at] for at in going]
            cache.reorder_cache(rows)  # type: ignore[arg-type]  # any integers do
            mask, places, step = pad(mask[rows], (0, 1), value=1), places[rows, -1:] + 1, tokens[going, None]
            rows = torch.arange(len(some), device=step.device)
    return texts


def _batches(draws: Sequence[Draw], length: int) -> list[list[Draw]]:
    """Draws by the length of their prompts, as many at once as the longest leave room for."""
    ordered = sorted(draws, key=lambda draw: len(draw[0].ids))
    size = max(1, BATCH_TOKENS // (len(ordered[-1][0].ids) + length)) if ordered else 1
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def _choose(logits: Tensor, chances: Sequence[float | None]) -> Tensor:
    """(N,) tokens from logits (N, V): of each row the one that its number falls on; without one the most probable."""
    sums = logits.float().softmax(-1).cumsum(-1)
    at = torch.tensor([chance or 0.0 for chance in chances], device=logits.device)[:, None]
    drawn = torch.searchsorted(sums, at * sums[:, -1:]).clamp_max(sums.shape[-1] - 1)[:, 0]
    greedy = torch.tensor([chance is None for chance in chances], device=logits.device)
    return torch.where(greedy, logits.argmax(-1), drawn)
