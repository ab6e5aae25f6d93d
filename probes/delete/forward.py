"""The forward method: key and value from forward and backward passes, on the fit prompts alone.

1. Site: the subject's last token, in a layer of the first quarter of the model but not of its first sixth, where the
   token is read rather than the subject and every change is felt everywhere.
2. Scan, for every such layer: leakage, how strongly a read direction computed with one half of the fit subjects still
   fires on the other half, which it never saw (root mean square over their positions, both ways).
3. Trial, for the layers that leak least, the shallowest first: fit the value briefly, with one half of the subjects, of
   the neutral prompts and a quarter of the phrasings withheld, and measure by forward passes what it does to them: it
   should leave the first two alone and suppress the third. The first layer that does so well enough is chosen, else
   the one that does best. What it did to the withheld neutral prompts decides how much care they need and how
   large the value may be (`ForwardOptions.wary`, `care`).
4. Key (`keys`) from all of the fit set, guard (`fisher`) from every other subject in it, and value (`value`) in full.
   The result is a `Delta`; the model is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from probes.delete import Delta
from probes.delete.controls import random_felt
from probes.delete.fisher import fisher_rows
from probes.delete.keys import Moment, Seen, observe, read_direction
from probes.delete.measure import KNOWN, answers
from probes.delete.passes import Tail
from probes.delete.value import PARTS, Value, ValueOptions, fit_value, moved, suppression
from probes.facts.prompts import Prompt
from probes.facts.sets import Fit
from probes.model import layers, null_layers
from vindex.errors import ProbeError

WANTED = 0.95
"""Suppression of withheld phrasings that a trial should reach; what is missing counts as harm."""
SUBJECTS_SHARE = 5.0
"""How much worse harm to other subjects is than harm to the deleted one: `strict` allows them a fifth."""
CLOSE = 1.1
"""A deeper layer must do less harm than a shallower one by this factor: trials are no more exact than that."""


@dataclass(frozen=True)
class ForwardOptions:
    """Free choices of the method; they go into the record."""

    subjects_weight: float = 15.0
    """w, of the other subjects' inputs beside generic text in A."""
    about_weight: float = 40.0
    """w′, of the subject's keys in neutral sentences, ..."""
    wary: float = 0.085
    """... unless a trial moves withheld ones by more than so many nats; ..."""
    wary_weight: float = 90.0
    """... w′ is this then, if random changes as large as the patch becomes are hardly felt (at most twice `felt`)."""
    care: float = 0.04
    """Nats by which a trial moves withheld neutral sentences, below which `ValueOptions.size` grows with the cube of
    what is lacking: little else that is known hangs on what is deleted, and a smaller d spares other subjects. ..."""
    felt: float = 0.025
    """... It also grows, with the square, above so large a mean |suppression| by random changes of the size that the
    trial foretells: what any change so large would do proves nothing. ..."""
    largest: float = 4.0
    """... At most so many times."""
    telling: float = 0.001
    """Nats below which a trial tells nothing of what else is known."""
    evenness: float = 600.0
    """How firmly every key of the deleted subject must get a response of 1, against the energy on what A has seen."""
    guarded: int = 2
    """Phrasings of each other subject that the value must leave alone."""
    trials: int = 2
    """Layers tried, at most, before the choice."""
    harmless: float = 0.08
    """Harm of a trial up to which no deeper layer is tried."""
    trial_steps: int = PARTS
    """`ValueOptions.steps` of a trial: each mini-batch once."""
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
    about_kl: float | None = None
    """The same on neutral prompts about the deleted subject that were withheld."""
    suppressed: float | None = None
    """1 − P′/P of the phrasings withheld from the trial, mean."""

    @property
    def tried(self) -> bool:
        """Whether a trial was made there."""
        return self.withheld_kl is not None

    @property
    def harm(self) -> float:
        """What the choice minimises, among trials; a trial that hardly suppresses is no candidate."""
        if self.withheld_kl is None or self.about_kl is None or self.suppressed is None:
            return float("inf")
        return SUBJECTS_SHARE * self.withheld_kl + self.about_kl + max(0.0, WANTED - self.suppressed)


class Forward(NamedTuple):
    """The patch and how it was found."""

    delta: Delta
    scan: tuple[Candidate, ...]
    value: Value
    suited: ForwardOptions
    """The options, as they suit the subject."""


