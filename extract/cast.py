"""The one place where numbers become half precision."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vindex.errors import NumericError

HALF_MAX = torch.finfo(torch.float16).max


class HalfCast(NamedTuple):
    """Values as float16, how many non-zero ones became zero, and the largest relative rounding error of the rest."""

    values: torch.Tensor
    flushed_to_zero: int
    max_relative_error: float


def to_half(source: torch.Tensor, name: str, first_row: int = 0) -> HalfCast:
    """Cast a float tensor of any shape to float16 on the CPU.

    name, first_row: what the tensor is, and the number of its first row in the whole, for the message.
    Raises NumericError on NaN, infinity or a value beyond ±65504, naming the first such element.
    """
    exact = source.to("cpu", torch.float32)
    half = exact.to(torch.float16)
    back = half.to(torch.float32)
    if not torch.isfinite(back.sum(dtype=torch.float64)):
        require_finite(exact, name, first_row)
        _refuse(exact, half, name, first_row, f"too large for float16 (at most {HALF_MAX:.0f})")
    error = back.sub_(exact).abs_().div_(exact.abs()).nan_to_num_(nan=0.0)  # 0/0 where the source is zero
    flushed = int(torch.count_nonzero(exact) - torch.count_nonzero(half))
    if flushed:
        error[half == 0] = 0.0
    return HalfCast(half, flushed, float(error.max()) if error.numel() else 0.0)


def require_finite(source: torch.Tensor, name: str, first_row: int = 0) -> None:
    """Raise NumericError naming the first NaN or infinite element of a float32 tensor."""
    if not torch.isfinite(source.sum(dtype=torch.float64)):
        _refuse(source, source, name, first_row, "not a finite number")


def _refuse(source: torch.Tensor, checked: torch.Tensor, name: str, first_row: int, problem: str) -> None:
    position = torch.nonzero(~torch.isfinite(checked))[0].tolist()
    value = float(source[tuple(position)])
    position[0] += first_row
    raise NumericError(f"{name}{position} is {value:g}: {problem}; a vindex of this checkpoint cannot be written")
