"""The eight bundled probe texts, one domain each, and any text of the user's, as token ids.

Every text is encoded with the special tokens that the tokenizer puts before it (`probes.live.tokens`) and cut to the
same number of tokens, so that figures from different texts and models are comparable; a shorter text is an error,
because padding it would change what is measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from probes.live.tokens import encode as tokens_of
from vindex.errors import ProbeError
from vindex.files import Kind, read_text

if TYPE_CHECKING:
    from probes.live.load import Loaded

BUNDLED = ("factual", "science", "story", "dialogue", "code", "mathematics", "instructions", "report")
"""Names of the bundled texts; the first is the headline text."""
OF_A_TEXT = Kind(ProbeError, f"expected a UTF-8 text file or a bundled text ({', '.join(BUNDLED)})")


class ProbeText(NamedTuple):
    """A text as a model sees it."""

    name: str
    sha256: str
    """Of the text's UTF-8 bytes, whole, before it is cut."""
    token_ids: tuple[int, ...]


def encoded(model: Loaded, names: Iterable[str] | str | None, tokens: int) -> tuple[ProbeText, ...]:
    """The texts of these names, or the one of that name, as the model sees them; by default BUNDLED, cut to `tokens`.

    Raises ProbeError where no text is named, and where one is given twice: n texts are n observations.
    """
    chosen = BUNDLED if names is None else (names,) if isinstance(names, str) else tuple(names)
    if not chosen:
        raise ProbeError(f"no text is given; expected files, or bundled texts: {', '.join(BUNDLED)}")
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    found = tuple(
        encode(name, read(name), model.tokenizer, tokens=tokens, vocabulary=vocabulary) for name in map(str, chosen)
    )
    for number, text in enumerate(found):
        if text.token_ids in [other.token_ids for other in found[:number]]:
            raise ProbeError(f"text {text.name}: given twice, and each counts once; leave one out")
    return found


def read(name: str) -> str:
    """The text called `name`: one of BUNDLED, or else a path to a UTF-8 file. Raises ProbeError if there is none."""
    if name in BUNDLED:
        return (resources.files(__name__) / f"{name}.txt").read_text(encoding="utf-8")
    return read_text(Path(name), OF_A_TEXT)


def encode(name: str, text: str, tokenizer: Any, *, tokens: int, vocabulary: int) -> ProbeText:
    """Encode `text` and cut it to exactly `tokens` ids, each known to the tokenizer and below `vocabulary`.

    Raises ProbeError when the text is too short, or holds a token that the tokenizer or the model does not have.
    """
    token_ids = list(tokens_of(tokenizer, text).ids[:tokens])
    if len(token_ids) < tokens:
        raise ProbeError(
            f"text {name}: {len(token_ids)} tokens with this tokenizer, {tokens} needed; use a longer text"
        )
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in token_ids:
        at = token_ids.index(unknown)
        before = tokenizer.decode(token_ids[max(0, at - 8) : at])
        raise ProbeError(
            f"text {name}: token {at}, after {before!r}, is {tokenizer.unk_token} (the tokenizer has no token for it); "
            "use a text this tokenizer knows"
        )
    if max(token_ids) >= vocabulary:
        raise ProbeError(
            f"text {name}: token id {max(token_ids)}, but the model embeds {vocabulary} tokens; "
            "model and tokenizer do not belong together"
        )
    return ProbeText(name, hashlib.sha256(text.encode()).hexdigest(), tuple(token_ids))
