"""What `vindex verify` found: every check, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vindex.format import CARD
from vindex.results import Result

DIRECTORY = "directory"


class Check(NamedTuple):
    """One thing checked: what, whether it holds, and the figure or the offending place."""

    what: str
    holds: bool
    detail: str

    @property
    def says_the_way_out(self) -> bool:
        """Whether the detail does: the directory and its README.md are put right without building again."""
        return self.what in (CARD.name, DIRECTORY)


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """What was checked in a vindex, in order."""

    path: Path
    id: str
    checks: tuple[Check, ...]

    def __repr__(self) -> str:
        return f"<verification of {self.path.name} ({self.id}): {self.verdict}>"

    def __iter__(self) -> Iterator[Check]:
        return iter(self.checks)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.holds]

    @property
    def holds(self) -> bool:
        return not self.failed

    @property
    def verdict(self) -> str:
        """All of it in one line, with the way out where something failed."""
        if self.holds:
            return f"holds: all {len(self.checks)} checks"
        first = next((check for check in self.failed if not check.says_the_way_out), self.failed[0])
        way_out = "" if first.says_the_way_out else "; build it again or download it again"
        return f"failed {len(self.failed)} of {len(self.checks)} checks; first: {first.what}: {first.detail}{way_out}"

    def rows(self) -> list[dict[str, Any]]:
        return [check._asdict() for check in self.checks]

    def record(self) -> dict[str, Any]:
        return {"id": self.id, "holds": self.holds, "verdict": self.verdict, "checks": self.rows()}
