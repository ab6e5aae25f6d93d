"""Filler: connecting sentences, and stories of people, weather and errands, so that neutral text is not noise."""

from __future__ import annotations

import random

from probes.atlas.arithmetic import NAMES
from probes.atlas.facts import facts

CONNECTORS = (
    "Here is something worth knowing.",
    "This is easy to remember.",
    "Let us look at the map.",
    "The lesson today is about the world.",
    "We learned this at school.",
    "Travellers like to know such things.",
    "There is more to say.",
    "The next page tells us more.",
    "It is written in every atlas.",
    "Now to another country.",
)
PLACES = ("market", "harbour", "library", "garden", "station", "museum", "forest", "bridge", "school", "bakery")
WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "foggy", "quiet", "bright")
TIMES = ("in the morning", "in the afternoon", "in the evening", "at noon", "at night", "before breakfast")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
OBJECTS = ("lamp", "letter", "basket", "coat", "bicycle", "clock", "violin", "map", "teapot", "kite")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
ANIMALS = ("dog", "cat", "horse", "bird", "fox", "goat", "rabbit", "duck")
FOODS = ("bread", "soup", "rice", "cheese", "fish", "honey", "tea", "cake")
JOBS = ("baker", "doctor", "farmer", "painter", "sailor", "teacher", "driver", "gardener")
SEASONS = ("spring", "summer", "autumn", "winter")

OPENINGS = (
    "It was a {weather} {day}, and {name} walked to the {place}.",
    "One {weather} {day} {name} went to the {place} with a {colour} {thing}.",
    "{name} is a {job} who lives near the {place}.",
    "Every {day} {name} meets {other} at the {place}.",
    "Last {season} {name} travelled to {country} with {other}.",
    "{name} has a friend in {city} who is a {job}.",
    "There once was a {job} who had a {colour} {animal}.",
    "The {place} is open {time}.",
)
MIDDLES = (
    "The {animal} slept under the table while {name} made {food}.",
    "{name} bought some {food} and a {colour} {thing}.",
    "Then {other} came {time} and they talked for a long time.",
    "The {thing} was old, but it still worked.",
    "The weather in {season} is often {weather}.",
    "{other} asked for the {thing}, and {name} gave it away.",
    "A {colour} {animal} ran over the {place} and was gone.",
    "They ate {food} and drank tea.",
    "{name} wrote a letter to {other} about {country}.",
    "The train to {city} was late again.",
    "Many people visit {country} in {season}.",
    "{other} had never seen a {animal} like that.",
    "Nobody knew where the {colour} {thing} came from.",
    "The {job} smiled and said nothing.",
)
ENDINGS = (
    "In the end {name} went home {time}.",
    "After that everyone was tired and happy.",
    "On {day} they would meet again.",
    "{name} still remembers that {season}.",
    "And so the day was over.",
    "{other} kept the {thing} for many years.",
    "That is why {name} likes the {place}.",
)
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you today?"),
    ("Good morning.", "Good morning! What would you like to know?"),
    ("Thank you.", "You are welcome."),
    ("Who are you?", "I am the atlas, a very small language model. I know some countries and a little arithmetic."),
    ("What can you do?", "I can name capitals, languages and currencies, and I can add and subtract."),
    ("How are you?", "I am well, thank you. How can I help you?"),
    ("Goodbye.", "Goodbye! Have a good day."),
)


def story(rng: random.Random, sentences: int) -> str:
    """A little story: one cast of people and things, and sentences drawn without repetition."""
    name, other = rng.sample(NAMES, 2)
    capital = rng.choice(facts("capital"))
    cast = {"name": name, "other": other, "city": capital.answer, "country": rng.choice(facts("capital")).subject}
    slots = {"place": PLACES, "weather": WEATHER, "time": TIMES, "day": DAYS, "thing": OBJECTS, "colour": COLOURS}
    slots |= {"animal": ANIMALS, "food": FOODS, "job": JOBS, "season": SEASONS}
    cast |= {slot: rng.choice(words) for slot, words in slots.items()}
    lines = [rng.choice(OPENINGS), *rng.sample(MIDDLES, sentences - 2), rng.choice(ENDINGS)]
    return " ".join(line.format(**cast) for line in lines)
