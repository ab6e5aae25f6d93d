"""Gates over training seeds, beside masks that need no training: what they forget, and what they keep.

    python -m benchmarks.gates_seeds MODEL DIR --panel PANEL [--variants reading,...] [--seeds 31,32,33]
        [--off 0.5,1,2,5,10] [--count 300] [--controls ratio,random,...] [--dtype bfloat16] [option=value ...]

1. For every variant and seed gates are trained, to `DIR/VARIANT-SEED`. A variant is a preset, or a part of VARIANTS:
   `reading` without one of its parts. Further options are of training, for all variants.
2. Soft gates, and masks with so many per cent of the neurons off, are scored on the panel. So are the controls, once
   for all seeds: ranked in each layer by mean |h|, or at random with five seeds, and as many off in every layer.
3. Every score goes to `DIR/scores.json` as soon as it is known, under a hash of all that decides it. What is there, or
   was trained, is taken over. `DIR/table.md` is written anew after every group of masks: mean, and extremes over the
   seeds, of each panel in per cent.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

import probes
from probes.gates.apply import gate_shape
from probes.gates.controls import RANDOM_SEEDS, magnitudes, ranked
from probes.gates.data import panel_files, read_forget, read_retain
from probes.gates.evaluation import area, kept_of
from probes.gates.gates import Gates
from probes.gates.journal import Journal, context
from probes.gates.panels import Panels, neutral_texts, read_asked
from probes.gates.score import Scores, Settings, score
from probes.live.load import Loaded
from probes.live.match import weights_sha256

VARIANTS: dict[str, dict[str, Any]] = {  # of the preset `reading`
    "no-context": {"context_weight": 0.0},
    "no-ratio": {"init_ratio": 0.0, "init_std": 0.1},
    "no-nke": {"unmasked_retain_weight": 0.0},
    "closed": {"init_mean": 0.0},
}
SIDES = (("forget", False), ("forget", True), ("oracle", None), ("conflict", None), ("reasoning", False),
         ("reasoning", True))  # fmt: skip
COLUMNS = "facts | new facts | in-context | conflict | kinds | new kinds | KL"


class Maker(NamedTuple):
    """Gates of one way to get them, and seed."""

    name: str
    seed: int | None
    gates: Gates
    trained: bool


def value(text: str) -> Any:
    return json.loads(text) if re.fullmatch(r"-?[\d.e-]+", text) else text


def trained(loaded: Loaded, given: argparse.Namespace) -> Iterator[Maker]:
    for variant in filter(None, given.variants.split(",")):
        preset = "reading" if variant in VARIANTS else variant
        options = VARIANTS.get(variant, {}) | {name: value(text) for name, _, text in map(split, given.options)}
        for seed in map(int, given.seeds.split(",")):
            where, began = given.directory / f"{variant}-{seed}", time.process_time()
            if not where.exists():
                probes.train_gates(loaded, preset=preset, output=where, panel=given.panel, seed=seed, **options)
                tell(f"{where.name}: trained in {time.process_time() - began:.0f} s of CPU")
            yield Maker(variant, seed, Gates.read(where), trained=True)


def split(option: str) -> tuple[str, str, str]:
    return option.partition("=")


def controls(loaded: Loaded, given: argparse.Namespace) -> Iterator[Maker]:
    ways = [way for way in given.controls.split(",") if way]
    if set(ways) - {"random"}:
        files = panel_files(given.panel)
        found = magnitudes(loaded, read_forget(files.forget)[0], read_retain(files.retain)[0], chat=False)
        yield from (Maker(way, None, Gates(ranked(found.scores(way))), False) for way in ways if way != "random")
    for seed in range(RANDOM_SEEDS) if "random" in ways else ():
        drawn = torch.rand(gate_shape(loaded.model), generator=torch.Generator().manual_seed(seed))
        yield Maker("random", seed, Gates(ranked(drawn)), False)


class Table:
    """Scores by (name, share off; 0 is soft), in the order of the seeds."""

    def __init__(self, plain: Scores, shares: list[float]) -> None:
        self.plain, self.shares, self.scores = plain, shares, {}

    def add(self, maker: Maker, found: dict[float, Scores]) -> None:
        for share, scores in found.items():
            self.scores.setdefault((maker.name, share), []).append(scores)

    def __str__(self) -> str:
        names = dict.fromkeys(name for name, _ in self.scores)
        lines = [f"| | {COLUMNS} |", "|---" * 8 + "|", line("plain model", [self.plain])]
        for share in (0.0, *self.shares):
            for name in names:
                if found := self.scores.get((name, share)):
                    lines.append(line(f"{share:.1%} off, {name}" if share else f"soft, {name}", found))
        lines += ["", "| | area | over seeds |", "|---|---|---|"]
        for name in names:
            lines.append(self.area(name))
        return "\n".join(lines) + "\n"

    def area(self, name: str) -> str:
        by_seed = zip(*(self.scores[name, share] for share in sorted(self.shares, reverse=True)), strict=True)
        values = [area([kept_of(scores, self.plain) for scores in curve]) for curve in by_seed]
        return f"| {name} | {fmean(values):.3f} | {min(values):.3f} … {max(values):.3f} |"


def line(name: str, several: list[Scores]) -> str:
    """Means over seeds, with the extremes."""
    shown = []
    for values in ([100 * scores.share(*side).value for scores in several] for side in SIDES):
        spread = f" ({min(values):.0f}–{max(values):.0f})" if max(values) - min(values) >= 0.5 else ""
        shown.append(f"{fmean(values):.0f}{spread}")
    kl = [scores.neutral_kl for scores in several]
    spread = f" ({min(kl):.3f}–{max(kl):.3f})" if max(kl) - min(kl) >= 0.0005 else ""
    return f"| {name} | {' | '.join(shown)} | {fmean(kl):.3f}{spread} |"


def scored(loaded: Loaded, panels: Panels, several: list[Any], kept: Journal, settings: Settings) -> list[Scores]:
    """The scores of each of several factors on h, from what is kept where it is."""
    left = [one for one in several if kept.get(one) is None]
    for one, found in zip(left, score(loaded, panels, left, settings), strict=True):
        kept.put(one, found)
    return [found for one in several if (found := kept.get(one)) is not None]


def tell(text: str) -> None:
    print(f"{time.process_time():7.0f} s  {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--panel", type=Path, required=True)
    parser.add_argument("--variants", default="reading")
    parser.add_argument("--seeds", default="31,32,33")
    parser.add_argument("--off", default="0.5,1,2,5,10")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--controls", default="ratio,random,contrast,largest")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("options", nargs="*")
    given = parser.parse_intermixed_args()

    loaded = probes.load(given.model, dtype=given.dtype, device="auto")
    given.directory.mkdir(parents=True, exist_ok=True)
    panels = read_asked(panel_files(given.panel).asked, neutral_texts(None), count=given.count)
    shares, settings = [float(share) / 100 for share in given.off.split(",")], Settings()
    kept = Journal(given.directory / "scores.json", context(loaded, weights_sha256(loaded), panels, settings))
    table = Table(scored(loaded, panels, [None], kept, settings)[0], shares)
    for makers in (trained, controls):
        for maker in makers(loaded, given):
            masks = {share: maker.gates.off(share).factors() for share in shares}
            masks = {0.0: maker.gates.factors(maker.gates.scale_mode), **masks} if maker.trained else masks
            found = scored(loaded, panels, list(masks.values()), kept, settings)
            table.add(maker, dict(zip(masks, found, strict=True)))
            (given.directory / "table.md").write_text(str(table), encoding="utf-8")
            tell(f"{maker.name} {'' if maker.seed is None else maker.seed}: scored")
    print(table)


if __name__ == "__main__":
    main()
