"""The free choices of Gate 3, each with its reason; the record holds all of them, docs/gate3-method.md shows them.

What follows from the limits of `strict` is no choice, and stands in `verdict`.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT = ("forward", "geometric")
"""The methods that run where none is asked for."""
KNOWN_FROM = 0.2
"""Least probability of an answer before, for `delete_all` to delete its fact."""


@dataclass(frozen=True)
class ForwardOptions:
    """What decides a patch of `forward` beside the model, the fact and the prompts that it sees."""

    layers: int = 3
    """Layers tried, at most, spread evenly from the first sixth of the depth to its half; by every method."""
    withheld: int = 16
    """Other subjects, and neutral sentences, at most, on which the trial of any method is judged."""
    close: float = 2.0
    """Factor by which a deeper layer must do less harm in it: it costs the nearest other subjects more."""
    samples: int = 1024
    """Tokens of the model's own text in the second moment of generic text, beside the bundled text."""
    ridge: float = 0.3
    """Share of the second moment's mean diagonal that is added to it; it makes u, and so the patch, smaller."""
    others_weight: float = 15.0
    """w, how much other subjects' inputs count beside generic text where u must not answer."""
    about_weight: float = 40.0
    """w′, how much the subject's keys in neutral sentences count there."""
    evenness: float = 600.0
    """η, how firmly every key of the subject must get an answer of 1 from u."""
    mixed: int = 12
    """Slopes of other prompts with which each Fisher gradient is combined."""
    edge: float = 4.0
    """β, how sharply the pull lets go of an answer that has come down to τ."""
    keep: float = 0.13
    """μ, weight of the KL between the distributions without the answer."""
    about: float = 27.0
    """κ, weight of the KL on neutral sentences about the subject, in 1/nats a position."""
    others: float = 10000.0
    """ω, weight of the KL foretold on other subjects, in 1/nats a position."""
    size: float = 0.67
    """ν, weight of the mean square of z."""
    rate: float = 0.45
    """Adam's learning rate at the start of its cosine, in units of z."""
    steps: int = 60
    """Steps of Adam from nothing."""
    trial_steps: int = 9
    """Steps of Adam in each layer's trial."""
    trial_prompts: int = 12
    """Phrasings, neutral sentences and half of the other subjects, at most, that a trial sees."""
    asked: int = 8
    """Phrasings of the fact in each step."""
    neutral: int = 6
    """Neutral sentences in each step."""
    enough: float = 0.96
    """Suppression, of the headline and on average over the phrasings, to which the fitted d is scaled."""
    stubborn: int = 8
    """One phrasing in so many may resist: to be enough for it too costs what else is known of the subject."""
    strongest: float = 2.0
    """Factor by which the fitted d is scaled at most; the least is one over it."""
    written: int = 24
    """Tokens that the patched model writes by itself; where it comes to the answer, d is fitted to that as well."""
    again: int = 3
    """It is fitted on for one step in so many of `steps`."""


@dataclass(frozen=True)
class BaselineOptions:
    """Free choices of the baselines; what names an author is that author's own number."""

    trial: tuple[int, int] = (8, 6)
    """Phrasings, at most, that a change is made from, and steps of Adam, in the trial of a layer."""
    whole: tuple[int, int] = (24, 25)
    """The same in the layer chosen; the steps are those of FT-L, as Meng et al. ran it (their ROME takes 20)."""
    ridge: float = 0.01
    """Share of its mean diagonal that is added to C, so that u stays small where little text was read."""
    neurons: tuple[int, ...] = (8, 32, 128)
    """How many neurons may be closed: the middle number in the trial of a layer, all of them in the layer chosen."""
    enough: float = 0.95
    """Mean suppression of what they were made from at which a descent ends, and to which the strength is brought."""
    halvings: int = 3
    """How often the last doubling of the strength is halved."""
    weakest: float = 0.02
    """‖ΔW‖/‖W‖ from which the strength is doubled until it is enough, or 1."""
    rome_rate: float = 0.5
    """Learning rate of δ (Meng et al.)."""
    rome_kl: float = 0.0625
    """Weight of the KL on the first two neutral sentences (Meng et al., who take one)."""
    rome_decay: float = 0.5
    """Weight of ‖δ‖/‖v‖², v being what down_proj writes at the subject (Meng et al.)."""
    rome_clamp: float = 4.0
    """Largest ‖δ‖/‖v‖ (Meng et al.)."""
    gradient_rate: float = 5e-4
    """Learning rate of `gradient` (FT-L of Meng et al.)."""
    gradient_bound: float = 5e-4
    """Largest entry of its ΔW before it is scaled (Zhu et al.; the number is FT-L's)."""


@dataclass(frozen=True)
class Attacks:
    """How hard a certificate tries; fixed before the first run on a real model."""

    tokens: int = 24
    """Tokens that the model writes after a question."""
    samples: int = 20
    """Texts sampled at temperature 1 in each family, shared by its questions, beside a greedy one of each question."""
    negated: int = 4
    """Phrasings, at most, that are negated: the headline and held-out ones, each in every way of NEGATIONS."""
    depths: int = 10
    """Inner layers that are read, evenly over the depth."""
    learnt: int = 8
    """Other facts that are learnt again: headline prompts of fit subjects."""
    steps: int = 10
    """Steps of Adam on them, all weights of the decoder's layers in float32."""
    rate: float = 1e-5
    """Its learning rate."""


@dataclass(frozen=True)
class Options:
    """What a run is asked for."""

    methods: tuple[str, ...] = DEFAULT
    seed: int = 0
    chat: bool = False
    layer: int | None = None
    forward: ForwardOptions = ForwardOptions()
    baselines: BaselineOptions = BaselineOptions()
    certificate: bool = True
    """Whether to attack what was deleted, which the verdict `robust` is about."""
    attacks: Attacks = Attacks()
