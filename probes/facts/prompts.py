"""A fact in a model's own tokens: the prompt's ids, the answer's ids, and where the subject stands.

1. The template is filled in; with `chat`, the relation's question becomes the user's turn of the model's chat template
   (`probes.chat`) and the template begins the assistant's answer. `probes.tokens` makes the ids.
2. Prompt and prompt + " " + answer are tokenised apart. The first must be a prefix of the second; the rest are the
   answer's tokens. A facts file that states `answer_ids` is held to them.
3. The subject's last token is found by character offsets, once for every time the subject is mentioned. Where that is
   the first token of all, the next one is taken: a first token is an attention sink, which after a few layers says next
   to nothing of itself, and neither reading nor writing there reaches the subject (docs/log.md, 2026-11-25).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from probes.chat import ask, render
from probes.facts import Fact, Relation
from probes.tokens import Span, encode, require_offsets
from vindex.errors import FactError


class Prompt(NamedTuple):
    """A question in tokens, with the answer that counts."""

    name: str
    """`subject/relation` and the template's number, e.g. `France/capital#3`."""
    text: str
    ids: tuple[int, ...]
    answer: tuple[int, ...]
    subject: tuple[int, ...]
    """Positions in `ids` where the subject is read, one per mention: its last token, or the one after the first."""

    @property
    def fact(self) -> str:
        """`name` without the template's number."""
        return self.name.rpartition("#")[0]

    @property
    def template(self) -> str:
        """The template's number, whatever stood before it."""
        return self.name.rpartition("#")[2].split(" ")[0]


class Encoder(NamedTuple):
    """Turns facts into prompts for one tokenizer, plainly or in its chat template."""

    tokenizer: Any
    chat: bool = False

    def fact(self, fact: Fact, relation: Relation, template: int, lead: str = "") -> Prompt:
        """The prompt that asks for `fact` with the relation's template of that number, after the sentence `lead`."""
        text = lead + relation.all_templates[template]
        name = f"{fact.name}#{template}" + (" after a sentence" if lead else "")
        before, asked = self._lead(relation.question, fact.subject)
        whole = before + text.replace("{}", fact.subject)
        starts = [*asked, len(before) + text.index("{}")]
        ids, spans = self._tokens(whole)
        answered, places = self._tokens(f"{whole} {fact.answer}")
        if not _covering(places, len(whole) + 1, fact.answer):
            raise FactError(f"{name}: the answer {fact.answer!r} has no tokens for this tokenizer; correct the fact")
        if answered[: len(ids)] != ids or len(answered) < len(ids):
            raise FactError(
                f"{name}: the tokenizer merges the end of the prompt {text[-20:]!r} with the answer {fact.answer!r}; "
                "end the template elsewhere"
            )
        answer = answered[len(ids) :]
        unknown = self.tokenizer.unk_token_id
        if unknown in answer and self.tokenizer.unk_token not in fact.answer:
            raise FactError(f"{name}: the tokenizer has no token for a part of the answer {fact.answer!r}; correct it")
        if fact.answer_ids is not None and answer != fact.answer_ids:
            raise FactError(
                f"{fact.name}: the answer ' {fact.answer}' is tokens {list(answer)} for this tokenizer, "
                f"but the facts file says {list(fact.answer_ids)}; correct answer_ids or leave it out"
            )
        return Prompt(name, whole, ids, answer, _read_at(spans, starts, fact.subject, name))

    def plain(self, text: str, subject: str, name: str) -> Prompt:
        """A prompt about `subject` that asks for nothing in particular."""
        before, asked = self._lead("Tell me about {}.", subject)
        whole = before + text.replace("{}", subject)
        ids, spans = self._tokens(whole)
        starts = [*asked, len(before) + text.index("{}")]
        return Prompt(name, whole, ids, (), _read_at(spans, starts, subject, name))

    def text(self, text: str) -> tuple[int, ...]:
        """Running text."""
        return encode(self.tokenizer, text).ids

    def _lead(self, question: str, subject: str) -> tuple[str, list[int]]:
        """What precedes the prompt (nothing, or the chat turn), and where in it the subject starts."""
        if not self.chat:
            return "", []
        rendered = render(self.tokenizer, ask(question.replace("{}", subject)), prompt=True)
        at = rendered.starts[0] + question.index("{}") if "{}" in question else None
        return rendered.text, [] if at is None else [at]

    def _tokens(self, text: str) -> tuple[tuple[int, ...], tuple[Span, ...]]:
        require_offsets(self.tokenizer)
        return encode(self.tokenizer, text, rendered=self.chat)


def _read_at(spans: Sequence[Span], starts: Sequence[int], subject: str, name: str) -> tuple[int, ...]:
    """Index of the last token of the subject at each of its starts, but 1 for 0. FactError where it has no token."""
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
