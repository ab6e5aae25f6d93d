"""A checkpoint becomes a vindex: tensors one at a time, singular directions with a certificate.

import extract
v = extract.build("Qwen/Qwen3-0.6B", "qwen3-0.6b.vindex")   # the opened vindex; every option of `vindex build`
extract.verify(v, "Qwen/Qwen3-0.6B")                        # and of `vindex verify --source`
extract.audit(v, "Qwen/Qwen3-0.6B").summary                 # of `vindex audit`; `repair` builds what it found wanting
extract.plan("Qwen/Qwen3-0.6B").rows()                      # and of `vindex plan`
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from extract.auditing import audit, repair
    from extract.estimate import plan
    from extract.rederive import verify
    from extract.run import build

FACE = {
    "audit": "extract.auditing",
    "build": "extract.run",
    "plan": "extract.estimate",
    "repair": "extract.auditing",
    "verify": "extract.rederive",
}
__all__ = ["audit", "build", "plan", "repair", "verify"]


def __getattr__(name: str) -> Any:
    """Load what is asked for, and torch with it, on first use."""
    if name not in FACE:
        raise AttributeError(f"module 'extract' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(FACE[name]), name)


def __dir__() -> list[str]:
    """What a user wants, and no module that happens to be loaded."""
    return __all__
