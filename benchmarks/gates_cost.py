"""What scoring masks of gates costs, beside the forward passes that it needs, in CPU seconds of this process.

    python -m benchmarks.gates_cost MODEL PANEL [DTYPE] [COUNT]

The passes needed: the plain model over every token that is not padding, what prompts begin with alike once, and its
head where an answer or a neutral token is; for four masks, one of them soft, four times this and the plain model over
the neutral texts once. `gates eval` has about fifty. Limit: 1.3 times that. Rounds are interleaved, and the fastest of
each counts: on a busy machine one round alone says nothing.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import probes
from probes.gates.apply import gate_shape
from probes.gates.panels import QUESTIONS, neutral_texts, read_asked
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
    if len(sys.argv) not in (3, 4, 5):
        sys.exit(__doc__)
    name, panel, dtype, count = (*sys.argv[1:], *("bfloat16", "300")[len(sys.argv) - 3 :])
    loaded = probes.load(name, dtype=dtype, device="cpu")
    panels = read_asked(Path(panel) / "asked.jsonl", neutral_texts(None), count=int(count))
    texts = replace(panels, **dict.fromkeys(QUESTIONS, ()))
    soft = torch.full(gate_shape(loaded.model), 0.99)
    masks = [soft, *(torch.rand(soft.shape).gt(share).float() for share in (0.01, 0.02, 0.05))]
    list(score(loaded, panels, [None]))  # what only a first pass pays
    seconds: dict[str, list[float]] = {"plain": [], "texts": [], "masks": []}
    for _ in range(ROUNDS):
        for label, asked, several in (("plain", panels, [None]), ("texts", texts, [None]), ("masks", panels, masks)):
            with Inside(loaded.model) as inside:
                began = time.process_time()
                list(score(loaded, asked, several))
                whole = time.process_time() - began
            seconds[label].append(whole if label == "masks" else inside.seconds * inside.real / inside.tokens)
            print(f"{label}: {whole:.1f} s, {inside.seconds:.1f} s of it in the model; "
                  f"{inside.tokens:,} tokens, {inside.tokens - inside.real:,} of them padding", flush=True)  # fmt: skip
    needed = len(masks) * min(seconds["plain"]) + min(seconds["texts"])
    ratio = min(seconds["masks"]) / needed
    print(f"{len(masks)} masks cost {ratio:.2f} × the passes they need "
          f"(limit {LIMIT}: {'holds' if ratio <= LIMIT else 'MISSED'})")  # fmt: skip


if __name__ == "__main__":
    main()
