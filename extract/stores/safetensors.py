"""Tensors of safetensors files, wherever their bytes lie: only those of a tensor that is asked for are read."""

from __future__ import annotations

import math

import torch

from extract.stores import FLOATS, Files, TensorInfo
from vindex.weights import Weights

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Safetensors:
    """The tensors of some safetensors files, read with the dtype they are stored in."""

    dtypes = FLOATS
    method = ""

    def __init__(self, files: Files, weights: Weights) -> None:
        self._files = files
        self.tensors = {
            name: TensorInfo(stored.file, stored.shape, stored.dtype, stored.start)
            for name, stored in weights.tensors.items()
        }

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        file, shape, dtype, start = self.tensors[name]
        rows = shape[0] if shape else 1
        last = rows if last is None else last
        row_bytes = math.prod(shape[1:]) * TORCH_DTYPES[dtype].itemsize
        content = self._files.read(file, start + first * row_bytes, start + last * row_bytes)
        found = torch.frombuffer(content, dtype=TORCH_DTYPES[dtype]) if content else torch.empty(0)
        return found.view(last - first, *shape[1:]) if shape else found.view(())
