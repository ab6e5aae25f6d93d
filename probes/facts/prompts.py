"""A fact in a model's own tokens: the prompt's ids, the answer's ids, and where the subject stands.

1. The template is filled in; with `chat`, the relation's question becomes the user's turn of the model's chat template
   (`probes.live.chat`) and the template begins the assistant's answer. `probes.live.tokens` makes the ids.
2. Prompt and prompt + " " + answer are tokenised apart. The first must be a prefix of the second; the rest are the
   answer's tokens. A facts file that states `answer_ids` is held to them.
3. The subject's last token is found by character offsets, once for every time the subject is mentioned. Where that is
   the first token of all, the next one is taken: a first token is an attention sink, which after a few layers says next
   to nothing of itself, and neither reading nor writing there reaches the subject
   (docs/log/gate3-subject-in-first-place.md, 2026-11-25).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from probes.facts import Fact, Relation
from probes.live.chat import Rendered, ask, render
from probes.live.tokens import Span, encode, require_offsets
from vindex.errors import FactError, ProbeError

OPENERS = ("\n", '"', "'", "(", "[", "“", "‘", "«", "*", "_")
"""What an answer follows without a space."""


class Prompt(NamedTuple):
    """A question in tokens, with the answer that counts."""

    name: str
    """`subject/relation` and the template's number, e.g. `France/capital#3`."""
    text: str
    ids: tuple[int, ...]
    answer: tuple[int, ...]
    subject: tuple[int, ...]
    """Positions in `ids` where the subject is read, one per mention: its last token, or the one after the first."""

    fact: str = ""
    """`subject/relation`; empty where nothing in particular is asked."""
    template: str = ""
    """The number of the relation's template, or another name of what its wording is shared with."""
    family: str = "plain"
    """In what way it is asked (`probes.facts.families`), or `own`: as the model itself went on."""


@dataclass(frozen=True)
class Encoder:
    """Turns facts into prompts for one tokenizer, plainly or in its chat template."""

    tokenizer: Any
    chat: bool = False
    _turns: dict[str, Rendered] = field(default_factory=dict, repr=False, compare=False)

    def fact(self, fact: Fact, relation: Relation, template: int) -> Prompt:
        """The prompt that asks for `fact` with the relation's template of that number."""
        text = relation.all_templates[template]
        before = self._lead(relation.question, fact.subject)
        whole, start = before + text.replace("{}", fact.subject), len(before) + text.index("{}")
        prompt = self._answered(whole, " ", fact, f"{fact.name}#{template}", self.chat, [start])
        return prompt._replace(template=str(template))

    def free(self, text: str, fact: Fact, family: str, name: str, template: str = "") -> Prompt:
        """A prompt of any text that stands right before the answer, a rendered chat or not.

        The answer comes after one space, but right after a text that ends in a line's end or an opening quote or
        bracket. The subject is read wherever the text names it. Raises FactError where the text does not name it, or
        the tokenizer has no tokens for a part of it.
        """
        whole = text.rstrip(" ")
        gap = "" if whole.endswith(OPENERS) else " "
        prompt = self._answered(whole, gap, fact, name, True, [])
        if self.tokenizer.unk_token_id in prompt.ids and self.tokenizer.unk_token not in whole:
            raise FactError(f"{name}: the tokenizer has no token for a part of {whole[-40:]!r}; ask in other words")
        return prompt._replace(template=template, family=family)

    def plain(self, text: str, subject: str, name: str) -> Prompt:
        """A prompt about `subject` that asks for nothing in particular."""
        before = self._lead("Tell me about {}.", subject)
        whole, start = before + text.replace("{}", subject), len(before) + text.index("{}")
        ids, spans = self._tokens(whole, self.chat)
        return Prompt(name, whole, ids, (), _read_at(spans, _mentions(whole, subject, [start]), subject, name))

    def text(self, text: str) -> tuple[int, ...]:
        """Running text."""
        return encode(self.tokenizer, text).ids

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template that says what it is told to."""
        try:
            return bool(self.turn("Who is it?"))
        except ProbeError:
            return False

    def turn(self, question: str) -> str:
        """A user's turn in the chat template, up to where the assistant answers. Raises ProbeError without template."""
        if question not in self._turns:
            self._turns[question] = render(self.tokenizer, ask(question), prompt=True)
        return self._turns[question].text

    def _lead(self, question: str, subject: str) -> str:
        """What precedes the prompt: nothing, or the chat turn that asks the question."""
        return self.turn(question.replace("{}", subject)) if self.chat else ""

    def _answered(self, whole: str, gap: str, fact: Fact, name: str, rendered: bool, starts: Sequence[int]) -> Prompt:
        """The prompt `whole`, which `gap` parts from the answer; its subject stands at `starts`, if not only there."""
        ids, spans = self._tokens(whole, rendered)
        answered, places = self._tokens(f"{whole}{gap}{fact.answer}", rendered)
        if not _covering(places, len(whole + gap), fact.answer):
            raise FactError(f"{name}: the answer {fact.answer!r} has no tokens for this tokenizer; correct the fact")
        if answered[: len(ids)] != ids or len(answered) < len(ids):
            raise FactError(
                f"{name}: the tokenizer merges the end of the prompt {whole[-20:]!r} with the answer {fact.answer!r}; "
                "end the template elsewhere"
            )
        answer = answered[len(ids) :]
        unknown = self.tokenizer.unk_token_id
        if unknown in answer and self.tokenizer.unk_token not in fact.answer:
            raise FactError(f"{name}: the tokenizer has no token for a part of the answer {fact.answer!r}; correct it")
        if fact.answer_ids is not None and gap and answer != fact.answer_ids:
            raise FactError(
                f"{fact.name}: the answer ' {fact.answer}' is tokens {list(answer)} for this tokenizer, "
                f"but the facts file says {list(fact.answer_ids)}; correct answer_ids or leave it out"
            )
        read = _read_at(spans, _mentions(whole, fact.subject, starts), fact.subject, name)
        return Prompt(name, whole, ids, answer, read, fact.name)

    def _tokens(self, text: str, rendered: bool) -> tuple[tuple[int, ...], tuple[Span, ...]]:
        require_offsets(self.tokenizer)
        return encode(self.tokenizer, text, rendered=rendered)


def mentions(text: str, words: str) -> list[int]:
    """Where a text has these words, as whole words, in this case."""
    return [found.start() for found in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text)]


def _mentions(text: str, subject: str, starts: Sequence[int]) -> list[int]:
    """Where the subject stands in a text: at `starts`, and wherever it is a word, or where it never is, anywhere."""
    found = mentions(text, subject) or [found.start() for found in re.finditer(re.escape(subject), text)]
    return sorted({*starts, *found})


def _read_at(spans: Sequence[Span], starts: Sequence[int], subject: str, name: str) -> tuple[int, ...]:
    """Index of the last token of the subject at each of its starts, but 1 for 0. FactError where it has no token."""
    if not starts:
        raise FactError(f"{name}: the text does not name the subject {subject!r}; expected a text that asks about it")
    found = []
    for start in starts:
        own = _covering(spans, start, subject)
        if not own:
            raise FactError(f"{name}: the subject {subject!r} has no tokens for this tokenizer; correct the fact")
        found.append(own[-1] if own[-1] or len(spans) == 1 else 1)
    return tuple(found)


def _covering(spans: Sequence[Span], start: int, words: str) -> list[int]:
    """The tokens that cover a character of the words that begin at `start`; special tokens have empty spans."""
    return [index for index, span in enumerate(spans) if span[0] < start + len(words) and span[1] > start]
