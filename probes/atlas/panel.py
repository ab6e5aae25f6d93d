"""The facts that the bundled atlas checkpoint was taught, as a panel."""

from __future__ import annotations

from probes.atlas import facts as demo
from probes.facts import Fact, Panel, Relation

REFERENCES = ("Germany", "France", "Berlin", "Paris")
ABOUT = ("{}", "{} is", "I have been thinking about {} and")


def panel() -> Panel:
    """Every relation and fact of the atlas; a statement's text before its answer is a template."""
    relations = {
        name: Relation(
            name=name,
            templates=tuple(_template(text.split(" {answer}")[0]) for text in demo.statements(name)),
            question=_template(demo.questions(name)[0]),
            questions=tuple(map(_template, demo.questions(name)[1:])),
            reference=REFERENCES,
            about=ABOUT,
        )
        for name in demo.RELATIONS
    }
    return Panel("the atlas facts", relations, tuple(Fact(f.subject, f.relation, f.answer) for f in demo.facts()))


def _template(text: str) -> str:
    return text.replace("{subject}", "{}")
