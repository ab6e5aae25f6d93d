"""Which family a vindex is of, by its files and the keys of its index.json."""

from __future__ import annotations

from pathlib import Path

from vindex.families.browse import Browse
from vindex.families.family import Family
from vindex.families.own import Own
from vindex.families.published import Published
from vindex.families.summaries import SUMMARY, Summaries
from vindex.format import GATE_META, INDEX, SIGMA
from vindex.schema import parse_fields
from vindex.shelf import Shelf

OURS = {SIGMA.name, GATE_META.name}  # which no other family has, so that a damaged one of ours is taken for no other


def recognise(shelf: Shelf, tokenizer: str | Path | None = None) -> Family:
    """The family of what is on a shelf. Raises FormatError when it is of none, or not whole."""
    names = shelf.names()
    if names & OURS:
        return Own(shelf, tokenizer)
    fields = {name: parse_fields(shelf.read(name), name) for name in (INDEX.name, SUMMARY) if name in names}
    keys = fields[INDEX.name].values if INDEX.name in fields else {}
    for family in (Published, Summaries, Browse) if "format" not in keys else ():
        if family.recognises(names, keys):
            return family(shelf, names, fields[SUMMARY if family is Summaries else INDEX.name], tokenizer)
    return Own(shelf, tokenizer)
