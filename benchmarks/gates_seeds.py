"""Gates over training seeds, beside the masks that need no training: what they forget, and what they keep.

    python -m benchmarks.gates_seeds MODEL DIR [--panel DIR] [--variants reading,...] [--seeds 0,1,2] [option=value ...]

1. For every variant and seed gates are trained (`DIR/VARIANT-SEED`) and evaluated (`DIR/VARIANT-SEED.json`). What is
   there already is taken over; a stopped evaluation goes on where it was.
2. A variant is a preset, or a part of VARIANTS: `reading` without one of its parts. Further options are of training,
   `count` and `thresholds` of the evaluation; `thresholds` as shares of the neurons that are off, joined by +.
3. The table has soft gates and each operating point: mean, and extremes over the seeds, of each panel in per cent.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {  # of the preset `reading`
    "no-context": {"context_weight": 0.0},
    "no-ratio": {"init_ratio": 0.0, "init_std": 0.1},
    "no-nke": {"unmasked_retain_weight": 0.0},
    "closed": {"init_mean": 0.0},
    "context-2": {"context_weight": 2.0},
    "forget-2": {"lambda_f": 2.0, "context_weight": 2.0},
}
SIDES = (("forget", False), ("forget", True), ("oracle", None), ("conflict", None), ("reasoning", False),
         ("reasoning", True))  # fmt: skip
COLUMNS = "facts  new facts  in-context  conflict  kinds  new kinds"


def value(text: str) -> Any:
    return json.loads(text) if re.fullmatch(r"-?[\d.e-]+", text) else text


def run(
    loaded: Any, variant: str, seed: int, place: Path, panel: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The record of the evaluation of one variant and seed."""
    import probes

    record = place / f"{variant}-{seed}.json"
    if record.exists():
        return json.loads(record.read_text())
    where, preset = place / f"{variant}-{seed}", variant if variant not in VARIANTS else "reading"
    evaluation = {name: options.pop(name) for name in ("count", "thresholds") if name in options}
    if not where.exists():
        given = {**VARIANTS.get(variant, {}), **options}
        probes.train_gates(loaded, preset=preset, output=where, panel=panel, seed=seed, **given)
    gates = probes.Gates.read(where)
    if "thresholds" in evaluation:
        shares = str(evaluation["thresholds"]).split("+")
        evaluation["thresholds"] = [gates.threshold_at(float(share)) for share in shares]
    return probes.evaluate_gates(loaded, gates, panel=panel, output=record, **evaluation).record()


def share(scores: dict[str, Any], panel: str, held_out: bool | None) -> float:
    cells = [c for c in scores["cells"] if c["panel"] == panel and held_out in (None, c["held_out"])]
    asked = sum(cell["asked"] for cell in cells)
    return 100 * sum(cell["right"] for cell in cells) / asked if asked else float("nan")


def line(name: str, several: list[dict[str, Any]]) -> str:
    """Means over seeds, with the extremes."""
    shown = []
    for values in ([share(scores, *side) for scores in several] for side in SIDES):
        spread = f" ({min(values):.0f}–{max(values):.0f})" if max(values) - min(values) >= 0.5 else ""
        shown.append(f"{fmean(values):.0f}{spread}")
    return f"| {name} | {' | '.join(shown)} | {fmean(scores['neutral_kl'] for scores in several):.3f} |"


def report(variant: str, records: list[dict[str, Any]]) -> None:
    areas = {family: [r["areas"][family]["value"] for r in records] for family in records[0]["areas"]}
    said = ", ".join(f"{family} {fmean(v):.3f} ({min(v):.3f}–{max(v):.3f})" for family, v in areas.items())
    print(f"\n{variant}, {len(records)} seeds; areas: {said}\n| | {COLUMNS.replace('  ', ' | ')} | KL |")
    print("|---" * 8 + "|")
    print(line("plain", [r["base"] for r in records]))
    print(line("soft", [r["soft"] for r in records]))
    shares = sorted({round(e["off_fraction"], 3) for r in records for e in r["entries"]})
    for off in shares:
        for family in areas:
            found = [
                e for r in records for e in r["entries"] if (e["family"], round(e["off_fraction"], 3)) == (family, off)
            ]
            if found:
                print(line(f"{off:.1%} {family}", found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--panel")
    parser.add_argument("--variants", default="reading")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("options", nargs="*")
    given = parser.parse_intermixed_args()
    import probes

    options = {name: value(text) for name, _, text in (option.partition("=") for option in given.options)}
    loaded = probes.load(given.model, dtype="float32", device="auto")
    given.directory.mkdir(parents=True, exist_ok=True)
    for variant in given.variants.split(","):
        seeds = [int(seed) for seed in given.seeds.split(",")]
        report(variant, [run(loaded, variant, s, given.directory, given.panel, dict(options)) for s in seeds])


if __name__ == "__main__":
    main()
