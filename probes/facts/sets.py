"""What a method may look at, and what it may not.

For a fact (subject, relation) a seed draws two disjoint sets, which the record lists by name:

- `Fit`: the headline prompt, a third of the relation's other templates, and those that are for fitting only; for half
  of the other subjects some of the same phrasings, without answers; neutral sentences about the subject.
- `HeldOut`: the remaining templates (paraphrases); the other half of the subjects, the reference among them; the
  subject's other facts; facts of other subjects that have the same answer; neutral text.

Both also have the fact asked in other ways, by family (`probes.facts.families`): each side with its own texts,
templates, questions and subjects in lists; other languages are held out only. These are drawn apart from all else.

Subjects with the deleted answer are never in `Fit`, and only in `same_answer` of `HeldOut`.
"""

from __future__ import annotations

import random
from itertools import chain
from typing import NamedTuple

from probes.facts import BUNDLED, Fact, Panel, Relation, families
from probes.facts.families import Asked
from probes.facts.prompts import Encoder, Prompt
from vindex.errors import FactError

MIN_OTHERS = 6
"""Other subjects that a relation needs, so that half of them can be held out."""
FIT_SHARE = 1 / 3
SAME_ANSWER_LIMIT = 24
OTHERS_TEMPLATES = 6
"""Phrasings, at most, in which the other subjects of `Fit` are asked."""


class Fit(NamedTuple):
    """What the method may look at."""

    phrasings: tuple[Prompt, ...]
    """The deleted fact, headline prompt first."""
    others: tuple[Prompt, ...]
    """The same phrasings for other subjects; their answers are not used."""
    about: tuple[Prompt, ...]
    families: dict[str, tuple[Prompt, ...]]
    """The deleted fact asked in other ways, by family."""
    questions: tuple[Prompt, ...]
    """From which the model may be let write freely; they have no answer."""

    @property
    def asked(self) -> tuple[Prompt, ...]:
        """Every prompt that asks for the fact, the headline first."""
        return self.phrasings + tuple(chain(*self.families.values()))


class HeldOut(NamedTuple):
    """What only the measurement sees."""

    paraphrases: tuple[Prompt, ...]
    reference: tuple[Prompt, ...]
    """One prompt: the fact that stands for all others in the `published` verdict."""
    other_subjects: tuple[Prompt, ...]
    same_subject: tuple[Prompt, ...]
    same_answer: tuple[Prompt, ...]
    neutral: tuple[tuple[int, ...], ...]
    """Token ids of the neutral passages."""
    families: dict[str, tuple[Prompt, ...]]
    questions: tuple[Prompt, ...]


class Sets(NamedTuple):
    """One fact's prompts, split by a seed."""

    fact: Fact
    headline: Prompt
    fit: Fit
    held_out: HeldOut
    seed: int


class Drawn(NamedTuple):
    """What the seed gives to the method, and what it holds out."""

    reference: Fact
    fit_subjects: list[Fact]
    held_out_subjects: list[Fact]
    used: list[int]
    """Numbers of the templates that the method sees, the headline's first."""
    kept: list[int]
    same_answer: list[Fact]


def split(panel: Panel, fact: Fact, encoder: Encoder, seed: int = 0) -> Sets:
    """Draw the sets for `fact`. Raises FactError when the relation has too few subjects to hold any out."""
    drawn = _draw(panel, fact, seed)
    others = drawn.fit_subjects, [drawn.reference, *drawn.held_out_subjects]
    draw = random.Random(f"{seed}/{fact.name}/families")
    one, other = families.sides(panel.relations[fact.relation], (drawn.used, drawn.kept), others, draw)
    fit = _fit(encoder, panel, fact, drawn, families.ask(encoder, fact, one, draw, families.FIT_MEMBERS))
    held_out = _held_out(encoder, panel, fact, drawn, families.ask(encoder, fact, other, draw))
    return Sets(fact, fit.phrasings[0], fit, held_out, seed)


