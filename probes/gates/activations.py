"""How strongly each neuron fires, for the masks that need no training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.gates.apply import gate_shape
from probes.gates.encode import Example, collate
from probes.live.hooks import capture
from probes.live.load import Loaded
from probes.live.sites import Site, sites
from probes.live.tokens import pad_token
from vindex.progress import Advance, unseen


def mean_magnitude(
    loaded: Loaded, examples: Sequence[Example], *, entity: bool, batch_size: int = 32, advance: Advance = unseen
) -> Tensor:
    """(L, I) float32: mean |h| where the examples predict a token (with `entity`, an entity token)."""
    sums, count = torch.zeros(gate_shape(loaded.model)), 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_token(loaded.tokenizer)).to(loaded.model.device)
        wanted = batch.entity[:, 1:] if entity else batch.predicted  # (B, T - 1)

        def add(site: Site, h: Tensor, wanted: Tensor = wanted) -> None:
            sums[site.layer] += h[:, :-1][wanted].float().abs().sum(0).cpu()

        with torch.no_grad(), capture(loaded.model, sites(loaded.model, "hidden"), observe=add):
            loaded.model(input_ids=batch.ids, attention_mask=batch.real.long(), use_cache=False)
        count += int(wanted.sum())
        advance(len(batch.ids))
    return sums / max(count, 1)
