"""The free choices of Gate 3's forward method, each with its reason; the record holds all of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardOptions:
    """What decides a patch beside the model, the fact and the prompts that the method sees.

    The symbols are those of docs/gate3-method.md, which has this table.
    """

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
    target: float = 0.05
    """τ, the share of the firmest answer's probability at which the pull lets go."""
    edge: float = 4.0
    """β, how sharply it lets go."""
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
    rounds: int = 1
    """How often the patched model is asked to go on by itself, and d is fitted to what it says as well."""
    again: int = 3
    """d is then fitted on for one step in so many of `steps`."""
    written: int = 24
    """Tokens that it writes each time."""


@dataclass(frozen=True)
class TrialOptions:
    """How every method's layer is chosen (`layer`)."""

    layers: int = 3
    """Layers tried, at most, spread evenly from the first sixth of the depth to its half."""
    wanted: float = 0.95
    """Suppression of withheld phrasings that a trial should reach; what is missing counts as harm."""
    subjects_share: float = 5.0
    """How much worse harm to other subjects is than harm to the deleted one: `strict` allows them a fifth."""
    close: float = 2.0
    """Factor by which a deeper layer must do less harm: it costs the nearest other subjects more."""
    withheld: int = 16
    """Other subjects, and neutral sentences, at most, on which a trial is judged."""
