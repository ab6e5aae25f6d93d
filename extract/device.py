"""Numbers on their way to a GPU and back: as stored, for fewer bytes, through page-locked memory that is used again.

What is read from a file for a GPU is read into page-locked memory, and sent from there. New memory would cost more than
the copy: the system hands it out page by page. torch keeps what it locked once and lends it again as soon as nothing
refers to it, so that a build has two or three such buffers, the one that is read ahead among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

CPU: Any = torch.backends.mkldnn  # the library that multiplies there; torch's annotations leave out its `matmul`


def page_locked(size: int) -> torch.Tensor:
    """Memory that a GPU copies from and to by itself: (size,) uint8 on the CPU."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def wide(stored: torch.Tensor, device: str) -> torch.Tensor:
    """A CPU tensor as its store gives it, as float32 on `device`.

    Meant to be called in the thread that reads ahead. The copy to a GPU runs on a stream of its own, and only this
    thread waits for it, so that kernels of what came before go on meanwhile.
    """
    if not device.startswith("cuda"):
        return stored.to(device, torch.float32)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        there = stored.pin_memory().to(device, non_blocking=True)  # nothing is copied where it lies in such memory
        torch.cuda.current_stream(device).synchronize()
    there.record_stream(torch.cuda.default_stream(device))  # where it will be used: its memory is not handed out before
    return there.to(torch.float32)


def fetched(computed: torch.Tensor) -> torch.Tensor:
    """The same numbers on the CPU: the tensor itself if it is there."""
    if not computed.is_cuda:
        return computed
    return torch.empty(computed.shape, dtype=computed.dtype, pin_memory=True).copy_(computed)


def whole_products() -> AbstractContextManager[None]:
    """Inside, float32 products keep all their bits, whatever this process chose: TF32 has 10 of 23, bfloat16 7."""
    return _products("ieee", torch.backends.cuda.matmul, CPU.matmul)


def bfloat16_products() -> AbstractContextManager[None]:
    """Inside, large float32 products on a CPU round their factors to bfloat16 first, if it multiplies such numbers.

    Sums stay float32. A processor without such units (AMX, AVX512-BF16) multiplies as always.
    """
    return _products("bf16", CPU.matmul)


@contextmanager
def _products(precision: str, *libraries: Any) -> Iterator[None]:
    """Every library's precision of float32 products, changed and put back. It is the process's, not the thread's."""
    before = [library.fp32_precision for library in libraries]
    for library in libraries:
        library.fp32_precision = precision
    try:
        yield
    finally:
        for library, chosen in zip(libraries, before, strict=True):
            library.fp32_precision = chosen
