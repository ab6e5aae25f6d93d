"""Which answers a model would write greedily, without writing them: teacher-forced.

An answer counts when every one of its tokens is the most probable next one after the prompt, and a number does not go
on. Some tokenizers write a line break together with the sign before it (`]\\n` is one token of Qwen's): the last token
counts with what is blank after it. What prompts begin with alike (their `shots`) is computed once for a batch, and the
head only where an answer is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from probes.gates.panels import Prompt
from probes.live.answers import goes_on
from probes.live.load import Loaded
from probes.live.tokens import pad_token
from probes.live.tokens import prompt as prompt_ids
from vindex.progress import Advance, unseen

PASS = 32
"""Tokens of padding that cost as much as one more pass: of the 135M on processors, about."""


class Asked(NamedTuple):
    """One answer of the prompt of this number, in tokens."""

    number: int
    head: list[int]
    tail: list[int]
    shared: int = 0
    """With how many tokens every prompt of the same shots begins."""

    @property
    def length(self) -> int:
        return len(self.head) + len(self.tail)


def answered(
    loaded: Loaded, prompts: Sequence[Prompt], made: Sequence[Sequence[Asked]], advance: Advance = unseen
) -> list[bool]:
    """Whether one of each prompt's answers is what the model, as it is now, writes.

    made: the `batches` of the prompts, which serve any number of masks. `advance` hears of answers.
    """
    right = [False] * len(prompts)
    with torch.no_grad():
        for batch in made:
            for asked, best in zip(batch, _best(loaded, batch), strict=True):
                *said, after = best
                if same_text(loaded.tokenizer, said, asked.tail) and not goes_on(loaded.tokenizer, said, after):
                    right[asked.number] = True
            advance(len(batch))
    return right


def same_text(tokenizer: Any, said: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether the tokens are the same, but for blanks that the last one has at its end; False of none."""
    if not wanted or said[:-1] != wanted[:-1]:
        return False
    if said[-1] == wanted[-1]:
        return True
    longer, last = tokenizer.decode([said[-1]]), tokenizer.decode([wanted[-1]])
    return longer != last and longer.rstrip() == last


def batches(loaded: Loaded, prompts: Sequence[Prompt], size: int) -> list[list[Asked]]:
    """Answers whose shots are equally long, at most `size` to a batch, of lengths alike."""
    everything = []
    order = sorted(range(len(prompts)), key=lambda number: prompts[number].shots)
    for shots, numbers in groupby(order, key=lambda number: prompts[number].shots):
        heads = {number: list(prompt_ids(loaded.tokenizer, prompts[number].whole)) for number in numbers}
        shared = _same(list(heads.values())) if shots else 0
        for number, head in heads.items():
            for answer in prompts[number].answers:
                everything.append(Asked(number, head, _after(loaded, prompts[number], head, answer), shared))
    everything.sort(key=lambda asked: (asked.shared, asked.length))
    alike = (list(same) for _, same in groupby(everything, key=lambda asked: asked.shared))
    return [batch for same in alike for batch in _of_like_length(same, size)]


def _of_like_length(answers: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Batches of answers in order of length; a new one begins where padding would cost more than another pass."""
    batch: list[Asked] = []
    for asked in answers:
        padding = sum(asked.length - before.length for before in batch)
        if len(batch) == size or padding > PASS:
            yield batch
            batch = []
        batch.append(asked)
    if batch:
        yield batch


def _after(loaded: Loaded, prompt: Prompt, head: list[int], answer: str) -> list[int]:
    """The answer's tokens as they follow the prompt: alone, Llama's and Mistral's would begin with a space.

    Where the tokenizer joins the two, those of the answer alone.
    """
    whole = list(prompt_ids(loaded.tokenizer, prompt.whole + answer))
    if whole[: len(head)] == head:
        return whole[len(head) :]
    return list(loaded.tokenizer(answer, add_special_tokens=False)["input_ids"])


def _same(heads: Sequence[list[int]]) -> int:
    """How many tokens all of them begin with, short of the last token of each."""
    return sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, zip(*(h[:-1] for h in heads), strict=False)))


def _best(loaded: Loaded, batch: Sequence[Asked]) -> Iterator[list[int]]:
    """For each answer, the most probable tokens in its place, and the one after it."""
    width, begun = max(asked.length for asked in batch), batch[0].shared
    ids = torch.full((len(batch), width), pad_token(loaded.tokenizer))
    real = torch.zeros(ids.shape, dtype=torch.long)
    for row, asked in enumerate(batch):
        ids[row, : asked.length], real[row, : asked.length] = torch.tensor(asked.head + asked.tail), 1
    hidden = _hidden(loaded, ids, real, begun)
    spans = [slice(len(asked.head) - 1 - begun, asked.length - begun) for asked in batch]
    wanted = torch.cat([row[span] for row, span in zip(hidden, spans, strict=True)])
    best = loaded.model.get_output_embeddings()(wanted).argmax(-1).cpu()
    for tokens in best.split([span.stop - span.start for span in spans]):
        yield tokens.tolist()


def _hidden(loaded: Loaded, ids: Tensor, real: Tensor, begun: int) -> Tensor:
    """(B, T - begun, H) after the last layer; the different beginnings of `begun` tokens run once."""
    decoder, device, cache = loaded.model.get_decoder(), loaded.model.device, None
    if begun:
        beginnings, row = ids[:, :begun].unique(dim=0, return_inverse=True)
        cache = DynamicCache(config=loaded.model.config)
        decoder(beginnings.to(device), past_key_values=cache, use_cache=True)
        cache.batch_select_indices(row.to(device))
    return decoder(
        ids[:, begun:].to(device), attention_mask=real.to(device), past_key_values=cache, use_cache=bool(begun)
    ).last_hidden_state
