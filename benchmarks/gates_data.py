"""Facts and sums that a model of one's own knows, as files for `vindex gates train` and `vindex gates eval`.

    python -m benchmarks.gates_data MODEL DIR

1. Countries' capitals and continents, in one phrasing to train on and in another to be asked in; kept are the facts
   that the model says right in both. The facts are the same: what is held out is the wording.
2. One-digit sums after three solved ones: those the model gets right are asked, the others are trained on (what is
   distilled is what the model writes there, right or wrong), so that no sum is in both.
3. Short stories as neutral text.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

TRAINED, ASKED = 0, 1  # statements of probes/atlas/phrasings.json
RELATIONS = ("capital", "continent")


def fact_rows(loaded: Any, index: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows in one phrasing, by (subject, relation), of the facts that the model says right in it."""
    from probes.atlas.facts import facts
    from probes.gates.panels import Prompt
    from probes.gates.score import Settings, accuracy

    rows = {}
    for fact in (fact for relation in RELATIONS for fact in facts(relation)):
        prompt = Prompt(fact.prompt(index), (f" {fact.answer}",))
        if accuracy(loaded, [prompt], None, Settings()) == 1:
            start = len(fact.prompt(index)) + 1
            rows[fact.subject, fact.relation] = {
                "text": fact.statement(index),
                "entities": [[start, start + len(fact.answer)]],
                "subj": fact.subject,
                "prop": fact.relation,
                "obj": fact.answer,
            }
    return rows


def sum_rows(loaded: Any, rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One-digit sums after three solved ones: those the model gets right, and the others."""
    from probes.gates.panels import Prompt
    from probes.gates.score import Settings, accuracy

    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    rng.shuffle(pairs)
    right, wrong = [], []
    for a, b in pairs:
        shown = "".join(f"{c}+{d}={c + d}\n" for c, d in rng.sample([p for p in pairs if p != (a, b)], 3))
        asked = f"{shown}{a}+{b}="
        known = accuracy(loaded, [Prompt(asked, (str(a + b),))], None, Settings()) == 1
        (right if known else wrong).append({"text": f"{asked}{a + b}\n", "problem": asked, "answer": str(a + b)})
    return right, wrong


def main(model: str, directory: str) -> None:
    from probes.atlas.corpus import neutral_texts
    from probes.live.load import load

    loaded = load(model, dtype="float32", device="cpu")
    trained, asked = fact_rows(loaded, TRAINED), fact_rows(loaded, ASKED)
    known = [key for key in trained if key in asked]
    solved, unsolved = sum_rows(loaded, random.Random(0))
    files = {
        "forget": [trained[key] for key in known],
        "forget_asked": [asked[key] for key in known],
        "retain": unsolved,
        "retain_asked": solved,
        "neutral": [{"text": text} for text in neutral_texts(4)],
    }
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name:14s} {len(rows):4d} rows")


if __name__ == "__main__":
    main(*sys.argv[1:3])
