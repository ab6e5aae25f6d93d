"""Tensors of safetensors files, wherever their bytes lie.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data
(https://github.com/huggingface/safetensors#format). Only headers are read until a tensor is asked for, and then only
its bytes, so that a store on the Hub works as one on disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import torch

from extract.stores import FLOATS, Files, TensorInfo
from vindex.errors import CheckpointError

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
LARGEST_HEADER = 100_000_000  # the format's own limit
AT_ONCE = 8  # headers read at the same time


class Safetensors:
    """The tensors of some safetensors files, read with the dtype they are stored in."""

    dtypes = FLOATS
    method = ""

    def __init__(self, files: Files, names: Sequence[str]) -> None:
        self._files = files
        with ThreadPoolExecutor(AT_ONCE) as pool:
            headers = list(pool.map(self._header, names))
        self.tensors = {name: info for header in headers for name, info in header.items()}

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        file, shape, dtype, start = self.tensors[name]
        rows = shape[0] if shape else 1
        last = rows if last is None else last
        row_bytes = math.prod(shape[1:]) * TORCH_DTYPES[dtype].itemsize
        content = self._files.read(file, start + first * row_bytes, start + last * row_bytes)
        found = torch.frombuffer(content, dtype=TORCH_DTYPES[dtype]) if content else torch.empty(0)
        return found.view(last - first, *shape[1:]) if shape else found.view(())

    def _header(self, file: str) -> dict[str, TensorInfo]:
        """Every tensor of a file. Raises CheckpointError when it is truncated or not safetensors."""
        size = self._files.sizes[file]
        length = int.from_bytes(self._files.read(file, 0, 8), "little") if size >= 8 else LARGEST_HEADER + 1
        if length > min(LARGEST_HEADER, size - 8):
            raise self._damaged(file, "its header is longer than the file")
        try:
            entries: dict[str, dict[str, Any]] = orjson.loads(self._files.read(file, 8, 8 + length))
            entries.pop("__metadata__", None)
            return {name: self._entry(file, 8 + length, entry) for name, entry in entries.items()}
        except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(file, f"header: {error}") from error

    def _entry(self, file: str, data: int, entry: dict[str, Any]) -> TensorInfo:
        shape, dtype, (start, stop) = tuple(entry["shape"]), entry["dtype"], entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError(f"shape {shape}, data_offsets {[start, stop]}")
        if dtype in TORCH_DTYPES and stop - start != math.prod(shape) * TORCH_DTYPES[dtype].itemsize:
            raise ValueError(f"{stop - start} bytes for {dtype} of shape {shape}")
        if data + stop > self._files.sizes[file]:
            raise ValueError("its tensors are longer than the file")
        return TensorInfo(file, shape, dtype, data + start)

    def _damaged(self, file: str, what: str) -> CheckpointError:
        return CheckpointError(f"{file} is damaged or cut short ({what}); download it again")