class Read(NamedTuple):
    """What one layer reads of the deleted subject and of the two halves of the other fit subjects."""

    keys: Tensor
    """(P, H): at the deleted subject, a row for each phrasing."""
    about: Tensor
    """(N, H): at the deleted subject, a row for each neutral sentence; 0 where a phrasing begins like it."""
    one: Seen
    other: Seen


def candidates(model: nn.Module) -> tuple[int, ...]:
    """The layers of the first quarter but the first sixth, at least two (fewer only in smaller models).

    Layers that write nothing are passed over, for the next ones. Raises ProbeError where no layer is left.
    """
    count, nothing = len(layers(model)), null_layers(model)
    first = count // 6
    wanted = max(2, count // 4 - first)
    found = tuple(layer for layer in range(first, count) if layer not in nothing)[:wanted]
    if not found:
        raise ProbeError(f"no layer from {first} on writes anything, a projection of each is zero; no patch can either")
    return found


def forward(
    model: nn.Module,
    fit: Fit,
    generic: Mapping[int, Moment],
    options: ForwardOptions,
    layer: int | None = None,
    tick: Callable[[str], None] = lambda _: None,
) -> Forward:
    """Compute the patch for the fact in `fit`, in `layer` or in the layer that the scan chooses.

    `generic` holds the second moment of generic text for each layer considered.
    """
    chosen = candidates(model) if layer is None else (layer,)
    tick("layer scan")
    phrasings = _answered(model, fit.phrasings + fit.contexts)
    halves = _read(model, phrasings, fit, chosen)
    scan = {index: _leakage(index, halves[index], generic[index], options) for index in chosen}
    trials: dict[int, Value] = {}
    for index in sorted(sorted(scan, key=lambda index: scan[index].leakage)[: options.trials]):
        tick(f"trial in layer {index}")
        scan[index], trials[index] = _trial(model, phrasings, fit, scan[index], halves[index], generic[index], options)
        if scan[index].harm <= options.harmless:
            break
    layer = _least_harmful([scan[index] for index in trials])
    found = halves[layer]
    options = _suited(model, phrasings[0], scan[layer], found, generic[layer], options, trials[layer])
    tick(f"value in layer {layer}")
    read = _read_direction(found, generic[layer], options, found.one, found.other)
    guard = _guard(model, layer, fit.others, found, generic[layer], options)
    value = fit_value(model, layer, phrasings, fit.about, read, guard, options.value, trials[layer].gate_write)
    delta = Delta(layer, value.gate_write.cpu(), read.cpu(), "forward")
    return Forward(delta, tuple(scan.values()), value, options)


def _least_harmful(tried: Sequence[Candidate]) -> int:
    """The layer whose trial did the least harm, or the shallowest of those that did hardly more."""
    least = min(candidate.harm for candidate in tried)
    # not `<=`: where a trial came out as NaN, the fit that follows says so
    return next(candidate.layer for candidate in tried if not candidate.harm > CLOSE * least)


def _suited(
    model: nn.Module,
    headline: Prompt,
    tried: Candidate,
    found: Read,
    generic: Moment,
    options: ForwardOptions,
    trial: Value,
) -> ForwardOptions:
    """The options with w′ and the size of d that suit a subject to which the trial did so much harm."""
    hurt = tried.about_kl or 0.0

    def felt(options: ForwardOptions) -> float:
        read = _read_direction(found, generic, options, found.one, found.other)
        return random_felt(model, headline, tried.layer, float(read.norm() * trial.gate_write.norm()))

    wary = replace(options, about_weight=options.wary_weight)
    if hurt > options.wary and felt(wary) <= 2 * options.felt:
        options = wary
    little = (options.care / hurt) ** 3 if hurt > options.telling else 1.0
    factor = min(max(1.0, little, (felt(options) / options.felt) ** 2), options.largest)
    return replace(options, value=replace(options.value, size=factor * options.value.size))


def _answered(model: nn.Module, phrasings: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """The phrasings that the model answers, the headline in any case; the others have nothing to suppress."""
    found = {prompt.name: outcome.probability for prompt, outcome in answers(model, phrasings)}
    return tuple(prompt for prompt in phrasings if prompt is phrasings[0] or found[prompt.name] >= KNOWN)


def _read(model: nn.Module, phrasings: Sequence[Prompt], fit: Fit, chosen: Sequence[int]) -> dict[int, Read]:
    first, second = _halves(fit.others)
    own = observe(model, phrasings, chosen)
    about = observe(model, fit.about, chosen)
    one, other = observe(model, first, chosen), observe(model, second, chosen)
    apart = _apart(phrasings, fit.about)
    return {
        layer: Read(
            keys=own[layer].keys,
            about=own[layer].keys.new_tensor(apart)[:, None] * about[layer].keys,
            one=one[layer],
            other=other[layer],
        )
        for layer in chosen
    }


def _apart(phrasings: Sequence[Prompt], about: Sequence[Prompt]) -> list[float]:
    """0 for each neutral sentence that begins like a phrasing, subject included, and so has its key; 1 for others."""
    begun = {prompt.ids[: max(prompt.subject) + 1] for prompt in phrasings}
    return [float(prompt.ids[: max(prompt.subject) + 1] not in begun) for prompt in about]


def _halves(others: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Every second subject's prompts, and the rest."""
    subjects = list(dict.fromkeys(prompt.fact for prompt in others))
    first = set(subjects[::2])
    return [p for p in others if p.fact in first], [p for p in others if p.fact not in first]


def _read_direction(found: Read, generic: Moment, options: ForwardOptions, *seen: Seen) -> Tensor:
    """u for A of generic text, the subject's keys in neutral sentences, and all that is read of the subjects seen."""
    total = generic.total + options.about_weight * found.about.T @ found.about
    for part in seen:
        total = total + options.subjects_weight * (part.moment.total + part.keys.T @ part.keys)
    return read_direction(found.keys, total, options.evenness)


def _leakage(layer: int, found: Read, generic: Moment, options: ForwardOptions) -> Candidate:
    energy, answers_there = 0.0, []
    for read, withheld in _crossed(found, generic, options):
        energy += float(read @ withheld.moment.total @ read) / withheld.moment.tokens / 2
        answers_there.append((withheld.keys @ read).abs())
    return Candidate(layer, energy**0.5, float(torch.cat(answers_there).mean()))


def _crossed(found: Read, generic: Moment, options: ForwardOptions) -> list[tuple[Tensor, Seen]]:
    """Each half of the subjects, after the u that has seen only the other half."""
    ways = ((found.one, found.other), (found.other, found.one))
    return [(_read_direction(found, generic, options, seen), withheld) for seen, withheld in ways]


def _guard(
    model: nn.Module,
    layer: int,
    others: Sequence[Prompt],
    found: Read,
    generic: Moment,
    options: ForwardOptions,
) -> Tensor:
    """Rows such that the sum of the squares of `rows` @ d is about the KL, nats a position, on a subject unseen.

    It is the mean over `others`, where u answers as strongly as one that has not seen them does (root mean square).
    """
    asked: dict[str, list[Prompt]] = {}
    for prompt in others:
        asked.setdefault(prompt.fact, []).append(prompt)
    rows = fisher_rows(model, layer, [prompt for each in asked.values() for prompt in each[: options.guarded]])
    unseen = torch.cat([withheld.keys @ read for read, withheld in _crossed(found, generic, options)])
    answer = unseen.square().mean().sqrt()
    return answer * rows / len(rows) ** 0.5


def _trial(
    model: nn.Module,
    phrasings: Sequence[Prompt],
    fit: Fit,
    candidate: Candidate,
    found: Read,
    generic: Moment,
    options: ForwardOptions,
) -> tuple[Candidate, Value]:
    """Fit briefly without a part of everything, and measure what it does to that part."""
    layer = candidate.layer
    options = replace(options, guarded=1)
    found = found._replace(about=found.about[::2])
    read = _read_direction(found, generic, options, found.one)
    seen, unseen = by_template(phrasings)
    ours, theirs = _halves(fit.others)
    guard = _guard(model, layer, ours, found, generic, options)
    brief = replace(options.value, steps=options.trial_steps)
    value = fit_value(model, layer, seen, fit.about[::2], read, guard, brief)
    withheld = list({prompt.fact: prompt for prompt in reversed(theirs)}.values())[: options.withheld]
    tried = candidate._replace(
        withheld_kl=moved(Tail.of(model, layer, withheld), read, value.gate_write),
        about_kl=moved(Tail.of(model, layer, fit.about[1::2] or fit.about), read, value.gate_write),
        suppressed=float(suppression(Tail.of(model, layer, unseen), read, value.gate_write).mean()),
    )
    return tried, value


def by_template(phrasings: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """The phrasings of three quarters of the templates, the headline's among them, and those of the others."""
    templates = list(dict.fromkeys(prompt.template for prompt in phrasings))
    withheld = set(templates[2::4] or templates[1:])
    unseen = [prompt for prompt in phrasings if prompt.template in withheld]
    return [prompt for prompt in phrasings if prompt not in unseen], unseen or list(phrasings)