def _draw(panel: Panel, fact: Fact, seed: int) -> Drawn:
    relation = panel.relations[fact.relation]
    others = [
        other for other in panel.of(fact.relation) if other.answer != fact.answer and other.subject != fact.subject
    ]
    if len(others) < MIN_OTHERS:
        raise FactError(
            f"{fact.name}: {panel.name} has {len(others)} other subjects with another answer for {fact.relation!r}, "
            f"at least {MIN_OTHERS} are needed"
        )
    draw = random.Random(f"{seed}/{fact.name}")
    reference = _reference(relation, others, draw)
    rest = [other for other in others if other is not reference]
    draw.shuffle(rest)
    half = len(rest) // 2
    return Drawn(reference, rest[:half], rest[half:], *_templates(relation, draw), _same_answer(panel, fact, draw))


def _fit(encoder: Encoder, panel: Panel, fact: Fact, drawn: Drawn, asked: Asked) -> Fit:
    relation = panel.relations[fact.relation]
    return Fit(
        phrasings=tuple(encoder.fact(fact, relation, template) for template in drawn.used),
        others=tuple(
            encoder.fact(other, relation, template)
            for other in drawn.fit_subjects
            for template in drawn.used[:OTHERS_TEMPLATES]
        ),
        about=tuple(
            encoder.plain(text, fact.subject, f"about {fact.subject}#{n}") for n, text in enumerate(relation.about)
        ),
        families=asked.families,
        questions=asked.questions,
    )


def _held_out(encoder: Encoder, panel: Panel, fact: Fact, drawn: Drawn, asked: Asked) -> HeldOut:
    def ask(other: Fact, template: int = 0) -> Prompt:
        return encoder.fact(other, panel.relations[other.relation], template)

    spoken = families.in_languages(encoder, fact, panel.relations[fact.relation])
    return HeldOut(
        paraphrases=tuple(ask(fact, template) for template in drawn.kept),
        reference=(ask(drawn.reference),),
        other_subjects=tuple(ask(other) for other in (drawn.reference, *drawn.held_out_subjects)),
        same_subject=tuple(
            ask(other, n)
            for other in _same_subject(panel, fact)
            for n in range(len(panel.relations[other.relation].templates))
        ),
        same_answer=tuple(ask(other, n) for other in drawn.same_answer for n in (0, 1)),
        neutral=tuple(encoder.text(passage) for passage in passages("neutral.txt")),
        families=asked.families | spoken.families,
        questions=asked.questions + spoken.questions,
    )


def passages(name: str) -> tuple[str, ...]:
    """The passages of a bundled text file, which blank lines separate."""
    return tuple((BUNDLED / name).read_text(encoding="utf-8").strip("\n").split("\n\n"))


def _templates(relation: Relation, draw: random.Random) -> tuple[list[int], list[int]]:
    """Template numbers the method sees (the first always) and those held out."""
    rest = list(range(1, len(relation.templates)))
    draw.shuffle(rest)
    seen = max(1, round(FIT_SHARE * len(rest)))
    fit_only = range(len(relation.templates), len(relation.all_templates))
    return [0, *sorted(rest[:seen]), *fit_only], sorted(rest[seen:])


def _reference(relation: Relation, others: list[Fact], draw: random.Random) -> Fact:
    named = {other.subject: other for other in others}
    for subject in relation.reference:
        if subject in named:
            return named[subject]
    return draw.choice(others)


def _same_subject(panel: Panel, fact: Fact) -> list[Fact]:
    return [other for other in panel.facts if other.subject == fact.subject and other.relation != fact.relation]


def _same_answer(panel: Panel, fact: Fact, draw: random.Random) -> list[Fact]:
    """Not those whose subject names the deleted one or the answer: they ask for the fact, or give it away."""
    found = [other for other in panel.facts if other.answer == fact.answer and other.subject != fact.subject]
    found = [other for other in found if fact.subject not in other.subject and fact.answer not in other.subject]
    return draw.sample(found, SAME_ANSWER_LIMIT) if len(found) > SAME_ANSWER_LIMIT else found
