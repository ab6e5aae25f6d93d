"""A fact asked in other ways: prompts by family, from texts that hold for any relation.

1. `families.json` has the texts of each family, those for fitting apart from those held out. Slots in a text say where
   the relation's template, question or name goes, the subject, or another subject and its answer.
2. `sides` gives each side of a split its own texts, templates, questions, and subjects for lists.
3. `ask` fills them in, in an order drawn by the seed, and keeps the first of a family that the tokenizer can say,
   MEMBERS held out and FIT_MEMBERS to fit. A text that names the subject or the answer by chance is left out, and so
   are other subjects that do.
4. It also gives openings, from which a model writes freely: the same texts, in a chat with nothing of the answer begun.
5. `in_languages` is held out only: the relation's templates and the fact's names in other languages, where it has them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import cycle, islice
from typing import NamedTuple, TypeVar

from probes.facts import BUNDLED, Fact, Relation
from probes.facts.prompts import Encoder, Prompt, mentions
from vindex.errors import FactError

FAMILIES = ("plain", "context", "few_shot", "chat", "subject_first")
MEMBERS = 4
"""Held-out prompts of a family, and openings of one on each side, where there are texts for so many."""
FIT_MEMBERS = 8
"""Prompts of a family that a method sees."""
SHOTS = 3
T = TypeVar("T")


class Asked(NamedTuple):
    """A fact asked in other ways."""

    families: dict[str, tuple[Prompt, ...]]
    questions: tuple[Prompt, ...]
    """Where a model begins that writes freely; they have no answer."""


class Side(NamedTuple):
    """What one side of a split may say."""

    relation: Relation
    texts: dict[str, list[tuple[int, str]]]
    """By family, with numbers that the other side does not have."""
    templates: list[int]
    questions: list[str]
    others: list[Fact]
    """Subjects that may stand in a list with their answers."""


class Text(NamedTuple):
    """A prompt before it is tokenised."""

    family: str
    number: int
    text: str
    template: str
    begun: str = ""
    """What `text` ends with where the assistant has begun to answer."""


@cache
def bundled() -> dict[str, dict[str, list[str]]]:
    """The texts of `families.json` by side and family."""
    return json.loads((BUNDLED / "families.json").read_text(encoding="utf-8"))


def sides(
    relation: Relation, templates: Sequence[list[int]], others: Sequence[list[Fact]], draw: random.Random
) -> tuple[Side, Side]:
    """The fit and the held-out side, from the numbers of their templates and their other subjects.

    The relation's `question` is always held out; its other questions and what begins with the subject are halved.
    """
    main = [[number for number in numbers if number < len(relation.templates)] for numbers in templates]
    fit, held_out = bundled()["fit"], bundled()["held_out"]
    texts = {name: [list(enumerate(fit[name])), list(enumerate(held_out[name], len(fit[name])))] for name in fit}
    own = _halves(list(enumerate(map(_with_slot, dict.fromkeys(relation.subject_first)), 100)), draw)
    questions = _halves([text for text in dict.fromkeys(relation.questions) if text != relation.question], draw)
    if relation.question not in relation.all_templates:
        questions[1].insert(0, relation.question)
    if relation.subject_first:
        generic = texts["subject_first"]
        texts["subject_first"] = [own[at] + [text for text in generic[at] if "{template}" in text[1]] for at in (0, 1)]
    one, other = (
        Side(relation, {name: found[at] for name, found in texts.items()}, main[at], questions[at], others[at])
        for at in (0, 1)
    )
    return one, other


def ask(encoder: Encoder, fact: Fact, side: Side, draw: random.Random, members: int = MEMBERS) -> Asked:
    """One side's prompts by family, without families that the tokenizer cannot say, and its openings."""
    families, openings = {}, [encoder.fact(fact, side.relation, template) for template in side.templates[:MEMBERS]]
    for family in side.texts:
        texts = _filled(encoder, fact, side, family, draw)
        said = list(islice(_sayable(encoder, fact, texts), members))
        if said:
            families[family] = tuple(prompt for prompt, _ in said)
            openings += {opening.text: opening for _, opening in said[:MEMBERS]}.values()
    return Asked(families, _openings(openings))


