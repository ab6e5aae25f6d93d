"""Which answers a model would write greedily, without writing them: teacher-forced.

An answer counts when every one of its tokens is the most probable next one after the prompt, and a number does not go
on. What prompts begin with alike (their `shots`) is computed once for a batch, and the head only where an answer is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from probes.gates.panels import Prompt
from probes.live.load import Loaded
from probes.live.tokens import pad_token
from probes.live.tokens import prompt as prompt_ids
from vindex.progress import Advance, unseen


class Asked(NamedTuple):
    """One answer of the prompt of this number, in tokens."""

    number: int
    shots: str
    head: list[int]
    tail: list[int]

    @property
    def length(self) -> int:
        return len(self.head) + len(self.tail)


def answered(loaded: Loaded, prompts: Sequence[Prompt], batch_size: int, advance: Advance = unseen) -> list[bool]:
    """Whether one of each prompt's answers is what the model, as it is now, writes. `advance` hears of answers."""
    right = [False] * len(prompts)
    with torch.no_grad():
        for batch in _batches(loaded, prompts, batch_size):
            for asked, best in zip(batch, _best(loaded, batch), strict=True):
                *said, after = best
                number = prompts[asked.number].answers[0][-1:].isdigit()
                goes_on = number and loaded.tokenizer.decode([after])[:1].isdigit()
                right[asked.number] |= bool(said) and said == asked.tail and not goes_on
            advance(len(batch))
    return right


def _batches(loaded: Loaded, prompts: Sequence[Prompt], size: int) -> Iterator[tuple[Asked, ...]]:
    """Answers with the same shots, of similar length."""
    everything = []
    for number, prompt in enumerate(prompts):
        head = list(prompt_ids(loaded.tokenizer, prompt.whole))
        tails = (loaded.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in prompt.answers)
        everything += [Asked(number, prompt.shots, head, tail) for tail in tails]
    everything.sort(key=lambda asked: (asked.shots, asked.length))
    for _, alike in groupby(everything, key=lambda asked: asked.shots):
        same = tuple(alike)
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _best(loaded: Loaded, batch: Sequence[Asked]) -> Iterator[list[int]]:
    """For each answer, the most probable tokens in its place, and the one after it."""
    shared = _beginning([asked.head for asked in batch]) if batch[0].shots else []
    width = max(asked.length for asked in batch)
    ids = torch.full((len(batch), width), pad_token(loaded.tokenizer))
    real = torch.zeros(ids.shape, dtype=torch.long)
    for row, asked in enumerate(batch):
        ids[row, : asked.length], real[row, : asked.length] = torch.tensor(asked.head + asked.tail), 1
    first = min(len(asked.head) for asked in batch) - 1  # the first place whose prediction counts
    best = _logits(loaded, ids, real, shared, width - first).argmax(-1).cpu()
    for row, asked in enumerate(batch):
        yield best[row, len(asked.head) - 1 - first : asked.length - first].tolist()


def _beginning(heads: Sequence[list[int]]) -> list[int]:
    """What all of them begin with, short of the last token of each."""
    alike = takewhile(lambda same: len(set(same)) == 1, zip(*(head[:-1] for head in heads), strict=False))
    return [same[0] for same in alike]


def _logits(loaded: Loaded, ids: Tensor, real: Tensor, shared: Sequence[int], keep: int) -> Tensor:
    """(B, keep, V) at the last places of each row; every row begins with the tokens `shared`, which run once."""
    model, device = loaded.model, loaded.model.device
    ids, cache = ids.to(device), None
    if shared:
        cache = DynamicCache(config=model.config)
        model(ids[:1, : len(shared)], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(ids))
    return model(
        ids[:, len(shared) :], attention_mask=real.to(device), past_key_values=cache, use_cache=bool(shared),
        logits_to_keep=keep,
    ).logits  # fmt: skip
