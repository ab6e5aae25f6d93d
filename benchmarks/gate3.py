"""What one deleted fact costs: seconds by stage, memory over the loaded model, and the saving of running only a tail.

    python -m benchmarks.gate3 MODEL [--fact France/capital] [--threads 1] [--json FILE]

`tail` is the ratio of one evaluation of the objective (forward and backward) through the whole model to the same from
the patched layer and the subject on, in one process. `memory` is the peak resident size of one whole run over the size
after loading, in MiB, beside the size of the model and of one gate_proj. Loading itself has a higher peak, which the
kernel is asked to forget (Linux alone).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.probe import resident
from probes.deletion.bench import Bench
from probes.deletion.delete import run
from probes.deletion.options import Options
from probes.deletion.tail import Tail
from probes.facts.sets import split
from probes.live.hooks import edited
from probes.live.load import load
from probes.live.sites import weight

LAYER_SHARE = 0.2  # of the model's depth: about where the method patches
REPEATS = 5


def stages(bench: Bench, name: str) -> dict[str, float]:
    """Seconds by stage of one whole run."""
    spent: dict[str, float] = {}
    now, began = "start", time.perf_counter()

    def tick(stage: str, _seconds: int = 1) -> None:
        nonlocal now, began
        spent[now] = spent.get(now, 0.0) + time.perf_counter() - began
        now, began = stage, time.perf_counter()

    bench.tick = tick
    run(bench, bench.panel.find(name))
    tick("end")
    return {stage: seconds for stage, seconds in spent.items() if stage != "start"}


def tail_ratio(bench: Bench, name: str) -> float:
    """Seconds of a whole-model evaluation over those of a tail, alternating, medians of REPEATS."""
    model: Any = bench.model
    prompts = split(bench.panel, bench.panel.find(name), bench.encoder).fit.phrasings
    layer = int(LAYER_SHARE * model.config.num_hidden_layers)
    tail = Tail.of(model, layer, prompts)
    change = torch.zeros(weight(model, "gate_proj", layer).shape[0], requires_grad=True)
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([prompt.ids + (0,) * (width - len(prompt.ids)) for prompt in prompts])
    last = torch.tensor([len(prompt.ids) - 1 for prompt in prompts])

    def whole() -> None:
        with edited(model, {("gate", layer): lambda gate: gate + change}):
            logits = model(ids, use_cache=False).logits
        logits[torch.arange(len(ids)), last].log_softmax(-1)[:, 0].sum().backward()

    def parts() -> None:
        tail.log_probs(change.expand(*tail.gate.shape))[:, 0].sum().backward()

    seconds: dict[str, list[float]] = {"whole": [], "parts": []}
    for _ in range(REPEATS):
        for label, evaluate in (("whole", whole), ("parts", parts)):
            began = time.perf_counter()
            evaluate()
            seconds[label].append(time.perf_counter() - began)
    return sorted(seconds["whole"])[REPEATS // 2] / sorted(seconds["parts"])[REPEATS // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--fact", default="France/capital")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load(arguments.model, dtype="float32")
    bench = Bench(loaded, None, Options())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    start = resident("VmRSS")
    found = stages(bench, arguments.fact)
    most = resident("VmHWM")
    gate = weight(loaded.model, "gate_proj", 0)
    result = {
        "threads": arguments.threads,
        "seconds": found,
        "total_seconds": sum(found.values()),
        "memory_over_load_mib": most - start,
        "model_mib": sum(p.numel() * p.element_size() for p in loaded.model.parameters()) / 2**20,
        "gate_proj_mib": gate.numel() * gate.element_size() / 2**20,
        "tail_ratio": tail_ratio(bench, arguments.fact),
    }
    for stage, seconds in found.items():
        print(f"{stage:28} {seconds:7.1f} s")
    for key, value in result.items():
        if isinstance(value, float):
            print(f"{key:28} {value:7.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
