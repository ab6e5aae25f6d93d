"""Token strings and ids, read from tokenizer.json alone.

Scoring needs single tokens, not text, so no merge rules are applied: a string is looked up as one piece of the
vocabulary, in the spelling the tokenizer uses inside (byte-level "Ġ" or SentencePiece "▁" for a space).
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import orjson

from vindex.errors import FormatError, QueryError


class Vocabulary:
    """Pieces and ids of one tokenizer, both ways."""

    def __init__(self, ids: dict[str, int], special: dict[str, int], byte_level: bool) -> None:
        self._ids, self._special, self._byte_level = ids, special, byte_level
        self._encode = _byte_characters() if byte_level else {}
        self._decode = {character: byte for byte, character in self._encode.items()}
        self._special_text = {token_id: text for text, token_id in special.items()}

    @cached_property
    def _inside(self) -> dict[int, str]:
        return {token_id: piece for piece, token_id in self._ids.items()}

    def __len__(self) -> int:
        """One past the last id any piece has."""
        return 1 + max(max(self._ids.values(), default=-1), max(self._special.values(), default=-1))

    def find(self, text: str) -> int | None:
        """The id of `text` as one token, or None."""
        if text in self._special:
            return self._special[text]
        if self._byte_level:
            return self._ids.get("".join(self._encode[byte] for byte in text.encode()))
        return self._ids.get(text.replace(" ", "▁"))

    def id_of(self, text: str) -> int:
        """The id of `text` as one token. Raises QueryError, with a hint when the other spacing is a token."""
        token_id = self.find(text)
        if token_id is not None:
            return token_id
        raise QueryError(f"{text!r} is not a single token of this model" + (self.hint(text) or "; try a shorter word"))

    def hint(self, text: str) -> str | None:
        """What to say when `text` is not a token but the same word with or without its leading space is."""
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
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path.name}: cannot be read ({error.strerror})") from error
    return parse_vocabulary(content, path.name)


def parse_vocabulary(content: bytes, name: str) -> Vocabulary:
    """The vocabulary in the bytes of a tokenizer.json, called `name` in messages. Raises FormatError."""
    try:
        tokenizer = orjson.loads(content)
        pieces = tokenizer["model"]["vocab"]
        ids = pieces if isinstance(pieces, dict) else {piece: at for at, (piece, _) in enumerate(pieces)}
        special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{name}: not a tokenizer.json with a vocabulary of pieces ({error})") from error
    parts = orjson.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])
    return Vocabulary(ids, special, byte_level=b'"ByteLevel"' in parts)


def _byte_characters() -> dict[int, str]:
    """GPT-2's reversible map from bytes to printable characters (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}
