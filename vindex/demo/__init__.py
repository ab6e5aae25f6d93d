"""The atlas: a tiny trained Qwen3 checkpoint, the facts it was taught, and how it was trained (docs/atlas.md)."""
