"""Gates as a user holds them: read, applied to a live model, soft or as a mask, and written.

g = Gates.read("lambda-gates/")
with g.off(0.25).applied(model):  # the quarter of the neurons with the lowest λ off
    model.generate("The capital of France is")
with g.applied(model):            # every neuron times its λ
    model.generate("The capital of France is")
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probes.gates import curves, masks
from probes.gates.apply import gated
from probes.gates.files import MADE, read_indices, read_logits, summary, write_logits
from probes.gates.options import ScaleMode, scale_of
from probes.live.load import Loaded, find
from probes.records import Result
from probes.weights.bake import bake
from vindex import places, targets
from vindex.errors import NumericError, PatchError
from vindex.kinds import GATE_FILES, TRAINING
from vindex.progress import Progress, silent
from vindex.schema import load_record


class Factors(ABC):
    """What can multiply h: gates, or a mask."""

    what: str
    """In words, such as `λ < 0.48, 25.0% off`."""

    @abstractmethod
    def factors(self, scale_mode: ScaleMode | None = None) -> Tensor:
        """(L, I) float32 after this rescaling; None: the one that belongs to these gates, none for a mask."""

    def applied(self, model: Loaded, scale_mode: ScaleMode | None = None) -> AbstractContextManager[None]:
        """Inside the `with` block every FFN of `model` passes h times the factors on. Afterwards it is as before.

        Raises PatchError unless the gates are of a model of this size.
        """
        return gated(model.model, self.factors(scale_mode))

    @abstractmethod
    def made_of(self) -> dict[str, Any]:
        """The gates and how they are applied, for records."""

    def bake(
        self,
        model: str | Path,
        output: str | Path,
        *,
        revision: str | None = None,
        force: bool = False,
        reads: Path | None = None,
        progress: Progress = silent,
    ) -> int:
        """Write an ordinary checkpoint of `model`, a directory or Hub id, in which h is multiplied by the factors.

        Returns how many neurons are zero. force: what this tool made at `output` may be replaced. reads: a directory
        that `output` may not be. Raises CheckpointError, PatchError or TargetError as `probes.weights.bake.bake` does.
        """
        source = find(model, revision)
        note = {"checkpoint": source.name, **self.made_of()}
        return bake(
            source.directory, self.factors(), Path(output), note=note, force=force, reads=[reads] if reads else [],
            advance=progress("copying", sum(source.sizes.values())),
        )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Mask(Factors):
    """Which neurons stay on."""

    keep: Tensor  # (L, I) bool
    what: str
    gates: str = "gates"
    """Name of the gates it was made of."""

    @property
    def neurons_off(self) -> int:
        return int((~self.keep).sum())

    def factors(self, scale_mode: ScaleMode | None = None) -> Tensor:
        return masks.rescaled(self.keep.float(), scale_mode or "none")

    def made_of(self) -> dict[str, Any]:
        return {"gates": self.gates, "mask": self.what, "neurons_off": self.neurons_off}

    def __repr__(self) -> str:
        return f"<mask of {self.gates}: {self.what}, {self.neurons_off:,} of {self.keep.numel():,} neurons off>"


@dataclass(frozen=True, eq=False, repr=False)
class Gates(Result, Factors):
    """One logit per FFN neuron; λ = sigmoid(logit)."""

    logits: Tensor  # (L, I) float32, finite
    name: str = "gates"
    training: Mapping[str, Any] = field(default_factory=dict)
    """How they were made here: the record of a training, with options, data and loss curves, or of a mask."""
    what = "soft"

    def __post_init__(self) -> None:
        if self.logits.dtype != torch.float32 or self.logits.ndim != 2:
            raise PatchError(f"gate logits are {self.logits.dtype}, {self.logits.ndim}-D; expected float32 (L, I)")
        bad = (~torch.isfinite(self.logits)).nonzero()
        if len(bad):
            layer, neuron = bad[0].tolist()
            raise NumericError(
                f"gate logits: {len(bad)} not finite, first at layer {layer} neuron {neuron} "
                f"({float(self.logits[layer, neuron])}); train again or download the file again"
            )

    @classmethod
    def read(cls, path: str | Path) -> Gates:
        """The gates in a directory of the published layout, or in one .pt or .safetensors file.

        Raises PatchError when there are none or its files differ, NumericError when a logit is not finite.
        """
        path = Path(path)
        logits, record = read_logits(path), path / TRAINING
        return cls(logits, path.name, load_record(record) if os.path.lexists(record) else {})

    @property
    def values(self) -> Tensor:
        """λ, (L, I) float32 in 0..1."""
        return torch.sigmoid(self.logits)

    @property
    def scale_mode(self) -> ScaleMode:
        """The rescaling of soft gates that they were trained with; none where that is not known."""
        options = self.training.get("options")
        return scale_of(options.get("scale_mode", "none")) if isinstance(options, Mapping) else "none"

    def keep(self, threshold: float) -> Tensor:
        """(L, I) bool: the neurons that stay on at `threshold`, those with λ >= threshold."""
        return masks.kept(self.values, threshold)

    def threshold_at(self, off: float) -> float:
        """The λ quantile at off-fraction `off`, rounded as it is on disk."""
        return masks.threshold_at(self.values, off)

    def selected_thresholds(self) -> tuple[float, ...]:
        """The thresholds at 5, 25, 50, 75 and 95 % off."""
        return masks.selected_thresholds(self.values)

    def point(self, threshold: float) -> masks.Point:
        """What a threshold turns off."""
        return masks.point(self.values, threshold)

    def factors(self, scale_mode: ScaleMode | None = None) -> Tensor:
        return masks.rescaled(self.values, scale_mode or self.scale_mode)

    def made_of(self) -> dict[str, Any]:
        return {"gates": self.name, "mask": self.what, "scale_mode": self.scale_mode}

    def off(self, share: float) -> Mask:
        """The mask that turns off this share of all neurons, those of lowest λ; 0.25 is a quarter."""
        return self.below(self.threshold_at(share))

    def below(self, threshold: float) -> Mask:
        """The mask that turns off the neurons with λ < threshold."""
        at = self.point(threshold)
        return Mask(self.keep(threshold), f"λ < {threshold:g}, {at.off_fraction:.1%} off", self.name)

    def listed(self, directory: str | Path) -> Mask:
        """The mask that turns off what `neuron_indices.json` of a directory of these gates lists."""
        keep = read_indices(Path(directory), (self.logits.shape[0], self.logits.shape[1]))
        return Mask(keep, f"neuron_indices.json, {1 - float(keep.float().mean()):.1%} off", self.name)

    def record(self) -> dict[str, Any]:
        return {"name": self.name, **summary(self.values), "training": dict(self.training)}

    def rows(self) -> list[dict[str, Any]]:
        """The selected thresholds and what each turns off."""
        return [self.point(threshold)._asdict() for threshold in self.selected_thresholds()]

    def plot(self, path: str | Path) -> None:
        """Draw the loss curves of the training to an .html or .png file. Raises PatchError where there are none."""
        if "curves" not in self.training:
            raise PatchError(f"{self.name}: no record of a training here, so that there are no loss curves")
        curves.draw(self.training, Path(path))

    def save(self, path: str | Path, *, force: bool | None = None, reads: Path | None = None) -> None:
        """Write a directory in the published layout, with the run record where there is one; whole or not at all.

        force: whether gates that this tool made may be replaced; reads: what `path` may not hold.
        """
        path, more = Path(path), [TRAINING] if self.training else []
        with places.new_directory(
            path, [*GATE_FILES, *more], making="directory of gates", force=force, reads=[reads] if reads else [],
            kinds=MADE,
        ) as partial:  # fmt: skip
            write_logits(self.logits, partial)
            if self.training:
                targets.write_json(partial / TRAINING, dict(self.training))

    def __repr__(self) -> str:
        layers, neurons = self.logits.shape
        return f"<{self.name}: {layers} × {neurons} lambda gates, λ {self.values.mean():.3f} ± {self.values.std():.3f}>"
