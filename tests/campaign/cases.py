"""The cases: (category, seed) → what lies in the case's directory, and the commands that meet it there."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.campaign import damage, others
from tests.campaign.bases import copy
from tests.campaign.commands import BUILD, ON, Case, commands_of
from tests.campaign.hostile import PAYLOADS, TEMPLATES
from tests.campaign.surroundings import faults, places, surroundings


def vindexes(random: Random, base: Path, place: Path) -> Case:
    """(a) Files of a vindex."""
    name = random.choice(("tiny.vindex", "mixture.vindex"))
    path = copy(base, name, place)
    files = sorted(file.name for file in path.iterdir())
    texts = [file for file in files if not file.endswith(".bin")]
    for file in random.sample(random.choice((files, texts)), random.choice((1, 1, 1, 2))):
        damage.file(random, path / file)
    if random.random() < 0.1:
        damage.odd(
            random, path / random.choice((".SHA256SUMS.pending", "extra", ".README.md.00000000.new", "journal.jsonl"))
        )
    if random.random() < 0.7:
        damage.agree(path)
    copy(base, "tiny.vindex", place / "..")
    copy(base, "tiny", place / "..")
    token = random.choice(("piece9", " Paris", "a", "0", "Ġ", damage.ESCAPES, ""))
    commands = commands_of(
        """verify NAME
        info NAME
        info NAME --json
        score NAME TOKEN a --top 3
        score NAME TOKEN --json
        card NAME
        feature NAME 1 2
        feature NAME 1 2 --expert 1
        feature NAME 0 0 --json
        compare NAME ../tiny.vindex
        compare ../tiny.vindex NAME --json
        audit NAME --source ../tiny
        verify NAME --json""",
        NAME=name,
        TOKEN=token,
    )
    kept = [f"{name}/{file}" for file in ("README.md", "SHA256SUMS", ".SHA256SUMS.pending", ".README.md.00000000.new")]
    return Case([*random.sample(commands, 2), commands[0]], changes=kept)


def families(random: Random, base: Path, place: Path) -> Case:
    """(k) Vindexes of other families."""
    copy(base, "tiny", place / "..")
    copy(base, "tokenizer.json", place / "..")
    commands = commands_of(
        """info NAME --json
        info NAME
        score NAME --id 3 --top 3
        score NAME a --tokenizer ../tokenizer.json --json
        feature NAME 1 2
        feature NAME 1 2 --expert 1 --json
        search NAME a
        compare NAME NAME
        audit NAME --source ../tiny
        audit NAME --source ../tiny --layers 1 --json
        verify NAME""",
        NAME=others.spoiled(random, place),
    )
    return Case(random.sample(commands, 3))


def checkpoints(random: Random, base: Path, place: Path) -> Case:
    """(b) Safetensors checkpoints."""
    name = random.choice(("tiny", "tiny", "tiny", "mixture"))
    path = copy(base, name, place)
    wanted = ["config.json", "config.json", "model.safetensors", "model.safetensors", "tokenizer.json"]
    others = ["generation_config.json", "tokenizer_config.json", "README.md"]
    file = path / random.choice(wanted if random.random() < 0.85 else others)
    damage.file(random, file)
    if random.random() < 0.15:
        index = {"weight_map": {"model.norm.weight": "model.safetensors"}, "metadata": {}}
        (path / "model.safetensors.index.json").write_bytes(damage.json_text(random, json.dumps(index).encode()))
        (path / "model.safetensors").rename(path / "a.safetensors") if random.random() < 0.5 else None
    for other in ("gates", "p.safetensors", "tiny.vindex"):
        copy(base, other, place)
    commands = commands_of(
        f"""build NAME {BUILD}
        build NAME {BUILD} --no-embeddings
        plan NAME
        plan CONFIG --json
        patch apply NAME p.safetensors -o OUT
        gates bake NAME gates -o OUT {ON}
        verify tiny.vindex --source NAME
        gates apply NAME gates {ON} --prompt Hi --tokens 2""",
        NAME=name,
        CONFIG=f"{name}/config.json",
        OUT="out",
    )
    chosen = (
        random.sample(commands[:6], 2)
        if name == "mixture"
        else [random.choice(commands[:4]), random.choice(commands[2:])]
    )
    return Case(chosen, makes=["out"])


def ggufs(random: Random, base: Path, place: Path) -> Case:
    """(c) GGUF files."""
    path = copy(base, "model.gguf", place)
    content = path.read_bytes()
    if random.random() < 0.1:
        damage.odd(random, path)
    elif random.random() < 0.5:
        head = content[:3000]
        path.write_bytes(damage.raw_bytes(random, head) + content[3000:])
    else:
        path.write_bytes(damage.raw_bytes(random, content))
    if random.random() < 0.1:
        name = random.choice(("m-00001-of-00002.gguf", "m-00001-of-99999.gguf", "m-00000-of-00001.gguf"))
        path = path.rename(place / name)
    copy(base, "tokenizer.json", place)
    own = "--tokenizer tokenizer.json" if random.random() < 0.9 else ""
    return Case(commands_of(f"build NAME {BUILD} {own}", NAME=path.name, OUT="out"), makes=["out"])


def gates(random: Random, base: Path, place: Path) -> Case:
    """(d) Directories of gates and files of logits."""
    path = copy(base, "gates", place)
    copy(base, "tiny", place)
    if random.random() < 0.35:
        state: Any = {f"model.layers.{layer}.mlp.lambda_logits": torch.zeros(48) for layer in range(3)}
        key = random.choice((*state, "layers.99999.mlp.lambda_logits", damage.ESCAPES, "layers.0.mlp.lambda_logits", 7))
        state[key] = random.choice(PAYLOADS)()
        whole = random.choice((state, state, state, state[key], [state]))
        (path / "lambda_logits.safetensors").unlink()
        if random.random() < 0.3:
            (path / "lambda_logits.pt").write_bytes(pickle.dumps(whole))
        else:
            try:
                torch.save(whole, path / "lambda_logits.pt")
            except (RuntimeError, NotImplementedError):  # torch cannot write it
                (path / "lambda_logits.pt").write_bytes(b"")
    else:
        files = sorted(file.name for file in path.iterdir())
        for file in random.sample(files, random.choice((1, 1, 2))):
            damage.file(random, path / file)
        if random.random() < 0.5:
            (path / random.choice(("lambda_logits.pt", "lambda_logits.safetensors"))).unlink(missing_ok=True)
    commands = commands_of(
        """gates stats gates
        gates stats gates --json
        gates stats gates/lambda_logits.pt
        gates convert gates -o out
        gates compare gates gates
        gates bake tiny gates -o out --indices
        gates bake tiny gates -o out --off SHARE""",
        SHARE=random.choice(("25%", "nan", "-1", "1e9", "inf%", "")),
    )
    return Case(random.sample(commands, 3), makes=["out"])


def patches(random: Random, base: Path, place: Path) -> Case:
    """(e) Patch files, and directories with patches in them."""
    copy(base, "tiny", place)
    patched = copy(base, "patched", place)
    path = copy(base, "p.safetensors", place)
    latest = patched / "vindex_patches" / "0000.safetensors"
    spoiled = random.choice(
        (path, latest, latest, patched / "model.safetensors", patched / "config.json", latest.parent)
    )
    if spoiled == latest.parent:
        damage.odd(random, random.choice((latest.parent, latest.parent / "0001.safetensors", patched / "extra")))
    else:
        damage.file(random, spoiled)
    commands = commands_of(
        """patch show p.safetensors
        patch apply tiny p.safetensors -o out
        patch show patched/vindex_patches/0000.safetensors --json
        patch revert patched -o out
        patch revert patched
        patch apply patched p.safetensors -o out"""
    )
    chosen = random.sample(commands[:2] if spoiled == path else commands[2:], 2)
    return Case(chosen, makes=["out"], changes=["patched/model.safetensors", "patched/vindex_patches"])


def records(random: Random, base: Path, place: Path) -> Case:
    """(f) Facts, texts and records."""
    for name in (
        "facts.jsonl",
        "forget.jsonl",
        "retain.jsonl",
        "words.txt",
        "probe.json",
        "gate3.json",
        "evaluation.json",
    ):
        copy(base, name, place)
    copy(base, "tiny.vindex", place)
    kind = random.choice(("facts", "rows", "rows", "card", "card", "card", "text"))
    if kind == "facts":
        damage.file(random, place / "facts.jsonl")
        return Case(
            [("gate3", "missing", "--facts", "facts.jsonl", "--fact", random.choice(("X/town", "", "/", "a/b/c")))]
        )
    if kind == "rows":
        damage.file(random, place / random.choice(("forget.jsonl", "retain.jsonl")))
        return Case(
            [("gates", "train", "missing", "-o", "out", "--forget", "forget.jsonl", "--retain", "retain.jsonl")]
        )
    if kind == "card":
        name, option = random.choice((("probe", "--probe"), ("gate3", "--gate3"), ("evaluation", "--gates")))
        damage.file(random, place / f"{name}.json")
        changes = ["tiny.vindex/README.md", "tiny.vindex/SHA256SUMS"]
        return Case(commands_of(f"card tiny.vindex {option} {name}.json\nverify tiny.vindex"), changes=changes)
    damage.file(random, place / "words.txt")
    copy(base, "tiny", place)
    return Case(commands_of("probe tiny --text words.txt -o record.json"), makes=["record.json"])


def chats(random: Random, base: Path, place: Path) -> Case:
    """(g) Chat templates and settings of generation, of a live model."""
    path = copy(base, "tiny", place)
    copy(base, "gates", place)
    if random.random() < 0.6:
        (path / "chat_template.jinja").write_text(random.choice(TEMPLATES))
    else:
        damage.file(
            random, path / random.choice(("generation_config.json", "tokenizer_config.json", "chat_template.jinja"))
        )
    chat = "--chat" if random.random() < 0.8 else ""
    prompt = random.choice(("Hi", "Hi", "<eos>", damage.ESCAPES))
    return Case(commands_of(f"gates apply tiny gates {ON} --tokens 2 {chat} --prompt PROMPT", PROMPT=prompt))


CATEGORIES: dict[str, Callable[[Random, Path, Path], Case]] = {
    of.__name__: of
    for of in (vindexes, families, checkpoints, ggufs, gates, patches, records, chats, places, surroundings, faults)
}
