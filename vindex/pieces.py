"""Take a text apart as a byte-level BPE tokenizer does, from tokenizer.json alone.

1. normalise: NFC where the file says so; 2. split: its pre_tokenizer's patterns, in order; 3. merge: in each part, the
neighbours whose merge comes first in the file become one piece, until none is left.
What the file asks for beyond that is refused: pieces that only look right would be worse.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # openai/gpt-2, encoder.py
NOT_BLANK = re.compile(r"[\x1c-\x1f]")  # white space for Python's patterns alone
PROPERTY = re.compile(r"\\p\{(\w+)\}")
NOWHERE = "\U0010fffe"  # no character: stands for a property that none in the text has


class CannotTakeApart(Exception):
    """The tokenizer asks for what is not done here; the message says what."""


def take_apart(text: str, tokenizer: Mapping[str, Any], encode: Callable[[str], str]) -> list[str]:
    """The pieces of `text` in the spelling of the vocabulary.

    tokenizer: the normalizer, pre_tokenizer and model of a tokenizer.json. encode: text to that spelling.
    Raises CannotTakeApart.
    """
    if NOT_BLANK.search(text):
        raise CannotTakeApart("a separator that patterns of Python and of tokenizers take for different things")
    model = tokenizer["model"]
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("merges"), list) or odd:
        raise CannotTakeApart(odd[0] if odd else f"a model of type {model.get('type')}")
    parts = [_normalised(text, tokenizer.get("normalizer"))]
    for step in _steps(tokenizer.get("pre_tokenizer")):
        parts = [part for whole in parts for part in _split(whole, step)]
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    whole = model["vocab"] if model.get("ignore_merges") else {}
    spelled = map(encode, parts)
    return [piece for part in spelled for piece in ([part] if part in whole else _merged(list(part), ranks))]


def _normalised(text: str, normalizer: Any) -> str:
    if normalizer is None:
        return text
    if normalizer.get("type") == "NFC":
        return unicodedata.normalize("NFC", text)
    raise CannotTakeApart(f"a normalizer of type {normalizer.get('type')}")


def _steps(pre_tokenizer: Any) -> Iterator[Mapping[str, Any]]:
    if pre_tokenizer and pre_tokenizer.get("type") == "Sequence":
        for step in pre_tokenizer["pretokenizers"]:
            yield from _steps(step)
    elif pre_tokenizer:
        yield pre_tokenizer


def _split(text: str, step: Mapping[str, Any]) -> list[str]:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return _isolated(text, GPT2) if step.get("use_regex", True) else [text]
    if kind == "Digits":
        return _isolated(text, r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step["pattern"]
        return _isolated(text, pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"]))
    raise CannotTakeApart(f"a pre_tokenizer of type {kind}")


def _isolated(text: str, pattern: str) -> list[str]:
    """Matches of the pattern and what lies between them.

    A property as \\p{L}, which Python's patterns lack, becomes the characters of this text that have it.
    """

    def characters(found: re.Match[str]) -> str:
        have = {one for one in text if unicodedata.category(one).startswith(found[1])} or {NOWHERE}
        escaped = "".join(map(re.escape, sorted(have)))
        before = pattern[: found.start()]
        inside = len(re.findall(r"(?<!\\)\[", before)) > len(re.findall(r"(?<!\\)\]", before))
        return escaped if inside else f"[{escaped}]"

    try:
        matches = re.finditer(PROPERTY.sub(characters, pattern), text)
        edges = sorted({0, len(text), *(edge for found in matches for edge in found.span())})
    except re.error as error:
        raise CannotTakeApart(f"a pattern that is not understood ({error})") from error
    return [text[first:last] for first, last in itertools.pairwise(edges)]


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _merged(pieces: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    while len(pieces) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(itertools.pairwise(pieces)))
        if rank == len(ranks):
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces
