"""What an audit says of directions by the methods of the field, in the form that is published (docs/audit.md).

    python -m benchmarks.audit MODEL [--features 128] [--layers 30]

Each method's rows, both sides of every layer, are written in half precision with the model's embeddings and an
index.json of four sizes, as the cards on the Hub have it, and `extract.audit` is asked. One line for each: verdicts,
rows of a weight that are no true direction (mean), rows with |cosine| above 0.99 (mean), residual (median, largest),
and what is missed of ‖W‖².
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import extract
from extract.checkpoint import open_checkpoint
from extract.layouts import find_layout
from extract.svd import top_directions
from tests.foreign import write_published
from vindex.audits import Audit

Method = Callable[[torch.Tensor, int], torch.Tensor]


def power_iterations(weight: torch.Tensor, features: int, steps: int = 4) -> torch.Tensor:
    """(F, H): a random block, multiplied by WᵀW and orthonormalised so many times."""
    block = torch.randn(weight.shape[1], features)
    for _ in range(steps):
        block = torch.linalg.qr(weight.T @ (weight @ block)).Q
    return block.T


METHODS: dict[str, Method] = {
    "ours": lambda weight, features: top_directions(weight, features, 1e-4, "w").rows,
    "torch.linalg.svd": lambda weight, features: torch.linalg.svd(weight, full_matrices=False).Vh[:features],
    "four power iterations": power_iterations,
    "torch.svd_lowrank": lambda weight, features: torch.svd_lowrank(weight, q=features)[2].T,
    "sixteen power iterations": lambda weight, features: power_iterations(weight, features, 16),
    "its neurons, the first": lambda weight, features: weight[:features],
}


def published(model: str, features: int, method: Method, directory: Path) -> Path:
    """The directory that holds these directions of all layers, as others publish theirs."""
    torch.manual_seed(0)
    opened = open_checkpoint(model)
    layout = find_layout(opened)
    sides = (
        np.stack([method(getattr(ffn, side)[0].by_neuron(opened).float(), features).numpy() for ffn in layout.ffns])
        for side in ("gate", "down")
    )
    return write_published(directory, *sides, opened.tensor(layout.embeddings).float().numpy(), sums=False)


def line(name: str, found: Audit) -> str:
    """What a row of the table says."""
    figures = [one.figures for one in found]
    residual = np.concatenate([one.residual for one in figures])
    wrong = np.mean([(~of.true).sum() for of in figures])
    near = np.mean([(of.cosine > 0.99).sum() for of in figures])
    other = ", ".join(f"{check.what} {'ok' if check.holds else check.detail}" for check in found.contents)
    return (
        f"| {name} | {found.summary.partition(';')[0]} | {wrong:.1f} | {near:.1f} | {np.median(residual):.2g}, "
        f"{residual.max():.2g} | {found.missed:.2%} | {other} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--layers", type=int, help="audit so many, evenly spread")
    asked = parser.parse_args()
    for name, method in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = published(asked.model, asked.features, method, Path(folder) / "published")
            print(line(name, extract.audit(directory, asked.model, layers=asked.layers)), flush=True)


if __name__ == "__main__":
    main()
