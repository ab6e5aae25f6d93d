"""Whether a patch does what it says, from the base and the patch alone: for a third party, who has neither the run
that made it nor the method.

1. `claimed` reads from the patch's provenance which fact it deletes, under which seed, and the verdicts recorded.
2. `verify` splits the same prompts by that seed and measures everything again: effect, controls, certificate, verdicts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from probes.deletion.bench import Bench
from probes.deletion.experiment import FactResult, run
from probes.facts import Fact
from probes.weights import patches
from probes.weights.patches import Patch
from vindex.errors import PatchError


class Claim(NamedTuple):
    """One verdict, as the patch records it and as it was measured."""

    standard: str
    recorded: str
    measured: str
    """`none` for a standard that this release does not have, or a certificate that was left out."""

    @property
    def holds(self) -> bool:
        """Whether the record is confirmed."""
        return self.recorded == self.measured


class Claimed(NamedTuple):
    """What a patch says of itself."""

    fact: str | None
    seed: int
    chat: bool
    verdicts: dict[str, str]


def claimed(patch: Patch) -> Claimed:
    """Read the provenance; what it leaves out is as `gate3` has it by default. Raises PatchError on another type."""
    said: dict[str, Any] = {"fact": None, "seed": 0, "chat": False, "verdicts": {}}
    kinds = {"fact": str, "seed": int, "chat": bool, "verdicts": dict}
    for key, kind in kinds.items():
        found = patch.provenance.get(key)
        if found is not None and type(found) is not kind:
            raise PatchError(f"provenance: {key} is {found!r}, expected {kind.__name__}; the patch file was edited")
        said[key] = said[key] if found is None else found
    return Claimed(**said)


def verify(bench: Bench, patch: Patch, fact: Fact) -> tuple[FactResult, tuple[Claim, ...]]:
    """Measure the patch on the bench's model, and compare the verdicts with those that it records.

    Raises PatchError when the model's tensor is not the one that the patch was made for.
    """
    patches.require_base(bench.loaded.path, patch)
    result = run(bench, fact, patch.delta)
    found = result.methods.get(patch.delta.method)
    measured = {name: verdict.result for name, verdict in found.verdicts.items()} if found else {}
    recorded = claimed(patch).verdicts
    other = "none" if found else "not_applicable"
    return result, tuple(Claim(name, str(said), measured.get(name, other)) for name, said in recorded.items())
