"""Forward passes that do no more work than the question needs.

- Prompts are padded on the right: with causal attention nothing before the padding sees it, so no mask is needed and a
  batch gives what single prompts give.
- Logits are computed at the answer's positions only.
- `part` is the model between two layers, sharing all weights. A patch in layer l changes nothing before that layer's
  FFN, and next to nothing before the subject: `Tail` runs what precedes both once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from probes.facts.prompts import Prompt
from probes.hooks import capture
from probes.model import Layer, Site, layers
from vindex.errors import ProbeError

BATCH_TOKENS = 512
"""Padded tokens per forward pass; bounds the memory that activations take."""
PARTS_TOLERANCE = 0.03
"""Largest difference in probability between the model run whole and in parts; bfloat16 differs by about 0.01."""


class Batch(NamedTuple):
    """Prompts with their answers but for the last token, padded on the right."""

    prompts: tuple[Prompt, ...]
    ids: Tensor
    """(B, T)"""
    real: Tensor
    """(B, T) bool: not padding."""
    rows: Tensor
    """(N,) row of each position looked at: those that predict an answer token, or all from the subject on."""
    columns: Tensor
    """(N,) its column."""
    targets: Tensor
    """(N,) the answer token there; 0 for a prompt without an answer."""

    def answers(self, log_probs: Tensor) -> Tensor:
        """(B,) log-probability of each prompt's whole answer, from log-probabilities (N, V) at `rows`, `columns`."""
        at = log_probs.gather(1, self.targets[:, None])[:, 0]
        return torch.zeros(len(self.prompts), device=at.device).index_add(0, self.rows, at)


def batch(prompts: Sequence[Prompt], device: torch.device) -> Batch:
    """Pad and stack `prompts`."""
    texts = [prompt.ids + prompt.answer[:-1] for prompt in prompts]
    width = max(map(len, texts))
    ids = torch.tensor([text + (0,) * (width - len(text)) for text in texts], device=device)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    places = [(row, *place) for row, prompt in enumerate(prompts) for place in _places(prompt)]
    rows, columns, targets = torch.tensor(places, device=device).unbind(1)
    real = torch.arange(width, device=device) < lengths[:, None]
    return Batch(tuple(prompts), ids, real, rows, columns, targets)


def _places(prompt: Prompt) -> list[tuple[int, int]]:
    """(column, token) of each answer token; without an answer, of every position from the subject on."""
    last = len(prompt.ids) - 1
    if prompt.answer:
        return [(last + step, token) for step, token in enumerate(prompt.answer)]
    return [(column, 0) for column in range(min(prompt.subject, default=last), last + 1)]


def batches(prompts: Sequence[Prompt], device: torch.device) -> Iterator[Batch]:
    """Batches of prompts of similar length, at most BATCH_TOKENS padded tokens each."""
    waiting: list[Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.ids) + len(prompt.answer)):
        width = len(prompt.ids) + len(prompt.answer)
        if waiting and width * (len(waiting) + 1) > BATCH_TOKENS:
            yield batch(waiting, device)
            waiting = []
        waiting.append(prompt)
    if waiting:
        yield batch(waiting, device)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's embedding lies."""
    causal: Any = model
    return causal.get_input_embeddings().weight.device


def part(model: nn.Module, start: int, stop: int) -> Callable[..., Tensor]:
    """The decoder's layers start … stop-1 as a function of ids or `inputs_embeds`, without the final norm.

    It is a shallow copy: weights and hooks are the model's own, and the model itself is not changed.
    """
    causal: Any = model
    whole = causal.get_decoder()
    piece = copy.copy(whole)
    piece._modules = dict(whole._modules)
    piece.layers = nn.ModuleList(whole.layers[start:stop])
    piece.norm = nn.Identity()
    piece.config = copy.copy(whole.config)
    piece.config.num_hidden_layers = stop - start
    kinds = getattr(whole.config, "layer_types", None)
    if kinds is not None:
        piece.config.layer_types = kinds[start:stop]
    # without a cache it must make none of its own: that would have room for the piece's number of layers only
    return lambda **inputs: piece(**inputs, use_cache=inputs.get("past_key_values") is not None).last_hidden_state


def unembed(model: nn.Module, hidden: Tensor) -> Tensor:
    """Float32 log-probabilities (…, V) of the residual stream (…, H) after the last layer."""
    causal: Any = model
    logits = causal.get_output_embeddings()(causal.get_decoder().norm(hidden))
    return logits.float().log_softmax(-1)


def last_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """Residual stream (B, T, H) after the last layer."""
    return part(model, 0, len(layers(model)))(input_ids=ids)


