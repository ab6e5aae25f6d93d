"""Forward hooks on a live model: measure, trace, gate, edit.

model = probes.load("Qwen/Qwen3-0.6B")
model.generate("The capital of France is")
probes.constants(model).C1.value
probes.delete(model, "France/capital").strict.passed
"""

from importlib import import_module
from typing import Any

FACE = {  # public name -> the module it stands in and its name there; nothing is imported before it is used
    "apply_patch": ("probes.weights.patches", "apply"),
    "constants": ("probes.suite.run", "constants"),
    "delete": ("probes.deletion.delete", "delete"),
    "delete_all": ("probes.deletion.delete", "delete_all"),
    "evaluate_gates": ("probes.gates.evaluate", "evaluate_gates"),
    "Gates": ("probes.gates.gates", "Gates"),
    "gates_panel": ("probes.gates.known", "make_panel"),
    "link_gates": ("probes.gates.link", "link_gates"),
    "load": ("probes.live.load", "load"),
    "Loaded": ("probes.live.load", "Loaded"),
    "mask_gates": ("probes.gates.controls", "mask_gates"),
    "read_patch": ("probes.weights.patches", "read"),
    "respond": ("probes.responses.respond", "respond"),
    "revert_patch": ("probes.weights.patches", "revert"),
    "trace": ("probes.tracing.trace", "trace"),
    "train_gates": ("probes.gates.learn", "train_gates"),
    "verify_patch": ("probes.deletion.delete", "verify_patch"),
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
