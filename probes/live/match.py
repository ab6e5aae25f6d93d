"""What a model is, as every record says it, and whether a vindex is of it.

A vindex is of a model when first the shapes agree, and then the SHA-256 of every weight file both of them know.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probes.live.experts import count, gate_weights
from probes.live.load import Loaded
from probes.live.sites import Mixture, ffns
from vindex.checksums import sha256_of
from vindex.errors import ProbeError
from vindex.progress import Progress, silent


def weight_files(loaded: Loaded) -> tuple[Path, ...]:
    """The safetensors files that the model was loaded from."""
    return tuple(loaded.path / name for name in loaded.weights.files)


def weights_sha256(loaded: Loaded, progress: Progress = silent) -> dict[str, str]:
    """SHA-256 of each weight file by name: every record says which weights it is of. A stage in bytes."""
    files = weight_files(loaded)
    advance = progress("hashing", sum(file.stat().st_size for file in files))
    return {file.name: sha256_of(file, advance) for file in files}


def shape_of(model: Any) -> tuple[int, int]:
    """(I, H) of the model's FFNs; of a routed expert where it is a mixture."""
    found = ffns(model)
    rows, columns = next(gate_weights(next((ffn for ffn in found if isinstance(ffn, Mixture)), found[0]))).shape
    return rows, columns


def describe(loaded: Loaded, digests: Mapping[str, str]) -> dict[str, Any]:
    """The model as every record names it; `digests` is what `weights_sha256` gives."""
    model = loaded.model
    rows, columns = shape_of(model)
    return {
        "name": loaded.name,
        "revision": loaded.revision,
        "weights_sha256": dict(digests),
        "architecture": type(model).__name__,
        "num_layers": len(ffns(model)),
        "hidden_size": columns,
        "intermediate_size": rows,
        "vocab_size": model.config.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def require_match(loaded: Loaded, vindex: Any, digests: Mapping[str, str]) -> None:
    """Raise ProbeError unless `vindex` was built from the weight files `digests` describes."""
    found = ffns(loaded.model)
    mixture = next((ffn for ffn in found if isinstance(ffn, Mixture)), None)
    rows, columns = shape_of(loaded.model)
    index = vindex.index
    for what, theirs, ours in (
        ("num_layers", index.num_layers, len(found)),
        ("hidden_size", index.hidden_size, columns),
        ("num_experts", index.num_experts, count(mixture) if mixture else None),
        ("intermediate_size", index.intermediate_size, rows),
    ):
        if theirs != ours:
            raise ProbeError(
                f"the vindex ({index.model}) has {what} {theirs}, the model ({loaded.name}) {ours}; "
                "give the model it was built from"
            )
    sources = {file.name: file.sha256 for file in vindex.manifest.source.files if file.name.endswith(".safetensors")}
    for name in sorted(sources.keys() | digests.keys()):
        if sources.get(name) != digests.get(name):
            raise ProbeError(
                f"{name} of the model ({loaded.name}) has SHA-256 {_short(digests.get(name))}, the vindex was built "
                f"from {_short(sources.get(name))}; give the model it was built from, or build the vindex again"
            )


def _short(digest: str | None) -> str:
    return "none (no such file)" if digest is None else f"{digest[:12]}…"
