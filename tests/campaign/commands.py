"""What a case is, and the commands of those that only vary the words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Command = tuple[str, ...]
ON = "--threshold 0.5"
BUILD = "-o OUT --features 4 --threads 1"
MAKING = f"""
    build tiny {BUILD} FORCE
    build tiny {BUILD} --resume
    gates bake tiny gates -o OUT {ON} FORCE
    patch apply tiny p.safetensors -o OUT
    gates convert gates -o OUT
    probe missing -o OUT
    probe missing --plot OUT
    gate3 missing --save-patch OUT -o OUT
    gates train missing -o OUT FORCE
    demo -o OUT"""
ODD_OPTIONS = """
    info NAME
    info NAME --json
    score NAME a
    score NAME é \udcff
    verify NAME
    feature NAME N N
    feature NAME 0 0 --expert N --json
    score NAME a --top N
    verify NAME --source NAME --layers N
    verify tiny.vindex --source tiny --experts N --layers N
    build tiny -o out --features 4 --threads N
    build tiny -o out --features N
    build tiny -o out --tolerance N
    build tiny -o out --device N
    plan tiny --features N --threads N
    gate3 missing --seed N --layer N
    gates train tiny -o out --seed N --max-steps 1 --forget-limit 2 --retain-limit 2
    gates train missing -o out --batch-size N --max-tokens N --beta N
    gates apply tiny gates --prompt Hi --threshold N --tokens 1
    gates bake tiny gates -o out --off N
    probe tiny --batch-size N --dtype N
    patch show p.safetensors
    gates stats gates
    --help
    N"""


def commands_of(text: str, **words: str) -> list[Command]:
    """A command from each line; a word in capitals stands for one that may hold anything, or for none."""
    lines = [line.split() for line in text.strip().split("\n")]
    return [tuple(words.get(word, word) for word in line if words.get(word) != "(none)") for line in lines]


@dataclass
class Case:
    """Commands to run in a directory that is made already.

    makes: the places where a command may put something new, whole. changes: what it may change of what was there.
    before: called in the command's process. environment: of a new process, instead of one that is forked.
    stdout: "closed", "full" or "gone" where it is no file. encoding: of the streams.
    """

    commands: list[Command]
    makes: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    before: Callable[[], None] | None = None
    environment: dict[str, str] | None = None
    stdout: str = ""
    encoding: str = "utf-8"
