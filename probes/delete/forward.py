"""The forward method: key and value from forward and backward passes, on the fit prompts alone.

1. Site: the subject's last token, in a layer of the first third of the model.
2. Scan, for every such layer: leakage, how strongly a read direction computed with one half of the fit subjects still
   fires on the other half, which it never saw (root mean square over their positions, both ways).
3. Trial, for the layers that leak least: fit the value briefly and measure, by forward passes, what it does to the
   half of the fit subjects that was withheld. The layer that harms them least is chosen.
4. Key (`keys`) from all of the fit set and value (`value`) in full. The result is a `Delta`; the model is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from probes.delete import Delta
from probes.delete.keys import Moment, Seen, observe, read_direction
from probes.delete.passes import Tail
from probes.delete.value import Value, ValueOptions, fit_value, kl_rows
from probes.facts.prompts import Prompt
from probes.facts.sets import Fit
from probes.model import layers
from vindex.errors import ProbeError


@dataclass(frozen=True)
class ForwardOptions:
    """Free choices of the method; they go into the record."""

    layer: int | None = None
    """None: chosen by the scan."""
    trials: int = 3
    """Layers tried before the choice."""
    trial_evaluations: int = 10
    withheld: int = 24
    """Other subjects, at most, on which a trial is judged."""
    value: ValueOptions = field(default_factory=ValueOptions)


class Candidate(NamedTuple):
    """What the scan found about one layer, on the fit set only."""

    layer: int
    leakage: float
    """RMS of u·x over the positions of subjects that u never saw; u·k = 1 at the deleted subject."""
    key_leakage: float
    """Mean |u·k_j| over the same subjects."""
    withheld_kl: float | None = None
    """Mean KL in nats at the answer position of subjects withheld from the trial; None where no trial was made."""
    suppressed: float | None = None
    """1 − P′/P of the fit phrasings in the trial, mean."""


class Forward(NamedTuple):
    """The patch and how it was found."""

    delta: Delta
    scan: tuple[Candidate, ...]
    value: Value


class Halves(NamedTuple):
    """One layer's reading of the deleted subject and of the two halves of the other fit subjects."""

    key: Tensor
    """(H,)"""
    one: Seen
    other: Seen


def candidates(model: nn.Module) -> tuple[int, ...]:
    """The layers of the first third, at least three (fewer only in smaller models)."""
    count = len(layers(model))
    return tuple(range(min(max(3, count // 3), count)))


def forward(model: nn.Module, fit: Fit, generic: Mapping[int, Moment], options: ForwardOptions) -> Forward:
    """Compute the patch for the fact in `fit`. `generic` holds the second moment of generic text for each layer used."""
    count = len(layers(model))
    if options.layer is not None and not 0 <= options.layer < count:
        raise ProbeError(f"layer {options.layer}: the model has layers 0 to {count - 1}")
    chosen = candidates(model) if options.layer is None else (options.layer,)
    halves = _read(model, fit, chosen)
    scan = [_leakage(layer, halves[layer], generic[layer]) for layer in chosen]
    layer, start = chosen[0], None
    if options.layer is None:
        scan, layer, start = _try(model, fit, generic, halves, scan, options)
    found = halves[layer]
    read = read_direction(found.key, _moment(generic[layer], found.one, found.other))
    value = fit_value(Tail(model, layer, fit.phrasings), Tail(model, layer, fit.about), read, options.value, start)
    return Forward(Delta(layer, value.gate_write, read, "forward"), tuple(scan), value)


def _read(model: nn.Module, fit: Fit, chosen: Sequence[int]) -> dict[int, Halves]:
    subjects = list(dict.fromkeys(_subject(prompt) for prompt in fit.others))
    first = set(subjects[::2])
    one = observe(model, [prompt for prompt in fit.others if _subject(prompt) in first], chosen)
    other = observe(model, [prompt for prompt in fit.others if _subject(prompt) not in first], chosen)
    own = observe(model, fit.phrasings, chosen)
    return {layer: Halves(own[layer].keys.mean(0), one[layer], other[layer]) for layer in chosen}


def _moment(generic: Moment, *seen: Seen) -> Tensor:
    """A without its ridge: generic text, and all positions and keys of the subjects seen."""
    return generic.total + sum(part.moment.total + part.keys.T @ part.keys for part in seen)  # type: ignore


def _leakage(layer: int, found: Halves, generic: Moment) -> Candidate:
    energy, keys = 0.0, []
    for seen, withheld in ((found.one, found.other), (found.other, found.one)):
        read = read_direction(found.key, _moment(generic, seen))
        energy += float(read @ withheld.moment.total @ read) / withheld.moment.count / 2
        keys.append((withheld.keys @ read).abs())
    return Candidate(layer, energy**0.5, float(torch.cat(keys).mean()))


def _trial(
    model: nn.Module, fit: Fit, layer: int, found: Halves, generic: Moment, options: ForwardOptions
) -> tuple[float, float, Tensor]:
    """Fit briefly with one half of the subjects known, and measure KL on the other half and suppression on the fact."""
    known = {_subject(prompt) for prompt in fit.others} 
    raise NotImplementedError


def _subject(prompt: Prompt) -> str:
    return prompt.name.rpartition("#")[0]
