"""What the records of every capability share: plain JSON values, and the libraries that computed them."""

from __future__ import annotations

import math
import platform
from importlib import metadata
from typing import Any

import numpy as np

import vindex


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
