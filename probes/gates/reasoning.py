"""Questions whose answer has to be worked out, in several kinds, generated from a seed; none names an entity.

Every kind begins with SHOTS solved questions, the same for all of its items, so that a small model sees what is asked.
HELD_OUT kinds are for evaluation only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

SHOTS = 3
THINGS = ("apples", "books", "coins", "cups", "eggs", "keys", "pens", "stones", "toys", "shells", "cards", "nails")
WHO = ("A boy", "A girl", "A farmer", "A teacher", "A baker", "A child", "A woman", "A man", "A painter", "A driver")
WORDS = (
    "table", "garden", "window", "river", "basket", "candle", "forest", "button", "mirror", "pencil", "orange",
    "hammer", "island", "jacket", "kettle", "ladder", "needle", "pocket", "rabbit", "summer", "ticket", "valley",
    "winter", "yellow", "bottle", "carpet", "dinner", "engine", "flower", "guitar", "helmet", "insect", "jungle",
    "letter", "market", "number", "oyster", "pillow", "saddle", "tunnel", "village", "whistle", "blanket", "chimney",
)  # fmt: skip
NONCE = ("wug", "blip", "dax", "fep", "zorp", "tove", "mib", "gorp", "lorn", "plim", "snib", "trag", "quib", "vark")


class Item(NamedTuple):
    """A question and its answer, with the space or line break that leads to it."""

    kind: str
    shots: str
    """The solved questions before it."""
    question: str
    answer: str


def items(kind: str, seed: int = 0) -> Iterator[Item]:
    """Different items of one kind without end, or as many as there are; what is shown solved is never asked."""
    draw, make = random.Random(f"{kind} {seed}"), KINDS[kind]
    shown = list(dict.fromkeys(make(draw) for _ in range(20)))[:SHOTS]
    shots = "".join(f"{question}{answer}\n" for question, answer in shown)
    seen, repeats = set(shown), 0
    while repeats < 200:
        asked = make(draw)
        repeats = repeats + 1 if asked in seen else 0
        if not repeats:
            seen.add(asked)
            yield Item(kind, shots, *asked)


def some(kind: str, count: int, seed: int = 0) -> list[Item]:
    """At most `count` items of a kind."""
    return list(islice(items(kind, seed), count))


def _sum(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(1, 9), draw.randint(1, 9)
    return f"{a} + {b} =", f" {a + b}"


def _equation(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(10, 49), draw.randint(10, 49)
    return f"{a}+{b}=", str(a + b)


def _difference(draw: random.Random) -> tuple[str, str]:
    a, b = sorted((draw.randint(1, 19), draw.randint(1, 9)), reverse=True)
    return f"{a} - {b} =", f" {a - b}"


def _largest(draw: random.Random) -> tuple[str, str]:
    numbers = draw.sample(range(1, 100), 3)
    return f"The largest of the numbers {numbers[0]}, {numbers[1]} and {numbers[2]} is", f" {max(numbers)}"


def _sequence(draw: random.Random) -> tuple[str, str]:
    start, step = draw.randint(1, 40), draw.choice((1, 2, 3, 4, 5, 10))
    *shown, last = range(start, start + 6 * step, step)
    return f"{', '.join(map(str, shown))},", f" {last}"


def _countdown(draw: random.Random) -> tuple[str, str]:
    start, step = draw.randint(30, 99), draw.choice((1, 2, 5))
    *shown, last = range(start, start - 6 * step, -step)
    return f"{', '.join(map(str, shown))},", f" {last}"


def _problem(draw: random.Random) -> tuple[str, str]:
    a, b, thing, who = draw.randint(2, 9), draw.randint(1, 9), draw.choice(THINGS), draw.choice(WHO)
    return f"{who} has {a} {thing} and gets {b} more. {a} + {b} =", f" {a + b}"


def _taking(draw: random.Random) -> tuple[str, str]:
    a, b, thing, who = draw.randint(3, 9), draw.randint(1, 2), draw.choice(THINGS), draw.choice(WHO)
    return f"{who} has {a} {thing} and gives away {b}. {a} - {b} =", f" {a - b}"


def _plural(draw: random.Random) -> tuple[str, str]:
    word = draw.choice(WORDS)
    return f"one {word}, two", f" {word}s"


def _chain(draw: random.Random) -> tuple[str, str]:
    a, b, c = draw.sample(NONCE, 3)
    return f"Every {a} is a {b}. Every {b} is a {c}. So every {a} is a", f" {c}"


def _code_lists(draw: random.Random) -> tuple[str, str]:
    numbers = draw.sample(range(1, 10), 4)
    return f">>> {numbers[:2]} + {numbers[2:]}\n", str(numbers)


def _code_reverse(draw: random.Random) -> tuple[str, str]:
    numbers = draw.sample(range(1, 10), 3)
    return f">>> {numbers}[::-1]\n", str(numbers[::-1])


def _code_sorted(draw: random.Random) -> tuple[str, str]:
    numbers = draw.sample(range(1, 10), 3)
    return f">>> sorted({numbers})\n", str(sorted(numbers))


def _code_join(draw: random.Random) -> tuple[str, str]:
    a, b = draw.sample(WORDS, 2)
    return f">>> '{a}' + '{b}'\n", f"'{a}{b}'"


def _capitals(draw: random.Random) -> tuple[str, str]:
    word = draw.choice(WORDS)
    return f">>> '{word}'.upper()\n", f"'{word.upper()}'"


def _tags(draw: random.Random) -> tuple[str, str]:
    a, b, c = draw.sample(WORDS, 3)
    return f"<{a}> <{b}> {c} </{b}>", f" </{a}>"


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "sum": _sum, "equation": _equation, "difference": _difference, "largest": _largest, "sequence": _sequence,
    "countdown": _countdown, "problem": _problem, "taking": _taking, "plural": _plural, "chain": _chain,
    "capitals": _capitals, "tags": _tags, "code lists": _code_lists, "code reverse": _code_reverse,
    "code sorted": _code_sorted, "code join": _code_join,
}  # fmt: skip
HELD_OUT = ("countdown", "taking", "chain", "code sorted", "code join")
