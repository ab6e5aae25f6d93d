"""What a gated model is asked: five sets of prompts or texts, each with a stated answer.

    forget      closed book: the fact is asked for and stands nowhere in the prompt
    oracle      the prompt states the fact, then asks for it
    conflict    the prompt states another answer, then asks; right is the stated one, not the remembered one
    reasoning   the answer has to be computed
    neutral     texts that neither recall nor compute; only KL(base‖gated) is taken there

The atlas panels use phrasings of facts and pairs of operands that no training text has.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from probes.gates.data import Forget, Retain
from probes.live.chat import ask, render
from vindex.errors import FactError
from vindex.files import Kind, parse_json, read_lines, read_text

OF_A_TEXT = Kind(FactError, "expected a UTF-8 text file")
QUESTIONS = ("forget", "oracle", "conflict", "reasoning")


class Prompt(NamedTuple):
    """A text and the answers that count as right, each with the space or line break that leads to it."""

    text: str
    answers: tuple[str, ...]
    shots: str = ""
    """What stands before the text: solved questions, which many prompts share."""
    kind: str = ""
    """Relation of a fact, kind of a question; scores are kept apart by it."""
    held_out: bool = False
    """Whether no training text states this fact in any wording, or asks a question of this kind."""

    @property
    def whole(self) -> str:
        return self.shots + self.text


@dataclass(frozen=True)
class Panels:
    forget: tuple[Prompt, ...]
    oracle: tuple[Prompt, ...]
    conflict: tuple[Prompt, ...]
    reasoning: tuple[Prompt, ...]
    neutral: tuple[str, ...]
    source: str
    """Where the prompts come from, for the record."""


def atlas(tokenizer: Any, *, chat: bool, count: int = 300, seed: int = 0) -> Panels:
    """Held-out prompts of the bundled atlas, at most `count` to a panel, drawn with `seed`; `chat`: facts are asked so.

    Then the answer begins as the headline statement of the fact does, in the tokenizer's own chat template.
    """
    from probes.atlas import corpus, facts

    def some(prompts: Sequence[Any]) -> tuple[Prompt, ...]:
        return tuple(Prompt(one.text, (one.answer,)) for one in _sample(prompts, count, seed))

    if chat:
        asked = [(fact, number) for fact in facts.facts() for number in fact.withheld_questions]
        recall = tuple(_in_chat(fact, number, tokenizer) for fact, number in _sample(asked, count, seed))
    else:
        recall = some(corpus.fact_prompts(True))
    styles = tuple(
        style for style in corpus.STYLES if style != "comparison"
    )  # a comparison copies, it computes nothing
    sums = [prompt for style in styles for prompt in corpus.sum_prompts(style, True, count // len(styles), seed)]
    given = {name: corpus.context_prompts(name == "oracle", seed=seed) for name in ("oracle", "conflict")}

    return Panels(
        recall,
        some(given["oracle"]),
        some(given["conflict"]),
        some(sums),
        tuple(corpus.neutral_texts(20, seed)),
        f"atlas, held out, {'chat' if chat else 'plain'} recall, seed {seed}",
    )


def read_asked(path: Path, neutral: Sequence[str], count: int = 300, seed: int = 0) -> Panels:
    """The prompts of a file that `make_panel` wrote, or of one like it, at most `count` to a panel, drawn with `seed`.

    Raises FactError, naming file and line, when a row is no prompt.
    """
    found: dict[str, list[Prompt]] = {name: [] for name in QUESTIONS}
    for number, line in read_lines(path, OF_A_TEXT):
        where = f"{path.name} line {number}"
        row = parse_json(line, where, OF_A_TEXT)
        fields = {"panel", *Prompt._fields}
        if not isinstance(row, dict) or set(row) != fields or row["panel"] not in QUESTIONS or not _is_prompt(row):
            raise FactError(
                f"{where}: expected panel ({', '.join(QUESTIONS)}), text, answers, shots, kind and held_out; "
                f"found {str(row)[:60]}; write it again with vindex gates panel"
            )
        found[row.pop("panel")].append(Prompt(**row | {"answers": tuple(row["answers"])}))
    if not found["forget"] or not found["reasoning"]:
        raise FactError(f"{path}: no {'reasoning' if found['forget'] else 'forget'} prompts; nothing can be told apart")
    chosen = {name: tuple(_sample(found[name], count, seed)) for name in QUESTIONS}
    return Panels(**chosen, neutral=tuple(neutral), source=f"{path.parent.name}/{path.name}, seed {seed}")


def _is_prompt(row: dict[str, Any]) -> bool:
    answers, texts = row["answers"], (row["text"], row["shots"], row["kind"])
    said = isinstance(answers, list) and answers and all(isinstance(answer, str) and answer for answer in answers)
    return bool(said) and all(isinstance(text, str) for text in texts) and isinstance(row["held_out"], bool)


def _in_chat(fact: Any, question: int, tokenizer: Any) -> Prompt:
    asked = render(tokenizer, ask(fact.question(question)), prompt=True).text
    return Prompt(asked + fact.prompt(0), (f" {fact.answer}",))


def from_rows(
    forget: Sequence[Forget],
    retain: Sequence[Retain],
    neutral: Sequence[str],
    tokenizer: Any,
    *,
    chat: bool,
    worked: bool = True,
    count: int = 300,
    seed: int = 0,
) -> Panels:
    """Panels from rows in the training schema. Raises FactError when no row has a question or none a short answer.

    A row's prompt is its text up to the entity where the text ends soon after it, or else the question. Conflicting
    answers are other rows' answers to the same relation (`prop`). Reasoning rows need `answer` or a \\boxed{} result;
    their prompt is their text up to the last place where the answer stands, or without `worked` the problem alone.
    """
    known = [row for row in forget if row.question or row.spans[0][0] > 0]
    solved = [prompt for row in retain if (prompt := _reason(row, tokenizer, chat, worked)) is not None]
    if not known:
        raise FactError("no forget row has a question or text before its entity; nothing can be asked")
    if not solved:
        raise FactError("no retain row has a short answer; add an `answer` column, or solutions with \\boxed{}")
    rng = random.Random(seed)
    chosen = _sample(known, count, seed)
    conflicts = [(row, other) for row in chosen if (other := _another(row, known, rng)) is not None]
    return Panels(
        tuple(_recall(row, tokenizer, chat) for row in chosen),
        tuple(_given(row, row.answers, tokenizer, chat) for row in chosen),
        tuple(_given(row, (other,), tokenizer, chat) for row, other in conflicts),
        tuple(_sample(solved, count, seed)),
        tuple(neutral),
        f"{len(chosen)} forget rows, {len(solved)} retain rows, {'chat' if chat else 'plain'}, seed {seed}",
    )


def _recall(row: Forget, tokenizer: Any, chat: bool) -> Prompt:
    return _asked(row, row.answers, "", tokenizer, chat)


def _given(row: Forget, answers: tuple[str, ...], tokenizer: Any, chat: bool) -> Prompt:
    """The statement with `answers[0]` in place of its entity, then the question."""
    start, end = row.spans[0]
    statement = f"{row.text[:start]}{answers[0]}{row.text[end:]}".strip()
    return _asked(row, answers, f"Imagine a world. {statement} In that world: ", tokenizer, chat)


def _asked(row: Forget, answers: tuple[str, ...], context: str, tokenizer: Any, chat: bool) -> Prompt:
    """The text up to its first entity; in a chat, the question and then the assistant's words up to there."""
    start = row.spans[0][0]
    chat = chat and row.question is not None
    lead = row.text[row.turn if chat else 0 : start].rstrip()
    gap = row.text[:start][len(row.text[:start].rstrip()) :] if lead else ""
    if chat:
        text = render(tokenizer, ask(context + str(row.question)), prompt=True, where=row.where).text + lead
    elif lead:
        text = context + lead
    else:
        text, gap = f"{context}Question: {row.question}\nAnswer:", " "
    return Prompt(text, tuple(gap + answer for answer in answers))


