"""What the probe suite costs: time beside a bare forward pass, and peak memory over 1 to 8 texts, in one run.

    python benchmarks/probe.py MODEL [DTYPE]

1. Time, on one text, processor seconds, rounds interleaved, the least of each: `bare`, a forward pass without hooks;
   `statistics`, the same statistics on activations captured beforehand; `suite`, everything `vindex probe` does after
   loading but the eigendecompositions (which a vindex saves). Limit: suite ≤ 1.5 × (bare + statistics).
2. Memory (Linux): the peak of the resident size above the loaded model, in a fresh process for each number of texts,
   beside the same number of bare passes. The C library's threshold for returning memory is fixed: left to adapt, a
   process's heap grows by fragmentation over the first texts in bfloat16, and hides what the suite holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS = 7
LIMIT = 1.5


def fastest(jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Processor seconds of the fastest of ROUNDS runs of each job, run in turn."""
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            best[name] = min(best[name], time.process_time() - start)
    return best


def times(model_name: str, dtype: str) -> None:
    import torch

    from probes.live.hooks import capture
    from probes.live.load import load
    from probes.live.sites import layers, sites
    from probes.suite import constants, readings
    from probes.suite.activity import Activations
    from probes.suite.cka import compare, gram
    from probes.suite.definition import TOKENS
    from probes.suite.run import read_texts
    from probes.texts import encoded

    loaded = load(model_name, dtype=dtype, device="cpu")
    model, count = loaded.model, len(layers(loaded.model))
    own = [readings.own_activations(model, layer) for layer in layers(model)]
    (text,) = encoded(loaded, "factual", TOKENS)
    ids = torch.tensor([text.token_ids])
    with torch.inference_mode(), capture(model, sites(model, "gate", "up", "hidden", "residual")) as seen:
        logits = model(ids, use_cache=False).logits[0]

    def bare() -> None:
        with torch.inference_mode():
            model(ids, use_cache=False)

    def statistics() -> None:
        grams = []
        scratch = torch.empty(2, *seen["hidden", 0][0].shape)
        with torch.inference_mode():
            for layer in range(count):
                gate, up, hidden, residual = (
                    seen[role, layer][0].float() for role in ("gate", "up", "hidden", "residual")
                )
                sink = readings.sink_tokens(residual, layer)
                found = Activations(gate, up, hidden, model.dtype, own[layer][0])
                readings.read_layer(found, sink, layer, scratch)
                grams.append(gram(residual, about=residual[~sink].mean(0)))
            readings.top_mass(logits)
            compare(grams, list(range(1, len(text.token_ids))))

    def whole() -> None:
        taken = read_texts(loaded, [text])
        for measure in (constants.ffn_sparsity, constants.layer_temperature, constants.circuit_stages):
            measure(taken)

    found = fastest({"bare": bare, "statistics": statistics, "suite": whole})
    floor = found["bare"] + found["statistics"]
    print(f"{loaded.name}, {model.dtype}, {torch.get_num_threads()} thread(s), 256 tokens, best of {ROUNDS}")
    for name, seconds in found.items():
        print(f"  {name:12s} {seconds * 1e3:9.1f} ms   {seconds / found['bare']:5.2f} × bare")
    verdict = "holds" if found["suite"] <= LIMIT * floor else "MISSED"
    print(f"  suite / (bare + statistics) = {found['suite'] / floor:.2f} (limit {LIMIT}: {verdict})")


def peak(model_name: str, dtype: str, count: int, what: str) -> None:
    """Print MB resident after loading, and at the peak of `count` texts read (`suite`) or only run (`bare`)."""
    import torch

    from probes.live.load import load
    from probes.suite.definition import TOKENS
    from probes.suite.run import read_texts
    from probes.texts import BUNDLED, encoded

    loaded = load(model_name, dtype=dtype, device="cpu")
    probe_texts = encoded(loaded, BUNDLED[:count], TOKENS)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = resident("VmRSS")
    if what == "suite":
        read_texts(loaded, probe_texts)
    else:
        with torch.inference_mode():
            for text in probe_texts:
                loaded.model(torch.tensor([text.token_ids]), use_cache=False)
    print(before, resident("VmHWM"))


def resident(field: str) -> float:
    """MB: VmRSS, resident now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    model_name, dtype, *rest = [*sys.argv[1:], "float32"] if len(sys.argv) == 2 else sys.argv[1:]
    if rest:
        peak(model_name, dtype, int(rest[0]), rest[1])
        return
    times(model_name, dtype)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    for count in (1, 2, 4, 8):
        grown = []
        for what in ("bare", "suite"):
            command = [sys.executable, __file__, model_name, dtype, str(count), what]
            result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            before, highest = map(float, result.stdout.split()[-2:])
            grown.append(highest - before)
        print(f"  {count} text(s): peak above the loaded model: bare {grown[0]:.0f} MB, suite {grown[1]:.0f} MB")


if __name__ == "__main__":
    main()
