"""A safetensors file of the project's own (gates, a training state, a patch), read whole and strictly."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load
from torch import Tensor

from vindex.files import Kind, parse_json, read_bytes


class TensorFile(NamedTuple):
    """What such a file holds."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def read_tensors(path: Path, kind: Kind) -> TensorFile:
    """Raises `kind.error` when it is missing, damaged, or its header says something twice."""
    content = read_bytes(path, kind)
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")], f"{path}: header", kind)
    try:
        return TensorFile(header.get("__metadata__") or {}, load(content))
    except Exception as error:  # a dtype or shape that the package does not foresee; a header that is no object
        raise kind.refusal(path, f"damaged or not safetensors ({error})") from error
