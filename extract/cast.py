"""The one place where numbers become half precision."""

from __future__ import annotations

from typing import NamedTuple

import torch

from extract.device import fetched
from vindex.errors import NumericError

HALF_MAX = torch.finfo(torch.float16).max
PIECE = 1 << 17  # values at a time, so that what the report needs stays in the cache


class HalfCast(NamedTuple):
    """Values as float16, how many non-zero ones became zero, and the largest relative rounding error of the rest."""

    values: torch.Tensor
    flushed_to_zero: int
    max_relative_error: float


def to_half(source: torch.Tensor, name: str, first_row: int = 0) -> HalfCast:
    """Cast a float tensor of any shape to float16, where it is, and give it on the CPU.

    name, first_row: what the tensor is, and the number of its first row in the whole, for the message.
    Raises NumericError on NaN, infinity or a value beyond ±65504, naming the first such element.
    """
    exact = source.to(torch.float32).contiguous()
    half = torch.empty_like(exact, dtype=torch.float16)
    flushed, worst, piece = 0, 0.0, max(1, exact.numel()) if exact.is_cuda else PIECE
    for values, cast in zip(exact.view(-1).split(piece), half.view(-1).split(piece), strict=True):
        cast.copy_(values)
        errors = cast.float().div_(values).sub_(1).abs_()
        largest = float(errors.amax()) if len(errors) else 0.0
        if not largest < 1:  # NaN for a zero, 1 for a value flushed to zero, infinite for one that is too large
            if not torch.isfinite(cast).all():
                require_finite(exact, name, first_row)
                too_large = f"too large for float16 (at most {HALF_MAX:.0f})"
                _refuse(exact, exact.to(torch.float16), name, first_row, too_large)
            flushed += int(((cast == 0) & (values != 0)).sum())
            largest = float(errors.where(cast != 0, 0.0).amax())
        worst = max(worst, largest)
    return HalfCast(fetched(half), flushed, worst)


def require_finite(source: torch.Tensor, name: str, first_row: int = 0) -> None:
    """Raise NumericError naming the first NaN or infinite element of a float32 tensor."""
    if source.numel() and not torch.isfinite(torch.stack(torch.aminmax(source))).all():
        _refuse(source, source, name, first_row, "not a finite number")


def _refuse(source: torch.Tensor, checked: torch.Tensor, name: str, first_row: int, problem: str) -> None:
    position = torch.nonzero(~torch.isfinite(checked))[0].tolist()
    value = float(source[tuple(position)])
    position[0] += first_row
    raise NumericError(f"{name}{position} is {value:g}: {problem}; a vindex of this checkpoint cannot be written")
