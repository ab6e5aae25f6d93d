"""Text as the ids that a model is prompted with. Whatever turns text into ids for a model goes through `encode`.

1. Special tokens that the tokenizer puts before a text stay: a model expects its BOS.
2. Those that it puts after a text (an EOS, by its post-processor or `add_eos_token`) go: a model that has read the end
   does not go on. What stands in the text itself stays.
3. A rendered chat brings its special tokens with it, and none is added, unless it has none at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vindex.errors import ProbeError

Span = tuple[int, int]


class Encoded(NamedTuple):
    """T tokens."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    """The characters of each, none for a special token that was added; empty for a tokenizer without offsets."""


def encode(tokenizer: Any, text: str, *, rendered: bool = False) -> Encoded:
    """The ids of a text, or of a `rendered` chat, as a model is prompted with them; none for a text without tokens."""
    own = rendered and any(token in text for token in tokenizer.all_special_tokens)
    if getattr(tokenizer, "is_fast", False):
        ids, spans, added = _fast(tokenizer, text, special=not own)
        plain = [token for token, extra in zip(ids, added, strict=True) if not extra]
        end = max((place + 1 for place, extra in enumerate(added) if not extra), default=0)
    else:
        plain = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids, spans = plain if own else tokenizer(text, verbose=False).input_ids, []
        end = _end(ids, plain) if plain else 0
    if plain and not is_embedded(tokenizer, max(plain)):
        raise ProbeError(
            f"token id {max(plain)}, but the model embeds {tokenizer.embedded} tokens; leave that token out, or give "
            "the tokenizer that belongs to the model"
        )
    return Encoded(tuple(ids[:end]), tuple((start, stop) for start, stop in spans[:end]))


def _fast(tokenizer: Any, text: str, *, special: bool) -> tuple[list[int], list[Span], list[int]]:
    """Ids, spans, and which of the ids were added to the text's own."""
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )  # not verbose: no word on a length that may be cut later
    return encoded.input_ids, encoded.offset_mapping, encoded.special_tokens_mask


def prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of what a model is to go on from, a rendered chat or not. Raises ProbeError where it has no tokens."""
    ids = encode(tokenizer, text, rendered=True).ids
    if not ids:
        raise ProbeError(f"prompt {text[:40]!r}: no tokens; expected some text to go on from")
    return ids


def require_offsets(tokenizer: Any) -> None:
    """Raise ProbeError unless the tokenizer tells which characters a token covers."""
    if not getattr(tokenizer, "is_fast", False):
        raise ProbeError(f"{type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer")


def is_embedded(tokenizer: Any, token: int) -> bool:
    """Whether the model that was loaded with this tokenizer has an embedding of a token."""
    return token < getattr(tokenizer, "embedded", token + 1)


def pad_token(tokenizer: Any) -> int:
    """A token to pad with; it is masked out, so that any will do that has an embedding."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in found if token is not None and is_embedded(tokenizer, token))


def _end(ids: list[int], plain: list[int]) -> int:
    """Where the text's own tokens end among those with special tokens around them."""
    starts = range(len(ids) - len(plain) + 1)
    return next((at + len(plain) for at in starts if ids[at : at + len(plain)] == plain), len(ids))
