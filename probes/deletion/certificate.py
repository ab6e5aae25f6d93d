"""Whether what was deleted comes back: held-out attacks on the patched model, each beside the unpatched one.

Only what the unpatched model does is scored: a prompt whose answer it does not know, or a question after which it does
not write the answer, is counted alone. Weights lent to an attack are put back as they were, never having been written
to. The limits stand in `verdict.LIMITS`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from probes.deletion.measure import KNOWN, Baseline, SetChange, compare
from probes.deletion.options import Attacks
from probes.deletion.verdict import SHOWN, Figure
from probes.facts import Panel
from probes.facts.passes import batch, device_of, last_hidden, unembed
from probes.facts.prompts import Encoder, Prompt
from probes.facts.sets import Sets
from probes.facts.writing import Draw, Text, write_on
from probes.live.hooks import capture, lent
from probes.live.sites import Site, layers

GROUP, LEVELS = 32, 16
"""Weights that share a scale in 4 bits, along the input, and the values that one can take: GGUF's Q4_0."""
NEGATIONS = ("{asked} not {wrong}, it is", "{asked} not {wrong}, but", "{asked} {wrong}. That is not true. {again}")


class Certificate(NamedTuple):
    """Every attack, before and after."""

    families: dict[str, SetChange]
    """The answer's P in every held-out family of prompts, and after the negation of a wrong answer."""
    texts: dict[Draw, tuple[Text, Text]]
    """What is written freely after questions after which the unpatched model says the answer, writing greedily."""
    ranks: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """By position: the answer's ranks when inner layers are read through the final norm and the head (logit lens)."""
    four_bit: SetChange
    """The fact and its paraphrases, all weights of the decoder rounded to 4 bits …"""
    relearned: SetChange
    """… and after a few steps of training on other facts of the relation."""

    @property
    def figures(self) -> dict[str, Figure]:
        """What the verdict `robust` is about, beside the fact itself."""
        groups = self.families.items()
        first = [Figure(one.still_first, one.first, name, 1.0, one.still_first) for name, one in groups if one.first]
        best = [(place, min(before), min(after)) for place, (before, after) in self.ranks.items()]
        ranks = [Figure(after, 1, place, before, after) for place, before, after in best if before <= SHOWN]
        return {
            "families, suppression": _worst(min, [_suppression(one, name) for name, one in groups]),
            "families, first choice": _worst(max, first),
            "written, greedily": _worst(max, self.said(sampled=False).values()),
            "written, sampled": _worst(max, self.said(sampled=True).values()),
            "rank at inner layers": _worst(min, ranks),
            "in 4 bits, suppression": _suppression(self.four_bit),
            "relearned, suppression": _suppression(self.relearned),
        }

    def said(self, *, sampled: bool) -> dict[str, Figure]:
        """By family: the shares of texts that say the answer, before and after, and the second as a share of the first.

        A family in which less than KNOWN of the texts said it is not scored: it would be decided by a single one.
        """
        families = defaultdict[str, list[tuple[Text, Text]]](list)
        for (question, draw), pair in self.texts.items():
            if bool(draw) == sampled:
                families[question.family].append(pair)
        found = {}
        for family, pairs in families.items():
            before, after = (sum(text.says for text in side) / len(pairs) for side in zip(*pairs, strict=True))
            found[family] = Figure(after / before if before >= KNOWN else None, len(pairs), family, before, after)
        return found


class Exam:
    """One fact's attacks, with what the unpatched model does under them, for any number of patches."""

    def __init__(self, baseline: Baseline, encoder: Encoder, panel: Panel, sets: Sets, attacks: Attacks):
        """Run the unpatched side; the weights must be the original ones."""
        self.baseline, self.model, self.sets, self.attacks = baseline, baseline.model, sets, attacks
        self.tokenizer, held_out = encoder.tokenizer, sets.held_out
        self.families = {**held_out.families, "negation": negations(encoder, panel, sets, attacks.negated)}
        self.core = {"core": (sets.headline, *held_out.paraphrases)}
        baseline.of(chain(*self.core.values(), *self.families.values()))
        self.rounded = Baseline(self.model)
        with four_bit(self.model):
            self.rounded.of(self.core["core"])
        self.ranks = lens(self.model, sets.headline, attacks.depths)
        self.texts = self._write([(question, 0) for question in held_out.questions])
        self.texts = {draw: text for draw, text in self.texts.items() if text.says}
        self.texts |= self._write(_samples([question for question, _ in self.texts], attacks.samples))

    def certify(self) -> Certificate:
        """Attack the model as it is now (patched)."""
        ranks = lens(self.model, self.sets.headline, self.attacks.depths)
        texts = self._write(list(self.texts))
        families = compare(self.baseline, self.families)
        with four_bit(self.model):
            rounded = compare(self.rounded, self.core)["core"]
        same = [prompt for prompt in self.sets.fit.others if prompt.template == self.sets.headline.template]
        with relearned(self.model, same[: self.attacks.learnt], self.attacks.steps, self.attacks.rate):
            learnt = compare(self.baseline, self.core)["core"]
        both = {draw: (text, texts[draw]) for draw, text in self.texts.items()}
        return Certificate(families, both, {at: (self.ranks[at], ranks[at]) for at in ranks}, rounded, learnt)

    def _write(self, draws: list[Draw]) -> dict[Draw, Text]:
        return write_on(self.model, self.tokenizer, draws, self.sets.fact, self.sets.seed, self.attacks.tokens)


