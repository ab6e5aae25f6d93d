"""How the atlas was made: its facts, its texts, its training, and its facts as a panel (docs/atlas.md)."""
