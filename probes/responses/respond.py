"""`probes.respond`: what a model's FFNs write when the gate directions of its vindex are read, over texts.

1. The texts of the probes, or others, pass the model together, once; no head is run.
2. Hooks see what the FFN of a layer reads (x) and writes (y). When the block's output tells the sinks, they are left
   out, v · x of all the layer's directions is one product, and the responses another (`probes.responses.linear`). Then
   x and y are dropped: the tokens of one layer are held at a time, whatever the number of layers.
3. In a mixture each expert is taken at the tokens at which it fires, with what it adds to the stream there. (What the
   whole FFN writes there would mix in the other experts, to which the direction is foreign.)
4. A second null: random directions that read the same x. y is a function of x, so that just any direction tells
   something of y; what the gate directions tell beyond that is the finding.
5. Where in the texts each direction is read most: the places of largest and of lowest v · x.
6. The tokens that each response pushes up and down, by the logit lens (`probes.responses.lens`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes import texts as probe_texts
from probes.live import match
from probes.live.experts import fire, outputs, require_sum
from probes.live.hooks import capture
from probes.live.load import Loaded
from probes.live.sites import EXPERT_ROLES, Layer, Mixture, Site, ffns, sites
from probes.records import head
from probes.responses import linear
from probes.responses.lens import poles
from probes.responses.result import RECORD, Responses
from probes.suite.activity import sink_tokens
from probes.suite.definition import SEED, TOKENS
from probes.texts import ProbeText
from vindex.chance import random_directions
from vindex.errors import ProbeError
from vindex.index import FINAL_NORM
from vindex.manifest import MeasuredResponses
from vindex.progress import Advance, Progress, silent
from vindex.reader import Vindex, as_vindex

USUAL = 0.95
"""Share of random directions whose R² stays below the second null."""


def respond(
    model: Loaded, *, vindex: Vindex | str | Path, texts: Iterable[str] | str | None = None, progress: Progress = silent
) -> Responses:
    """Measure what is written when each gate direction of `vindex` is read.

    vindex: one of the same weights, opened or named. texts: names of bundled ones or UTF-8 files; by default the eight
    bundled. Nothing is written before `Responses.add`. Raises ProbeError for a text, a vindex or a model that does not
    do, and where an activation is not finite.
    """
    vindex, found = as_vindex(vindex), ffns(model.model)
    encoded = probe_texts.encoded(model, texts, TOKENS)
    measured = _measured(model, encoded)
    digests = match.weights_sha256(model, progress)
    match.require_match(model, vindex, digests)
    observer = _Observer(vindex, found, progress("texts", len(found)))
    texts_read = np.array([text.token_ids for text in encoded], np.uint32)
    ids = torch.tensor(texts_read.astype(np.int64), device=model.model.device)
    with torch.inference_mode(), capture(model.model, _sites(model.model, found), observe=observer.see):
        model.model.get_decoder()(input_ids=ids, use_cache=False)
    direction, figures = (np.concatenate(each) for each in (observer.directions, observer.figures))
    places = np.concatenate(observer.places, axis=1)
    tokens = _tokens(model, vindex, direction, progress)
    described = match.describe(model, digests)
    return Responses(vindex, described, measured, direction, figures, tokens, texts_read, places)


def _measured(model: Loaded, encoded: Sequence[ProbeText]) -> MeasuredResponses:
    """How, for the manifest. Raises ProbeError where two texts have one name there."""
    names = [Path(text.name).name for text in encoded]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ProbeError(f"text {twice}: given twice, and each counts once; leave one out, or give it another name")
    made = head(RECORD)
    return MeasuredResponses(
        created=made["created"],
        dtype=str(model.model.dtype).removeprefix("torch."),
        device=model.model.device.type,
        tokens=TOKENS,
        texts={name: text.sha256 for name, text in zip(names, encoded, strict=True)},
        permutations=linear.PERMUTATIONS,
        seed=SEED,
        versions=made["libraries"],
    )


def _sites(model: Any, found: Sequence[Layer | Mixture]) -> tuple[Site, ...]:
    dense = [ffn.number for ffn in found if isinstance(ffn, Layer)]
    mixed = [ffn.number for ffn in found if isinstance(ffn, Mixture)]
    read = (*sites(model, "mlp_in", only=dense), *sites(model, *EXPERT_ROLES, only=mixed))
    return (*read, *sites(model, "mlp_out", "residual"))


class _Observer:
    """Takes the responses of each layer as soon as its block is through.

    directions: (F, H) float16 of each expert of each layer, a dense one being one expert. figures: (F, 6) float32:
    the five of response_stats.bin, and the mean R² of random directions. places: (2, F, 2 · PLACES) each.
    """

    def __init__(self, vindex: Vindex, found: Sequence[Layer | Mixture], advance: Advance) -> None:
        self.vindex, self.ffns, self.advance = vindex, found, advance
        self.random = random_directions(vindex.index.hidden_size)
        self.generator = torch.Generator().manual_seed(SEED)
        self.pending: dict[str, Tensor] = {}
        self.directions: list[np.ndarray] = []
        self.figures: list[np.ndarray] = []
        self.places: list[np.ndarray] = []

    def see(self, site: Site, value: Tensor) -> None:
        self.pending[site.role] = value
        if site.role != "residual":
            return
        kept = ~torch.stack([sink_tokens(text.float(), site.layer) for text in value]).flatten()
        gates, width = self.vindex.layer(site.layer).gate, value.shape[-1]
        read = {expert: (at, x.float(), y.float()) for expert, at, x, y in self.read(self.ffns[site.layer], kept)}
        never = value.new_zeros(0, width, dtype=torch.float32)
        for expert, gate in enumerate(gates):
            self.respond(gate, *read.get(expert, (kept.new_zeros(0), never, never)))
        self.pending.clear()
        self.advance(1)

    def read(self, ffn: Layer | Mixture, kept: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Each expert that fires, at which tokens (P,) of those that are kept (n,), and what it reads and adds there,
        (P, H) each.
        """
        y = self.pending["mlp_out"].flatten(0, 1)
        if isinstance(ffn, Layer):
            yield 0, kept.nonzero()[:, 0], self.pending["mlp_in"].flatten(0, 1)[kept], y[kept]
            return
        routed, chosen, weight = (self.pending[role].reshape(len(y), -1) for role in EXPERT_ROLES)
        added = tuple(outputs(ffn, fire(ffn, routed, chosen, weight)))
        require_sum(ffn, added, y)
        for expert, token, output in added:
            own = kept[token]
            yield expert, token[own], routed[token[own]], output[own]

    def respond(self, gate: np.ndarray, at: Tensor, x: Tensor, y: Tensor) -> None:
        """Of the directions (F, H) of an expert, from x and y (P, H) at the tokens `at` (P,)."""
        own, random = (torch.from_numpy(rows).to(x) for rows in (gate.astype(np.float32), self.random))
        a = x @ own.T
        found, control = linear.respond(a, y, self.generator), linear.explained(x @ random.T, y)
        same = (control.quantile(USUAL), found.slope.new_tensor(len(x)), control.mean())  # of all F directions
        usual, tokens, mean = (figure.expand(len(gate)) for figure in same)
        figures = torch.stack([found.r2, found.null, usual, found.slope, tokens, mean], dim=1)
        self.directions.append(found.direction.cpu().numpy().astype(np.float16))
        self.figures.append(figures.cpu().numpy())
        self.places.append(linear.strongest(a, at).cpu().numpy())


def _tokens(model: Loaded, vindex: Vindex, direction: np.ndarray, progress: Progress) -> np.ndarray:
    """Records of response_meta.bin, with the model's head, or the embeddings where it has none."""
    index, own = vindex.index, model.model
    words = own.get_output_embeddings() if model.head else own.get_input_embeddings()
    count = min(index.vocab_size, len(vindex.vocabulary))
    final_norm = torch.from_numpy(vindex.norms[FINAL_NORM].astype(np.float32)).to(own.device)
    with torch.inference_mode():
        return poles(
            torch.from_numpy(direction).to(own.device),
            final_norm,
            words.weight[:count],
            index.down_top_k,
            progress("logit lens", count),
        )
