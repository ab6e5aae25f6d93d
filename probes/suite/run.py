"""The whole probe suite on one model.

1. Encode the texts (`probes.texts`); a text that is too short or foreign to the tokenizer is an error before any work.
2. One forward pass per batch of texts (`probes.suite.readings`): C1, C2, C4 and C5 need nothing else. Statistics
   stream, so memory does not grow with the number of texts.
3. Leading gate directions and spectra, from a vindex when given, else from the weights (`probes.suite.spectrum`): C3.
4. The constants (`probes.suite.constants`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes import texts
from probes.live.experts import count, down_weights, gate_weights
from probes.live.load import Loaded
from probes.live.sites import Layer, Mixture, ffns
from probes.suite import constants, readings
from probes.suite.constants import Constant
from probes.suite.definition import DIRECTIONS, SPECTRUM_RANKS, TOKENS
from probes.suite.readings import Reading
from probes.suite.spectrum import Spectrum, given, leading, leading_read
from probes.texts import ProbeText
from vindex.errors import ProbeError

Advance = Callable[[int], object]


class Geometry(NamedTuple):
    """What the weights alone say; L = layers, F = directions, H = hidden size."""

    source: str
    """"weights", or "vindex ID"."""
    directions: tuple[np.ndarray, ...]
    """Per layer (F, H), leading right singular vectors of gate_proj."""
    mean_rows: np.ndarray
    """(L, H): mean over neurons of gate_proj's rows."""
    gate: tuple[Spectrum, ...]
    down: tuple[Spectrum, ...]
    experts: tuple[np.ndarray | None, ...]
    """Per layer (E, H), the leading direction of every routed expert's gate_proj; None for a dense layer."""


class Results(NamedTuple):
    """Everything a record is made of."""

    texts: tuple[ProbeText, ...]
    readings: tuple[Reading, ...]
    geometry: Geometry
    constants: tuple[Constant, ...]


def nothing(_steps: int) -> None:
    """Progress nobody looks at."""


def run(
    loaded: Loaded,
    names: Sequence[str] = texts.BUNDLED,
    *,
    vindex: Any = None,
    batch_size: int = 1,
    on_text: Advance = nothing,
    on_layer: Advance = nothing,
) -> Results:
    """Measure `loaded` on the texts `names` (bundled names or files); the first is the headline text.

    `vindex` is an open vindex of the same model (`probes.live.match`). `on_text` and `on_layer` are told of progress.
    """
    found = ffns(loaded.model)
    if len(found) < 2:
        raise ProbeError("the model has one layer; C3 and C5 compare adjacent layers and need at least two")
    probe_texts = encode(loaded, names)
    taken = read_texts(loaded.model, probe_texts, batch_size=batch_size, on_text=on_text, head=loaded.head)
    geometry = from_weights(found, on_layer) if vindex is None else from_vindex(found, vindex, on_layer)
    return Results(probe_texts, taken, geometry, measure(taken, geometry, loaded.model.config.vocab_size))


def encode(loaded: Loaded, names: Sequence[str]) -> tuple[ProbeText, ...]:
    """The texts as this model sees them."""
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    return tuple(
        texts.encode(name, texts.read(name), loaded.tokenizer, tokens=TOKENS, vocabulary=vocabulary) for name in names
    )


def read_texts(
    model: Any,
    probe_texts: Sequence[ProbeText],
    *,
    batch_size: int = 1,
    on_text: Advance = nothing,
    head: bool = True,
) -> tuple[Reading, ...]:
    """One Reading per text, `batch_size` texts to a forward pass. head: whether the model has one."""
    taken: list[Reading] = []
    for start in range(0, len(probe_texts), batch_size):
        batch = probe_texts[start : start + batch_size]
        ids = torch.tensor([text.token_ids for text in batch], device=model.device)
        taken.extend(readings.read(model, ids, head=head))
        on_text(len(batch))
    return tuple(taken)


def measure(taken: Sequence[Reading], geometry: Geometry, vocabulary: int) -> tuple[Constant, ...]:
    """C1 to C5."""
    return (
        constants.ffn_sparsity(taken),
        constants.top_mass(taken, vocabulary),
        constants.gate_coherence(geometry.directions, geometry.mean_rows, geometry.experts),
        constants.layer_temperature(taken),
        constants.circuit_stages(taken),
    )


def from_weights(found: Sequence[Layer | Mixture], on_layer: Advance = nothing, vindex: Any = None) -> Geometry:
    """Directions and spectra by exact eigendecomposition of each weight's residual-side Gram matrix.

    The experts of a mixture count as one weight, and their own leading directions come from `vindex` when it is given.
    """
    directions, gate, down, experts = [], [], [], []
    for ffn in found:
        spectrum, reads = leading(gate_weights(ffn), DIRECTIONS, side=1)
        gate.append(spectrum)
        directions.append(reads.astype(np.float32))
        down.append(leading(down_weights(ffn), DIRECTIONS, side=0)[0])
        experts.append(_experts(ffn, vindex) if isinstance(ffn, Mixture) else None)
        on_layer(1)
    source = "weights" if vindex is None else f"weights; each expert's leading direction from vindex {vindex.id}"
    return Geometry(source, tuple(directions), _mean_rows(found), tuple(gate), tuple(down), tuple(experts))


def from_vindex(found: Sequence[Layer | Mixture], vindex: Any, on_layer: Advance = nothing) -> Geometry:
    """Directions and spectra from an open vindex; only each weight's norm is taken from the weights.

    A mixture's vindex knows the experts one by one and not what they are together, which the weights then say.
    """
    dense = [ffn for ffn in found if isinstance(ffn, Layer)]
    if len(dense) < len(found):
        return from_weights(found, on_layer, vindex)
    needed = min(max(SPECTRUM_RANKS), *dense[0].gate_proj.weight.shape)
    if vindex.index.num_feats < needed:
        raise ProbeError(
            f"the vindex keeps {vindex.index.num_feats} directions per layer, C3 and var@{max(SPECTRUM_RANKS)} need "
            f"{needed}; leave --vindex out, or build it with --features {needed}"
        )
    gate, down = [], []
    for layer in dense:
        gate.append(given(layer.gate_proj.weight, vindex.singular_values[0, layer.number]))
        down.append(given(layer.down_proj.weight, vindex.singular_values[1, layer.number]))
        on_layer(1)
    directions = tuple(np.asarray(vindex.gate[layer.number], dtype=np.float32) for layer in dense)
    none = (None,) * len(dense)
    return Geometry(f"vindex {vindex.id}", directions, _mean_rows(dense), tuple(gate), tuple(down), none)


def _experts(mixture: Mixture, vindex: Any) -> np.ndarray:
    """(E, H): the leading direction of every routed expert."""
    if vindex is not None:
        return np.asarray(vindex.layer(mixture.number).gate[: count(mixture), 0], dtype=np.float32)
    return np.stack([leading_read(weight) for weight in islice(gate_weights(mixture), count(mixture))])


def _mean_rows(found: Sequence[Layer | Mixture]) -> np.ndarray:
    return np.stack([_mean_row(ffn).cpu().numpy() for ffn in found])


def _mean_row(ffn: Layer | Mixture) -> Tensor:
    sums = [(weight.double().mean(0), len(weight)) for weight in gate_weights(ffn)]
    return torch.stack([mean * rows for mean, rows in sums]).sum(0) / sum(rows for _, rows in sums)
