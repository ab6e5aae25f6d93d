"""The tokenizer.json of a GGUF model: the one beside the file, or one that transformers makes of the metadata."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import orjson

from vindex.errors import CheckpointError, first_line
from vindex.tokens import parse_vocabulary

WAY_OUT = "give the model's own with --tokenizer PATH"


def tokenizer_from_gguf(path: Path, tokens: Sequence[str]) -> bytes:
    """tokenizer.json made from the pieces, merges and types in a GGUF file that has these tokens.

    Raises CheckpointError, with the way out, when transformers cannot make one.
    """
    from transformers import AutoTokenizer  # the one use of transformers in extract; slow to load

    try:
        made = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = orjson.loads(made.backend_tokenizer.to_str())
    except Exception as error:  # a converter of foreign files may fail in any way
        what = f"no tokenizer can be made from its metadata ({first_line(error)})"
        raise CheckpointError(f"{path.name}: {what}; {WAY_OUT}") from error
    # transformers adds the default special tokens of the tokenizer's class, whether the model has them or not
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < len(tokens)]
    return orjson.dumps(tokenizer)


def require_same_tokens(content: bytes, tokens: Sequence[str], where: str) -> None:
    """Raise CheckpointError when a tokenizer.json gives an id another piece than the GGUF file with these tokens."""
    for piece, at in parse_vocabulary(content, where).pieces.items():
        theirs = tokens[at] if at < len(tokens) else None
        if piece != theirs:
            raise CheckpointError(
                f"{where} is of another model: its token {at} is {piece!r} and the GGUF's {theirs!r}; {WAY_OUT}"
            )
