"""A fact in a model's own tokens: the prompt's ids, the answer's ids, and where the subject stands.

1. The template is filled in; with `chat`, the relation's question becomes the user's turn of the model's chat template
   and the template begins the assistant's answer.
2. Prompt and prompt + " " + answer are tokenised apart. The first must be a prefix of the second; the rest are the
   answer's tokens. A facts file that states `answer_ids` is held to them.
3. The subject's last token is found by character offsets, once for every time the subject is mentioned. Where that is
   the first token of all, the next one is taken: a first token is an attention sink, which after a few layers says next
   to nothing of itself, and neither reading nor writing there reaches the subject (docs/log.md, 2026-11-25).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from probes.facts import Fact, Relation
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
        answered, _ = self._tokens(f"{whole} {fact.answer}")
        if answered[: len(ids)] != ids or len(answered) == len(ids):
            raise FactError(
                f"{name}: the tokenizer merges the end of the prompt {text[-20:]!r} with the answer {fact.answer!r}; "
                "end the template elsewhere"
            )
        answer = answered[len(ids) :]
        if fact.answer_ids is not None and answer != fact.answer_ids:
            raise FactError(
                f"{fact.name}: the answer ' {fact.answer}' is tokens {list(answer)} for this tokenizer, "
                f"but the facts file says {list(fact.answer_ids)}; correct answer_ids or leave it out"
            )
        ends = [start + len(fact.subject) for start in starts]
        return Prompt(name, whole, ids, answer, tuple(_read_at(spans, end) for end in ends))

    def plain(self, text: str, subject: str, name: str) -> Prompt:
        """A prompt about `subject` that asks for nothing in particular."""
        before, asked = self._lead("Tell me about {}.", subject)
        whole = before + text.replace("{}", subject)
        ids, spans = self._tokens(whole)
        starts = [*asked, len(before) + text.index("{}")]
        return Prompt(name, whole, ids, (), tuple(_read_at(spans, start + len(subject)) for start in starts))

    def text(self, text: str) -> tuple[int, ...]:
        """Running text, with the tokenizer's usual special tokens."""
        return tuple(self.tokenizer(text).input_ids)

    def _lead(self, question: str, subject: str) -> tuple[str, list[int]]:
        """What precedes the prompt (nothing, or the chat turn), and where in it the subject starts."""
        if not self.chat:
            return "", []
        if not getattr(self.tokenizer, "chat_template", None):
            raise FactError("the tokenizer has no chat template; leave --chat out")
        asked = question.replace("{}", subject)
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        at = rendered.rindex(asked) + question.index("{}") if "{}" in question else None
        return rendered, [] if at is None else [at]

    def _tokens(self, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        # a rendered chat turn brings its own special tokens
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not self.chat)
        return tuple(encoded.input_ids), encoded.offset_mapping


def _read_at(spans: list[tuple[int, int]], end: int) -> int:
    """Index of the last token that covers a character before `end`, but 1 for 0; special tokens have empty spans."""
    last = max(index for index, (start, stop) in enumerate(spans) if start < end and stop > start)
    return last if last or len(spans) == 1 else 1
