"""What a user may choose for a build: the command's options, their help and the manifest's record are one class."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


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


HELP = {option.name: option.metadata["help"] for option in fields(BuildOptions)}
DEFAULTS = BuildOptions()
