"""The choices of a training run and of an evaluation, and the published variants as presets.

Each class is at once the command's options, a table in docs/gates-method.md and a part of the record; the first is also
what a resumed run must agree with. Nothing heavy is imported: the command line is made of these classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from vindex.errors import ProbeError

ScaleMode = Literal["none", "mean", "energy"]
SCALE_MODES: tuple[ScaleMode, ...] = ("none", "mean", "energy")


def _option(default: Any, description: str) -> Any:
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True)
class TrainOptions:
    """What decides the result of a run on given data. The metadata of each field is its help text."""

    preset: str = _option("baseline", "Settings to start from: a published variant, or `reading`, which is ours.")
    scale_mode: ScaleMode = _option("none", "Rescaling after gating: none, mean, energy.")  # noqa: RUF009
    chat: bool = _option(False, "Wrap the texts in the model's chat template, thinking off.")
    beta: float = _option(4.0, "Cross-entropy, in nats, at which an entity counts as forgotten.")
    lambda_f: float = _option(0.1, "Weight of the forget loss.")
    lambda_r: float = _option(0.5, "Weight of the distillation loss on reasoning text.")
    temperature: float = _option(2.0, "Temperature of the distillation loss.")
    unmasked_retain_weight: float = _option(0.0, "Weight of NKE: KL on the forget text's other tokens.")
    learning_rate: float = _option(1e-2, "Peak of the cosine; no warm-up.")
    weight_decay: float = _option(0.01, "AdamW's, pulling logits to 0 (λ to 0.5); unpublished, torch's default.")
    epochs: int = _option(3, "Passes over the forget data.")
    max_steps: int | None = _option(None, "Stop after this many steps; the cosine ends there.")
    batch_size: int = _option(16, "Forget examples to a step; unpublished.")
    retain_ratio: int = _option(2, "Retain batches to each forget batch.")
    micro_batch: int = _option(16, "Examples to a forward pass; memory grows with it, the result does not change.")
    max_tokens: int = _option(256, "Longer texts are cut here.")
    init_std: float = _option(0.1, "Standard deviation of the initial logits.")
    init_mean: float = _option(
        0.0, "Mean of the initial logits; at 3 every neuron begins with 95 % of what it passes on."
    )
    init_ratio: float = _option(
        0.0, "How far a neuron of high |h| ratio begins below: times the standard score of its logarithm in the layer."
    )
    context_weight: float = _option(0.0, "Weight of KL where the answer, true or not, stands in the text before.")
    seed: int = _option(0, "Of the initial logits and the order of the examples.")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "batch_size", "retain_ratio", "micro_batch", "temperature"):
            if not getattr(self, name) > 0:
                raise ProbeError(f"{name} {getattr(self, name)}: expected more than 0")
        for name in (
            "lambda_f",
            "lambda_r",
            "unmasked_retain_weight",
            "weight_decay",
            "init_std",
            "init_ratio",
            "context_weight",
        ):
            if not getattr(self, name) >= 0:
                raise ProbeError(f"{name} {getattr(self, name)}: expected 0 or more")
        if self.max_steps is not None and self.max_steps < 1:
            raise ProbeError(f"max_steps {self.max_steps}: expected at least 1")
        if self.max_tokens < 2:
            raise ProbeError(f"max_tokens {self.max_tokens}: expected at least 2")
        scale_of(self.scale_mode)


@dataclass(frozen=True)
class EvalOptions:
    """What decides the scores of given gates on given rows. The metadata of each field is its help text."""

    chat: bool = _option(False, "Ask in the model's chat template, thinking off.")
    soft_scale_mode: ScaleMode | None = _option(  # noqa: RUF009
        None, "Rescaling of soft gates: none, mean, energy; unset, as trained."
    )
    mask_scale_mode: ScaleMode = _option("none", "Rescaling of hard masks: none, mean, energy.")  # noqa: RUF009
    thresholds: tuple[float, ...] | None = _option(
        None, "Operating points, neurons with λ below each off; unset, those at 5, 25, 50, 75 and 95 % off."
    )
    count: int = _option(300, "Prompts to a panel, at most.")
    batch_size: int = _option(64, "Answers to a forward pass; memory grows with it.")
    generate: int = _option(0, "Tokens that the model writes, in which the answer must stand; 0: teacher-forced.")
    seed: int = _option(0, "Of the choice of prompts, and of the rows for mean |h|.")

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("batch_size", 1), ("generate", 0)):
            if getattr(self, name) < least:
                raise ProbeError(f"{name} {getattr(self, name)}: expected at least {least}")
        scale_of(self.mask_scale_mode)
        if self.soft_scale_mode is not None:
            scale_of(self.soft_scale_mode)


@dataclass(frozen=True)
class PanelOptions:
    """What decides a panel of what a model knows. The metadata of each field is its help text."""

    facts: int = _option(240, "Facts to ask about, at most, half of them never trained on.")
    items: int = _option(320, "Questions to work out, at most.")
    pool: int = _option(120, "Facts of a relation, and half as many questions of a kind, that are tried, at most.")
    batch_size: int = _option(64, "Answers to a forward pass; memory grows with it.")
    seed: int = _option(0, "Of what is shown solved, which subjects are held out, and the questions.")

    def __post_init__(self) -> None:
        for name, least in (("facts", 2), ("items", 1), ("pool", 8), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ProbeError(f"{name} {getattr(self, name)}: expected at least {least}")


def scale_of(name: str) -> ScaleMode:
    """`name`, if it is a scale mode. Raises ProbeError."""
    for mode in SCALE_MODES:
        if mode == name:
            return mode
    raise ProbeError(f"scale mode {name!r}: expected {', '.join(SCALE_MODES)}")


# What each published variant changes from the defaults. The weights of nke_optA and nke_optB are not published;
# they are taken from the chat variants of the same letters.
OWN = "reading"  # ours; the other eight are the published ones
PRESETS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "nke_w1p0": {"unmasked_retain_weight": 1.0},
    "nke_optA": {"unmasked_retain_weight": 0.05},
    "nke_optB": {"unmasked_retain_weight": 0.1, "lambda_f": 1.0},
    "chat_energy": {"chat": True, "scale_mode": "energy"},
    "chat_energy_optA": {"chat": True, "scale_mode": "energy", "unmasked_retain_weight": 0.05},
    "chat_energy_optB": {"chat": True, "scale_mode": "energy", "unmasked_retain_weight": 0.1, "lambda_f": 1.0},
    "chat_mean": {"chat": True, "scale_mode": "mean"},
    OWN: {
        "scale_mode": "energy", "init_mean": 3.0, "init_std": 0.0, "init_ratio": 0.5, "weight_decay": 0.0,
        "lambda_f": 1.0, "lambda_r": 4.0, "temperature": 1.0, "context_weight": 3.0, "unmasked_retain_weight": 0.5,
        "retain_ratio": 1, "learning_rate": 0.15, "batch_size": 8, "epochs": 2,
    },
}  # fmt: skip


def from_preset(name: str, **changes: Any) -> TrainOptions:
    """The options of a preset with `changes`; a change that is None leaves the preset's value."""
    if name not in PRESETS:
        raise ProbeError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
    given = {key: value for key, value in changes.items() if value is not None}
    return replace(TrainOptions(preset=name, **PRESETS[name]), **given)


def to_evaluate(**changes: Any) -> EvalOptions:
    """The options of an evaluation with `changes`; a change that is None leaves the default."""
    given = {key: value for key, value in changes.items() if value is not None}
    if "thresholds" in given:
        given["thresholds"] = tuple(given["thresholds"])
    return EvalOptions(**given)


def differences(old: dict[str, Any], new: TrainOptions) -> list[str]:
    """`learning_rate: 0.01 there, 0.05 here` for each option in which a saved run differs."""
    old, here = asdict(TrainOptions()) | old, asdict(new)
    return [f"{k}: {old.get(k)} there, {here.get(k)} here" for k in {**old, **here} if old.get(k) != here.get(k)]
