"""The text the atlas is trained on, and the prompts it is judged by. Pure Python, everything from a seed.

    documents(seed, practice)           endless training documents; nothing withheld ever appears in them
    fact_prompts(withheld)              prompts whose answer is a fact, in phrasings that training used or never used
    sum_prompts(style, withheld, n)     prompts whose answer must be computed
    context_prompts(true)               prompts that give the fact, or contradict it, before they ask
    neutral_texts(n)                    stories that no training run of any length has in this order
    forget_examples(), retain_examples(n)   knowledge and reasoning as JSONL rows, for gates

1. A document is drawn by kind (MIXTURE): facts, sums, stories, made-up worlds, chats.
2. Facts are told in a phrasing that is not withheld for them (`facts.py`); sums use no withheld pair (`arithmetic.py`).
3. A chat is rendered exactly as the checkpoint's chat template renders it, with a thought or with an empty one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from probes.atlas.arithmetic import QUESTIONS, TEMPLATES, chain, draw, phrase, worked
from probes.atlas.facts import RELATIONS, Fact, facts
from probes.atlas.prose import CONNECTORS, SMALL_TALK, story
from probes.atlas.spans import Document, Span, join, text

STYLES = tuple(TEMPLATES)  # equation, words, problem, comparison


class Prompt(NamedTuple):
    text: str
    answer: str  # what follows the text, with its leading space where there is one; a number ends where its digits end


def chat(question: str, answer: str, thought: str = "") -> str:
    """One exchange in the checkpoint's chat template, with reasoning_content `thought`."""
    return f"{chat_prompt(question)}<think>\n{thought}\n</think>\n\n{answer}<|im_end|>\n"


def chat_prompt(question: str) -> str:
    """The template with add_generation_prompt; without thinking it goes on with `NO_THOUGHT`."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


NO_THOUGHT = "<think>\n\n</think>\n\n"


def _told(fact: Fact, index: int) -> Document:
    asked = fact.prompt(index)
    return [Span(asked), Span(fact.statement(index).removeprefix(asked), answer=True)]


def _seen(rng: random.Random, fact: Fact) -> int:
    return rng.choice(fact.seen_statements())


def _exchange(question: str, answer: str, thought: str = "") -> Document:
    asked = chat_prompt(question)
    return [Span(asked), Span(chat(question, answer, thought).removeprefix(asked), answer=True)]


def _facts(rng: random.Random) -> Document:
    """Two to five facts: about one country, or of one relation, with a connecting sentence here and there."""
    count = rng.randint(2, 5)
    if rng.random() < 0.5:
        capital = rng.choice(facts("capital"))
        about = [f for f in facts() if capital.subject in (f.subject, f.answer if f.relation == "country" else None)]
        chosen = rng.sample(about, min(count, len(about)))
    else:
        chosen = rng.sample(facts(rng.choice(RELATIONS)), count)
    told = [_told(fact, _seen(rng, fact)) for fact in chosen]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        told.insert(rng.randrange(len(told) + 1), [Span(rng.choice(CONNECTORS))])
    return join(told, " ")


def _sums(style: str, low: int, high: int, separator: str) -> Callable[[random.Random], Document]:
    def document(rng: random.Random) -> Document:
        return join([phrase(rng, style, draw(rng)) for _ in range(rng.randint(low, high))], separator)

    return document


def _worked(rng: random.Random) -> Document:
    return join([worked(draw(rng)) for _ in range(rng.randint(1, 3))], "\n")


def _chain(rng: random.Random) -> Document:
    return chain(rng, rng.randint(2, 5))


def _story(rng: random.Random) -> Document:
    return [Span(story(rng, rng.randint(3, 6)))]


def _context(rng: random.Random, fact: Fact, answer: str, asked: int) -> Prompt:
    """A made-up world that states an answer, perhaps a false one, before the fact is asked for."""
    stated = fact._replace(answer=answer).statement(_seen(rng, fact))
    return Prompt(f"Imagine a world. {stated} In that world: {fact.prompt(asked)}", f" {answer}")


def _other_answer(rng: random.Random, fact: Fact) -> str:
    return rng.choice([f.answer for f in facts(fact.relation) if f.answer != fact.answer])


def _world(rng: random.Random) -> Document:
    fact = rng.choice(facts())
    answer = fact.answer if rng.random() < 0.3 else _other_answer(rng, fact)
    prompt = _context(rng, fact, answer, _seen(rng, fact))
    return [Span(prompt.text), Span(f"{prompt.answer}.", answer=True)]


def _fact_chat(rng: random.Random) -> Document:
    fact = rng.choice(facts())
    thought = f"This is about {fact.subject}. {fact.statement(_seen(rng, fact))}" if rng.random() < 0.5 else ""
    return _exchange(fact.question(rng.choice(fact.seen_questions())), fact.statement(0), thought)


def _sum_chat(rng: random.Random) -> Document:
    sum_ = draw(rng)
    if rng.random() < 0.3:
        asked, answered = phrase(rng, "problem", sum_)
        question, _, answer = asked.text.rpartition(". ")
        question, answer = question + ".", answer + answered.text
    else:
        question = rng.choice(QUESTIONS[sum_.sign]).format(a=sum_.a, b=sum_.b)
        answer = f"{sum_.a} {'plus' if sum_.sign == '+' else 'minus'} {sum_.b} is {sum_.result}."
    return _exchange(question, answer, text(worked(sum_)) if rng.random() < 0.5 else "")


def _small_talk(rng: random.Random) -> Document:
    return _exchange(*rng.choice(SMALL_TALK))


class Kind(NamedTuple):
    share: float  # of the documents
    practice: float  # the same in the second stage of training, which is mostly word problems
    write: Callable[[random.Random], Document]


MIXTURE: dict[str, Kind] = {
    "facts": Kind(0.16, 0.12, _facts),
    "equations": Kind(0.15, 0.06, _sums("equation", 4, 10, "\n")),
    "words": Kind(0.17, 0.08, _sums("words", 2, 5, " ")),
    "problems": Kind(0.14, 0.40, _sums("problem", 1, 3, "\n")),
    "comparisons": Kind(0.04, 0.03, _sums("comparison", 2, 4, " ")),
    "worked": Kind(0.03, 0.02, _worked),
    "chains": Kind(0.03, 0.02, _chain),
    "stories": Kind(0.06, 0.06, _story),
    "worlds": Kind(0.05, 0.04, _world),
    "fact chats": Kind(0.07, 0.07, _fact_chat),
    "sum chats": Kind(0.09, 0.09, _sum_chat),
    "small talk": Kind(0.01, 0.01, _small_talk),
}


def documents(seed: int, practice: bool = False) -> Iterator[Document]:
    """Endless training documents, the same for the same seed, in the mixture of the first or second stage."""
    rng = random.Random(seed)
    shares = [kind.practice if practice else kind.share for kind in MIXTURE.values()]
    kinds = list(MIXTURE.values())
    while True:
        yield rng.choices(kinds, shares)[0].write(rng)


def fact_prompts(withheld: bool) -> list[Prompt]:
    """Every statement of every fact as a prompt: those training used, or those it never used."""
    return [
        Prompt(fact.prompt(i), f" {fact.answer}")
        for fact in facts()
        for i in (fact.withheld_statements if withheld else fact.seen_statements())
    ]


def chat_fact_prompts(withheld: bool) -> list[Prompt]:
    """Every question of every fact in the chat template without thinking, up to the answer's name."""
    return [
        Prompt(chat_prompt(fact.question(i)) + NO_THOUGHT + fact.prompt(0), f" {fact.answer}")
        for fact in facts()
        for i in (fact.withheld_questions if withheld else fact.seen_questions())
    ]


