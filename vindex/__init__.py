"""Read, verify and score a vindex: the singular directions of a model's FFN layers.

import vindex
v = vindex.open("qwen3-0.6b.vindex")
v.top_features(" Paris", k=5)
"""

from typing import TYPE_CHECKING, Any

from vindex.errors import VindexError

if TYPE_CHECKING:
    from vindex.reader import Vindex
    from vindex.reader import open_vindex as open
    from vindex.records import Feature, FeatureHit, LayerFrames, TokenScore

    __version__: str

__all__ = ["Feature", "FeatureHit", "LayerFrames", "TokenScore", "Vindex", "VindexError", "__version__", "open"]


def __getattr__(name: str) -> Any:
    """Load the reader, and numpy with it, on first use: `vindex --help` needs neither."""
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module 'vindex' has no attribute {name!r}")
    from vindex import reader

    return reader.open_vindex if name == "open" else getattr(reader, name)


def __dir__() -> list[str]:
    """What a user wants, and no module that happens to be loaded."""
    return sorted(__all__)


def _version() -> str:
    """That of the installed distribution, or of the source where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version("vindex")
    except metadata.PackageNotFoundError:
        return "0+source"
