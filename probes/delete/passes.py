"""Forward passes that do no more work than the question needs.

- Prompts are padded on the right: with causal attention nothing before the padding sees it, so no mask is needed and a
  batch gives what single prompts give.
- Logits are computed at the answer's positions only.
- `part` is the model between two layers, sharing all weights. A patch in layer l changes nothing before that layer's
  FFN, and next to nothing before the subject: `begin` runs what precedes both once, `Tail` the rest for any change.
- Where later layers do more than attend to all that stands before (linear attention, a window shorter than a prompt),
  what precedes the subject is no set of keys and values, and prompts cannot lie end to end: there a tail is the whole
  prompts from the layer's FFN on, padded on the right (`separate`).
- `check_layers` and `check_parts` hold all this against the model run whole, before any work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from probes.facts.prompts import Prompt
from probes.hooks import capture, edited
from probes.model import Layer, Site, layers
from vindex.errors import ProbeError

CHECKED_CHANGE = 0.5
"""Random change of the gates, in shares of their spread, under which the two are compared."""
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

    def answers(self, log_probs: Tensor) -> Tensor:
        """(B,) log-probability of each prompt's whole answer, from log-probabilities (N, V) at `rows`, `columns`."""
        return _summed(log_probs, self.rows, self.targets, len(self.prompts))


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


def _summed(log_probs: Tensor, rows: Tensor, targets: Tensor, count: int) -> Tensor:
    """(count,) sums over each row's positions of the log-probability of the token wanted there."""
    at = log_probs.gather(1, targets[:, None])[:, 0]
    return torch.zeros(count, device=at.device).index_add(0, rows, at)


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


CAPTURED = ("mlp_in", "mlp_out", "residual", "gate", "up")
"""What a tail needs of the patched layer; `Begun` and `Tail` call it by the same names."""


class Begun(NamedTuple):
    """One prompt in the unchanged model, up to the FFN of a layer: S positions before its subject, T from there on.

    Where it is `separate`, S is 0 and T is all of it.
    """

    prompt: Prompt
    before: int
    """S"""
    mlp_in: Tensor
    """(T, H)"""
    mlp_out: Tensor
    """(T, H)"""
    residual: Tensor
    """(T, H) after the layer."""
    gate: Tensor
    """(T, I) pre-activations."""
    up: Tensor
    """(T, I)"""
    keys: Tensor
    """(L, heads, S, D) in each of the L later layers."""
    values: Tensor
    """(L, heads, S, D)"""
    separate: bool
    unchanged: Tensor
    """(N, H) the last layer's residual stream at the answer positions."""

    @property
    def subjects(self) -> list[int]:
        """Which of the T positions read the subject."""
        return [at - self.before for at in self.prompt.subject]


def separate(model: nn.Module, layer: int, longest: int) -> bool:
    """Whether a layer after `layer` does more, in prompts of up to so many tokens, than attend to all before."""
    causal: Any = model
    config = causal.get_decoder().config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(
        layers(model)
    )
    short = {"full_attention"} | ({"sliding_attention"} if window and longest <= window else set())
    return not set(kinds[layer + 1 :]) <= short


def begin(model: nn.Module, layer: int, prompts: Sequence[Prompt]) -> list[Begun]:
    """Run `prompts` once, unchanged, and keep what a `Tail` from `layer` on begins with."""
    sites = [Site(role, layer) for role in CAPTURED]
    first, rest = part(model, 0, layer + 1), part(model, layer + 1, len(layers(model)))
    apart = separate(model, layer, max(len(prompt.ids) + len(prompt.answer) for prompt in prompts))
    begun: dict[Prompt, Begun] = {}
    for group in batches(prompts, device_of(model)):
        cache = None if apart else DynamicCache()
        with torch.no_grad(), capture(model, sites) as seen:
            first(input_ids=group.ids)
            last = rest(inputs_embeds=seen[Site("residual", layer)], past_key_values=cache)
        later: Any = cache.layers[layer + 1 :] if cache else []
        for row, prompt in enumerate(group.prompts):
            start, stop = 0 if apart else min(prompt.subject), len(prompt.ids) + len(prompt.answer[:-1])
            begun[prompt] = Begun(
                prompt,
                start,
                **{site.role: seen[site][row, start:stop].clone() for site in sites},
                keys=_stacked([each.keys[row, :, :start] for each in later]),
                values=_stacked([each.values[row, :, :start] for each in later]),
                separate=apart,
                unchanged=last[row, group.columns[group.rows == row]],
            )
    return [begun[prompt] for prompt in prompts]


