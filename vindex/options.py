"""What a user may choose for a build: the command's options, their help and the manifest's record are one class."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields

from vindex.errors import QueryError

MOST_THREADS = 1024


def _option(default: object, description: str) -> object:
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True)
class BuildOptions:
    """Options of `vindex build`. The metadata of each field is its help text."""

    features: int | None = _option(  # type: ignore[assignment]
        None, "Singular directions kept of each weight; by default 128, or 32 of each expert in a mixture."
    )
    device: str = _option("cpu", "Torch device of the linear algebra: cpu or cuda.")  # type: ignore[assignment]
    threads: int = _option(1, "CPU threads; two builds are byte-identical when they agree.")  # type: ignore[assignment]
    tolerance: float = _option(  # type: ignore[assignment]
        1e-4, "Largest relative residual ‖WᵀWv − σ²v‖/σ² any direction may have."
    )
    embeddings: bool = _option(True, "Write embeddings.bin, which scoring tokens needs.")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Raise QueryError, naming the option, for a value with which no build makes sense."""
        if self.features is not None and not _is_count(self.features):
            raise _odd("features", "a positive integer", self.features)
        if not (isinstance(self.device, str) and re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", self.device)):
            raise _odd("device", "cpu, cuda or cuda:N", self.device)
        if not (_is_count(self.threads) and self.threads <= MOST_THREADS):
            raise _odd("threads", f"an integer from 1 to {MOST_THREADS}", self.threads)
        if type(self.tolerance) not in (int, float) or not (self.tolerance > 0 and math.isfinite(self.tolerance)):
            raise _odd("tolerance", "a number above 0", self.tolerance)
        if not isinstance(self.embeddings, bool):
            raise _odd("embeddings", "true or false", self.embeddings)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _odd(option: str, expected: str, got: object) -> QueryError:
    return QueryError(f"--{option} {str(got)[:40]}: expected {expected}")


HELP = {option.name: option.metadata["help"] for option in fields(BuildOptions)}
DEFAULTS = BuildOptions()
