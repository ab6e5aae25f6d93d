"""What an audit says of directions by the methods of the field, and of ours spoilt, as published (docs/audit.md).

    python -m benchmarks.audit MODEL [--features 128] [--layers 30]
    python -m benchmarks.audit MODEL --features 64 --layers 4 --experts 8

Each set of rows, of every layer and expert, is written as the field does it and `extract.audit` is asked. Of a dense
model: the published form, in half precision with the model's embeddings and an index.json of four sizes. Of a mixture:
a research summary, gate directions in float32. --experts makes a mixture of a dense model first, by sparse upcycling:
each expert is the FFN of its layer with noise of a tenth of its size. One line for each set: verdicts, rows of a weight
that are no true direction (mean), rows with |cosine| above 0.99 (mean), residual (median, largest), and what is missed
of ‖W‖².
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import extract
from benchmarks.mixture import write_experts
from extract.checkpoint import Checkpoint, open_checkpoint
from extract.layouts import Layout, find_layout
from extract.rederive import evenly
from extract.svd import top_directions
from tests.foreign import write_published, write_summary
from vindex.audits import Audit

NOISE = 0.1  # of an expert's weights, relative to those it was copied from
OURS = "ours"
Frames = dict[str, torch.Tensor]  # by side: (layers, experts, F, H)


def power_iterations(weight: torch.Tensor, features: int, steps: int = 4) -> torch.Tensor:
    """(F, H): a random block, multiplied by WᵀW and orthonormalised so many times."""
    block = torch.randn(weight.shape[1], features)
    for _ in range(steps):
        block = torch.linalg.qr(weight.T @ (weight @ block)).Q
    return block.T


METHODS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    OURS: lambda weight, features: top_directions(weight, features, 1e-4, "w").rows,
    "torch.linalg.svd": lambda weight, features: torch.linalg.svd(weight, full_matrices=False).Vh[:features],
    "four power iterations": power_iterations,
    "sixteen": lambda weight, features: power_iterations(weight, features, 16),
    "torch.svd_lowrank": lambda weight, features: torch.svd_lowrank(weight, q=features)[2].T,
    "the first neurons": lambda weight, features: weight[:features],
}


def rotation(size: int, angle: float) -> torch.Tensor:
    """A rotation at random that turns each axis by about so much (rad)."""
    random = torch.randn(size, size)
    return torch.linalg.matrix_exp(angle * (random - random.T) / (2 * size) ** 0.5)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shuffled": lambda rows: rows[torch.randperm(len(rows))],
    "half the signs flipped": lambda rows: rows * (torch.randint(2, (len(rows), 1)) * 2 - 1),
    "mixed among themselves by 0.001 rad": lambda rows: rotation(len(rows), 0.001) @ rows,
    "mixed by 0.01 rad": lambda rows: rotation(len(rows), 0.01) @ rows,
    "turned in space by 0.001 rad": lambda rows: rows @ rotation(rows.shape[1], 0.001),
    "turned by 0.01 rad": lambda rows: rows @ rotation(rows.shape[1], 0.01),
}


def sets(opened: Checkpoint, layout: Layout, features: int, sides: tuple[str, ...]) -> Iterator[tuple[str, Frames]]:
    """Each set of rows with its name: of every method, and of ours spoilt in every way."""
    torch.manual_seed(0)
    weights = {
        side: [[of.by_neuron(opened).float() for of in getattr(ffn, side)] for ffn in layout.ffns] for side in sides
    }
    for name, method in METHODS.items():
        frames = {
            side: torch.stack([torch.stack([method(of, features) for of in experts]) for experts in layers])
            for side, layers in weights.items()
        }
        yield name, frames
        for change, spoil in CHANGES.items() if name == OURS else ():
            spoilt = {side: [spoil(of) for of in rows.flatten(0, 1)] for side, rows in frames.items()}
            yield f"{name}, {change}", {side: torch.stack(spoilt[side]).view_as(frames[side]) for side in sides}
        if name == OURS and layout.ffns[0].num_experts:
            yield f"{name}, of the next expert", {side: rows.roll(-1, 1) for side, rows in frames.items()}


def upcycled(model: str, experts: int, layers: int | None, directory: Path) -> Path:
    """A mixture of so many copies of each FFN, each with noise of its own, of so many layers, evenly spread."""
    opened, random = open_checkpoint(model), torch.Generator().manual_seed(0)
    layout = find_layout(opened)

    def copy(weight: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(weight.shape, generator=random) * weight.float().std() * NOISE
        return (weight.float() + noise).bfloat16()

    ffns = (
        ((copy(ffn.gate[0].by_neuron(opened)), copy(ffn.down[0].by_neuron(opened).T)) for _ in range(experts))
        for ffn in (layout.ffns[at] for at in evenly(len(layout.ffns), layers or len(layout.ffns)))
    )
    return write_experts(directory, ffns, opened.tensor(layout.embeddings).bfloat16())


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
    parser.add_argument("--layers", type=int, help="audit so many, evenly spread; with --experts, the mixture has them")
    parser.add_argument("--experts", type=int, help="make a mixture of so many a layer first")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, layers = asked.model, asked.layers
        if asked.experts:
            model, layers = str(upcycled(model, asked.experts, layers, Path(folder) / "mixture")), None
        opened = open_checkpoint(model)
        layout = find_layout(opened)
        mixture = bool(layout.ffns[0].num_experts)
        for name, frames in sets(opened, layout, asked.features, ("gate",) if mixture else ("gate", "down")):
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                directory = Path(beside) / "vindex"
                if mixture:
                    write_summary(directory, dict(enumerate(frames["gate"].numpy())))
                else:
                    embeddings = opened.tensor(layout.embeddings).float().numpy()
                    write_published(directory, *(frames[side][:, 0].numpy() for side in frames), embeddings, sums=False)
                print(line(name, extract.audit(directory, model, layers=layers)), flush=True)


if __name__ == "__main__":
    main()
