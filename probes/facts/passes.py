"""Forward passes that do no more work than the question needs.

- Prompts are padded on the right: with causal attention nothing before the padding sees it, so no mask is needed and a
  batch gives what single prompts give.
- Logits are computed at the answer's positions only.
- `part` is the model between two layers, sharing all weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.facts.prompts import Prompt
from probes.live.sites import layers
from vindex.errors import ProbeError

BATCH_TOKENS = 512
"""Padded tokens per forward pass; bounds the memory that activations take."""
ROWS = 32
"""Distributions over the vocabulary held at once where whole texts are compared."""
PARTS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 2e-2}
"""Largest difference of the logits about their mean, as a share of their norm, between the model whole and in parts.

Rounding makes 1e-6, 0.01 and 0.001 of the atlas's."""


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

    def hidden(self, model: nn.Module) -> Tensor:
        """(N, H) the last layer's residual stream at the positions looked at."""
        return last_hidden(model, self.ids)[self.rows, self.columns]

    def answers(self, log_probs: Tensor) -> Tensor:
        """(B,) log-probability of each prompt's whole answer, from log-probabilities (N, V) at `rows`, `columns`."""
        return summed(log_probs, self.rows, self.targets, len(self.prompts))


def batch(prompts: Sequence[Prompt], device: torch.device) -> Batch:
    """Pad and stack `prompts`."""
    texts = [prompt.ids + prompt.answer[:-1] for prompt in prompts]
    width = max(map(len, texts))
    ids = torch.tensor([text + (0,) * (width - len(text)) for text in texts], device=device)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    places = [(row, *place) for row, prompt in enumerate(prompts) for place in answer_places(prompt)]
    rows, columns, targets = torch.tensor(places, device=device).unbind(1)
    real = torch.arange(width, device=device) < lengths[:, None]
    return Batch(tuple(prompts), ids, real, rows, columns, targets)


def summed(log_probs: Tensor, rows: Tensor, targets: Tensor, count: int) -> Tensor:
    """(count,) sums over each row's positions of the log-probability of the token wanted there."""
    at = log_probs.gather(1, targets[:, None])[:, 0]
    return torch.zeros(count, device=at.device).index_add(0, rows, at)


def answer_places(prompt: Prompt) -> list[tuple[int, int]]:
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
    if start == stop:  # nothing is left to run
        return lambda inputs_embeds, **_: inputs_embeds
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


def kl_rows(before: Tensor, after: Tensor) -> Tensor:
    """(N,) KL(before ‖ after) in nats of two (N, V) tables of log-probabilities."""
    return (before.exp() * (before - after)).sum(-1)


def kl_between(model: nn.Module, before: Tensor, after: Tensor) -> Tensor:
    """(N,) the same from two (N, H) of the last layer's residual stream, ROWS distributions at a time."""
    pairs = zip(before.split(ROWS), after.split(ROWS), strict=True)
    return torch.cat([kl_rows(unembed(model, one), unembed(model, other)) for one, other in pairs])


def last_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """Residual stream (B, T, H) after the last layer."""
    return part(model, 0, len(layers(model)))(input_ids=ids)


def require_same(model: nn.Module, whole: Tensor, parts: Tensor) -> None:
    """Raise ProbeError where log-probabilities (N, V) differ: a model sure of nothing shows it in all of them alone."""
    causal: Any = model
    whole, parts = (each - each.mean(-1, keepdim=True) for each in (whole, parts))
    gap = float(torch.dist(whole, parts) / whole.norm().clamp_min(1e-30))
    if not gap < PARTS_TOLERANCE[causal.dtype]:
        raise ProbeError(
            f"{type(model).__name__}: run in parts it gives other probabilities than whole (its logits differ by "
            f"{gap:.1%}); Gate 3 supports models like Qwen3, Qwen3.5, Qwen2, Llama and Mistral"
        )
