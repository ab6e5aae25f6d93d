"""The loss of a training run, term by term, as .html or .png."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vindex.charts import COLOURS, Curve, draw_curves

TERMS = {
    "forget": "forget: softplus(β − CE of the entity)", "retain": "retain: KL on reasoning, times T²",
    "nke": "NKE: KL on the facts' other words", "context": "context: KL where the text states the answer",
}  # fmt: skip


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw the record of a training to `path`, the terms that took part. Raises TargetError for another suffix."""
    found = {name: record["curves"][name] for name in TERMS if any(record["curves"].get(name, ()))}
    drawn = [
        Curve(TERMS[name], range(1, len(values) + 1), [value or None for value in values], colour)
        for (name, values), colour in zip(found.items(), COLOURS, strict=False)
    ]
    title = f"{record['model']['name']}, {record['options']['preset']}: {record['steps']} steps"
    draw_curves(drawn, path, title, "step", "nats, before weighting", log=True)
