"""Open a vindex: check that it is whole, then map. Nothing is guessed, copied or filled in.

v = vindex.open("qwen3-0.6b.vindex")
v.gate.shape                     # (L, F, H) float16, read-only memory map
v.layer(3).gate.shape            # (groups, F, H): groups are a mixture's experts, else 1
v.score([" Paris", " Berlin"])   # which features read them: .rows(), .record(), .cosines
v.cosines(" Paris").shape        # (L, F)
v.top_features(" Paris", k=5)
v.lacks                          # what it does not have; of ours nothing
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vindex.beside import BesideChance
from vindex.errors import FormatError, QueryError
from vindex.families.recognised import recognise
from vindex.hub import on_the_hub
from vindex.progress import Progress, silent
from vindex.shelf import Directory, Shelf


class Vindex(BesideChance):
    """A vindex of any family (docs/families.md), its arrays as read-only memory maps. Use `vindex.open(path)`."""

    def __repr__(self) -> str:
        i = self.index
        experts = f"{i.num_experts} experts × " if i.num_experts else ""
        features = f"{i.num_features_per_expert or i.num_feats} features"
        form = f", {self.family.title}" if self.family.title else ""
        return f"<vindex {self.id} of {i.model}: {i.num_layers} layers × {experts}{features} × {i.hidden_size}{form}>"

    def info(self) -> dict[str, Any]:
        """What `vindex info --json` prints: shape, source, certificates and size as plain values."""
        return {"id": self.id, **self.family.facts(), "size_bytes": self.size_bytes}


def open_vindex(path: str | Path, tokenizer: str | Path | None = None, *, progress: Progress = silent) -> Vindex:
    """Open a vindex, ours or of a family that others publish (docs/families.md).

    path: a directory, or hf://OWNER/NAME[@REVISION], of which only what is asked for travels, now and later; progress
    is told of each file that does (docs/hub.md).

    Checks the index, the presence and exact size of every file, and that the checksum lists agree; it does not
    re-hash (`vindex verify` does). tokenizer: for a vindex without tokenizer.json that of its model, as a file, a
    directory or a Hub id. Raises FormatError when anything is missing, malformed or of the wrong size.
    """
    try:
        return Vindex(recognise(_shelf_of(path, progress), tokenizer))
    except FormatError as error:
        if str(path) in str(error):
            raise
        raise FormatError(f"{path}: {error}") from error


def as_vindex(given: Vindex | str | Path) -> Vindex:
    """An opened vindex as it is, or the one of that name. Raises QueryError for what is neither."""
    if isinstance(given, Vindex):
        return given
    if isinstance(given, str | Path):
        return open_vindex(given)
    raise QueryError(f"expected a vindex or the name of one, got {type(given).__name__}")


def _shelf_of(place: str | Path, progress: Progress) -> Shelf:
    if address := on_the_hub(place):
        from vindex.hub_shelf import HubShelf

        return HubShelf(address, progress)
    return Directory(Path(place))
