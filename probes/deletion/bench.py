"""A model on the bench, and what is measured once for all facts.

`Bench` refuses what cannot be measured: a model that gives something else when it is run in parts, a layer that writes
nothing, an FFN whose activation is unknown. What does not depend on the fact, second moments of generic text and
unpatched answers, is kept there and used again by the next fact; what does not depend on the method, the unpatched side
of the layer trial, by the next method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probes.atlas import panel as atlas
from probes.deletion.baselines import BaselineOptions
from probes.deletion.certificate import Attacks
from probes.deletion.generic import generic_prompts
from probes.deletion.keys import observe
from probes.deletion.layer import Trial, candidates
from probes.deletion.measure import Baseline, Outcome
from probes.deletion.options import ForwardOptions
from probes.deletion.tail import check_parts
from probes.facts import Fact, Panel, bundled, read
from probes.facts.passes import check_layers
from probes.facts.prompts import Encoder, Prompt
from probes.facts.sets import Fit, passages
from probes.live import activation
from probes.live.load import Loaded, require_head
from probes.live.match import weights_sha256
from probes.live.sites import layers, null_layers
from probes.weights.patches import stored_dtype
from vindex.demo import CHECKPOINT
from vindex.errors import ProbeError
from vindex.progress import Progress
from vindex.reader import Vindex, open_vindex

DEFAULT = ("forward", "geometric")
"""The methods that run where none is asked for."""
FROM_WEIGHTS = {"geometric"}
"""Methods without a forward pass: no layer trial, and no check of the parts that trials run."""
CHECKED = 48
"""Tokens of the text on which a model run in parts is held against the model run whole."""
Tick = Callable[[str], object]
"""Called with the name of each stage as it begins."""


def panel_for(model: str | Path, facts: str | Path | Panel | None = None) -> Panel:
    """The bundled facts with the user's on top; for the bundled checkpoint, the facts that it was taught."""
    if isinstance(facts, Panel):
        return facts
    base = atlas.panel() if Path(model).resolve() == CHECKPOINT.resolve() else bundled()
    return base if facts is None else read(facts, base=base)


@dataclass(frozen=True)
class Options:
    """Free choices of a run; all of them go into the record."""

    methods: tuple[str, ...] = DEFAULT
    seed: int = 0
    chat: bool = False
    layer: int | None = None
    forward: ForwardOptions = field(default_factory=ForwardOptions)
    baselines: BaselineOptions = field(default_factory=BaselineOptions)
    certificate: bool = True
    """Whether to attack what was deleted, which the verdict `robust` is about."""
    attacks: Attacks = field(default_factory=Attacks)


@dataclass
class Bench:
    """Raises ProbeError where the model, or the layer asked for, cannot be measured."""

    loaded: Loaded
    panel: Panel
    options: Options
    stored: torch.dtype | None = None
    """Dtype to which a patched weight is rounded: that of the checkpoint, so that what is measured is what is saved."""
    gate: Any = None
    """(L, F, H) gate directions of a vindex, for the geometric method."""
    tick: Tick = lambda _: None
    generic: dict[str, dict[int, Tensor]] = field(default_factory=dict)

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
        self._trial: Trial | None = None
        if set(self.options.methods) - FROM_WEIGHTS:
            for layer in self.layers:
                check_parts(self.model, layer, prompt)

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """Of each weight file by name."""
        return weights_sha256(self.loaded)

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that a method may choose from."""
        chosen = self.options.layer
        return candidates(self.model, self.options.forward.layers) if chosen is None else (chosen,)

    def generic_moments(self, role: str = "mlp_in") -> dict[int, Tensor]:
        """Second moments, in generic text, of the site of that role in every layer of `layers`; computed once."""
        if role not in self.generic:
            prompts = generic_prompts(self.model, self.loaded.tokenizer, self.options.forward.samples)
            seen = observe(self.model, prompts, self.layers, role)
            self.generic[role] = {index: found.moment for index, found in seen.items()}
        return self.generic[role]

    def trial(self, fit: Fit) -> Trial:
        """The trial by which every method gets its layer; what the unchanged model says is computed once for a fact."""
        if self._trial is None or self._trial.given is not fit:
            self._trial = Trial(self.model, fit, self.options.forward)
        return self._trial

    def known(self, relation: str, least: float) -> list[tuple[Fact, Outcome]]:
        """The relation's facts that the model answers with at least that probability, with what it says."""
        facts = self.panel.of(relation)
        prompts = [self.encoder.fact(fact, self.panel.relations[relation], 0) for fact in facts]
        pairs = zip(facts, self.baseline.of(prompts), strict=True)
        return [(fact, outcome) for fact, outcome in pairs if outcome.probability >= least]


def bench_for(
    loaded: Loaded,
    facts: str | Path | Panel | None,
    options: Options,
    vindex: Vindex | str | Path | None,
    progress: Progress,
) -> Bench:
    """A model as `probes.load` gives it, its weight files hashed; patched weights are rounded as it stores them."""
    require_head(loaded)
    layers(loaded.model)  # refuses a mixture of experts before any work
    directions = open_vindex(vindex) if isinstance(vindex, str | Path) else vindex
    panel, digests = panel_for(loaded.path, facts), weights_sha256(loaded, progress)
    bench = Bench(loaded, panel, options, stored_dtype(loaded.path, 0), directions and directions.gate)
    bench.weights_sha256 = digests
    return bench