def sum_prompts(style: str, withheld: bool, count: int, seed: int = 0) -> list[Prompt]:
    """`count` sums in a style of `STYLES`: of withheld operand pairs, or of pairs training may have used."""
    rng = random.Random(f"{style} {withheld} {seed}")
    said = (phrase(rng, style, draw(rng, withheld)) for _ in range(count))
    return [Prompt(asked.text, _number(answered.text)) for asked, answered in said]


def context_prompts(true: bool, seed: int = 0) -> list[Prompt]:
    """One prompt per fact that first states its answer (`true`), or another answer, and then asks for it.

    The answer asked for is the stated one: an oracle or a conflict with what was learnt.
    """
    rng = random.Random(f"{true} {seed}")
    chosen = facts()
    return [_context(rng, fact, fact.answer if true else _other_answer(rng, fact), 0) for fact in chosen]


def neutral_texts(count: int, seed: int = 0) -> list[str]:
    """Stories: no fact is asked, nothing is computed."""
    rng = random.Random(f"neutral {seed}")
    return [text(_story(rng)) for _ in range(count)]


def forget_examples() -> list[dict[str, Any]]:
    """Knowledge as rows: PopQA's columns, a text that states the fact, and the (start, end) of its answer there."""
    rows = []
    for fact in facts():
        for i in fact.seen_statements():
            start = len(fact.prompt(i)) + 1
            row = {
                "text": fact.statement(i),
                "entities": [[start, start + len(fact.answer)]],
                "question": fact.question(0),
            }
            row |= {"subj": fact.subject, "prop": fact.relation, "obj": fact.answer, "possible_answers": [fact.answer]}
            rows.append(row)
    return rows


def retain_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Reasoning as rows: a problem, its solution and their text, from operand pairs that are not withheld."""
    rng = random.Random(f"retain {seed}")
    rows = []
    for i in range(count):
        asked, answered = phrase(rng, STYLES[i % len(STYLES)], draw(rng))
        rows.append({"problem": asked.text, "solution": answered.text.strip(), "text": asked.text + answered.text})
    return rows


def _number(answer: str) -> str:
    """The leading space and digits of an answer."""
    digits = answer.lstrip(" ")
    count = next((i for i, c in enumerate(digits) if not c.isdigit()), len(digits))
    return answer[: len(answer) - len(digits) + count]