def _reason(row: Retain, tokenizer: Any, chat: bool, worked: bool) -> Prompt | None:
    """The problem with its worked solution up to the answer, the text up to it, or the problem alone."""
    if row.answer is None:
        return None
    if not worked and row.problem:
        alone = render(tokenizer, ask(row.problem), prompt=True, where=row.where).text if chat else row.problem
        return Prompt(alone, (row.answer,))
    if chat and row.problem:
        turn = row.messages[-1]["content"] if row.messages else row.text
        place = turn.rfind(row.answer)
        head = render(tokenizer, ask(row.problem), prompt=True, where=row.where).text + turn[: max(place, 0)]
    else:
        place = row.text.rfind(row.answer)
        head = row.text[: max(place, 0)]
    if place < 0:
        return None
    lead = head.rstrip(" ")
    return Prompt(lead, (head[len(lead) :] + row.answer,)) if lead else None


def _another(row: Forget, rows: Sequence[Forget], rng: random.Random) -> str | None:
    others = sorted({r.answers[0] for r in rows if r.relation == row.relation} - set(row.answers))
    return rng.choice(others) if others else None


def _sample(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    return list(items) if len(items) <= count else random.Random(seed).sample(list(items), count)


def neutral_texts(path: Path | None) -> tuple[str, ...]:
    """The text of a .txt file (whole) or of a .jsonl file (`text`), or the eight bundled probe texts."""
    from probes.gates.data import read_retain

    if path is None:
        from probes import texts

        return tuple(texts.read(name) for name in texts.BUNDLED)
    if path.suffix == ".txt":
        return (read_text(path, OF_A_TEXT),)
    return tuple(row.text for row in read_retain(path)[0])
