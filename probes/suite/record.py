"""The JSON record of a probe run: every figure with its definition, and what is needed to recompute it.

The layout is documented in docs/probes.md; `RECORD` changes when a reader of the old layout would misread the new one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

import numpy as np
import orjson

from probes.live.experts import count
from probes.live.load import Loaded
from probes.live.match import describe
from probes.live.sites import Mixture, ffns
from probes.records import head, plain
from probes.suite import definition
from probes.suite.activity import MixtureReading
from probes.suite.constants import Constant
from probes.suite.definition import SPECTRUM_RANKS, STAGE_THRESHOLD
from probes.suite.geometry import Geometry
from probes.suite.measures import Measure
from probes.suite.readings import Reading
from probes.suite.segments import segment
from probes.suite.spectrum import Spectrum, floor
from probes.texts import ProbeText

RECORD = "vindex-probe/1"


def build(
    loaded: Loaded,
    texts: Sequence[ProbeText],
    readings: Sequence[Reading],
    geometry: Geometry,
    constants: Sequence[Constant],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """The record of one run: plain JSON values, floats with 6 significant digits. digests: of the weight files."""
    return plain(
        {
            **head(RECORD),
            "definition": definition.VERSION,
            "choices": definition.choices(),
            "model": _model(loaded, digests),
            "activation": readings[0].activation.name,
            "null_layers": null_layers(readings, geometry),
            "texts": [text._asdict() for text in texts],
            "constants": {constant.symbol: _constant(constant) for constant in constants},
            "published": published(),
            "layers": [_layers(reading) for reading in readings],
            "cka": _cka(readings[0]),
            "spectra": _spectra(geometry),
        }
    )


def null_layers(readings: Sequence[Reading], geometry: Geometry) -> dict[str, list[Any]]:
    """Layers that some figures leave out: without a direction, since the weight is zero, or without a scale of h.

    `hidden`: h is 0 at every token (or at every one that no_sink keeps) of a text. `experts`: [layer, expert] of routed
    experts whose gate_proj is zero.
    """
    layers = range(len(geometry.gate))
    scales = [(layer.sparsity.rms, layer.sparsity_no_sink.rms) for text in readings for layer in text.layers]
    silent = {place % len(layers) for place, rms in enumerate(scales) if not all(rms)}
    return {
        "gate_proj": [layer for layer in layers if not geometry.gate[layer].energy],
        "down_proj": [layer for layer in layers if not geometry.down[layer].energy],
        "hidden": sorted(silent),
        "experts": [
            [layer, int(expert)]
            for layer, frame in enumerate(geometry.experts)
            if frame is not None
            for expert in np.flatnonzero(~frame.any(axis=1))
        ],
    }


def published() -> dict[str, Any]:
    """C1–C5 as others published them, without their definitions; for display, never for comparison."""
    text = (resources.files("probes.suite") / "published.json").read_bytes()
    return {"status": "definition unpublished", **orjson.loads(text)}


def _model(loaded: Loaded, digests: Mapping[str, str]) -> dict[str, Any]:
    config = loaded.model.config
    mixtures = [ffn for ffn in ffns(loaded.model) if isinstance(ffn, Mixture)]
    return {
        **describe(loaded, digests),
        "head": loaded.head,
        "notes": loaded.notes,
        "attn_implementation": config._attn_implementation,
        **(_mixture(mixtures, config) if mixtures else {}),
    }


def _mixture(mixtures: Sequence[Mixture], config: Any) -> dict[str, Any]:
    shared = mixtures[0].shared
    return {
        "num_experts": count(mixtures[0]),
        "top_k": config.num_experts_per_tok,
        "shared_intermediate_size": None if shared is None else shared.gate_proj.weight.shape[0],
        "mixture_layers": [mixture.number for mixture in mixtures],
    }


def _constant(constant: Constant) -> dict[str, Any]:
    return {
        "symbol": constant.symbol,
        "name": constant.name,
        "definition": constant.definition,
        **_measure(constant.headline),
        "per_layer": constant.per_layer,
        "variants": {name: _measure(variant) for name, variant in constant.variants.items()},
    }


def _measure(measure: Measure) -> dict[str, Any]:
    """As it is; a count of stages is written as the whole number it is."""
    entry = asdict(measure)
    if measure.unit == "stages" and measure.value is not None:
        entry["value"], entry["samples"] = int(measure.value), [int(sample) for sample in measure.samples]
    return entry


def _layers(reading: Reading) -> dict[str, Any]:
    """Per-layer curves of one text: each a list of L values, or L lists."""
    rows = reading.layers
    mixed = any(row.mixture for row in rows)
    return {
        "sinks": [row.sinks for row in rows],
        "sparsity": {field: [getattr(row.sparsity, field) for row in rows] for field in rows[0].sparsity._fields},
        "sparsity_no_sink": {
            field: [getattr(row.sparsity_no_sink, field) for row in rows] for field in rows[0].sparsity._fields
        },
        "temperature": {
            field: [getattr(row.temperature, field) for row in rows] for field in rows[0].temperature._fields
        },
        **(
            {"experts": [row.mixture and _experts(row.mixture, len(reading.top_mass)) for row in rows]} if mixed else {}
        ),
        "adjacent_cka": np.diagonal(reading.similarity.debiased.cpu().numpy(), offset=1),
        "top_mass": reading.top_mass,
    }


def _experts(mixture: MixtureReading, tokens: int) -> dict[str, Any]:
    """The reading, with the share of experts that fired beside that of routers that choose k at random."""
    experts = len(mixture.load)
    shares = np.array(mixture.load) / sum(mixture.load)
    return {
        **mixture._asdict(),
        "fired": float(np.mean(np.array(mixture.load) > 0)),
        "fired_null": 1 - (1 - mixture.top_k / experts) ** tokens,
        "largest_share": float(shares.max()),
        "effective": float(np.exp(-sum(share * math.log(share) for share in shares if share))),
    }


def _cka(reading: Reading) -> dict[str, Any]:
    """Of the headline text."""
    debiased = reading.similarity.debiased.cpu().numpy()
    below = np.diagonal(debiased, offset=1) < STAGE_THRESHOLD
    return {
        "debiased": debiased,
        "biased": reading.similarity.biased.cpu().numpy(),
        "with_sink_adjacent": reading.similarity.with_sink.cpu().numpy(),
        "permuted_adjacent": reading.similarity.permuted.cpu().numpy(),
        "permuted_adjacent_biased": reading.similarity.permuted_biased.cpu().numpy(),
        "stage_starts": [0, *(int(layer) + 1 for layer in np.flatnonzero(below))],
        "segmentation": segment(debiased, STAGE_THRESHOLD)._asdict(),
    }


def _spectra(geometry: Geometry) -> dict[str, Any]:
    return {"source": geometry.source, "gate_proj": _projection(geometry.gate), "down_proj": _projection(geometry.down)}


def _projection(spectra: tuple[Spectrum, ...]) -> dict[str, Any]:
    shapes = [spectrum.shape for spectrum in spectra]
    floors = {shape: floor(shape) for shape in set(shapes)}
    by_rank = {str(rank): [floors[shape][place] for shape in shapes] for place, rank in enumerate(SPECTRUM_RANKS)}
    return {
        "shape": shapes[0] if len(floors) == 1 else None,
        **({"shapes": shapes} if len(floors) > 1 else {}),
        "var": {str(rank): [spectrum.share(rank) for spectrum in spectra] for rank in SPECTRUM_RANKS},
        "marchenko_pastur": {rank: each[0] if len(floors) == 1 else each for rank, each in by_rank.items()},
        "squared_norm": [spectrum.energy for spectrum in spectra],
        "singular_values": [spectrum.singular_values for spectrum in spectra],
    }
