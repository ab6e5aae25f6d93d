"""Vindexes as others publish them, made small for each case and spoiled."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.campaign import damage
from tests.foreign import weights, write_browse, write_published, write_summary, write_sums

LAYERS, FEATURES, NEURONS, HIDDEN, TOKENS, EXPERTS = 3, 4, 48, 32, 258, 3  # but for experts, those of bases' tiny


def spoiled(random: Random, place: Path) -> str:
    """Make one of some family in a directory, spoil one or two of its files; its name."""
    family = random.choice(("published", "summary", "browse"))
    path, embeddings = place / family, weights(TOKENS, HIDDEN)
    if family == "published":
        write_published(path, *(weights(LAYERS, FEATURES, HIDDEN, seed=seed) for seed in (1, 2)), embeddings)
    elif family == "summary":
        write_summary(path, {layer: weights(EXPERTS, FEATURES, HIDDEN, seed=layer) for layer in (1, 2)})
    else:
        write_browse(path, [weights(NEURONS, HIDDEN, seed=layer) for layer in range(LAYERS)], embeddings)
    if family != "published" and random.random() < 0.3:
        write_sums(path)
    files = sorted(file.name for file in path.iterdir())
    texts = [name for name in files if name.endswith(".json") and name != "tokenizer.json"]
    numbers = [name for name in files if name.endswith(".bin")]
    for name in random.sample(random.choice((files, texts, numbers)), 1) + random.sample(files, random.random() < 0.2):
        damage.file(random, path / name)
    if random.random() < 0.5:
        damage.agree(path)
    return family