class Tail:
    """The model from the FFN of `layer` on, and from the subject on, for prompts whose earlier activations stay.

    The prompts lie end to end in one row, so that nothing is padded, and each attends to itself alone. First comes what
    stands before their first mentions of the subject: its keys and values are computed once. There u·x is close to 0,
    and taking it as 0 while fitting saves half of the work (in chat, most of it); measurements never use this shortcut.
    Then the rest: T positions, those of one prompt after those of another.
    """

    def __init__(self, model: nn.Module, layer: int, prompts: Sequence[Prompt]):
        self.model, self.prompts = model, tuple(prompts)
        self.at: Layer = layers(model)[layer]
        self._device = device_of(model)
        firsts = torch.tensor([min(prompt.subject) for prompt in prompts], device=self._device)
        self._batch = batch(prompts, self._device)
        self.rows, self.targets = self._batch.rows, self._batch.targets
        owner, self._positions = self._end_to_end(firsts)
        self._start = int(firsts.sum())
        self._mask = self._attends(owner)
        # a position's column among the T: its prompt's first one, and so many on
        begins = torch.searchsorted(owner[self._start :], torch.arange(len(prompts), device=self._device)) - firsts
        self._columns = self._batch.columns + begins[self.rows]
        self.subjects = [[begin + at for at in p.subject] for begin, p in zip(begins.tolist(), prompts, strict=True)]
        ids = self._batch.ids[owner, self._positions]
        sites = [Site(role, layer) for role in ("mlp_in", "mlp_out", "residual", "gate", "up")]
        with torch.no_grad(), capture(model, sites) as seen:
            part(model, 0, layer + 1)(
                input_ids=ids[None], attention_mask=self._mask, position_ids=self._positions[None]
            )
        self._rest = part(model, layer + 1, len(layers(model)))
        self.mlp_in, self.mlp_out, self.residual, self.gate, self.up = (seen[at][0, self._start :] for at in sites)
        self._past, self._unchanged = self._run_once(seen[Site("residual", layer)])

    def log_probs(self, change: Tensor | None = None) -> Tensor:
        """Float32 log-probabilities (N, V) at the answer positions, after adding `change` (T, I) to the gate."""
        if change is None:
            with torch.no_grad():
                return unembed(self.model, self._unchanged)
        activation: Any = self.at.mlp.act_fn
        gate = (self.gate + change).to(self.gate.dtype)
        return self.log_probs_of(activation(gate) * self.up)

    def log_probs_of(self, down_in: Tensor) -> Tensor:
        """The same for another input of down_proj, (T, I)."""
        hidden = self.residual + (self.at.down_proj(down_in) - self.mlp_out)
        after = self._rest(
            inputs_embeds=hidden[None],
            attention_mask=self._mask[..., self._start :, :],
            position_ids=self._positions[None, self._start :],
            past_key_values=self._cache(),
        )
        return unembed(self.model, after[0, self._columns])

    def answers(self, log_probs: Tensor) -> Tensor:
        """(B,) log-probability of each prompt's whole answer, from `log_probs` (N, V)."""
        return self._batch.answers(log_probs)

    def _end_to_end(self, firsts: Tensor) -> tuple[Tensor, Tensor]:
        """Row in the batch and column there of every token: all before their prompt's `firsts`, then all others."""
        begun = torch.arange(self._batch.ids.shape[1], device=self._device) >= firsts[:, None]
        order = torch.cat([(self._batch.real & which).nonzero() for which in (~begun, begun)])
        owner, positions = order.T.contiguous()
        return owner, positions

    def _attends(self, owner: Tensor) -> Tensor:
        """(1, 1, M, M), M all tokens: what to add to attention scores, so that each sees its prompt up to itself."""
        sees = (owner[:, None] == owner) & (self._positions[:, None] >= self._positions)
        dtype = self.at.down_proj.weight.dtype
        return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)[None, None]

    def _run_once(self, residual: Tensor) -> tuple[list[tuple[int, Tensor, Tensor]], Tensor]:
        """Layer number, keys and values of what stands before the subject, for every layer after the patched one.

        And the last layer's residual stream (N, H) at the answer positions, where nothing is changed.
        """
        cache = DynamicCache()
        with torch.no_grad():
            after = self._rest(
                inputs_embeds=residual,
                attention_mask=self._mask,
                position_ids=self._positions[None],
                past_key_values=cache,
            )
        stored: Any = cache.layers
        past = [
            (index, stored[index].keys[..., : self._start, :], stored[index].values[..., : self._start, :])
            for index in range(self.at.number + 1, len(layers(self.model)))
        ]
        return past if self._start else [], after[0, self._start + self._columns]

    def _cache(self) -> Any:
        """A cache that holds what stands before the subject; a pass appends to it, so each gets its own."""
        if not self._past:
            return None
        cache = DynamicCache()
        blank = self._past[0][1]
        for index in range(self.at.number + 1):  # layers before the tail's first, which it never asks for
            cache.update(blank, blank, index)
        for index, keys, values in self._past:
            cache.update(keys, values, index)
        return cache


def check_parts(model: nn.Module, layer: int, prompt: Prompt) -> None:
    """An architecture that does more than its layers and its final norm cannot be run in parts: ProbeError."""
    whole: Any = model
    tail = Tail(model, layer, [prompt])
    with torch.no_grad():
        ids = torch.tensor([prompt.ids], device=device_of(model))
        together = whole(ids, use_cache=False).logits[0, -1].float().softmax(-1)
        parts = tail.log_probs(torch.zeros_like(tail.gate))[0].exp()
    gap = float((together - parts).abs().max())
    if not gap < PARTS_TOLERANCE:
        raise ProbeError(
            f"{type(model).__name__}: run in parts it gives other probabilities than whole (by {gap:.2g}); "
            "the forward method supports models like Qwen3, Qwen2, Llama and Mistral"
        )
