"""Changes of one projection's weight, as values: of rank 1 (`Delta`), which patch files hold, or of any rank (`Wide`).

`probes.live.hooks.patched` applies one to a live model and restores the weight bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from probes.live.hooks import Edit
from probes.live.sites import weight


@dataclass(frozen=True)
class Delta:
    """A rank-1 change of `gate_proj.weight` (I, H) in one layer: ΔW = outer(gate_write, gate_read). On the CPU."""

    layer: int
    gate_write: Tensor
    """(I,) float32: what is added to the gate pre-activations for each unit of gate_read · x."""
    gate_read: Tensor
    """(H,) float32: the direction of the FFN's input that triggers it."""
    method: str
    projection = "gate_proj"

    @property
    def norm(self) -> float:
        """Frobenius norm of ΔW."""
        return norm(self.gate_write) * norm(self.gate_read)

    @property
    def shape(self) -> tuple[int, int]:
        """Of ΔW."""
        return len(self.gate_write), len(self.gate_read)

    def like(self, write: Tensor, read: Tensor, method: str) -> Delta:
        """Another rank-1 change of the same weight and size."""
        return Delta(self.layer, write, read, method).scaled_to(self.norm)

    def scaled_to(self, norm: float) -> Delta:
        """The same change with ‖ΔW‖ = `norm`."""
        return replace(self, gate_write=self.gate_write * (norm / max(self.norm, 1e-30)))

    def edits(self, stored: torch.dtype | None = None) -> dict[tuple[str, int], Edit]:
        """For `hooks.patched`. With `stored`, the new weight is rounded as in a checkpoint of that dtype."""

        def change(gate: Tensor) -> Tensor:
            # two roundings, not a fused one: patches.apply computes the same bits block by block
            new = gate + torch.outer(self.gate_write.to(gate.device), self.gate_read.to(gate.device))
            return new if stored is None else new.to(stored).float()

        return {("gate_proj", self.layer): change}


@dataclass(frozen=True)
class Wide:
    """A change of any rank of one projection's weight, which no patch file holds. On the CPU."""

    layer: int
    projection: str
    change: Tensor
    """(out, in) float32: ΔW."""
    method: str

    @property
    def norm(self) -> float:
        """Frobenius norm of ΔW."""
        return norm(self.change)

    @property
    def shape(self) -> tuple[int, int]:
        """Of ΔW."""
        rows, columns = self.change.shape
        return rows, columns

    def like(self, write: Tensor, read: Tensor, method: str) -> Wide:
        """A rank-1 change of the same weight and size."""
        return replace(self, change=torch.outer(write, read), method=method).scaled_to(self.norm)

    def scaled_to(self, norm: float) -> Wide:
        """The same change with ‖ΔW‖ = `norm`."""
        return replace(self, change=self.change * (norm / max(self.norm, 1e-30)))

    def edits(self, stored: torch.dtype | None = None) -> dict[tuple[str, int], Edit]:
        """As `Delta.edits`."""

        def edit(old: Tensor) -> Tensor:
            new = old + self.change.to(old.device)
            return new if stored is None else new.to(stored).float()

        return {(self.projection, self.layer): edit}


def relative_norm(model: nn.Module, delta: Delta | Wide) -> float:
    """‖ΔW‖ / ‖W‖ of the weight that `delta` changes."""
    return delta.norm / norm(weight(model, delta.projection, delta.layer))


def norm(values: Tensor) -> float:
    """Frobenius norm, summed in float64: in float32 a weight of 50 million entries comes out 0.4 % too short."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
