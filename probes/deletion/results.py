"""What a deletion gives back: one fact by some methods (`Deletion`), or many facts (`Deletions`).

The model is as it was. `applied` lends it the patch for as long as a block lasts; `save` writes the patch as a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from probes.deletion import plot, record
from probes.deletion.bench import Bench
from probes.deletion.experiment import FactResult
from probes.deletion.verdict import STANDARDS, Verdict
from probes.facts import Fact
from probes.live.hooks import patched
from probes.live.sites import weight
from probes.records import Result
from probes.weights import patches
from probes.weights.delta import Delta
from vindex.errors import ProbeError, TargetError


class Claim(NamedTuple):
    """One verdict, as a patch records it and as it was measured."""

    standard: str
    recorded: str
    measured: str
    """`none` for a standard that this release does not have, or a certificate that was left out."""

    @property
    def holds(self) -> bool:
        """Whether the record is confirmed."""
        return self.recorded == self.measured


@dataclass(frozen=True, repr=False)
class Deletion(FactResult, Result):
    """One fact deleted by every method asked for, or by a patch that was there, each change measured and judged.

    `published`, `strict` and `robust` are the verdicts on the main method: forward, where it ran.
    """

    claims: tuple[Claim, ...] | None = None
    """Of a patch that was there: the verdicts that it records."""

    @property
    def confirmed(self) -> bool:
        """Whether every recorded verdict was measured again."""
        return all(claim.holds for claim in self.claims or ())

    @property
    def fact(self) -> Fact:
        return self.sets.fact

    @property
    def published(self) -> Verdict:
        """The criterion of the published cards."""
        return self.verdicts["published"]

    @property
    def strict(self) -> Verdict:
        """Whether it holds in other phrasings, and nothing else goes."""
        return self.verdicts["strict"]

    @property
    def robust(self) -> Verdict:
        """Whether it stays deleted under attack. Raises ProbeError where no certificate was made."""
        if "robust" not in self.verdicts:
            raise ProbeError(f"{self.fact.name}: no certificate was made, so robust is not known; use certificate=True")
        return self.verdicts["robust"]

    @contextmanager
    def applied(self, method: str | None = None) -> Iterator[None]:
        """The model with the change in it; afterwards its weight is restored bit for bit.

        method: one of `methods`, by default the main one. Raises ProbeError where it has made no change.
        """
        name = method or self.main
        if name is None:
            raise ProbeError(f"{self.fact.name}: nothing was deleted, the model does not know this fact")
        if name not in self.methods:
            raise ProbeError(f"method {name!r}: expected one that was run, {', '.join(self.methods)}")
        delta = self.methods[name].delta
        with patched(self.bench.model, delta.edits(self.bench.stored(delta.layer))):
            yield

    def record(self) -> dict[str, Any]:
        """Everything measured, prompt by prompt (docs/gate3.md)."""
        claims = {} if self.claims is None else {"claims": [claim._asdict() for claim in self.claims]}
        return record.one(self) | claims

    def rows(self) -> list[dict[str, Any]]:
        """A row for each method: mean losses of the fact, its paraphrases and what should stay, and the verdicts."""
        return record.rows([record.entry(self)])

    def save(self, path: str | Path) -> None:
        """Write the patch where `path` ends in .safetensors, the record where it ends in .json.

        Raises TargetError for another ending, ProbeError where no method has made a patch.
        """
        path = Path(path)
        if path.suffix == ".json":
            super().save(path)
        elif path.suffix == ".safetensors":
            self.save_patch(path)
        else:
            raise TargetError(f"{path}: expected .safetensors for the patch, or .json for the record")

    def save_patch(self, path: Path) -> Delta:
        """Write the first rank-1 change of a gate_proj as a patch file of any name, and return it."""
        found = next((found for found in self.methods.values() if isinstance(found.delta, Delta)), None)
        if found is None:
            why = "its methods change other weights" if self.methods else "the model does not know this fact"
            raise ProbeError(f"{self.fact.name}: no patch to save, {why}")
        delta, loaded = cast(Delta, found.delta), self.bench.loaded
        provenance = {
            "model": loaded.name,
            "revision": loaded.revision,
            "fact": self.fact.name,
            "answer": self.fact.answer,
            "seed": self.sets.seed,
            "chat": self.bench.options.chat,
            "suppression": found.effect.headline.loss,
            "verdicts": {name: verdict.result for name, verdict in found.verdicts.items()},
        }
        patches.save(path, delta, loaded.path, provenance, weight(loaded.model, "gate_proj", delta.layer))
        return delta

    def plot(self, path: str | Path) -> None:
        """Draw every held-out set before and after to `path`, .html or .png."""
        plot.draw(self.record(), Path(path))

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {verdict.result}" for name, verdict in self.verdicts.items())
        caution = self.bench.caution and f" ({self.bench.caution})"
        return f"<Deletion of {self.fact.name} → {self.fact.answer} by {self.main or 'nothing'}: {found}{caution}>"


@dataclass(frozen=True, repr=False)
class Deletions(Result):
    """Many facts, each deleted from the same unchanged model."""

    bench: Bench
    asked: Mapping[str, Any]
    """Which facts: `relations`, and `known_from`, the least probability of the answer before."""
    facts: tuple[record.Entry, ...]
    """What the record says of each."""

    def rates(self, method: str) -> dict[str, record.Rate]:
        """How many facts pass each verdict, with 95 % Wilson intervals; without one that nothing was held to."""
        found = {name: record.rate(self.facts, method, name) for name in STANDARDS}
        return {name: rate for name, rate in found.items() if rate.of}

    def record(self) -> dict[str, Any]:
        """Rates, and a short entry for each fact (docs/gate3.md)."""
        return record.all_facts(self.bench, self.asked, self.facts)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each fact and method, as `Deletion.rows` has them."""
        return record.rows(self.facts)

    def plot(self, path: str | Path) -> None:
        """Draw what each fact, its paraphrases and other subjects lost to `path`, .html or .png."""
        plot.draw(self.record(), Path(path))

    def __repr__(self) -> str:
        return f"<Deletions of {len(self.facts)} facts: {', '.join(self.asked['relations'])}>"
