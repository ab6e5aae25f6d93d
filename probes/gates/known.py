"""What a model knows and can work out, as files: to train gates on, and to ask gated models.

1. A fact of the bundled panel (probes.facts) is asked after SHOTS solved ones of its relation, of other answers. It is
   known when the model says it right. What a relation shows solved is asked nowhere.
2. A question to be worked out (reasoning.py) is kept when the model is right. A kind is kept when it is right in LEAST
   of them: of the others, right ones would be luck.
3. The seed halves the subjects. Facts of one half are trained on, in other wordings; the other half and the relations
   HELD_OUT_RELATIONS are asked only. So are the kinds `reasoning.HELD_OUT`, and of every kind the questions asked.
4. `asked.jsonl` has each chosen fact closed book (`forget`), after a text that states it (`oracle`) or another answer
   (`conflict`), both in another wording than the question's, and the questions to be worked out (`reasoning`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from probes.facts import BUNDLED, Fact, Panel, Relation, bundled
from probes.gates import reasoning
from probes.gates.forced import answered, batches
from probes.gates.options import PanelOptions
from probes.gates.panels import QUESTIONS, Prompt
from probes.gates.reasoning import Item
from probes.gates.stated import lead, row, statement
from probes.live.load import Loaded, require_head
from probes.live.match import describe, weights_sha256
from probes.records import Result, head, plain
from vindex import places, targets
from vindex.errors import ProbeError
from vindex.kinds import PANEL, PANEL_FILES
from vindex.progress import Progress, silent

FORGET, RETAIN, ASKED, ABOUT = PANEL_FILES
SHOTS = 2
LEAST = 0.4  # of a kind's questions that the model gets right
RETAIN_ROWS, RETAIN_ITEMS = 30, 5  # of a kind that is trained on, and questions to a row
NEUTRAL_ROWS = 60
HELD_OUT_RELATIONS = ("landmark", "nationality", "element_symbol")
STATED = "In this story, things are as follows. {statement} So in this story, "
"""How a prompt of `oracle` and `conflict` begins; no text to train on begins so."""


class Known(NamedTuple):
    """A fact that the model says right after `shots`."""

    fact: Fact
    relation: Relation
    shots: str
    held_out: bool


@dataclass(frozen=True, repr=False)
class GatesPanel(Result):
    """How many facts and questions a model gets right, by relation and kind, and how many are trained on and asked."""

    about: dict[str, Any]
    counts: tuple[dict[str, Any], ...]
    """kind, tried, right, held_out, trained, asked."""
    files: dict[str, list[dict[str, Any]]]
    """The rows of `forget.jsonl`, `retain.jsonl` and `asked.jsonl`."""

    def total(self, of: str, what: str) -> int:
        """Of `facts` or `reasoning`: how many were `tried`, `right`, `trained` or `asked`."""
        return sum(row[what] for row in self.counts if row["of"] == of)

    def record(self) -> dict[str, Any]:
        return plain({**self.about, "counts": self.rows()})

    def rows(self) -> list[dict[str, Any]]:
        return list(self.counts)

    def write(self, directory: Path, force: bool | None = None) -> None:
        """Make the directory, whole or not at all. force: whether a panel that stands there may be replaced."""
        with places.new_directory(
            directory, PANEL_FILES, making="panel", force=force, kinds=(PANEL,)
        ) as partial:  # fmt: skip
            for name, rows in self.files.items():
                targets.write_bytes(partial / name, b"".join(orjson.dumps(row) + b"\n" for row in rows))
            targets.write_json(partial / ABOUT, self.record(), indent=True)

    def __repr__(self) -> str:
        facts, items = (f"{self.total(of, 'right')} of {self.total(of, 'tried')}" for of in ("facts", "reasoning"))
        return f"<{self.about['model']['name']}: knows {facts} facts, works out {items} questions>"


def make_panel(
    model: Loaded, output: str | Path | None = None, *, force: bool = False, progress: Progress = silent, **options: Any
) -> GatesPanel:
    """Ask `model` the bundled facts and questions, and make a panel of what it gets right.

    output: a directory for `forget.jsonl` and `retain.jsonl`, which `train_gates` takes, `asked.jsonl`, which
    `evaluate_gates` takes, and `panel.json`, the record; force: replace a panel there. options: `PanelOptions`.
    Raises ProbeError or TargetError before the work.
    """
    chosen = PanelOptions(**options)
    require_head(model)
    target = Path(output) if output else None
    if target:
        places.check_directory(target, force=force, kinds=(PANEL,))
    digests = weights_sha256(model, progress)
    panel = bundled()
    everything = list(_shown(panel, chosen))
    pools = {kind: reasoning.some(kind, chosen.pool // 2, chosen.seed) for kind in reasoning.KINDS}
    tried = [_closed(known) for known in everything]
    tried += [_question(item) for pool in pools.values() for item in pool]
    right = answered(model, tried, batches(model, tried, chosen.batch_size), progress("asking", len(tried)))
    knows = [known for known, said in zip(everything, right, strict=False) if said]
    if not knows:
        raise ProbeError(f"{model.name}: knows none of {len(everything)} facts; train on files of your own")
    facts = Facts.of(panel, everything, knows, chosen)
    items = Items.of(pools, right[len(everything) :], chosen)
    if not items.asked:
        raise ProbeError(
            f"{model.name}: works out less than {LEAST:.0%} of the questions of every kind; train on files of your own"
        )
    about = {**head("vindex-gates-panel/1"), "model": describe(model, digests), "choices": asdict(chosen)}
    rows = {FORGET: facts.forget, RETAIN: items.retain, ASKED: facts.asked + items.asked}
    found = GatesPanel(about, (*facts.counts, *items.counts), rows)
    if target:
        found.write(target, force)
    return found


class Facts(NamedTuple):
    """Rows to train on, rows to ask, and counts by relation."""

    forget: list[dict[str, Any]]
    asked: list[dict[str, Any]]
    counts: list[dict[str, Any]]

    @classmethod
    def of(cls, panel: Panel, tried: Sequence[Known], knows: Sequence[Known], options: PanelOptions) -> Facts:
        trained = [known for known in knows if not known.held_out]
        sides = ([k for k in knows if k.held_out is side] for side in (False, True))
        asked = [one for side in sides for one in _evenly(_by_relation(side), options.facts // 2)]
        draw = random.Random(f"conflicts {options.seed}")
        rows = [row for known in asked for row in _ask(known, panel, draw)]
        counts = []
        for name in panel.relations:
            numbers = [sum(k.relation.name == name for k in some) for some in (tried, knows, trained, asked)]
            counts.append(_count("facts", name, *numbers, held_out=name in HELD_OUT_RELATIONS))
        rows.sort(key=lambda row: QUESTIONS.index(row["panel"]))
        return cls([row for known in trained for row in _train(known)], rows, counts)


class Items(NamedTuple):
    """The same of questions to be worked out."""

    retain: list[dict[str, Any]]
    asked: list[dict[str, Any]]
    counts: list[dict[str, Any]]

    @classmethod
    def of(cls, pools: dict[str, list[Item]], right: Sequence[bool], options: PanelOptions) -> Items:
        said, solved = iter(right), {}
        for kind, pool in pools.items():
            solved[kind] = [item for item in pool if next(said)]
        kept = {kind: some for kind, some in solved.items() if len(some) >= LEAST * len(pools[kind])}
        asked = _evenly(kept.values(), options.items)
        taken = {(item.question, item.answer) for item in asked}
        retain: list[dict[str, Any]] = []
        for kind in (kind for kind in kept if kind not in reasoning.HELD_OUT):
            retain += _retain(kind, taken, options)
        texts = (BUNDLED / "generic.txt").read_text(encoding="utf-8").split("\n\n")[:NEUTRAL_ROWS]
        neutral = [{"text": text.strip(), "kind": "neutral"} for text in texts]
        counts = [
            _count("reasoning", kind, len(pools[kind]), len(solved[kind]), sum(row["kind"] == kind for row in retain),
                   sum(item.kind == kind for item in asked), held_out=kind in reasoning.HELD_OUT)
            for kind in pools
        ]  # fmt: skip
        return cls(retain + neutral, [_row("reasoning", _question(item)) for item in asked], counts)


def _count(of: str, kind: str, tried: int, right: int, trained: int, asked: int, *, held_out: bool) -> dict[str, Any]:
    return {"of": of, "kind": kind, "tried": tried, "right": right, "trained": trained, "asked": asked,
            "held_out": held_out}  # fmt: skip


def _shown(panel: Panel, options: PanelOptions) -> Iterator[Known]:
    """Every fact but those shown solved, behind SHOTS of them whose answers are others; `pool` of a relation."""
    seed = options.seed
    subjects = sorted({fact.subject for fact in panel.facts})
    random.Random(f"subjects {seed}").shuffle(subjects)
    asked_only = set(subjects[::2])
    for relation in panel.relations.values():
        by_answer = {fact.answer: fact for fact in panel.of(relation.name)}
        shown = random.Random(f"{relation.name} {seed}").sample(list(by_answer.values()), SHOTS + 1)
        for fact in [fact for fact in panel.of(relation.name) if fact not in shown][: options.pool]:
            others = [one for one in shown if one.answer != fact.answer][:SHOTS]
            shots = "".join(f"{statement(one, relation, 0)}\n" for one in others)
            held_out = fact.subject in asked_only or relation.name in HELD_OUT_RELATIONS
            yield Known(fact, relation, shots, held_out)


def _train(known: Known) -> Iterator[dict[str, Any]]:
    """The fact in two wordings that are not asked, the second after the solved facts."""
    fact, relation, shots, _ = known
    yield from (row(fact, relation, 1), row(fact, relation, 2, shots))


def _closed(known: Known) -> Prompt:
    fact, relation, shots, held_out = known
    return Prompt(lead(fact, relation, 0), (f" {fact.answer}",), shots, relation.name, held_out)


def _ask(known: Known, panel: Panel, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Closed book, after the fact, and after another answer of the relation."""
    fact, relation, *_ = known
    yield _row("forget", _closed(known))
    other = draw.choice(sorted({one.answer for one in panel.of(relation.name)} - {fact.answer}))
    for name, answer in (("oracle", fact.answer), ("conflict", other)):
        asked = re.sub("^(The|A) ", lambda found: found[0].lower(), lead(fact, relation, 0))
        text = STATED.format(statement=statement(fact, relation, 3, answer)) + asked
        yield _row(name, Prompt(text, (f" {answer}",), "", relation.name, known.held_out))


