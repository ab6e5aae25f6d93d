"""Gates like the published baseline: its size, its key prefix, and logits whose figures are those on its card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import fsolve

PREFIX = "model.module.model."
LAYERS, NEURONS = 28, 3072
CARD = {"gates": 86016, "mean": 0.501, "std": 0.044, "min": 0.126, "max": 0.957}
THRESHOLDS = {0.432: 0.05, 0.478: 0.254, 0.502: 0.501, 0.525: 0.746, 0.568: 0.949}


def published_values() -> np.ndarray:
    """λ of 86,016 gates with the card's five off-fractions, extremes, mean and standard deviation.

    The quantile function is linear between the thresholds; the two tails are powers, bent until mean and std fit.
    """
    share = (np.arange(LAYERS * NEURONS) + 0.5) / (LAYERS * NEURONS)
    knots, levels = list(THRESHOLDS.values()), list(THRESHOLDS)

    def quantiles(bends: np.ndarray) -> np.ndarray:
        low, high = np.exp(bends)
        lower = levels[0] - (levels[0] - CARD["min"]) * (1 - np.minimum(share / knots[0], 1)) ** low
        upper = levels[-1] + (CARD["max"] - levels[-1]) * np.maximum((share - knots[-1]) / (1 - knots[-1]), 0) ** high
        middle = np.interp(share, knots, levels)
        lower = np.minimum(lower, levels[0] - 1e-4)  # below the threshold in float32 too
        return np.where(share < knots[0], lower, np.where(share > knots[-1], upper, middle))

    def misses(bends: np.ndarray) -> list[float]:
        values = quantiles(bends)
        return [values.mean() - CARD["mean"], values.std() - CARD["std"]]

    values = quantiles(fsolve(misses, [1.0, 1.0]))
    values[[0, -1]] = CARD["min"], CARD["max"]
    return np.random.default_rng(0).permutation(values).reshape(LAYERS, NEURONS)


def write_published(directory: Path) -> torch.Tensor:
    """The published directory, file by file; returns its logits (28, 3072)."""
    directory.mkdir(parents=True)
    values = torch.from_numpy(published_values())
    logits = torch.logit(values).float()
    torch.save(
        {f"{PREFIX}layers.{i}.mlp.lambda_logits": row.clone() for i, row in enumerate(logits)},
        directory / "lambda_logits.pt",
    )
    below = torch.sigmoid(logits) < 0.5
    indices = {str(i): row.nonzero().flatten().tolist() for i, row in enumerate(below)}
    (directory / "neuron_indices.json").write_text(json.dumps(indices))
    stats = {
        "total_gates": 86016,
        "mean": 0.501,
        "std": 0.044,
        "min": 0.126,
        "max": 0.957,
        "selected_thresholds": [{"threshold": t, "off_fraction": f} for t, f in THRESHOLDS.items()],
    }
    (directory / "gate_stats.json").write_text(json.dumps(stats))
    (directory / "selected_thresholds.txt").write_text(",".join(map(str, THRESHOLDS)))
    return logits
