"""Generic text, whose FFN inputs the read direction must not fire on: the bundled passages and the model's own words.

The bundled `generic.txt` (100 passages sampled from SmolLM2-135M-Instruct, Apache-2.0, about 10k tokens) serves models
of English at large. A model of something else, such as a small model of one domain, mostly reads what it would write
itself, so a seeded sample of that is added.
"""

from __future__ import annotations

from typing import Any

import torch

from probes.facts.prompts import Encoder, Prompt
from probes.facts.sets import passages

SAMPLE_LENGTH = 16


def generic_prompts(model: Any, tokenizer: Any, samples: int) -> list[Prompt]:
    """The bundled passages and `samples` tokens of the model's own text, as prompts without subject or answer."""
    encoder = Encoder(tokenizer)
    texts = [encoder.text(passage) for passage in passages("generic.txt")]
    texts += own_text(model, tokenizer, samples)
    return [Prompt("generic", "", ids, (), ()) for ids in texts]


def own_text(model: Any, tokenizer: Any, tokens: int, seed: int = 0) -> list[tuple[int, ...]]:
    """About `tokens` tokens sampled at temperature 1 from the model, in sequences of SAMPLE_LENGTH.

    They are drawn on the CPU, so that they are the same on a GPU.
    """
    rows = round(tokens / SAMPLE_LENGTH)
    if not rows:
        return []
    start = next(token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if token is not None)
    ids = torch.full((rows, 1), start, device=model.device)
    cache, step = None, ids
    draw = torch.Generator().manual_seed(seed)
    for _ in range(SAMPLE_LENGTH):
        with torch.no_grad():
            out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        step = torch.multinomial(out.logits[:, -1].float().softmax(-1).cpu(), 1, generator=draw).to(ids.device)
        ids = torch.cat((ids, step), dim=1)
    return [tuple(row) for row in ids.tolist()]