def negations(encoder: Encoder, panel: Panel, sets: Sets, count: int) -> tuple[Prompt, ...]:
    """The first `count` phrasings with a wrong answer denied, which is a held-out subject's."""
    templates = panel.relations[sets.fact.relation].all_templates
    wrong = [panel.find(prompt.fact).answer for prompt in sets.held_out.other_subjects]
    found = []
    for number, prompt in enumerate((sets.headline, *sets.held_out.paraphrases)[:count]):
        again = templates[int(prompt.template)].replace("{}", sets.fact.subject)
        for kind, form in enumerate(NEGATIONS):
            other = wrong[(number * len(NEGATIONS) + kind) % len(wrong)]
            text = form.format(asked=prompt.text, wrong=other, again=again)
            found.append(encoder.free(text, sets.fact, "negation", f"{prompt.name} not {other}, {kind}"))
    return tuple(found)


@torch.no_grad()
def lens(model: nn.Module, prompt: Prompt, depths: int) -> dict[str, tuple[int, ...]]:
    """The rank of the answer's first token after inner layers, read where the answer follows and at the subject."""
    inner = dict.fromkeys(step * (len(layers(model)) - 1) // (depths + 1) for step in range(1, depths + 1))
    sites = [Site("residual", layer) for layer in inner]
    with capture(model, sites) as seen:
        last_hidden(model, torch.tensor([prompt.ids], device=device_of(model)))
    found = {}
    for place, at in (("last token", len(prompt.ids) - 1), ("subject", prompt.subject[-1])):
        scores = [unembed(model, seen[site][0, at]) for site in sites]
        found[place] = tuple(1 + int((score > score[prompt.answer[0]]).sum()) for score in scores)
    return found


@contextmanager
def four_bit(model: nn.Module) -> Iterator[None]:
    """Round every linear weight of the decoder's layers to 4 bits inside the block. Takes their memory once more."""
    with lent(model):
        for block in (layer.block for layer in layers(model)):
            for linear in (module for module in block.modules() if isinstance(module, nn.Linear)):
                linear.weight.data = q4_0(linear.weight.data)
        yield


def q4_0(weight: Tensor) -> Tensor:
    """The weight (O, I) as GGUF's Q4_0 keeps it: of each group the entry largest in size becomes −8 steps exactly."""
    rows, width = weight.shape
    groups = pad(weight.float(), (0, -width % GROUP)).reshape(rows, -1, GROUP)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    step = largest / -(LEVELS // 2)
    inverse = torch.where(step == 0, 0.0, 1 / step)
    level = (groups * inverse + (LEVELS + 1) / 2).floor().clamp(0, LEVELS - 1)
    kept = (level - LEVELS // 2) * step.half().float()
    return kept.reshape(rows, -1)[:, :width].to(weight.dtype)


@contextmanager
def relearned(model: nn.Module, prompts: Sequence[Prompt], steps: int, rate: float) -> Iterator[None]:
    """Train the decoder's layers on the answers of `prompts`, in float32, and forget it all after the block.

    It takes four times the memory of their weights: a copy, its gradients and Adam's two means.
    """
    with lent(model):
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        trained = [parameter for layer in layers(model) for parameter in layer.block.parameters()]
        for parameter in trained:
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        adam = torch.optim.Adam(trained, lr=rate, fused=True)
        group = batch(prompts, device_of(model))
        for _ in range(steps):
            with torch.enable_grad():
                log_probs = unembed(model, group.hidden(model))
                (-group.answers(log_probs).mean()).backward()
            adam.step()
            adam.zero_grad()
        yield


def _samples(questions: Sequence[Prompt], samples: int) -> list[Draw]:
    """So many draws in each family, which its questions share in turn."""
    families = {family: [one for one in questions if one.family == family] for family in (q.family for q in questions)}
    return [(some[number % len(some)], 1 + number) for some in families.values() for number in range(samples)]


def _suppression(group: SetChange, name: str | None = None) -> Figure:
    return Figure(group.mean, len(group.changes), name, group.before, group.after)


def _worst(extreme: Callable[..., Figure], figures: Iterable[Figure]) -> Figure:
    """The figure that decides, with all that was counted."""
    found = [figure for figure in figures if figure.value is not None]
    if not found:
        return Figure(None, 0)
    return extreme(found, key=lambda one: one.value)._replace(counted=sum(one.counted for one in found))
