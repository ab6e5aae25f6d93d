"""Does the model give this answer? Teacher-forced: one pass for each batch says what greedy decoding would write.

Prompts are padded on the right, where causal attention sees nothing of it. An answer that ends in a digit counts only
where the number ends there, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Given(NamedTuple):
    """What a model makes of one answer to one prompt."""

    probability: float
    """Of the whole answer."""
    greedy: bool
    """Whether greedy decoding writes it."""


def given(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 64
) -> list[Given]:
    """For each pair of a prompt's ids and an answer's ids, both not empty, what the model as it is now makes of it."""
    found: dict[int, Given] = {}
    order = sorted(range(len(pairs)), key=lambda number: sum(map(len, pairs[number])))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts = [[*pairs[number][0], *pairs[number][1]] for number in chosen]
        width = max(map(len, texts))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=model.device)
        real = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits  # (B, T, V)
        for number, row in zip(chosen, logits, strict=True):
            head, tail = pairs[number]
            log_p = row[len(head) - 1 : len(head) + len(tail)].float().log_softmax(-1).cpu()  # (answer and one, V)
            *said, after = log_p.argmax(-1).tolist()
            probability = float(log_p[range(len(tail)), list(tail)].sum().exp())
            found[number] = Given(probability, said == list(tail) and not goes_on(tokenizer, said, after))
    return [found[number] for number in range(len(pairs))]


def goes_on(tokenizer: Any, said: Sequence[int], after: int) -> bool:
    """Whether the next token adds a digit to the number that was said: after 3 `7` does, ` 7` and `.` do not.

    The two are decoded together: by itself, SentencePiece's `▁7` would lose its space.
    """
    before = tokenizer.decode(list(said))
    return before[-1:].isdigit() and tokenizer.decode([*said, after])[len(before) :][:1].isdigit()