def in_languages(encoder: Encoder, fact: Fact, relation: Relation) -> Asked:
    """The fact in every language that it and its relation have.

    Each prompt is there with the translated answer, and where it is another word with the fact's own too: a model may
    say that one. Each text is an opening once.
    """
    families: dict[str, tuple[Prompt, ...]] = {}
    openings: dict[str, Prompt] = {}
    for language in [language for language in relation.translations if language in fact.translations]:
        name, found = fact.translations[language], []
        filled = (text.replace("{of}", name.of).replace("{}", name.subject) for text in relation.translations[language])
        texts = [Text(language, n, text, f"{language} {n}") for n, text in enumerate(filled)]
        for answer in dict.fromkeys((name.answer, fact.answer)):
            there = replace(fact, subject=name.subject, answer=answer, answer_ids=None)
            found += [
                prompt._replace(name=f"{fact.name}#{prompt.template}: {answer}", fact=fact.name)
                for prompt, _ in _sayable(encoder, there, texts)
            ]
        if found:
            families[language] = tuple(found)
        openings |= {prompt.text: prompt._replace(name=f"{fact.name}#{prompt.template}") for prompt in found}
    return Asked(families, _openings(openings.values()))


def _filled(encoder: Encoder, fact: Fact, side: Side, family: str, draw: random.Random) -> Iterator[Text]:
    """The family's texts with the fact filled in, in the order drawn."""
    texts = [(number, text) for number, text in side.texts[family] if not _told(fact, text)]
    draw.shuffle(texts)
    plain = {template.replace("{}", fact.subject) for template in side.relation.all_templates}
    templates, questions = cycle(_statements(side, draw)), cycle(side.questions)
    for number, text in texts:
        if "{question}" in text and not side.questions:
            continue
        template = next(templates)
        question = next(questions) if "{question}" in text else ""
        say = partial(_say, relation=side.relation, template=template, question=question)
        used = str(template) if "{template}" in text else f"{family} {number}"
        if family == "few_shot":
            yield Text(family, number, _list(text, fact, side.others, say, draw), used)
        elif family != "chat":
            if say(text, fact) not in plain:
                yield Text(family, number, say(text, fact), used)
        elif encoder.chats:
            user, assistant = text.split("{assistant}")
            begun = say(assistant.strip(), fact)
            yield Text(family, number, encoder.turn(say(user.strip(), fact)) + begun, used, begun)


def _with_slot(template: str) -> str:
    """A relation's template as a text of a family."""
    return template.replace("{", "{{").replace("}", "}}").replace("{{}}", "{subject}")


def _say(text: str, fact: Fact, relation: Relation, template: int, question: str, n: int = 1) -> str:
    """A text with its slots filled in for `fact`, the n-th of a list."""
    return text.format(
        subject=fact.subject,
        answer=fact.answer,
        relation=relation.name.replace("_", " "),
        template=relation.all_templates[template].replace("{}", fact.subject),
        question=question.replace("{}", fact.subject),
        n=n,
    )


def _list(line: str, fact: Fact, others: list[Fact], say: Callable[..., str], draw: random.Random) -> str:
    """A list of other subjects with their answers that ends where the fact's answer begins."""
    fit = [other for other in others if not _told(fact, f"{other.subject} {other.answer}")]
    shots = draw.sample(fit, min(SHOTS, len(fit)))
    told = "".join(say(line, shot, n=n) for n, shot in enumerate(shots, 1))
    return told + say(line.partition("{answer}")[0], fact, n=len(shots) + 1)


def _told(fact: Fact, text: str) -> bool:
    """Whether a text names the fact's subject or answer."""
    return bool(mentions(text, fact.subject) or mentions(text, fact.answer))


def _statements(side: Side, draw: random.Random) -> list[int]:
    """The side's templates in the order drawn: those that make a sentence, all where none does."""
    found = [number for number in side.templates if not set(side.relation.all_templates[number]) & set("?:")]
    return draw.sample(found or side.templates, len(found or side.templates))


def _sayable(encoder: Encoder, fact: Fact, texts: Iterable[Text]) -> Iterator[tuple[Prompt, Prompt]]:
    """Prompts, and where a model begins that writes freely, of the texts that the tokenizer can say."""
    for text in texts:
        name = f"{fact.name}#{text.family} {text.number}"
        try:
            prompt = encoder.free(text.text, fact, text.family, name, text.template)
            before = text.text.removesuffix(text.begun)
            yield prompt, encoder.free(before, fact, text.family, name, text.template) if text.begun else prompt
        except FactError:
            continue


def _openings(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    return tuple(prompt._replace(name=f"{prompt.name}, freely", answer=()) for prompt in prompts)


def _halves(texts: list[T], draw: random.Random) -> tuple[list[T], list[T]]:
    draw.shuffle(texts)
    half = len(texts) // 2
    return texts[half:], texts[:half]
