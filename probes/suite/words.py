"""What C1–C5 say of the model at hand, a sentence each, from the record alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def meanings(record: Mapping[str, Any]) -> dict[str, str]:
    """The headline value of each constant in words, beside its null."""
    choices, found = record["choices"], record["constants"]
    value = {symbol: entry["value"] for symbol, entry in found.items()}
    null = {symbol: entry["null"] for symbol, entry in found.items()}
    firing = " of experts that fire" if record["model"].get("num_experts") else ""
    said = {
        "C1": f"{_percent(value['C1'])} of what FFN neurons{firing} give out is next to nothing "
        f"(|h| < {choices['sparsity_headline']:g}); in normal noise of the same size, {_percent(null['C1'])}.",
        "C2": "No head is stored: nothing is predicted.",
        "C3": "No two adjacent layers have a leading direction.",
        "C4": f"A neuron's output{firing} has variance {digits(value['C4'])} over tokens; if its gate and its up came "
        f"from different tokens, {digits(null['C4'])}.",
        "C5": f"The residual stream changes its geometry (CKA < {choices['stage_threshold']:g}) at "
        f"{value['C5'] - 1} of the {len(found['C5']['per_layer'])} steps from layer to layer; with tokens shuffled, "
        f"at {digits(null['C5'] - 1)}.",
    }
    if value["C2"] is not None:
        said["C2"] = (
            f"The {choices['top']} most probable next tokens hold {_percent(value['C2'])} of the probability; "
            f"if all tokens were alike, {_percent(null['C2'])}."
        )
    if value["C3"] is not None:
        said["C3"] = (
            f"The directions that the gates of adjacent layers read most are at |cos| {digits(value['C3'])}; "
            f"random directions, at {digits(null['C3'])}."
        )
    return said


def choice_of_stages(record: Mapping[str, Any]) -> str:
    """Which of C5's variants is the headline, why, and what others give."""
    entry, choices = record["constants"]["C5"], record["choices"]
    others = [variant["value"] for name, variant in entry["variants"].items() if variant["unit"] == "stages"]
    low, high = min(others), max(others)
    return (
        f"C5's headline is a choice: debiased CKA, because the biased one is far from 0 even for unrelated layers with "
        f"{choices['tokens']} tokens; without sinks, because one huge token makes all layers alike; and a limit of "
        f"{choices['stage_threshold']:g}, by convention. Its other variants give {digits(low)}"
        + (f" to {digits(high)}" if high != low else "")
        + " here."
    )


def digits(value: float) -> str:
    """Three significant digits, never as a power of ten: 0.0708, 1.26, 384."""
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def _percent(share: float) -> str:
    return f"{np.format_float_positional(100 * share, precision=2, fractional=False, trim='-')} %"
