"""A training document as spans: what is asked, drawn at random, and what is answered, which follows from it."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    text: str
    answer: bool = False  # it can be known or computed from what stands before it


Document = list[Span]


def text(document: Document) -> str:
    return "".join(span.text for span in document)


def join(documents: list[Document], separator: str) -> Document:
    """Documents in a row. A space opens the next span and a line break ends the last, so that no token spans two."""
    joined: Document = []
    for i, document in enumerate(documents):
        first, *rest = document
        if i and separator == " ":
            first = first._replace(text=" " + first.text)
        elif i:
            joined[-1] = joined[-1]._replace(text=joined[-1].text + separator)
        joined += [first, *rest]
    return joined
