"""What this tool makes, told by the files in it: nothing else is ever replaced, emptied or continued."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from vindex.format import FILES, INDEX, SUMS
from vindex.targets import PENDING, TEMPORARY

BAKED, HISTORY = "baked_gates.json", "vindex_patches"
TRAINING, STATE = "training.json", "training_state.safetensors"
GATE_FILES = (
    "lambda_logits.pt",
    "lambda_logits.safetensors",
    "neuron_indices.json",
    "gate_stats.json",
    "selected_thresholds.txt",
)
PANEL_FILES = ("forget.jsonl", "retain.jsonl", "asked.jsonl", "panel.json")


class Kind(NamedTuple):
    """What this tool makes: the names that tell it, and the only files and directories that it may hold."""

    name: str
    marks: tuple[str, ...]
    files: frozenset[str] | None = None
    """None: plain files of any name."""
    folders: frozenset[str] = frozenset()

    def allows(self, file: str) -> bool:
        """Whether a plain file of this path belongs to it."""
        return self.files is None or file in self.files


VINDEX = Kind("vindex", (SUMS.name, INDEX.name), frozenset({*(spec.name for spec in FILES), PENDING}))
BAKED_CHECKPOINT = Kind("baked checkpoint", (BAKED,), folders=frozenset({HISTORY}))
PATCHED_CHECKPOINT = Kind("patched checkpoint", (HISTORY,), folders=frozenset({HISTORY}))
REPLACEABLE = (VINDEX, BAKED_CHECKPOINT, PATCHED_CHECKPOINT)
_TRAINED = frozenset({*GATE_FILES, TRAINING, STATE})
TRAINED_GATES = (Kind("trained gates", (TRAINING,), _TRAINED), Kind("stopped training", (STATE,), _TRAINED))
PANEL = Kind("panel of gates", PANEL_FILES, frozenset(PANEL_FILES))


def objection(directory: Path, kinds: Sequence[Kind]) -> str | None:
    """What speaks against replacing a directory; None when it is of one of these kinds and holds nothing else."""
    entries = set(os.listdir(directory))
    likely = [kind for kind in kinds if entries.issuperset(kind.marks)]
    if not likely:
        return f"is nothing that this tool made ({', '.join(kind.name for kind in kinds)})"
    foreign = [first_foreign(directory, kind.allows, kind.folders) for kind in likely]
    return f"holds {foreign[0]}, which this tool did not write" if all(foreign) else None


def first_foreign(
    directory: Path, allows: Callable[[str], bool], folders: Collection[str], inside: str = ""
) -> str | None:
    """The first entry that is no plain file with an allowed path, nor a directory of these; None when there is none."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = inside + entry.name
            if entry.is_dir(follow_symlinks=False) and path in folders:
                if found := first_foreign(directory / entry.name, allows, folders, path + "/"):
                    return found
            elif not entry.is_file(follow_symlinks=False) or not (allows(path) or TEMPORARY.fullmatch(entry.name)):
                return path
    return None