def _stacked(each: Sequence[Tensor]) -> Tensor:
    """One tensor, of no elements where no later layer has any."""
    return torch.stack(list(each)) if each else torch.empty(0, 0, 0, 0)


class Tail:
    """The model from the FFN of `layer` on, and from the subject on, for prompts whose earlier activations stay.

    The prompts lie end to end in one row, so that nothing is padded, and each attends to itself alone. What stands
    before their first mentions of the subject is there as keys and values: u·x is close to 0 there, and taking it as 0
    while fitting saves half of the work (in chat, most of it); measurements never use this shortcut. T and N below are
    the prompts' together. A tail is quickly made; what took a pass through the model is in what `begin` returned.
    """

    def __init__(self, model: nn.Module, layer: int, begun: Sequence[Begun]):
        self.model, self.prompts = model, tuple(each.prompt for each in begun)
        self.at: Layer = layers(model)[layer]
        self.mlp_in, self.mlp_out, self.residual, self.gate, self.up = (
            torch.cat([getattr(each, role) for each in begun]) for role in CAPTURED
        )
        self._keys = torch.cat([each.keys for each in begun], -2)
        self._values = torch.cat([each.values for each in begun], -2)
        self._unchanged = torch.cat([each.unchanged for each in begun])
        lengths = [len(each.mlp_in) for each in begun]
        begins = list(accumulate(lengths[:-1], initial=0))
        places = [
            (row, begins[row] + column - each.before, token)
            for row, each in enumerate(begun)
            for column, token in _places(each.prompt)
        ]
        device = self.gate.device
        self.rows, self._columns, self.targets = torch.tensor(places, device=device).unbind(1)
        self.subjects = [[at + first for at in each.subjects] for each, first in zip(begun, begins, strict=True)]
        self._separate = begun[0].separate
        self._owner, self._positions, self._mask = self._attends([each.before for each in begun], lengths)
        self._rest = part(model, layer + 1, len(layers(model)))

    @classmethod
    def of(cls, model: nn.Module, layer: int, prompts: Sequence[Prompt]) -> Tail:
        """The tail of prompts that have not begun yet."""
        return cls(model, layer, begin(model, layer, prompts))

    def log_probs(self, change: Tensor | None = None) -> Tensor:
        """Float32 log-probabilities (N, V) at the answer positions, after adding `change` (T, I) to the gate."""
        return unembed(self.model, self.last_hidden(change))

    def last_hidden(self, change: Tensor | None = None) -> Tensor:
        """The last layer's residual stream (N, H) there, from which the distributions are computed."""
        if change is None:
            return self._unchanged
        activation: Any = self.at.mlp.act_fn
        gate = (self.gate + change).to(self.gate.dtype)
        return self.last_hidden_of(activation(gate) * self.up)

    def last_hidden_of(self, down_in: Tensor) -> Tensor:
        """The same for another input of down_proj, (T, I)."""
        hidden = self.residual + (self.at.down_proj(down_in) - self.mlp_out)
        if self._separate:
            width = int(self._positions.max()) + 1
            rows = hidden.new_zeros(len(self.prompts), width, hidden.shape[-1])
            rows = rows.index_put((self._owner, self._positions), hidden)
            return self._rest(inputs_embeds=rows)[self._owner, self._positions][self._columns]
        after = self._rest(
            inputs_embeds=hidden[None],
            attention_mask=self._mask,
            position_ids=self._positions[None],
            past_key_values=self._cache(),
        )
        return after[0, self._columns]

    def answers(self, log_probs: Tensor) -> Tensor:
        """(B,) log-probability of each prompt's whole answer, from `log_probs` (N, V)."""
        return _summed(log_probs, self.rows, self.targets, len(self.prompts))

    def _attends(self, before: list[int], lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(T,) prompts and (T,) positions in them, and (1, 1, T, S + T) what to add to attention scores.

        Each position sees its own prompt, up to itself.
        """
        first, then = map(range, before), [range(s, s + t) for s, t in zip(before, lengths, strict=True)]
        pairs = [(row, at) for ranges in (first, then) for row, positions in enumerate(ranges) for at in positions]
        owner, positions = torch.tensor(pairs, device=self.gate.device).unbind(1)
        start = sum(before)
        sees = (owner[start:, None] == owner) & (positions[start:, None] >= positions)
        dtype = self.residual.dtype
        mask = torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        return owner[start:], positions[start:], mask[None, None]

    def _cache(self) -> Any:
        """A cache that holds what stands before the subject; a pass appends to it, so each gets its own."""
        if not self._keys.numel():
            return None
        cache = DynamicCache()
        for index in range(self.at.number + 1):  # layers before the tail's first, which it never asks for
            cache.update(self._keys[:1], self._values[:1], index)
        for index, (keys, values) in enumerate(zip(self._keys, self._values, strict=True), self.at.number + 1):
            cache.update(keys[None], values[None], index)
        return cache


def check_layers(model: nn.Module, prompt: Prompt) -> None:
    """An architecture that does more than its layers and its final norm cannot be measured in parts: ProbeError.

    The layers all together are held against the model run whole, on the positions of `prompt` that count.
    """
    group = batch([prompt], device_of(model))
    with torch.no_grad():
        parts = unembed(model, last_hidden(model, group.ids)[group.rows, group.columns])
        _require_same(model, _run_whole(model, group), parts)


def check_parts(model: nn.Module, layer: int, prompt: Prompt) -> None:
    """The same for a tail from `layer` on, whose gates are changed at random from the subject on."""
    tail, group = Tail.of(model, layer, [prompt]), batch([prompt], device_of(model))
    draw = torch.Generator().manual_seed(0)
    size = CHECKED_CHANGE * tail.gate.float().std()
    change = size * torch.randn(tail.gate.shape, generator=draw).to(tail.gate.device)
    everywhere = pad(change, (0, 0, group.ids.shape[1] - len(change), 0))
    with torch.no_grad(), edited(model, {("gate", layer): lambda gate: gate + everywhere}):
        whole = _run_whole(model, group)
    with torch.no_grad():
        _require_same(model, whole, tail.log_probs(change))


def _run_whole(model: nn.Module, group: Batch) -> Tensor:
    """Float32 log-probabilities (N, V) at the positions of one prompt that count, by the model's own forward."""
    causal: Any = model
    return causal(group.ids, use_cache=False).logits[group.rows, group.columns].float().log_softmax(-1)


def _require_same(model: nn.Module, whole: Tensor, parts: Tensor) -> None:
    """Raise ProbeError where log-probabilities (N, V) differ: a model sure of nothing shows it in all of them alone."""
    causal: Any = model
    whole, parts = (each - each.mean(-1, keepdim=True) for each in (whole, parts))
    gap = float(torch.dist(whole, parts) / whole.norm().clamp_min(1e-30))
    if not gap < PARTS_TOLERANCE[causal.dtype]:
        raise ProbeError(
            f"{type(model).__name__}: run in parts it gives other probabilities than whole (its logits differ by "
            f"{gap:.1%}); Gate 3 supports models like Qwen3, Qwen3.5, Qwen2, Llama and Mistral"
        )
