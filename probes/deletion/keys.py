"""What FFNs read, in generic text and at a subject, and the direction that reads the subject and nothing else.

ROME's whitened key (Meng et al. 2022) stands for all phrasings by their mean: with it, a phrasing that begins with the
subject had a response of only 0.1. `read_direction` wants a response of 1 to each of them (docs/gate3-method.md, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.facts.passes import batches, device_of, part
from probes.facts.prompts import Encoder, Prompt
from probes.facts.sets import passages
from probes.live.hooks import capture
from probes.live.sites import Site
from vindex.errors import NumericError

SAMPLE_LENGTH = 16


class Seen(NamedTuple):
    """What one layer's FFN reads in some prompts."""

    moment: Tensor
    """(H, H) float32: the sum of x xᵀ over its inputs x."""
    keys: Tensor
    """(P, H) float32: mean input where each prompt's subject is read, in the order given; NaN where it has none."""


def observe(
    model: nn.Module, prompts: Sequence[Prompt], chosen: Sequence[int], role: str = "mlp_in"
) -> dict[int, Seen]:
    """Second moments over all positions and keys at the subject in the `chosen` layers, in one pass over `prompts`.

    `role`: of the site that is read (`probes.live.sites.ROLES`); "hidden" is the input of down_proj, of width I.
    """
    sites = [Site(role, layer) for layer in chosen]
    totals: dict[int, Any] = dict.fromkeys(chosen, 0.0)
    keys: dict[tuple[int, Prompt], Tensor] = {}
    run = part(model, 0, max(chosen) + 1)
    for group in batches(prompts, device_of(model)):
        with torch.no_grad(), capture(model, sites) as seen:
            run(input_ids=group.ids)
        for site in sites:
            inputs = seen[site].float()
            rows = inputs[group.real]
            totals[site.layer] = totals[site.layer] + rows.T @ rows
            for row, prompt in enumerate(group.prompts):
                keys[site.layer, prompt] = inputs[row, list(prompt.subject)].mean(0)
    return {at: Seen(totals[at], torch.stack([keys[at, prompt] for prompt in prompts])) for at in chosen}


def generic_prompts(model: Any, tokenizer: Any, samples: int) -> list[Prompt]:
    """Generic text, as prompts without subject or answer: bundled passages, and `samples` tokens of the model's own.

    The 100 bundled ones serve models of English at large (sampled from SmolLM2-135M-Instruct, Apache-2.0, about 10k
    tokens). A model of something else, such as a small one of one domain, mostly reads what it would write itself.
    """
    texts = [Encoder(tokenizer).text(passage) for passage in passages("generic.txt")]
    return [Prompt("generic", "", ids, (), ()) for ids in texts + own_text(model, tokenizer, samples)]


def own_text(model: Any, tokenizer: Any, tokens: int, seed: int = 0) -> list[tuple[int, ...]]:
    """About `tokens` tokens sampled at temperature 1 from the model, in sequences of SAMPLE_LENGTH.

    They are drawn on the CPU, so that they are the same on a GPU.
    """
    start = next(token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if token is not None)
    ids = torch.full((round(tokens / SAMPLE_LENGTH), 1), start, device=model.device)
    cache, step = None, ids
    draw = torch.Generator().manual_seed(seed)
    for _ in range(SAMPLE_LENGTH):
        with torch.no_grad():
            out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        step = torch.multinomial(out.logits[:, -1].float().softmax(-1).cpu(), 1, generator=draw).to(ids.device)
        ids = torch.cat((ids, step), dim=1)
    return [tuple(row) for row in ids.tolist()]


def ridged(moment: Tensor, ridge: float) -> Tensor:
    """The second moment (n, n) in float64, with that share of its mean diagonal added to its diagonal."""
    wide = moment.double()
    return wide + ridge * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)


def read_direction(keys: Tensor, moment: Tensor, evenness: float, ridge: float) -> Tensor:
    """The u, (H,) float32, that minimises uᵀAu + `evenness`·Σ_i (u·k_i − 1)² over the keys k_i, rows of (P, H).

    A is the `moment` of what u must not respond to, `ridged`. Raises NumericError where it is singular.
    """
    wanted = keys.double()
    matrix = ridged(moment, ridge) + evenness * wanted.T @ wanted
    direction, failed = torch.linalg.solve_ex(matrix, evenness * wanted.sum(0))
    if int(failed) or not torch.isfinite(direction).all():
        raise NumericError("the second moment of the FFN's inputs is singular; expected more text or a larger ridge")
    return direction.float()