def _question(item: Item) -> Prompt:
    return Prompt(item.question, (item.answer,), item.shots, item.kind, item.kind in reasoning.HELD_OUT)


def _row(panel: str, prompt: Prompt) -> dict[str, Any]:
    return {"panel": panel, **prompt._asdict()}


def _retain(kind: str, taken: set[tuple[str, str]], options: PanelOptions) -> Iterator[dict[str, Any]]:
    """Rows of solved questions of a kind, none of which is asked."""
    draw, solved = random.Random(f"retain {kind} {options.seed}"), reasoning.some(kind, 2 * options.pool, options.seed)
    free = [item for item in solved if (item.question, item.answer) not in taken]
    for _ in range(RETAIN_ROWS):
        chosen = draw.sample(free, min(RETAIN_ITEMS, len(free)))
        text = "\n".join(f"{item.question}{item.answer}" for item in chosen)
        answer = chosen[-1].answer
        yield {"text": text, "problem": text.removesuffix(answer), "solution": answer.strip(), "kind": kind}


def _by_relation(knows: Iterable[Known]) -> list[list[Known]]:
    found: dict[str, list[Known]] = {}
    for known in knows:
        found.setdefault(known.relation.name, []).append(known)
    return list(found.values())


def _evenly(groups: Iterable[Sequence[Any]], count: int) -> list[Any]:
    """At most `count` members, one of each group in turn."""
    turns = (one for turn in zip_longest(*groups) for one in turn if one is not None)
    return [one for _, one in zip(range(count), turns, strict=False)]
