"""What lambda gates cost: a gated forward pass beside the plain one, and the memory of training, in one run.

    python -m benchmarks.gates MODEL [DTYPE …]

1. Time, 128 tokens, rounds interleaved, the fastest of each, in float32 and bfloat16: plain, soft gates, a hard mask.
   Limit: gated ≤ 1.1 × plain.
2. Memory (Linux), a fresh process each, peak of the resident size in copies of the model's weights, on the same batch:
   `load`; `plain`, the model loaded, and the same two passes over the text, one of them with gradient, without gates or
   loss; `train`, two steps of training. Limit: train − plain ≤ 0.1 copies of the weights, so that there is one copy.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Any

from benchmarks.probe import fastest

TOKENS = 128
LIMIT = 1.1


def times(model_name: str, dtype: str) -> None:
    import torch

    from probes.gates.apply import gate_shape, gated
    from probes.gates.gates import Gates
    from probes.live.load import load

    model = load(model_name, dtype=dtype, device="cpu").model
    gates = Gates(torch.randn(gate_shape(model)) * 0.1)
    ids = torch.arange(TOKENS)[None]
    masks = {"soft": gates.factors("energy"), "hard": gates.below(0.5).factors()}

    def plain() -> None:
        with torch.inference_mode():
            model(ids, use_cache=False)

    def with_gates(name: str) -> None:
        with torch.inference_mode(), gated(model, masks[name]):
            model(ids, use_cache=False)

    found = fastest({"plain": plain, "soft": lambda: with_gates("soft"), "hard": lambda: with_gates("hard")})
    for name, seconds in found.items():
        ratio = seconds / found["plain"]
        verdict = "" if name == "plain" else f"  (limit {LIMIT}: {'holds' if ratio <= LIMIT else 'MISSED'})"
        print(f"{dtype:9s} {name:6s} {seconds * 1e3:9.1f} ms   {ratio:5.3f} × plain{verdict}")


def examples() -> Any:
    import torch

    from probes.gates.encode import Example
    from probes.gates.train import Data

    text = [Example(torch.arange(64) + shift, torch.arange(64) == 40) for shift in range(4)]
    return Data(text, text, {})


def peak(model_name: str, what: str) -> tuple[float, float]:
    """(peak resident bytes, bytes of the weights) of a fresh process."""
    code = f"from benchmarks.gates import measure; measure({model_name!r}, {what!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used, weights = done.stdout.split()[-2:]
    return float(used), float(weights)


def measure(model_name: str, what: str) -> None:
    """Load, and then nothing, two plain passes or two steps; print the peak and the weights' size, in bytes."""
    from probes.gates.encode import collate
    from probes.gates.options import TrainOptions
    from probes.gates.train import base_logits, train
    from probes.live.load import load

    loaded = load(model_name, dtype="float32", device="cpu")
    data, model = examples(), loaded.model
    if what == "plain":
        batch = collate(data.forget, 0)
        for _ in range(2):
            inputs = model.get_input_embeddings()(batch.ids).requires_grad_()
            base = base_logits(model, batch, batch.predicted)
            logits = model(inputs_embeds=inputs, use_cache=False).logits[:, :-1][batch.predicted]
            (logits.float().log_softmax(-1) - base.float().log_softmax(-1)).square().mean().backward()
    if what == "train":
        train(loaded, data, TrainOptions(batch_size=4, retain_ratio=1, micro_batch=4, max_steps=2, epochs=2))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, weights)


def memory(model_name: str) -> None:
    found = {what: peak(model_name, what) for what in ("load", "plain", "train")}
    weights = found["load"][1]
    for what, (used, _) in found.items():
        print(
            f"memory    {what:6s} {used / 1e6:9.0f} MB   {used / weights:5.2f} × the weights ({weights / 1e6:.0f} MB)"
        )
    extra = (found["train"][0] - found["plain"][0]) / weights
    print(f"train − plain = {extra:+.2f} × the weights (limit 0.10: {'holds' if extra <= 0.1 else 'MISSED'})")


if __name__ == "__main__":
    for precision in sys.argv[2:] or ("float32", "bfloat16"):
        times(sys.argv[1], precision)
    memory(sys.argv[1])
