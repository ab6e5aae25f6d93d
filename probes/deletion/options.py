"""The free choices of Gate 3's forward method, each with its reason; the record holds all of them.

What follows from the limits of `strict` is no choice, and stands in `verdict`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardOptions:
    """What decides a patch beside the model, the fact and the prompts that the method sees.

    The symbols are those of docs/gate3-method.md, which has this table.
    """

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
