"""Forward passes that do no more work than the question needs.

- Prompts are padded on the right: with causal attention nothing before the padding sees it, so no mask is needed and a
  batch gives what single prompts give.
- Logits are computed at the answer's positions only.
- `part` is the model between two layers, sharing all weights. A patch in layer l changes nothing before that layer's
  FFN, so `Tail` runs what precedes it once and starts every later pass from there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.facts.prompts import Prompt
from probes.hooks import capture
from probes.model import Layer, Site, layers
from vindex.errors import ProbeError

BATCH_TOKENS = 1024
"""Padded tokens per forward pass; bounds the memory that activations take."""


class Batch(NamedTuple):
    """Prompts with their answers but for the last token, padded on the right."""

    prompts: tuple[Prompt, ...]
    ids: Tensor
    """(B, T)"""
    real: Tensor
    """(B, T) bool: not padding."""
    rows: Tensor
    """(N,) row of each position that predicts an answer token; N = number of answer tokens of all prompts."""
    columns: Tensor
    """(N,) its column."""
    targets: Tensor
    """(N,) the answer token there; 0 for a prompt without an answer, which gets its last position."""

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
    places = [
        (row, len(prompt.ids) - 1 + step, token)
        for row, prompt in enumerate(prompts)
        for step, token in enumerate(prompt.answer or (0,))
    ]
    rows, columns, targets = torch.tensor(places, device=device).unbind(1)
    real = torch.arange(width, device=device) < lengths[:, None]
    return Batch(tuple(prompts), ids, real, rows, columns, targets)


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
    return lambda **inputs: piece(**inputs, use_cache=False).last_hidden_state


def unembed(model: nn.Module, hidden: Tensor) -> Tensor:
    """Float32 log-probabilities (…, V) of the residual stream (…, H) after the last layer."""
    causal: Any = model
    logits = causal.get_output_embeddings()(causal.get_decoder().norm(hidden))
    return logits.float().log_softmax(-1)


def last_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """Residual stream (B, T, H) after the last layer."""
    return part(model, 0, len(layers(model)))(input_ids=ids)


class Tail:
    """The model from the FFN of `layer` on, for one batch of prompts whose earlier activations never change."""

    def __init__(self, model: nn.Module, layer: int, prompts: Sequence[Prompt]):
        self.model = model
        self.at: Layer = layers(model)[layer]
        self.batch = batch(prompts, device_of(model))
        sites = [Site(role, layer) for role in ("mlp_in", "mlp_out", "residual", "gate", "up")]
        with torch.no_grad(), capture(model, sites) as seen:
            part(model, 0, layer + 1)(input_ids=self.batch.ids)
        self.mlp_in, self.mlp_out, self.residual, self.gate, self.up = (seen[site] for site in sites)
        self._rest = part(model, layer + 1, len(layers(model)))
        self._check()

    def log_probs(self, change: Tensor | None = None) -> Tensor:
        """Float32 log-probabilities (N, V) at the answer positions, after adding `change` (B, T, I) to the gate."""
        hidden = self.residual
        if change is not None:
            activation: Any = self.at.mlp.act_fn
            gate = (self.gate + change).to(self.gate.dtype)
            hidden = hidden + (self.at.down_proj(activation(gate) * self.up) - self.mlp_out)
        return unembed(self.model, self._rest(inputs_embeds=hidden)[self.batch.rows, self.batch.columns])

    def answers(self, log_probs: Tensor) -> Tensor:
        """(B,) log-probability of each prompt's whole answer, from `log_probs` (N, V)."""
        return self.batch.answers(log_probs)

    def _check(self) -> None:
        """An architecture that does more than its layers and its final norm cannot be run in parts."""
        model: Any = self.model
        row, column = self.batch.rows[0], self.batch.columns[0]
        with torch.no_grad():
            whole = model(self.batch.ids[:1], use_cache=False).logits[0, column].float().log_softmax(-1)
            parts = self.log_probs()[0]
        gap = (whole.exp() - parts.exp()).abs().max()
        if row != 0 or not gap < 0.02:
            raise ProbeError(
                f"{type(self.model).__name__}: run in parts it gives other probabilities than whole (by {gap:.2g}); "
                "the forward method supports models like Qwen3, Qwen2, Llama and Mistral"
            )
