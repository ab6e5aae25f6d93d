"""Gate 3, one fact from beginning to end.

0. `Bench` refuses what cannot be measured: a model that gives something else when it is run in parts, a layer that
   writes nothing, an FFN whose activation is unknown.
1. Split the fact's prompts into what the methods see and what they do not (`probes.facts.sets`).
2. Run everything once unpatched. A fact with P < 0.1 ends here: there is nothing to delete.
3. `forward` and `geometric` each compute a `Delta` from the fit set, or from the weights alone.
4. Each is applied (and afterwards the saved weight restored and compared bit for bit) and measured on the same prompts.
5. Controls of the same norm, and the verdicts.

What does not depend on the fact, second moments of generic text and unpatched answers, is kept in `Bench` and used
again by the next fact.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from probes import activation
from probes.delete import Delta, relative_norm, verdict
from probes.delete.controls import DRAWS, Control, controls, random_suppression
from probes.delete.forward import Forward, ForwardOptions, candidates, forward
from probes.delete.generic import generic_prompts
from probes.delete.geometric import Geometric, geometric
from probes.delete.keys import Moment, observe
from probes.delete.measure import KNOWN, Baseline, Effect, Outcome, measure
from probes.delete.passes import check_layers, check_parts
from probes.delete.verdict import Verdict
from probes.facts import Fact, Panel
from probes.facts.prompts import Encoder, Prompt
from probes.facts.sets import Sets, passages, split
from probes.hooks import patched
from probes.model import Loaded, layers, null_layers
from vindex.errors import ProbeError

METHODS = ("forward", "geometric")
CHECKED = 48
"""Tokens of the text on which a model run in parts is held against the model run whole."""
Tick = Callable[[str], None]
"""Called with the name of each stage as it begins, for a progress display."""


@dataclass(frozen=True)
class Options:
    """Free choices of a run; all of them go into the record."""

    methods: tuple[str, ...] = METHODS
    seed: int = 0
    chat: bool = False
    layer: int | None = None
    samples: int = 1024
    """Tokens of the model's own text in the generic second moment, beside the bundled text."""
    forward: ForwardOptions = field(default_factory=ForwardOptions)


class MethodResult(NamedTuple):
    """One method's patch and everything measured about it."""

    delta: Delta
    found: Forward | Geometric
    relative_norm: float
    effect: Effect
    controls: tuple[Control, ...]
    seed: Verdict
    strict: Verdict
    seconds: float


class FactResult(NamedTuple):
    """One fact's outcome. `methods` is empty when the model does not know it."""

    sets: Sets
    before: Outcome
    methods: dict[str, MethodResult]
    seconds: float

    @property
    def known(self) -> bool:
        """Whether there was anything to delete."""
        return self.before.probability >= KNOWN


@dataclass
class Bench:
    """A model on the bench, and what is measured once for all facts."""

    loaded: Loaded
    panel: Panel
    options: Options
    stored: torch.dtype | None = None
    """Dtype to which a patched weight is rounded: that of the checkpoint, so that what is measured is what is saved."""
    gate: Any = None
    """(L, F, H) gate directions of a vindex, for the geometric method."""
    tick: Tick = lambda _: None
    generic: dict[int, Moment] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.loaded.model
        count = len(layers(self.model))
        layer = self.options.layer
        if layer is not None and not 0 <= layer < count:
            raise ProbeError(f"layer {layer}: the model has layers 0 to {count - 1}")
        self.null_layers = null_layers(self.model)
        if layer in self.null_layers:
            zero = " and ".join(self.null_layers[layer])
            raise ProbeError(f"layer {layer} writes nothing, its {zero} being zero; no patch can, choose another layer")
        self.baseline = Baseline(self.model)
        self.encoder = Encoder(self.loaded.tokenizer, self.options.chat)
        own = [activation.of(self.model, layer.mlp, f"layers.{layer.number}.mlp") for layer in layers(self.model)]
        self.activation = own[0].name
        ids = self.encoder.text(passages("generic.txt")[0])[:CHECKED]
        prompt = Prompt("check", "", ids, (), (len(ids) // 2,))
        check_layers(self.model, prompt)
        for layer in self._layers():
            check_parts(self.model, layer, prompt)

    def _layers(self) -> tuple[int, ...]:
        """Those that the forward method may use."""
        if "forward" not in self.options.methods:
            return ()
        return candidates(self.model) if self.options.layer is None else (self.options.layer,)

    def generic_moments(self) -> dict[int, Moment]:
        """Second moments of generic text in every layer that the forward method may use; computed once."""
        if not self.generic:
            prompts = generic_prompts(self.model, self.loaded.tokenizer, self.options.samples)
            seen = observe(self.model, prompts, self._layers())
            self.generic = {index: found.moment for index, found in seen.items()}
        return self.generic

    def known(self, relation: str, least: float) -> list[tuple[Fact, Outcome]]:
        """The relation's facts that the model answers with at least that probability, with what it says."""
        facts = self.panel.of(relation)
        prompts = [self.encoder.fact(fact, self.panel.relations[relation], 0) for fact in facts]
        pairs = zip(facts, self.baseline.of(prompts), strict=True)
        return [(fact, outcome) for fact, outcome in pairs if outcome.probability >= least]


def run(bench: Bench, fact: Fact) -> FactResult:
    """Delete one fact by every method asked for, and measure it. The model is as before when this returns."""
    began = time.perf_counter()
    bench.tick("unpatched answers")
    sets = split(bench.panel, fact, bench.encoder, bench.options.seed)
    before = bench.baseline.of([sets.headline])[0]
    results: dict[str, MethodResult] = {}
    if before.probability >= KNOWN:
        bench.baseline.prepare(sets)
        for method in bench.options.methods:
            results[method] = _method(bench, sets, method)
    return FactResult(sets, before, results, time.perf_counter() - began)


def ticks(bench: Bench) -> int:
    """About how many ticks `run` gives for one fact, for a progress bar."""
    trials = 1 if bench.options.layer is not None else bench.options.forward.trials
    return 1 + 3 * len(bench.options.methods) + (trials + 2 if "forward" in bench.options.methods else 0)


def _method(bench: Bench, sets: Sets, method: str) -> MethodResult:
    began = time.perf_counter()
    found: Forward | Geometric
    if method == "forward":
        bench.tick("generic text")
        generic = bench.generic_moments()
        found = forward(bench.model, sets.fit, generic, bench.options.forward, bench.options.layer, bench.tick)
    elif method == "geometric":
        bench.tick("geometric")
        found = geometric(bench.model, sets.headline.answer[0], layer=bench.options.layer, gate=bench.gate)
    else:
        raise ProbeError(f"method {method!r}: expected {' or '.join(METHODS)}")
    bench.tick(f"measuring {method}")
    delta = found.delta
    with patched(bench.model, delta.edits(bench.stored)):
        effect = measure(bench.baseline, sets)
    bench.tick(f"controls for {method}")
    tested = controls(bench.baseline, sets, delta, bench.stored)
    random = random_suppression(tested)
    return MethodResult(
        delta=delta,
        found=found,
        relative_norm=relative_norm(bench.model, delta),
        effect=effect,
        controls=tested,
        seed=verdict.seed(effect),
        strict=verdict.strict(effect, random, DRAWS),
        seconds=time.perf_counter() - began,
    )
