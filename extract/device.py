"""Numbers on their way to a GPU: as stored, for fewer bytes, and without holding up what is computed meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def wide(stored: torch.Tensor, device: str) -> torch.Tensor:
    """A CPU tensor as its store gives it, as float32 on `device`."""
    return _sent(stored, device).to(torch.float32)


def narrow(stored: torch.Tensor, device: str) -> torch.Tensor:
    """The same for a weight: on a GPU as bfloat16 where every value is one, whatever it is stored as; else float32."""
    there = _sent(stored, device)
    if not there.is_cuda:
        return there.to(torch.float32)
    return there if there.dtype == torch.bfloat16 else narrowed(there.to(torch.float32))


def narrowed(weight: torch.Tensor) -> torch.Tensor:
    """The same values as bfloat16 where each of them is one, as in a checkpoint stored so; else as they are."""
    small = weight.bfloat16()
    return small if torch.equal(small.float(), weight) else weight


def _sent(stored: torch.Tensor, device: str) -> torch.Tensor:
    """The same tensor on `device`.

    Meant to be called in the thread that reads ahead. The copy to a GPU runs on a stream of its own, and only this
    thread waits for it, so that kernels of what came before go on meanwhile. It starts in page-locked memory, which
    torch keeps for the next one.
    """
    if not device.startswith("cuda"):
        return stored.to(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        there = stored.pin_memory().to(device, non_blocking=True)
        torch.cuda.current_stream(device).synchronize()
    there.record_stream(torch.cuda.default_stream(device))  # where it will be used: its memory is not handed out before
    return there


@contextmanager
def whole_products() -> Iterator[None]:
    """Inside, float32 products on a GPU keep all their bits, whatever this process chose: TF32 has 10 of 23."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before
