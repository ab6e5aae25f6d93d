"""The model from a layer's FFN on: what a change of that layer's gates does, at a fraction of a pass.

A patch changes nothing before its layer's FFN, and next to nothing before the subject: `begin` runs what precedes both
once, `Tail` the rest for any change. Where later layers do more than attend to all that stands before (linear
attention, a window shorter than a prompt), what precedes the subject is no set of keys and values, and prompts cannot
lie end to end: there a tail is the whole prompts from the layer's FFN on, padded on the right (`separate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from probes.facts.passes import answer_places, batch, batches, device_of, part, require_same, summed, unembed
from probes.facts.prompts import Prompt
from probes.live.hooks import capture, edited
from probes.live.sites import Layer, Site, layers, sites

CHECKED_CHANGE = 0.5
"""Random change of the gates, in shares of their spread, under which a tail is held against the model run whole."""
CAPTURED = ("mlp_in", "mlp_out", "residual", "gate", "up")
"""What a tail needs of the patched layer; `Begun` and `Tail` call it by the same names."""


class Begun(NamedTuple):
    """One prompt in the unchanged model, up to the FFN of a layer: S positions before its subject, T from there on.

    Where it is `separate`, S is 0 and T is all of it.
    """

    prompt: Prompt
    before: int  # S
    mlp_in: Tensor  # (T, H)
    mlp_out: Tensor  # (T, H)
    residual: Tensor  # (T, H), after the layer
    gate: Tensor  # (T, I), pre-activations
    up: Tensor  # (T, I)
    past: Tensor  # (L, 2, heads, S, D), keys and values in the L later layers; of no elements where there are none
    separate: bool
    unchanged: Tensor  # (N, H), the last layer's residual stream at the answer positions

    @property
    def subjects(self) -> list[int]:
        """Which of the T positions read the subject."""
        return [at - self.before for at in self.prompt.subject]

    @property
    def key(self) -> Tensor:
        """(H,) float32 mean of what the FFN reads there."""
        return self.mlp_in[self.subjects].float().mean(0)


def separate(model: nn.Module, layer: int, longest: int) -> bool:
    """Whether a layer after `layer` does more, in prompts of up to so many tokens, than attend to all before."""
    causal: Any = model
    config = causal.get_decoder().config
    window = getattr(config, "sliding_window", None)
    kind = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [kind] * len(layers(model))
    short = {"full_attention"} | ({"sliding_attention"} if window and longest <= window else set())
    return not set(kinds[layer + 1 :]) <= short


def begin(model: nn.Module, chosen: Sequence[int], prompts: Sequence[Prompt]) -> dict[int, list[Begun]]:
    """Run `prompts` once, unchanged, and keep what a `Tail` from each of the `chosen` layers on begins with."""
    first = min(chosen)
    lead, rest = part(model, 0, first + 1), part(model, first + 1, len(layers(model)))
    apart = separate(model, first, max(len(prompt.ids) + len(prompt.answer) for prompt in prompts))
    begun: dict[tuple[int, Prompt], Begun] = {}
    for group in batches(prompts, device_of(model)):
        cache = None if apart else DynamicCache()
        with torch.no_grad(), capture(model, sites(model, *CAPTURED, only=chosen)) as seen:
            lead(input_ids=group.ids)
            last = rest(inputs_embeds=seen[Site("residual", first)], past_key_values=cache)
        for layer, (row, prompt) in product(chosen, enumerate(group.prompts)):
            start, stop = 0 if apart else min(prompt.subject), len(prompt.ids) + len(prompt.answer[:-1])
            later: Any = cache.layers[layer + 1 :] if cache else ()
            past = [torch.stack((each.keys[row, :, :start], each.values[row, :, :start])) for each in later]
            begun[layer, prompt] = Begun(
                prompt,
                start,
                **{role: seen[Site(role, layer)][row, start:stop].clone() for role in CAPTURED},
                past=torch.stack(past or [torch.empty(2, 0, 0, 0)]),
                separate=apart,
                unchanged=last[row, group.columns[group.rows == row]],
            )
    return {layer: [begun[layer, prompt] for prompt in prompts] for layer in chosen}


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
        self._past = torch.cat([each.past for each in begun], -2)
        self._unchanged = torch.cat([each.unchanged for each in begun])
        lengths = [len(each.mlp_in) for each in begun]
        begins = list(accumulate(lengths[:-1], initial=0))
        places = [
            (row, begins[row] + column - each.before, token)
            for row, each in enumerate(begun)
            for column, token in answer_places(each.prompt)
        ]
        device = self.gate.device
        self.rows, self._columns, self.targets = torch.tensor(places, device=device).unbind(1)
        self.reads = torch.zeros(len(begun), len(self.gate), device=device)  # 1 where each prompt's subject is read
        for row, (each, first) in enumerate(zip(begun, begins, strict=True)):
            self.reads[row, [at + first for at in each.subjects]] = 1.0
        self._separate = begun[0].separate
        self._owner, self._positions, self._mask = self._attends([each.before for each in begun], lengths)
        self._rest = part(model, layer + 1, len(layers(model)))

    @classmethod
    def of(cls, model: nn.Module, layer: int, prompts: Sequence[Prompt]) -> Tail:
        """The tail of prompts that have not begun yet."""
        return cls(model, layer, begin(model, [layer], prompts)[layer])

    def log_probs(self, change: Tensor | None = None) -> Tensor:
        """Float32 log-probabilities (N, V) at the answer positions, after adding `change` (T, I) to the gate."""
        return unembed(self.model, self._unchanged if change is None else self.last_hidden(self.down_in(change)))

    @cached_property
    def said(self) -> Tensor:
        """(B,) log-probability of each prompt's whole answer in the unchanged model."""
        with torch.no_grad():
            return self.answers(self.log_probs())

    def down_in(self, change: Tensor | float = 0.0) -> Tensor:
        """(T, I) what down_proj reads, after adding `change` (T, I) to the gate."""
        activation: Any = self.at.mlp.act_fn
        return activation((self.gate + change).to(self.gate.dtype)) * self.up

    def last_hidden(self, down_in: Tensor, added: Tensor | float = 0.0) -> Tensor:
        """(N, H) the last layer's residual stream at the answer positions.

        For this input of down_proj, (T, I), and after adding (T, H) to what it gives.
        """
        hidden = (self.residual + (self.at.down_proj(down_in) - self.mlp_out + added)).to(self.residual.dtype)
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

    def at_subjects(self, rows: Tensor) -> Tensor:
        """(B, n) float32 mean of rows (T, n) over each prompt's mentions of the subject."""
        return self.reads @ rows.float() / self.reads.sum(1, keepdim=True)

    def answers(self, log_probs: Tensor) -> Tensor:
        """(B,) log-probability of each prompt's whole answer, from `log_probs` (N, V)."""
        return summed(log_probs, self.rows, self.targets, len(self.prompts))

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
        if not self._past.numel():
            return None
        cache, earlier = DynamicCache(), self._past[:1].expand(self.at.number + 1, -1, -1, -1, -1)
        for index, (keys, values) in enumerate((*earlier, *self._past)):  # the tail never asks for the earlier ones
            cache.update(keys[None], values[None], index)
        return cache


def check_parts(model: nn.Module, prompt: Prompt, chosen: Sequence[int]) -> None:
    """An architecture that does more than its layers and its final norm cannot be measured in parts: ProbeError.

    On the positions of `prompt` that count, the layers all together are held against the model run whole; so is a tail
    from each of the `chosen` layers on, with gates that are changed at random from the subject on.
    """
    causal: Any = model
    group = batch([prompt], device_of(model))

    def whole() -> Tensor:
        return causal(group.ids, use_cache=False).logits[group.rows, group.columns].float().log_softmax(-1)

    def require_tail(layer: int) -> None:
        tail, draw = Tail.of(model, layer, [prompt]), torch.Generator().manual_seed(0)
        size = CHECKED_CHANGE * tail.gate.float().std()
        change = size * torch.randn(tail.gate.shape, generator=draw).to(tail.gate.device)
        everywhere = pad(change, (0, 0, group.ids.shape[1] - len(change), 0))
        with edited(model, {("gate", layer): lambda gate: gate + everywhere}):
            changed = whole()
        require_same(model, changed, tail.log_probs(change))

    with torch.no_grad():
        require_same(model, whole(), unembed(model, group.hidden(model)))
        for layer in chosen:
            require_tail(layer)
