"""Where the subject is read, and how to read it and nothing else.

1. Second moments: sum of x xᵀ over the FFN inputs x of a layer. G: generic text. S: every position of the other
   subjects' prompts. Keys: x at the subject's last token, k_i for each fit phrasing of the deleted subject, k_n for
   each neutral sentence about it and k_j for each prompt of the others.
2. gate_read: the u that minimises uᵀAu + η Σ_i (u·k_i − 1)² with A = G + w·(S + Σ k_j k_jᵀ) + w′·Σ k_n k_nᵀ + ridge.
   It responds with nearly 1 to every key k_i of the deleted subject, whatever phrasing it stands in, and with little to
   what A has seen. With the mean key in place of all k_i (ROME's whitened key, Meng et al. 2022) a phrasing that begins
   with the subject got a tenth of the response. The k_n take the response where another of its known facts is
   asked, beside that to a paraphrase, from 0.78 to 0.70 (w′ 40) or 0.60 (150;
   docs/log/gate3-own-facts.md, 2026-11-25).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from probes.facts.passes import batches, device_of, part
from probes.facts.prompts import Prompt
from probes.live.hooks import capture
from probes.live.sites import Site
from vindex.errors import NumericError


class Seen(NamedTuple):
    """What one layer's FFN reads in some prompts."""

    moment: Tensor
    """(H, H) float32: the sum of x xᵀ over its inputs x."""
    keys: Tensor
    """(P, H) float32: mean input at the subject's last token, one row per prompt, in the order given."""


def observe(
    model: nn.Module, prompts: Sequence[Prompt], chosen: Sequence[int], role: str = "mlp_in"
) -> dict[int, Seen]:
    """Second moments over all positions and keys at the subject in the `chosen` layers, in one pass over `prompts`.

    `role`: of the site that is read (`probes.live.sites.ROLES`); "hidden" is the input of down_proj, of width I.
    """
    sites = [Site(role, layer) for layer in chosen]
    totals: dict[int, Tensor | float] = dict.fromkeys(chosen, 0.0)
    keys: dict[int, dict[str, Tensor]] = {layer: {} for layer in chosen}
    run = part(model, 0, max(chosen) + 1)
    for group in batches(prompts, device_of(model)):
        with torch.no_grad(), capture(model, sites) as seen:
            run(input_ids=group.ids)
        for site in sites:
            inputs = seen[site].float()
            rows = inputs[group.real]
            totals[site.layer] = totals[site.layer] + rows.T @ rows
            for row, prompt in enumerate(group.prompts):
                if prompt.subject:
                    keys[site.layer][prompt.name] = inputs[row, list(prompt.subject)].mean(0)
    named = {layer: [found[prompt.name] for prompt in prompts if prompt.subject] for layer, found in keys.items()}
    return {
        layer: Seen(torch.as_tensor(totals[layer]), torch.stack(own) if own else torch.empty(0))
        for layer, own in named.items()
    }


def read_direction(keys: Tensor, moment: Tensor, evenness: float, ridge: float) -> Tensor:
    """The u, (H,) float32, that minimises uᵀAu + `evenness`·Σ_i (u·k_i − 1)² over the keys k_i, rows of (P, H).

    A is `moment` with that share of its mean diagonal added to it.
    """
    wide, wanted = moment.double(), keys.double()
    raised = wide + ridge * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    direction, failed = torch.linalg.solve_ex(raised + evenness * wanted.T @ wanted, evenness * wanted.sum(0))
    if int(failed) or not torch.isfinite(direction).all():
        raise NumericError("the second moment of the FFN's inputs is singular; expected more text or a larger ridge")
    return direction.float()
