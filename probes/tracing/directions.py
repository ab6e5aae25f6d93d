"""What the FFNs read and write at a position, along the directions of a vindex.

1. `generic`: v · x over generic text, its mean and spread for each gate direction v, tokens that are sinks left out.
2. `along`: z of v · x at the position against these; coefficients d · y of what the FFN writes (y) along the down
   directions d; and what each adds to the target's logit, (d · y)(u · d). What of y lies outside all of them is a
   remainder with its own effect, so that the rows add up to what the FFN added.
3. Of two prompts it is the same with the differences of x and of y, and z is the difference over √2 times the spread,
   which is that of two tokens of generic text.

4. Where the vindex has responses, `responses`: what goes with such a read in text, as it reaches the target's logit.

A gate and a down direction of the same rank have nothing to do with each other: the rows of the two never share a line.
Looking at FFNs through their singular directions: Millidge & Black 2022; NaNA ("SVD as a Fast Interpretability Method
for Transformers", ICML 2026) reads and writes of GPT-2 in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes import texts
from probes.live.hooks import capture
from probes.live.load import Loaded
from probes.live.sinks import sinks
from probes.live.sites import Site, sites
from vindex.progress import Progress, silent
from vindex.reader import Vindex

TOKENS = 48
"""Of each generic text: a few hundred tokens in all tell a mean and a spread to a few per cent, in a second or two."""

USUAL = 0.95


class Generic(NamedTuple):
    """v · x over generic text; L layers, F directions."""

    mean: np.ndarray
    """(L, F)"""
    spread: np.ndarray
    """(L, F) standard deviation."""
    usual: np.ndarray
    """(L,) the largest |z| over the F directions stays below this at 95 % of the tokens."""
    tokens: int
    """How many were read; in a layer its sinks are left out."""
    names: tuple[str, ...]


class Along(NamedTuple):
    """L layers, F directions, all float64."""

    read: np.ndarray
    """(L, F) v · x."""
    excess: np.ndarray
    """(L, F) what of it is not generic: less the mean, or all of a difference."""
    z: np.ndarray
    """(L, F) that in spreads of generic text; NaN where a direction reads nothing."""
    read_share: np.ndarray
    """(L,) share of ‖x‖² inside the F gate directions."""
    coefficient: np.ndarray
    """(L, F) d · y."""
    adds: np.ndarray
    """(L, F) what it adds to the target's logit."""
    outside: np.ndarray
    """(L,) what the rest of y adds."""
    write_share: np.ndarray
    """(L,) share of ‖y‖² inside the F down directions."""


def generic(
    loaded: Loaded, vindex: Vindex, names: Iterable[str] | str | None = None, progress: Progress = silent
) -> Generic:
    """Read the first TOKENS tokens of each text (bundled names or files) and tell what v · x is there."""
    model, given = loaded.model, texts.encoded(loaded, names, TOKENS)
    frames = [torch.from_numpy(gate.astype(np.float32)).to(model.device) for gate in vindex.gate]  # (F, H) each
    advance = progress("generic text", len(frames))
    pending: list[Tensor] = []
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def see(site: Site, value: Tensor) -> None:
        if site.role == "mlp_in":
            pending.append(value.float() @ frames[site.layer].T)  # (texts, TOKENS, F)
            return
        kept = ~torch.stack([sinks(norms) for norms in value.float().norm(dim=2)])
        read = pending.pop()[kept].double()
        mean, spread = read.mean(0), read.std(0)
        largest_z = ((read - mean) / spread).nan_to_num(0, 0, 0).abs().amax(1)
        found.append((mean, spread, largest_z.quantile(USUAL)))
        advance(1)

    ids = torch.tensor([text.token_ids for text in given], device=model.device)
    with torch.inference_mode(), capture(model, sites(model, "mlp_in", "residual"), observe=see):
        model.get_decoder()(input_ids=ids, use_cache=False)
    mean, spread, usual = (torch.stack(each).cpu().numpy() for each in zip(*found, strict=True))
    return Generic(mean, spread, usual, ids.numel(), tuple(text.name for text in given))


def along(
    vindex: Vindex, x: np.ndarray, y: np.ndarray, u: np.ndarray, about: Generic, *, difference: bool = False
) -> Along:
    """The directions of every layer at x and y (L, H), which are those of one prompt or a `difference` of two.

    u: (H,) of `probes.tracing.stream.Frozen`, by which what is written becomes what is added to the target's logit.
    """
    read = _products(vindex.gate, x)
    excess, spread = (read, about.spread * 2**0.5) if difference else (read - about.mean, about.spread)
    z = np.divide(excess, spread, out=np.full_like(excess, np.nan), where=spread > 0)
    coefficient = _products(vindex.down, y)
    adds = coefficient * _products(vindex.down, np.broadcast_to(u, y.shape))
    inside = np.stack([down.astype(np.float64).T @ row for down, row in zip(vindex.down, coefficient, strict=True)])
    return Along(read, excess, z, _share(read, x), coefficient, adds, (y - inside) @ u, _share(coefficient, y))


def responses(vindex: Vindex, excess: np.ndarray, u: np.ndarray) -> np.ndarray | None:
    """(L, F) what usually goes with reads of this `excess` (L, F), in units of the target's logit: u · (excess r).

    NaN where a direction has no response r; None for a vindex without responses.
    """
    if not vindex.index.has_responses:
        return None
    slope = vindex.response_stats.slope
    return np.where(slope > 0, excess * slope, np.nan) * _products(
        vindex.responses, np.broadcast_to(u, (len(slope), len(u)))
    )


def largest(values: np.ndarray, k: int) -> Iterator[tuple[int, int]]:
    """Layer and feature of the k entries of (L, F) that are farthest from 0; NaN counts as nothing."""
    order = np.argsort(-np.abs(np.nan_to_num(values)), axis=None, kind="stable")[:k]
    return ((int(place) // values.shape[1], int(place) % values.shape[1]) for place in order)


def _products(frames: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(L, F) products of each layer's directions (L, F, H) with its vector (L, H), a layer at a time."""
    return np.stack([frame.astype(np.float64) @ vector for frame, vector in zip(frames, vectors, strict=True)])


def _share(products: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    whole: Any = np.square(vectors).sum(1)
    return np.divide(np.square(products).sum(1), whole, out=np.full(len(whole), np.nan), where=whole > 0)
