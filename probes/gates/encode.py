"""Texts become token ids, with a mask over the tokens of their entities.

1. Plain texts are tokenised as the model would read them (`probes.live.tokens`); chat texts go through
   `probes.live.chat`, the question as the user's turn and the text as the assistant's.
2. A token belongs to an entity when its characters overlap the entity's span, so that an entity of several tokens is
   covered whole, with its leading space.
3. Texts are cut at max_tokens and padded on the right; causal attention never looks there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.gates.data import Forget, Retain, Span
from probes.live.chat import ask, render
from probes.live.tokens import encode, require_offsets
from vindex.errors import FactError


class Example(NamedTuple):
    ids: Tensor  # (T,) int64
    entity: Tensor  # (T,) bool: the token belongs to an entity
    shown: int = 0
    """How many tokens of shots stand before; nothing is learnt from them."""


class Batch(NamedTuple):
    """Examples of one forward pass, padded on the right to the longest."""

    ids: Tensor  # (B, T) int64
    real: Tensor  # (B, T) bool: not padding
    entity: Tensor  # (B, T) bool
    shown: Tensor  # (B, T) bool: a token of the shots

    @property
    def predicted(self) -> Tensor:
        """(B, T - 1) bool: the next token at this place is a real one, so that its loss counts."""
        return self.real[:, 1:]

    @property
    def entities(self) -> Tensor:
        """(B, T - 1) bool: the next token is an entity's; the first token of a text is predicted nowhere."""
        return self.entity[:, 1:]

    @property
    def others(self) -> Tensor:
        """(B, T - 1) bool: the next token is of the text, and no entity's."""
        return self.predicted & ~self.entities & ~self.shown[:, 1:]

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def forget_example(row: Forget, tokenizer: Any, *, chat: bool, max_tokens: int) -> Example:
    """Token ids and entity mask of a row. Raises FactError when no token of an entity is left to predict."""
    text = row.shots + row.text
    spans = tuple((start + len(row.shots), end + len(row.shots)) for start, end in row.spans)
    if chat:
        if row.question is None:
            raise FactError(f"{row.where}: no question; the chat template needs one for the user's turn")
        answer = row.text[row.turn :]
        turns = [*ask(row.question), {"role": "assistant", "content": answer}]
        text, (_, turn) = render(tokenizer, turns, where=row.where)
        spans = tuple((start + turn - row.turn, end + turn - row.turn) for start, end in row.spans)
    ids, offsets = _tokenise(text, tokenizer, chat)
    entity = [any(_overlap(token, span) for span in spans) for token in offsets]
    for span in spans:
        if not any(_overlap(token, span) for token in offsets[1:max_tokens]):
            raise FactError(
                f"{row.where}: entity {text[slice(*span)]!r} has no token to predict among the first {max_tokens}; "
                "raise max_tokens, or let the text begin before it"
            )
    shown = 0 if chat else sum(end <= len(row.shots) for _, end in offsets) if row.shots else 0
    return _cut(ids, entity, max_tokens)._replace(shown=shown)


def retain_example(row: Retain, tokenizer: Any, *, chat: bool, max_tokens: int) -> Example:
    """Token ids of a row. Raises FactError when there is nothing to predict."""
    text = row.text
    if chat:
        if not row.messages:
            raise FactError(f"{row.where}: no problem and solution, nor messages; the chat template needs turns")
        text = render(tokenizer, row.messages, where=row.where).text
    ids, _ = _tokenise(text, tokenizer, chat)
    if len(ids) < 2:
        raise FactError(f"{row.where}: {len(ids)} token(s) in {text[:40]!r}; expected at least 2")
    return _cut(ids, [False] * len(ids), max_tokens)


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Pad examples on the right with the token `pad`."""
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad)
    real = torch.zeros(ids.shape, dtype=torch.bool)
    entity, shown = torch.zeros(ids.shape, dtype=torch.bool), torch.zeros(ids.shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length], real[row, :length], entity[row, :length] = example.ids, True, example.entity
        shown[row, : example.shown] = True
    return Batch(ids, real, entity, shown)


def _tokenise(text: str, tokenizer: Any, chat: bool) -> tuple[list[int], list[Span]]:
    require_offsets(tokenizer)
    ids, spans = encode(tokenizer, text, rendered=chat)
    return list(ids), list(spans)


def _overlap(token: Span, span: Span) -> bool:
    return token[0] < span[1] and span[0] < token[1]


def _cut(ids: list[int], entity: list[bool], max_tokens: int) -> Example:
    return Example(torch.tensor(ids[:max_tokens]), torch.tensor(entity[:max_tokens]))
