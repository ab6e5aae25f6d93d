"""A weight on its way to a GPU: narrow where that loses nothing, and without holding up what is computed meanwhile."""

from __future__ import annotations

import torch


def to_device(weight: torch.Tensor, device: str) -> torch.Tensor:
    """A float32 CPU tensor on `device`: as bfloat16 on CUDA when every value is one, as float32 otherwise.

    Meant to be called in the thread that reads ahead. The copy runs on a stream of its own from page-locked memory, and
    only this thread waits for it, so that kernels of the weight before go on meanwhile.
    """
    if not device.startswith("cuda"):
        return weight.to(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        there = narrowed(weight.pin_memory().to(device, non_blocking=True))
        torch.cuda.current_stream(device).synchronize()
    there.record_stream(torch.cuda.default_stream(device))  # where it will be used: its memory is not handed out before
    return there


def narrowed(weight: torch.Tensor) -> torch.Tensor:
    """The same values as bfloat16 where each of them is one, as in a checkpoint stored so; else as they are."""
    narrow = weight.bfloat16()
    return narrow if torch.equal(narrow.float(), weight) else weight
