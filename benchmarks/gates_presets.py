"""Every preset trained on the atlas for a short while, and what its gates do: the effect of NKE, chat and scale modes.

    python -m benchmarks.gates_presets [STEPS] [RECORD.json]

One process, one seed, learning rate 0.05. Knowledge and reasoning retained with soft gates and with hard masks at three
off-fractions, each mask also rescaled as `mean` and `energy` would; random masks of the same size beside them. Chat
presets are asked in the chat template.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

OFFS = (0.05, 0.25, 0.5)
LEARNING_RATE = 0.05
COUNT = 45  # prompts to a panel
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in ("baseline", "nke_w1p0", "nke_optA", "nke_optB")),
    *((name, {}) for name in ("chat_energy", "chat_energy_optA", "chat_energy_optB", "chat_mean")),
    ("chat_energy", {"scale_mode": "none"}),  # the control that is not published: chat without rescaling
)


def run(loaded: Any, preset: str, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train one variant and score it."""
    from probes.gates.data import read_forget, read_retain
    from probes.gates.masks import SCALE_MODES, random_keep
    from probes.gates.options import from_preset
    from probes.gates.panels import atlas
    from probes.gates.score import Settings, accuracy
    from probes.gates.train import encode, train

    options = from_preset(preset, learning_rate=LEARNING_RATE, max_steps=steps, micro_batch=32, **changes)
    facts, sums = read_forget(None), read_retain(None)
    size = steps * options.batch_size  # only rows that are seen, drawn over all facts
    facts = random.Random(0).sample(facts[0], min(size, len(facts[0]))), facts[1]
    sums = sums[0][: size * options.retain_ratio], sums[1]
    trained = train(loaded, encode(loaded, facts, sums, options, {}), options)
    panels, gates = atlas(loaded.tokenizer, chat=options.chat, count=COUNT), trained.gates

    def kept(factors: Any) -> list[float]:
        scores = [accuracy(loaded, prompts, factors, Settings()) for prompts in (panels.forget, panels.reasoning)]
        return [round(score, 3) for score in scores]

    found: dict[str, Any] = {"preset": preset, "changes": changes, "plain": kept(None)}
    found["soft"] = kept(gates.factors(options.scale_mode))
    for off in OFFS:
        threshold = gates.threshold_at(off)
        masks = {mode: gates.below(threshold).factors(mode) for mode in SCALE_MODES}
        masks["random"] = random_keep(gates.keep(threshold), 0).float()
        found[f"{off:.0%}"] = {name: kept(factors) for name, factors in masks.items()}
    last = {name: round(trained.curves[name][-1], 3) for name in ("forget", "retain", "nke", "lambda_std")}
    return found | {"last_step": last, "seconds": round(trained.seconds, 1)}


def main(steps: int = 60, target: str | None = None) -> None:
    from probes.live.load import load
    from vindex.demo import CHECKPOINT

    loaded = load(CHECKPOINT, dtype="float32", device="cpu")
    found = []
    print(f"{steps} steps; each cell: facts / sums right")
    print(
        f"{'preset':22s} {'plain':9s} {'soft':9s} "
        + " ".join(f"{off:.0%} off: none, mean, energy, random" for off in OFFS)
    )
    for preset, changes in VARIANTS:
        made = run(loaded, preset, changes, steps)
        found.append(made)
        name = preset + "".join(f" {key}={value}" for key, value in changes.items())
        pairs = [made["plain"], made["soft"], *(pair for off in OFFS for pair in made[f"{off:.0%}"].values())]
        cells = " ".join(f"{facts:.2f}/{sums:.2f}" for facts, sums in pairs)
        print(f"{name:22s} {cells}  {made['last_step']} {made['seconds']} s", flush=True)
    if target:
        Path(target).write_text(json.dumps({"steps": steps, "learning_rate": LEARNING_RATE, "runs": found}) + "\n")


if __name__ == "__main__":
    main(*(convert(value) for convert, value in zip((int, str), sys.argv[1:], strict=False)))
