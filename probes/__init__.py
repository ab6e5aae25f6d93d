"""Forward hooks on a live model: measure, trace, gate, edit.

model = probes.load("Qwen/Qwen3-0.6B")
model.generate("The capital of France is")
probes.constants(model).C1.value
"""

from importlib import import_module
from typing import Any

FACE = {  # public name -> the module it stands in and its name there; nothing is imported before it is used
    "Loaded": ("probes.live.load", "Loaded"),
    "constants": ("probes.suite.run", "constants"),
    "load": ("probes.live.load", "load"),
    "trace": ("probes.tracing.trace", "trace"),
}
__all__ = list(FACE)


def __getattr__(name: str) -> Any:
    if name not in FACE:
        raise AttributeError(f"module 'probes' has no attribute {name!r}; it has {', '.join(sorted(FACE))}")
    module, own = FACE[name]
    return getattr(import_module(module), own)


def __dir__() -> list[str]:
    """What a user wants, and no room that happens to be loaded."""
    return sorted(FACE)
