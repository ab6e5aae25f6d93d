"""Token strings and ids, read from tokenizer.json alone.

A string is first looked up as one piece of the vocabulary, in the spelling the tokenizer uses inside (byte-level "Ġ"
or SentencePiece "▁" for a space). A word of several tokens is taken apart where the tokenizer is byte-level BPE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson

from vindex.console import SHOWN_SPACE
from vindex.demo import or_bundled
from vindex.errors import FormatError, QueryError
from vindex.files import Kind, parse_json, read_bytes, uncollected
from vindex.format import MOST_TOKENS, TOKENIZER
from vindex.hub import is_hub_id, one_file
from vindex.pieces import CannotTakeApart, take_apart

NEVER_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))
OF_TOKENS = Kind(FormatError, "download it again, or give another with --tokenizer")


class Vocabulary:
    """Pieces and ids of one tokenizer, both ways."""

    def __init__(
        self, ids: dict[str, int], special: dict[str, int], byte_level: bool, tokenizer: Mapping[str, Any]
    ) -> None:
        self._ids, self._special, self._byte_level, self._tokenizer = ids, special, byte_level, tokenizer
        self._encode = _byte_characters() if byte_level else {}
        self._decode = {character: byte for byte, character in self._encode.items()}
        self._special_text = {token_id: text for text, token_id in special.items()}

    @cached_property
    def _inside(self) -> dict[int, str]:
        return {token_id: piece for piece, token_id in self._ids.items()}

    @property
    def pieces(self) -> Mapping[str, int]:
        """{piece: id} in the spelling the tokenizer uses inside; tokens that were added are not among them."""
        return MappingProxyType(self._ids)

    def __len__(self) -> int:
        """One past the last id any piece has."""
        return 1 + max(max(self._ids.values(), default=-1), max(self._special.values(), default=-1))

    @property
    def trained(self) -> int:
        """One past the last id of a piece that is no added token."""
        return 1 + max(self._ids.values(), default=-1)

    def in_no_text(self, rows: int) -> list[int]:
        """Ids below `rows` that no text has: those without a piece, and the bytes that UTF-8 never uses."""
        spelled = (self._encode.get(byte, f"<0x{byte:02X}>") for byte in NEVER_UTF8)
        known = self._inside.keys() | self._special_text.keys()
        return [found for found in map(self._ids.get, spelled) if found is not None] + [
            token_id for token_id in range(rows) if token_id not in known
        ]

    def find(self, text: str) -> int | None:
        """The id of `text` as one token, or None."""
        if text in self._special:
            return self._special[text]
        return self._ids.get(self._spelled(text))

    def _spelled(self, text: str) -> str:
        return "".join(self._encode[byte] for byte in text.encode()) if self._byte_level else text.replace(" ", "▁")

    def take_apart(self, text: str) -> list[int]:
        """The ids of `text`: one where it is a token, else those of its pieces, as the model's tokenizer has them.

        Raises QueryError where it is empty, has a ␣ for a space or a piece without an id, or the tokenizer is none that
        vindex/pieces.py follows.
        """
        if self.find(text) is not None or SHOWN_SPACE in text:
            return [self.id_of(text)]
        try:
            if not self._byte_level:
                raise CannotTakeApart("no byte-level pieces")
            return [found for part in self._parts(text) for found in self._taken_apart(part)] or [self.id_of(text)]
        except (CannotTakeApart, KeyError, TypeError, ValueError) as error:
            why = f"{error} in tokenizer.json" if isinstance(error, CannotTakeApart) else "a piece of it has no id"
            apart = f", and it cannot be taken apart here ({why}); give its pieces, or their ids with --id"
            raise QueryError(f"{text!r} is not a single token of this model{self.hint(text) or apart}") from error

    def _parts(self, text: str) -> list[str]:
        """The added tokens in a text, and what lies between them."""
        added = [one for one in self._tokenizer.get("added_tokens") or [] if one["content"] and one["content"] in text]
        if any(one.get(flag) for one in added for flag in ("lstrip", "rstrip", "single_word")):
            raise CannotTakeApart("an added token that minds what is beside it")
        longest = sorted((re.escape(one["content"]) for one in added), key=len, reverse=True)
        return [part for part in re.split(f"({'|'.join(longest)})", text) if part] if added else [text]

    def _taken_apart(self, part: str) -> list[int]:
        if part in self._special:
            return [self._special[part]]
        return [self._ids[piece] for piece in take_apart(part, self._tokenizer, self._spelled)]

    def id_of(self, text: str) -> int:
        """The id of `text` as one token. Raises QueryError, with a hint when the other spacing is a token."""
        token_id = self.find(text)
        if token_id is not None:
            return token_id
        raise QueryError(f"{text!r} is not a single token of this model" + (self.hint(text) or "; try a shorter word"))

    def hint(self, text: str) -> str | None:
        """What to say when `text` is not a token but the same word with or without its leading space is, or empty, or
        typed as tables show it.
        """
        if not text:
            return "; it is empty"
        if SHOWN_SPACE in text and self.find(text) is None:
            return f"; {SHOWN_SPACE} is how a space is shown: type a space"
        other = text[1:] if text.startswith(" ") else f" {text}"
        token_id = self.find(other)
        return None if token_id is None else f", but {other!r} is one (id {token_id}): leading spaces matter"

    def piece(self, token_id: int) -> str:
        """The text of a token; bytes that are not UTF-8 on their own show as �. Ids with no piece give <id N>."""
        if token_id in self._special_text:
            return self._special_text[token_id]
        inside = self._inside.get(token_id)
        if inside is None:
            return f"<id {token_id}>"
        if self._byte_level and all(character in self._decode for character in inside):
            return bytes(self._decode[character] for character in inside).decode(errors="replace")
        return inside.replace("▁", " ")


def load_vocabulary(path: Path) -> Vocabulary:
    """Read tokenizer.json. Raises FormatError when it is not a tokenizer with a vocabulary of pieces."""
    return parse_vocabulary(read_bytes(path, OF_TOKENS), path.name)


def given_vocabulary(place: str) -> Vocabulary:
    """That of a tokenizer.json, of a directory that has one, of a model on the Hub, or of `atlas`, the bundled one.

    Raises FormatError, or CheckpointError where the Hub does not give it.
    """
    path = Path(or_bundled(place))
    if path.is_dir():
        path = path / TOKENIZER.name
    elif not path.exists() and is_hub_id(place):
        path = one_file(place, TOKENIZER.name)
    return load_vocabulary(path)


@uncollected()
def parse_vocabulary(content: bytes, name: str) -> Vocabulary:
    """The vocabulary in the bytes of a tokenizer.json, called `name` in messages. Raises FormatError."""
    tokenizer = parse_json(content, f"{name}: not a tokenizer.json with a vocabulary of pieces", OF_TOKENS)
    try:
        pieces, added = tokenizer["model"]["vocab"], tokenizer.get("added_tokens")
        ids = _numbered(
            pieces.items() if isinstance(pieces, dict) else ((piece, at) for at, (piece, _) in enumerate(pieces))
        )
        if not isinstance(added, list | None):
            raise ValueError(f"added_tokens is a {type(added).__name__}, not a list")
        special = _numbered((token["content"], token["id"]) for token in added or [])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OF_TOKENS.refusal(name, f"not a tokenizer.json with a vocabulary of pieces ({_reason(error)})") from error
    parts = orjson.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])
    return Vocabulary(ids, special, byte_level=b'"ByteLevel"' in parts, tokenizer=tokenizer)


def _numbered(pieces: Iterable[tuple[Any, Any]]) -> dict[str, int]:
    """{piece: id}. Raises ValueError unless pieces are strings, ids are sensible, and no two share either."""
    ids: dict[str, int] = {}
    for piece, token_id in pieces:
        if not isinstance(piece, str):
            raise ValueError(f"a piece is {str(piece)[:40]!r}, not a string")
        if type(token_id) is not int or not 0 <= token_id < MOST_TOKENS:
            raise ValueError(f"{piece[:40]!r} has id {str(token_id)[:40]}, not an integer from 0 to {MOST_TOKENS - 1}")
        if ids.setdefault(piece, token_id) != token_id:
            raise ValueError(f"{piece[:40]!r} has two ids, {ids[piece]} and {token_id}")
    if len(set(ids.values())) < len(ids):
        raise ValueError("two pieces have the same id")
    return ids


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _byte_characters() -> dict[int, str]:
    """GPT-2's reversible map from bytes to printable characters (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}
