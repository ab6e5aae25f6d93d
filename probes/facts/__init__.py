"""Facts as data: who (subject), what about them (relation), what a model should say (answer).

A facts file is JSON lines of two kinds, in any order except that a relation comes before its facts:

    {"relation": "capital", "templates": ["The capital of {} is", …], "question": "What is the capital of {}?",
     "reference": ["Germany", "France"], "about": ["{} is", "The history of {} is", …]}
    {"subject": "France", "relation": "capital", "answer": "Paris"}

A template holds `{}` once, for the subject, and ends right before the answer; the answer follows after one space. The
first template is the headline prompt, the others are paraphrases. `question` is what a user asks in the chat template;
`reference` names the subject whose answer must survive (the first that is not the deleted one); `about` are
neutral sentences on such subjects, which ask for nothing that the panel asks; `fit_templates` are more phrasings, never
held out; `questions` are more questions, `subject_first` more templates, which begin with the subject. `answer_ids` on
a fact, when given, must be the tokens that the tokenizer makes of the answer. Both kinds of line may have
`translations`: of a relation {"fr": ["La capitale {of} est", "{} : sa capitale est"]}, where `{of}` says "of the
subject"; of a fact {"fr": {"subject": "France", "of": "de la France", "answer": "Paris"}}.

The bundled panel (`panel.jsonl`): 117 countries × capital, language, currency, continent, and 317 facts of other
relations. `Panel` reads, `prompts` encodes, `sets` splits into what a method may see and what it may not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vindex.errors import FactError
from vindex.files import Kind, parse_json, read_lines

OF_FACTS = Kind(FactError, "expected JSON lines")
BUNDLED = Path(__file__).parent
MIN_TEMPLATES = 4
ABOUT = ("{}", "{} is", "{} has", "The name {}", "I have been thinking about {} and")


@dataclass(frozen=True)
class Relation:
    """A kind of fact and the phrasings that ask for it."""

    name: str
    templates: tuple[str, ...]
    question: str
    reference: tuple[str, ...] = ()
    about: tuple[str, ...] = ABOUT
    fit_templates: tuple[str, ...] = ()
    """More phrasings, which are never held out; numbered after `templates`."""
    questions: tuple[str, ...] = ()
    """More questions; `question` is the one that is always held out."""
    subject_first: tuple[str, ...] = ()
    """More templates, which begin with the subject."""
    translations: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """By language: templates with `{}` for the subject, or `{of}` for the words that say "of the subject"."""

    @property
    def all_templates(self) -> tuple[str, ...]:
        return self.templates + self.fit_templates


class Names(NamedTuple):
    """A fact in another language."""

    subject: str
    of: str
    """"Of the subject", e.g. "de la France"."""
    answer: str


@dataclass(frozen=True)
class Fact:
    """One thing a model may know."""

    subject: str
    relation: str
    answer: str
    answer_ids: tuple[int, ...] | None = None
    translations: dict[str, Names] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """`subject/relation`, as the command line takes it."""
        return f"{self.subject}/{self.relation}"


@dataclass(frozen=True)
class Panel:
    """Facts and their relations, in file order."""

    name: str
    relations: dict[str, Relation] = field(default_factory=dict)
    facts: tuple[Fact, ...] = ()

    def of(self, relation: str) -> tuple[Fact, ...]:
        """The facts of one relation. Raises FactError for a relation the panel does not have."""
        if relation not in self.relations:
            raise FactError(f"relation {relation!r}: {self.name} has {', '.join(self.relations)}")
        return tuple(fact for fact in self.facts if fact.relation == relation)

    def find(self, name: str) -> Fact:
        """The fact called `subject/relation`, e.g. `France/capital`. Raises FactError when there is none."""
        subject, slash, relation = name.rpartition("/")
        if not slash:
            raise FactError(f"fact {name!r}: expected SUBJECT/RELATION, for example France/capital")
        for fact in self.of(relation):
            if fact.subject == subject:
                return fact
        near = ", ".join(fact.subject for fact in self.of(relation)[:5])
        raise FactError(f"fact {name!r}: {self.name} has no such subject (it has {near}, …); add it with --facts FILE")


def bundled() -> Panel:
    """The panel that comes with the package."""
    return read(BUNDLED / "panel.jsonl", name="the bundled panel")


def read(path: str | Path, name: str | None = None, base: Panel | None = None) -> Panel:
    """Read a facts file, on top of `base` where one is given.

    A relation that the file defines is taken from the file alone; facts of other relations are added to the base's.
    Raises FactError with the file's name and the line number at the first bad line.
    """
    path = Path(path)
    base = base or Panel("")
    own: dict[str, Relation] = {}
    facts: dict[tuple[str, str], Fact] = {}
    for number, record in _records(path):
        where = f"{path}:{number}"
        if "subject" in record:
            fact = _fact(record, base.relations | own, where)
            if facts.setdefault((fact.subject, fact.relation), fact) is not fact:
                raise FactError(f"{where}: {fact.name} is already given above; expected each fact once")
        else:
            relation = _relation(record, where)
            if own.setdefault(relation.name, relation) is not relation:
                raise FactError(f"{where}: relation {relation.name!r} is already given above")
    if not facts:
        raise FactError(f'{path}: no facts; expected lines like {{"subject": …, "relation": …, "answer": …}}')
    kept = {(fact.subject, fact.relation): fact for fact in base.facts if fact.relation not in own}
    both = f"{name or path.name} and {base.name}" if base.facts else name or path.name
    return Panel(both, base.relations | own, tuple((kept | facts).values()))


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(path, OF_FACTS):
        record = parse_json(line, f"{path}:{number}", OF_FACTS)
        if not isinstance(record, dict):
            raise FactError(f"{path}:{number}: found {type(record).__name__}, expected a JSON object")
        yield number, record


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise FactError(f"{where}: {key} is {value!r}, expected a non-empty string")
    return value


def _relation(record: dict[str, Any], where: str) -> Relation:
    name, templates = _text(record, "relation", where), record.get("templates")
    if not isinstance(templates, list) or len(templates) < MIN_TEMPLATES:
        raise FactError(
            f"{where}: relation {name!r} needs a list of at least {MIN_TEMPLATES} templates (and no subject)"
        )
    reference = record.get("reference", [])
    if not isinstance(reference, list) or not all(isinstance(subject, str) for subject in reference):
        raise FactError(f"{where}: reference is {reference!r}, expected a list of subjects")
    first = _templates(record, "subject_first", where)
    if other := [template for template in first if not template.startswith("{}")]:
        raise FactError(f"{where}: subject_first has {other[0]!r}, expected templates that begin with {{}}")
    return Relation(
        name=name,
        templates=_templates(record, "templates", where),
        question=_text(record, "question", where) if "question" in record else templates[0],
        reference=tuple(reference),
        about=_templates(record, "about", where) or ABOUT,
        fit_templates=_templates(record, "fit_templates", where),
        questions=_templates(record, "questions", where),
        subject_first=first,
        translations={
            language: _templates(_object(record, "translations", where), language, where, of="{of}")
            for language in _object(record, "translations", where)
        },
    )


def _templates(record: dict[str, Any], key: str, where: str, of: str = "{}") -> tuple[str, ...]:
    """The templates under a key, none where it is not there; `of` may stand for the subject too."""
    templates = record.get(key, [])
    if not isinstance(templates, list):
        raise FactError(f"{where}: {key} is {templates!r}, expected a list of templates")
    for template in templates:
        plain = template.replace(of, "{}") if isinstance(template, str) else ""
        if plain.count("{}") != 1 or plain != plain.rstrip():
            raise FactError(f"{where}: template {template!r}: expected text with one {{}} and no space at the end")
    return tuple(templates)


def _object(record: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = record.get(key, {})
    if not isinstance(value, dict):
        raise FactError(f"{where}: {key} is {value!r}, expected a JSON object by language")
    return value


def _names(record: dict[str, Any], where: str) -> dict[str, Names]:
    """A fact's `translations`; where `of` is not there, the subject's name stands for it."""
    found = {}
    for language, names in _object(record, "translations", where).items():
        if not isinstance(names, dict):
            raise FactError(
                f'{where}: translations of {language!r} is {names!r}, expected {{"subject": …, "answer": …}}'
            )
        subject, of, answer = (_text({"of": names.get("subject")} | names, key, where) for key in Names._fields)
        found[language] = Names(subject, of, answer)
    return found


def _fact(record: dict[str, Any], relations: dict[str, Relation], where: str) -> Fact:
    subject, relation, answer = (_text(record, key, where).strip() for key in ("subject", "relation", "answer"))
    if relation not in relations:
        raise FactError(f"{where}: relation {relation!r} has no templates; put a line with its templates above")
    ids = record.get("answer_ids")
    if ids is not None and not (isinstance(ids, list) and ids and all(type(token) is int for token in ids)):
        raise FactError(f"{where}: answer_ids is {ids!r}, expected a list of token ids")
    return Fact(subject, relation, answer, None if ids is None else tuple(ids), _names(record, where))
