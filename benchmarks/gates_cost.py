"""What scoring a mask of gates costs, beside the forward passes that it needs, in CPU seconds of this process.

    python -m benchmarks.gates_cost MODEL PANEL [DTYPE] [COUNT]

The passes needed: the plain model over every token that is not padding, what prompts begin with alike once, and its
head where an answer or a neutral token is. Limit: a mask costs at most 1.3 times that. Rounds are interleaved, and the
fastest of each counts: on a busy machine one round alone says nothing.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import probes
from probes.gates.apply import gate_shape
from probes.gates.panels import neutral_texts, read_asked
from probes.gates.score import score

LIMIT, ROUNDS = 1.3, 3


class Inside:
    """Seconds in the decoder and in the head, and how many tokens the decoder was given, padding and others."""

    def __init__(self, model: Any) -> None:
        self.seconds, self.tokens, self.real, self._began, self._model = 0.0, 0, 0, 0.0, model

    def __enter__(self) -> Inside:
        self._hooks = ExitStack()
        decoder, head = self._model.get_decoder(), self._model.get_output_embeddings()
        handles = [decoder.register_forward_pre_hook(self._count, with_kwargs=True)]
        handles += [part.register_forward_pre_hook(self._start) for part in (decoder, head)]
        handles += [part.register_forward_hook(self._stop) for part in (decoder, head)]
        for handle in handles:
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        self.tokens += ids.numel()
        self.real += ids.numel() if mask is None else int(mask[:, -ids.shape[1] :].sum())

    def _start(self, *_: object) -> None:
        self._began = time.process_time()

    def _stop(self, *_: object) -> None:
        self.seconds += time.process_time() - self._began


def main() -> None:
    name, panel, dtype, count = (*sys.argv[1:], *("bfloat16", "300")[len(sys.argv) - 3 :])
    loaded = probes.load(name, dtype=dtype, device="cpu")
    panels = read_asked(Path(panel) / "asked.jsonl", neutral_texts(None), count=int(count))
    masks = {"plain": None, "gated": torch.full(gate_shape(loaded.model), 0.99)}
    list(score(loaded, panels, [None]))  # what only a first pass pays
    needed: list[float] = []
    whole: dict[str, list[float]] = {label: [] for label in masks}
    for _ in range(ROUNDS):
        for label, factors in masks.items():
            with Inside(loaded.model) as inside:
                began = time.process_time()
                list(score(loaded, panels, [factors]))
                whole[label].append(time.process_time() - began)
            if factors is None:
                needed.append(inside.seconds * inside.real / inside.tokens)
            print(f"{label}: {whole[label][-1]:.1f} s, {inside.seconds:.1f} s of it in the model; "
                  f"{inside.tokens:,} tokens, {inside.tokens - inside.real:,} of them padding")  # fmt: skip
    ratio = min(whole["gated"]) / min(needed)
    print(f"a mask costs {ratio:.2f} × the passes it needs (limit {LIMIT}: {'holds' if ratio <= LIMIT else 'MISSED'})")


if __name__ == "__main__":
    main()
