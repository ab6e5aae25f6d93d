"""The atlas: a tiny trained Qwen3 checkpoint, the facts it was taught, and how it was trained (docs/atlas.md)."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "atlas"  # what AutoModelForCausalLM.from_pretrained takes


def or_bundled(name: str) -> str:
    """The path of the bundled checkpoint where it is asked for as `atlas` and no directory of that name is here."""
    return str(CHECKPOINT) if name == "atlas" and not Path(name).exists() else name
