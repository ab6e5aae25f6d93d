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
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

from probes.facts import BUNDLED, Fact, Panel, Relation, families
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


def split(panel: Panel, fact: Fact, encoder: Encoder, seed: int = 0) -> Sets:
    """Draw the sets for `fact`. Raises FactError when the relation has too few subjects to hold any out."""
    relation, draw = panel.relations[fact.relation], random.Random(f"{seed}/{fact.name}")
    others = [
        other for other in panel.of(fact.relation) if other.answer != fact.answer and other.subject != fact.subject
    ]
    if len(others) < MIN_OTHERS:
        raise FactError(
            f"{fact.name}: {panel.name} has {len(others)} other subjects with another answer for {fact.relation!r}, "
            f"at least {MIN_OTHERS} are needed"
        )
    reference = _reference(relation, others, draw)
    others.remove(reference)
    draw.shuffle(others)
    half = len(others) // 2
    ours, theirs = others[:half], [reference, *others[half:]]
    seen, kept = _templates(relation, draw)
    same_answer = _same_answer(panel, fact, draw)
    draw = random.Random(f"{seed}/{fact.name}/families")
    one, other = families.sides(relation, (seen, kept), (ours, theirs), draw)
    asked, unseen = (
        families.ask(encoder, fact, one, draw, families.FIT_MEMBERS),
        families.ask(encoder, fact, other, draw),
    )
    spoken = families.in_languages(encoder, fact, relation)

    def ask(facts: Iterable[Fact], *templates: int) -> tuple[Prompt, ...]:
        return tuple(encoder.fact(one, panel.relations[one.relation], number) for one in facts for number in templates)

    fit = Fit(
        phrasings=ask([fact], *seen),
        others=ask(ours, *seen[:OTHERS_TEMPLATES]),
        about=tuple(
            encoder.plain(text, fact.subject, f"about {fact.subject}#{n}") for n, text in enumerate(relation.about)
        ),
        families=asked.families,
        questions=asked.questions,
    )
    held_out = HeldOut(
        paraphrases=ask([fact], *kept),
        reference=ask([reference], 0),
        other_subjects=ask(theirs, 0),
        same_subject=tuple(
            prompt
            for other in panel.facts
            if other.subject == fact.subject and other.relation != fact.relation
            for prompt in ask([other], *range(len(panel.relations[other.relation].templates)))
        ),
        same_answer=ask(same_answer, 0, 1),
        neutral=tuple(encoder.text(passage) for passage in passages("neutral.txt")),
        families=unseen.families | spoken.families,
        questions=unseen.questions + spoken.questions,
    )
    return Sets(fact, fit.phrasings[0], fit, held_out, seed)


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


def _same_answer(panel: Panel, fact: Fact, draw: random.Random) -> list[Fact]:
    """Not those whose subject names the deleted one or the answer: they ask for the fact, or give it away."""
    found = [other for other in panel.facts if other.answer == fact.answer and other.subject != fact.subject]
    found = [other for other in found if fact.subject not in other.subject and fact.answer not in other.subject]
    return draw.sample(found, SAME_ANSWER_LIMIT) if len(found) > SAME_ANSWER_LIMIT else found
