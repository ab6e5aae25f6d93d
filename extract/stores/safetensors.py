"""Tensors of safetensors files, wherever their bytes lie: only those of a tensor that is asked for are read."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch

from extract.stores import FLOATS, Files, Memory, TensorInfo
from vindex.weights import Weights

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def fresh(size: int) -> torch.Tensor:
    """New memory. numpy asks for huge pages: with those of 4 KiB, as Python and torch have, reading takes 2.6 times."""
    return torch.from_numpy(np.empty(size, np.uint8))


class Safetensors:
    """The tensors of some safetensors files, read with the dtype they are stored in, into memory from `memory`."""

    dtypes = FLOATS
    method = ""

    def __init__(self, files: Files, weights: Weights) -> None:
        self._files = files
        self.memory: Memory = fresh
        self.tensors = {
            name: TensorInfo(stored.file, stored.shape, stored.dtype, stored.start)
            for name, stored in weights.tensors.items()
        }

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        file, shape, dtype, start = self.tensors[name]
        rows = shape[0] if shape else 1
        last = rows if last is None else last
        row_bytes = math.prod(shape[1:]) * TORCH_DTYPES[dtype].itemsize
        content = self.memory((last - first) * row_bytes)
        self._files.read_into(file, start + first * row_bytes, content.numpy().data)
        found = content.view(TORCH_DTYPES[dtype])
        return found.view(last - first, *shape[1:]) if shape else found.view(())

    def reading_into(self, memory: Memory) -> Safetensors:
        """The same tensors, read into other memory."""
        other = copy.copy(self)
        other.memory = memory
        return other
