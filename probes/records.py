"""What records are made of. A capability's result is a `Result`, as everywhere in this project."""

from __future__ import annotations

import math
import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np

import vindex
from vindex.results import Result as Result


def head(record: str) -> dict[str, Any]:
    """The first entries of every record: `record` names its layout; when it was made, and with what."""
    return {
        "record": record,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "libraries": libraries(),
    }


def libraries() -> dict[str, str]:
    """Versions of what a figure may depend on."""
    names = ("torch", "transformers", "tokenizers", "numpy")
    own = {"python": platform.python_version(), "vindex": vindex.__version__}
    return own | {name: metadata.version(name) for name in names}


def plain(value: Any) -> Any:
    """JSON values: arrays and tuples become lists, floats 6 significant digits."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
