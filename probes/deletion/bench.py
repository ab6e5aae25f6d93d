"""A model on the bench, and what is measured once for all facts.

What does not depend on the fact, second moments of generic text and unpatched answers, is kept and used again by the
next fact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from probes.atlas import panel as atlas
from probes.deletion.keys import generic_prompts, observe
from probes.deletion.measure import Baseline
from probes.deletion.options import Options
from probes.deletion.tail import check_parts
from probes.facts import Fact, Panel, bundled, read
from probes.facts.prompts import Encoder, Prompt
from probes.facts.sets import passages
from probes.live import activation
from probes.live.load import Loaded, require_head
from probes.live.match import require_match, weights_sha256
from probes.live.sites import layers, null_layers
from probes.weights.patches import stored_dtype
from vindex import scoring
from vindex.demo import CHECKPOINT
from vindex.errors import ProbeError
from vindex.progress import Advance, Progress, silent, unseen
from vindex.reader import Vindex, as_vindex

FROM_WEIGHTS = {"geometric"}
"""Methods without a forward pass: no layer trial, and no check of the parts that trials run."""
CHECKED = 48
"""Tokens of the text on which a model run in parts is held against the model run whole."""


def panel_for(model: str | Path, facts: str | Path | Panel | None = None) -> Panel:
    """The bundled facts with the user's on top; for the bundled checkpoint, the facts that it was taught."""
    if isinstance(facts, Panel):
        return facts
    base = atlas.panel() if Path(model).resolve() == CHECKPOINT.resolve() else bundled()
    return base if facts is None else read(facts, base=base)


class Bench:
    """A model as `probes.load` gives it, with facts and options.

    Raises ProbeError for what cannot be measured: a model that gives something else when it is run in parts, a layer
    that writes nothing, an FFN whose activation is unknown.
    """

    def __init__(
        self,
        loaded: Loaded,
        facts: Panel | str | Path | None,
        options: Options,
        vindex: Vindex | str | Path | None = None,
        progress: Progress = silent,
    ):
        """`vindex`: whose gate directions the geometric method takes. The hashing of the weights tells `progress`."""
        require_head(loaded)
        self.loaded, self.model, self.options = loaded, loaded.model, options
        scoring.whole("seed", options.seed)
        own = layers(self.model)  # refuses a mixture of experts before any work
        self.vindex = None if vindex is None else as_vindex(vindex)
        self.panel = panel_for(loaded.path, facts)
        self.null_layers = null_layers(self.model)
        if options.layer is not None and not 0 <= scoring.whole("layer", options.layer) < len(own):
            raise ProbeError(f"layer {options.layer}: the model has layers 0 to {len(own) - 1}")
        if options.layer in self.null_layers:
            zero = " and ".join(self.null_layers[options.layer])
            raise ProbeError(
                f"layer {options.layer} writes nothing, its {zero} being zero; no patch can, choose another layer"
            )
        acting = [activation.of(self.model, each.mlp, f"layers.{each.number}.mlp") for each in own]
        self.activation = acting[0].name
        self.baseline = Baseline(self.model)
        self.encoder = Encoder(loaded.tokenizer, options.chat)
        tried = self.layers if set(options.methods) - FROM_WEIGHTS else ()
        ids = self.encoder.text(passages("generic.txt")[0])[:CHECKED]
        check_parts(self.model, Prompt("check", "", ids, (), (len(ids) // 2,)), tried)
        self.weights_sha256 = weights_sha256(loaded, progress)
        if self.vindex is not None:
            require_match(loaded, self.vindex, self.weights_sha256)
        self._generic: dict[str, dict[int, Tensor]] = {}
        self._advance: Advance = unseen
        self._note, self._running, self._left = "", 0, 0

    def stored(self, layer: int) -> torch.dtype:
        """The checkpoint's, to which a patched weight is rounded: what is measured is what is saved."""
        return stored_dtype(self.loaded.path, layer)

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that a method may choose from."""
        chosen = self.options.layer
        return candidates(self.model, self.options.forward.layers) if chosen is None else (chosen,)

    def generic_moments(self, role: str = "mlp_in") -> dict[int, Tensor]:
        """Second moments, in generic text, of the site of that role in every layer of `layers`; computed once."""
        if role not in self._generic:
            prompts = generic_prompts(self.model, self.loaded.tokenizer, self.options.forward.samples)
            seen = observe(self.model, prompts, self.layers, role)
            self._generic[role] = {index: found.moment for index, found in seen.items()}
        return self._generic[role]

    def known(self, relation: str, least: float) -> list[Fact]:
        """The relation's facts that the model answers with at least that probability."""
        facts = self.panel.of(relation)
        said = self.baseline.of([self.encoder.fact(fact, self.panel.relations[relation], 0) for fact in facts])
        return [fact for fact, outcome in zip(facts, said, strict=True) if outcome.probability >= least]

    @property
    def caution(self) -> str:
        """What to hold against figures of a model that is not in float32; empty otherwise."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return "" if dtype == "float32" else f"in {dtype}, whose rounding counts as harm; load it with float32"

    @property
    def seconds(self) -> int:
        """About how long one fact takes by all methods, as the stages say of themselves when they begin."""
        tried, attacks = 10 * len(self.layers), self.options.certificate
        made = {"given": 0, "geometric": 1, "forward": 72 + (5 + tried) * (len(self.layers) > 1)}
        methods = [made.get(method, 1 + tried) for method in self.options.methods or ("given",)]
        return 5 + 25 * attacks + sum(seconds + 10 + 30 * attacks for seconds in methods)

    @contextmanager
    def staged(self, advance: Advance, note: str = "") -> Iterator[None]:
        """Let `tick` tell `advance` inside the block: `seconds` in all, `note` before the name of each stage."""
        self._advance, self._note, self._running, self._left = advance, note, 0, self.seconds
        yield
        advance(self._left, note)
        self._advance = unseen

    def tick(self, stage: str, seconds: int = 1) -> None:
        """A stage begins, and the one before is done. seconds: about what it takes of SmolLM2-135M on one thread."""
        done = min(self._running, self._left)
        self._running, self._left = seconds, self._left - done
        self._advance(done, self._note + stage)


def candidates(model: nn.Module, wanted: int) -> tuple[int, ...]:
    """So many layers, evenly from the first sixth of the depth to its half; fewer in smaller models, but at least two.

    Before it a subject's token is read rather than the subject, and every change is felt everywhere; after it the
    subject has mostly been read. Layers that write nothing are passed over, for the next ones. Raises ProbeError where
    no layer is left.
    """
    count, nothing = len(layers(model)), null_layers(model)
    first = count // 6
    found = tuple(layer for layer in range(first, count) if layer not in nothing)[: max(2, count // 2 - first)]
    if not found:
        raise ProbeError(f"no layer from {first} on writes anything, a projection of each is zero; no patch can either")
    wanted = min(wanted, len(found))
    return tuple(found[round(n * (len(found) - 1) / max(1, wanted - 1))] for n in range(wanted))
