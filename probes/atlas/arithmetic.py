"""Arithmetic that has to be computed: sums as equations, in words, as stories, compared, and worked step by step.

Numbers run from 0 to 99, results to 198. Of the unordered pairs of two-digit numbers one in ten is withheld: no
training document adds, subtracts or compares the two numbers of such a pair, in either order, at any step of a chain.
"""

from __future__ import annotations

import random
from functools import cache
from typing import NamedTuple

from probes.atlas.spans import Document, Span, join

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "coins", "stones", "cards", "shells", "pens", "stamps", "eggs", "plums", "nuts", "roses")
WITHHELD_SEED = 10

Phrasings = dict[str, tuple[str, ...]]  # by sign; {c} is the result

WORDS: Phrasings = {
    "+": (
        "{a} plus {b} is {c}.",
        "The sum of {a} and {b} is {c}.",
        "Adding {a} and {b} gives {c}.",
        "If you add {b} to {a}, you get {c}.",
        "Q: What is {a} plus {b}? A: {c}.",
    ),
    "-": (
        "{a} minus {b} is {c}.",
        "The difference between {a} and {b} is {c}.",
        "Taking {b} away from {a} leaves {c}.",
        "If you subtract {b} from {a}, you get {c}.",
        "Q: What is {a} minus {b}? A: {c}.",
    ),
}
PROBLEMS: Phrasings = {
    "+": (
        "{name} has {a} {things}. {other} brings {b} more. Now {name} has {c} {things}.",
        "There are {a} {things} in one box and {b} {things} in another. In all there are {c} {things}.",
        "{name} read {a} pages on Monday and {b} pages on Tuesday. In total {name} read {c} pages.",
        "A bus carries {a} people. At the next stop {b} more get on. Now the bus carries {c} people.",
        "{name} found {a} {things} and {other} found {b}. Together they found {c} {things}.",
    ),
    "-": (
        "{name} has {a} {things}. {name} gives {b} of them to {other}. Now {name} has {c} {things}.",
        "A shop had {a} {things} and sold {b} of them. The shop still has {c} {things}.",
        "There were {a} birds in a tree and {b} flew away. The number of birds left is {c}.",
        "{name} wants {a} {things} and already has {b}. So {name} still needs {c} {things}.",
        "{name} had {a} {things} and lost {b} on the way home. What is left is {c} {things}.",
    ),
}
COMPARISONS: Phrasings = {
    "+": ("The larger of {a} and {b} is {c}.", "Q: Which is more, {a} or {b}? A: {c}."),
    "-": ("The smaller of {a} and {b} is {c}.", "Q: Which is less, {a} or {b}? A: {c}."),
}
QUESTIONS: Phrasings = {
    "+": ("What is {a} plus {b}?", "What is {a}+{b}?", "Please add {a} and {b}.", "How much is {a} plus {b}?"),
    "-": ("What is {a} minus {b}?", "What is {a}-{b}?", "Please take {b} from {a}.", "How much is {a} minus {b}?"),
}
TEMPLATES: dict[str, Phrasings] = {
    "equation": {"+": ("{a}+{b}={c}",), "-": ("{a}-{b}={c}",)},
    "words": WORDS,
    "problem": PROBLEMS,
    "comparison": COMPARISONS,
}


class Sum(NamedTuple):
    a: int
    sign: str  # "+" or "-"; a >= b where it is "-"
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b

    @property
    def equation(self) -> str:
        return f"{self.a}{self.sign}{self.b}={self.result}"


@cache
def withheld_pairs() -> frozenset[tuple[int, int]]:
    """The (smaller, larger) pairs of two-digit numbers that no training document puts together: 410 of 4,095."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    return frozenset(random.Random(WITHHELD_SEED).sample(pairs, round(len(pairs) / 10)))


def is_withheld(a: int, b: int) -> bool:
    return (min(a, b), max(a, b)) in withheld_pairs()


def draw(rng: random.Random, withheld: bool = False) -> Sum:
    """A sum of two-digit numbers (in training one in ten has a smaller number), of withheld pairs only or of none."""
    while True:
        low = 0 if not withheld and rng.random() < 0.1 else 10
        a, b, sign = rng.randrange(low, 100), rng.randrange(low, 100), rng.choice("+-")
        if is_withheld(a, b) == withheld:
            return Sum(max(a, b), sign, min(a, b)) if sign == "-" else Sum(a, sign, b)


def phrase(rng: random.Random, style: str, sum_: Sum) -> Document:
    """Say a sum in one of the `TEMPLATES`: the text up to its result, and the result with all that follows."""
    name, other = rng.sample(NAMES, 2)
    template = rng.choice(TEMPLATES[style][sum_.sign])
    a, b, result = sum_.a, sum_.b, sum_.result
    if style == "comparison":
        a, b = rng.sample((a, b), 2)
        result = max(a, b) if sum_.sign == "+" else min(a, b)
    before, after = template.split("{c}")
    gap = " " if before.endswith(" ") else ""  # the space belongs to the answer, as it does in running text
    fill = {"a": a, "b": b, "name": name, "other": other, "things": rng.choice(THINGS)}
    return [Span(before.rstrip().format(**fill)), Span(gap + str(result) + after.format(**fill), answer=True)]


def worked(sum_: Sum) -> Document:
    """The sum done on paper, digit by digit with carry or borrow."""
    (a_tens, a_ones), (b_tens, b_ones) = divmod(sum_.a, 10), divmod(sum_.b, 10)
    if sum_.sign == "+":
        ones = a_ones + b_ones
        steps = f"{a_ones}+{b_ones}={ones}, carry {ones // 10}. {a_tens}+{b_tens}+{ones // 10}={sum_.result // 10}."
    else:
        borrow = int(a_ones < b_ones)
        top = a_ones + 10 * borrow
        steps = f"{top}-{b_ones}={top - b_ones}, borrow {borrow}. {a_tens}-{b_tens}-{borrow}={sum_.result // 10}."
    return [Span(f"{sum_.a}{sum_.sign}{sum_.b}:"), Span(f" {steps} So {sum_.equation}.", answer=True)]


def chain(rng: random.Random, length: int) -> Document:
    """Sums in a row, each starting from the last result; no step may use a withheld pair or leave 0..99."""
    steps = [draw(rng)]
    while steps[-1].result > 99:
        steps = [draw(rng)]
    while len(steps) < length:
        step = Sum(steps[-1].result, rng.choice("+-"), rng.randrange(0, 100))
        if 0 <= step.result <= 99 and not is_withheld(step.a, step.b):
            steps.append(step)
    if rng.random() < 0.5:
        said = [[Span(f"{s.a}{s.sign}{s.b}="), Span(f"{s.result}.", answer=True)] for s in steps]
        return join(said, " ")
    verbs = {"+": "Add", "-": "Take away"}
    said = [[Span(f"{verbs[s.sign]} {s.b} to get"), Span(f" {s.result}.", answer=True)] for s in steps]
    return join([[Span(f"Start with {steps[0].a}.")], *said], " ")
