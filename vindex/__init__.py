"""Read, verify and score a vindex: the singular directions of a model's FFN layers.

import vindex
v = vindex.open("qwen3-0.6b.vindex")
v.score([" Paris", " Berlin"])                  # which features read them: .rows(), .record(), .cosines
vindex.verify(v)                                # every check, and the verdict
vindex.compare(v, vindex.open("other.vindex"))  # how far apart they are, by layer
vindex.push(v.path, "someone/qwen3-vindex")     # to the Hub; vindex.pull brings it back
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vindex.distribution import version
from vindex.errors import VindexError

if TYPE_CHECKING:
    from vindex.card import write_card
    from vindex.checks import verify
    from vindex.differences import Comparison, compare
    from vindex.exchange import Pushed, pull, push
    from vindex.reader import Vindex
    from vindex.reader import open_vindex as open
    from vindex.records import Feature, FeatureHit, LayerFrames, TokenScore
    from vindex.report.page import write_report
    from vindex.scores import Scores
    from vindex.verification import Verification

    __version__: str

FACE = {
    "open": ("vindex.reader", "open_vindex"),
    "verify": ("vindex.checks", "verify"),
    "compare": ("vindex.differences", "compare"),
    "write_card": ("vindex.card", "write_card"),
    "write_report": ("vindex.report.page", "write_report"),
    "push": ("vindex.exchange", "push"),
    "pull": ("vindex.exchange", "pull"),
    "Pushed": ("vindex.exchange", "Pushed"),
    "Vindex": ("vindex.reader", "Vindex"),
    "Scores": ("vindex.scores", "Scores"),
    "Verification": ("vindex.verification", "Verification"),
    "Comparison": ("vindex.differences", "Comparison"),
    "Feature": ("vindex.records", "Feature"),
    "FeatureHit": ("vindex.records", "FeatureHit"),
    "LayerFrames": ("vindex.records", "LayerFrames"),
    "TokenScore": ("vindex.records", "TokenScore"),
}
__all__ = [
    "Comparison",
    "Feature",
    "FeatureHit",
    "LayerFrames",
    "Pushed",
    "Scores",
    "TokenScore",
    "Verification",
    "Vindex",
    "VindexError",
    "__version__",
    "compare",
    "open",
    "pull",
    "push",
    "verify",
    "write_card",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Load what is asked for, and numpy with it, on first use: `vindex --help` needs neither."""
    if name == "__version__":
        return version()
    if name not in FACE:
        raise AttributeError(f"module 'vindex' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = FACE[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """What a user wants, and no module that happens to be loaded."""
    return sorted(__all__)
