"""Whether the weights of a checkpoint are quantised, and where it says how: for the extractor and for live models.

Settings are believed only where a tensor is stored in fewer bits than a plain float or has a scale. Merging a
fine-tune to 16 bits often leaves the settings of its base in config.json, and then they say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from vindex.errors import CheckpointError
from vindex.model_config import NESTED
from vindex.weights import CONFIG, Readable, read_json

FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
FEW_BITS = FLOAT8 | {"F8_E8M0", "F4", "I8", "U8", "I32", "U32"}
SCALES = ("_scale", "_scale_inv")
PACKED = (".qweight", ".absmax", "_blocks", "_packed", *SCALES)
MODELOPT = "hf_quant_config.json"


class HasDtype(Protocol):
    """What is_quantised needs to know of a tensor."""

    @property
    def dtype(self) -> str:
        """As its file names it: BF16, F8_E4M3."""


class Quantisation(NamedTuple):
    """What a checkpoint says of how it was quantised. file: where it says so; path: the key there."""

    settings: Mapping[str, Any]
    file: str
    path: str


def quantisation(files: Readable, config: Mapping[str, Any]) -> Quantisation | None:
    """The settings in config.json, those of its towers included, or in hf_quant_config.json; None where there are none.

    Raises CheckpointError when they are no object.
    """
    path: str = ""
    tower: Any = config
    while isinstance(tower, dict):
        for key in ("quantization_config", "compression_config"):
            if tower.get(key):
                return _checked(Quantisation(tower[key], CONFIG, path + key), files.name)
        inner = next((key for key in NESTED if key in tower), "")
        path, tower = f"{path}{inner}.", tower.get(inner)
    settings = read_json(files, MODELOPT).get("quantization") if MODELOPT in files.sizes else None
    if not settings:
        return None
    found = _checked(Quantisation(settings, MODELOPT, "quantization"), files.name)
    return found._replace(settings={"quant_method": "modelopt", **found.settings})


def _checked(found: Quantisation, where: str) -> Quantisation:
    if not isinstance(found.settings, Mapping):
        raise CheckpointError(f"{where}: {found.file} {found.path}: expected an object, got {found.settings!r:.60}")
    return found


def is_quantised(tensors: Mapping[str, HasDtype]) -> bool:
    """Whether any tensor is stored in fewer bits than a plain float, or has a scale."""
    return any(info.dtype in FEW_BITS or name.endswith(PACKED) for name, info in tensors.items())


def left_over_note(found: Quantisation) -> str:
    """What to say of settings that no tensor bears out."""
    return f"plain numbers: {found.file} has {found.path}, and no tensor is quantised"


def unscaled_note(tensors: Mapping[str, HasDtype]) -> str | None:
    """What to say of plain numbers beside a scale of their own, where no settings say to multiply by it."""
    for suffix in SCALES:
        for name in (found.removesuffix(suffix) for found in tensors if found.endswith(suffix)):
            if name in tensors and tensors[name].dtype not in FEW_BITS:
                return f"{name}{suffix} is not applied, as no settings say so: transformers does the same"
    return None
