"""What the page says first: of which model the vindex is, and as far as it is known from where and how well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vindex.checks import verify
from vindex.errors import LackingError
from vindex.format import MANIFEST
from vindex.progress import Progress, silent
from vindex.reader import Vindex


class Fact(NamedTuple):
    """One line: what it is of, the words, and a class of the style sheet for them."""

    name: str
    words: str
    kind: str = ""


class Masthead(NamedTuple):
    title: str
    lead: str
    facts: tuple[Fact, ...]


def masthead(v: Vindex, progress: Progress = silent) -> Masthead:
    """Of a vindex of ours where it is from and what `verify` finds; of another family what it lacks."""
    facts = _facts(v, progress) if v.has(MANIFEST) else _facts_of_another_family(v)
    return Masthead(v.index.model or v.name, _lead(v), tuple(facts))


def _lead(v: Vindex) -> str:
    i = v.index
    rows = "neurons" if v.family.neurons else "directions"
    experts = f" of each of {i.num_experts} experts" if i.num_experts else ""
    said = f"{i.num_layers} layers × {i.num_features_per_expert or i.num_feats:,} {rows}{experts}"
    try:
        tokens = f", {i.vocab_size:,} tokens"
    except LackingError:
        tokens = ""
    return f"{said}, hidden size {i.hidden_size:,}{tokens}."


def _facts(v: Vindex, progress: Progress) -> Iterator[Fact]:
    source, verified = v.manifest.source, verify(v, progress)
    where = f"revision {source.revision[:12]}" if source.revision else "a local checkpoint"
    yield Fact("Licence", source.licence or "not named by the source")
    yield Fact("Source", f"{where}, SHA-256 {(source.weights_sha256 or 'none')[:16]}")
    yield Fact("Worst certificate", v.manifest.worst)
    yield Fact("Verified", verified.verdict, "good" if verified.holds else "bad")


def _facts_of_another_family(v: Vindex) -> Iterator[Fact]:
    yield Fact("Family", f"{v.family.title}: made by others, read as it is, and checked by nothing here")
    for name, value in v.family.more().items():
        yield Fact(name.replace("_", " "), str(value))
    ways: dict[str, list[str]] = {}
    for lack in v.lacks:
        ways.setdefault(lack.way_out, []).append(lack.what)
    for way, what in ways.items():
        yield Fact("It lacks", f"{', '.join(what)}: {way}")
