"""The tokenizer.json of a GGUF model: the one beside the file, or one that transformers makes of the metadata."""

from __future__ import annotations

from pathlib import Path

from vindex.errors import CheckpointError

WAY_OUT = "give the model's own with --tokenizer PATH"


def tokenizer_from_gguf(path: Path) -> bytes:
    """tokenizer.json made from the tokens, merges and types in a GGUF file. Takes transformers, which is slow to load.

    Raises CheckpointError, with the way out, when transformers cannot make one.
    """
    from transformers import AutoTokenizer  # the one use of transformers in extract; nothing is read with it but this

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return tokenizer.backend_tokenizer.to_str(pretty=False).encode()
    except Exception as error:  # a converter for foreign files may fail in any way
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{path.name}: no tokenizer can be made from its metadata ({reason}); {WAY_OUT}"
        ) from error
