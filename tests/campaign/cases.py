"""The cases: (category, seed) → what lies in the case's directory, and the commands that meet it there."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.campaign import damage, others
from tests.campaign.bases import copy
from tests.campaign.commands import BUILD, MAKING, ODD_OPTIONS, ON, Case, commands_of
from tests.campaign.hostile import PAYLOADS, TEMPLATES, fail_at_step, read_badly


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


def places(random: Random, base: Path, place: Path) -> Case:
    """(h) Where something is to be written."""
    for name in ("tiny", "gates", "p.safetensors", "tiny.vindex", "words.txt"):
        copy(base, name, place)
    (place / "mine").mkdir()
    (place / "mine" / "notes").write_text("kept")
    out = random.choice(
        (".", "/", "", "..", "mine", "mine/", "mine/out", "tiny", "tiny/out", "gates", "tiny.vindex", "words.txt",
         "out", "x" * 5000, "x" * 250, "/".join(["y"] * 1900), "/dev/null", "/dev/full", "/dev/null/out",
         "/proc/out", "/sys/out",
         "words.txt/out", "a\nb", damage.ESCAPES.replace("/", ""), "é", "~", "-", "odd", "odd", "odd/out", "odd")
    )  # fmt: skip
    odd = out.partition("/")[0]
    if odd == "odd" or (random.random() < 0.3 and out in ("out", "é", "mine/out")):
        if odd == "odd":
            damage.odd(random, place / "odd")
        else:
            damage.odd(random, place / f"{out}{random.choice(('.partial', '.replacing', '.replaced', ''))}")
    force = random.choice(("--force", "(none)"))
    making = commands_of(MAKING, OUT=out, FORCE=force)
    if out == "out" or out.startswith(("~", "é", "a", "-", "x", "y", "\x1b", "mine/o", "tiny/o", "odd/o")):
        making.pop()  # a demo would be made, and takes long
    reading = commands_of(
        "info OUT\npatch show OUT\nplan OUT\ngates stats OUT\nverify tiny.vindex --source OUT", OUT=out
    )
    ours = ["tiny.vindex"] if force != "(none)" and out == "tiny.vindex" else []
    made = [out] if out and not out.startswith(("/", ".")) else []
    return Case([random.choice(making), random.choice((*making, *reading))], makes=[*made, *ours])


def surroundings(random: Random, base: Path, place: Path) -> Case:
    """(i) Streams, locales, odd options."""
    name = random.choice(("tiny.vindex", "mixture.vindex"))
    path = copy(base, name, place)
    for other in ("tiny", "gates", "p.safetensors"):
        copy(base, other, place)
    index = json.loads((path / "index.json").read_bytes())
    (path / "index.json").write_text(json.dumps(index | {"model": f"a/{damage.ESCAPES} é 東"}))
    damage.agree(path)
    number = random.choice(("0", "-1", "1", "100000", "10000000000", "9" * 40, "1.5", "nan", "x", "", "１"))
    commands = [*commands_of(ODD_OPTIONS, NAME=name, N=number), ()]
    if name == "mixture.vindex":
        copy(base, "mixture", place)
        copy(base, "tiny.vindex", place)
    case = Case([random.choice(commands)], makes=["out"])
    way = random.random()
    if way < 0.3:
        case.stdout = random.choice(("closed", "full", "gone"))
    elif way < 0.5:
        case.encoding = random.choice(("ascii", "latin-1", "cp1252", "utf-16"))
    elif way < 0.6:
        case.environment = random.choice(
            ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "xx_YY.nothing"}, {"LANG": ""},
             {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "1"}, {"COLUMNS": "x"}, {"TERM": "dumb"}, {"HOME": "/nowhere"})
        )  # fmt: skip
        case.commands = [random.choice(commands[:5])]
    elif way < 0.75:
        epoch = random.choice(("x", "-1", "1e9", "9" * 30, "", " 1", "253402300800", "0", "0x10"))
        case.before = lambda: os.environ.__setitem__("SOURCE_DATE_EPOCH", epoch)
        case.commands = commands_of(f"build tiny {BUILD}", OUT="out")
    return case


def faults(random: Random, base: Path, place: Path) -> Case:
    """(j) Errors of the operating system at any step, and reads that give little, or fail."""
    for name in ("tiny", "gates", "p.safetensors", "tiny.vindex", "patched", "probe.json"):
        copy(base, name, place)
    commands = commands_of(
        f"""build tiny {BUILD}
        build tiny -o tiny.vindex --features 4 --threads 1 --force
        gates bake tiny gates -o OUT {ON}
        patch apply tiny p.safetensors -o OUT
        patch revert patched
        patch revert patched -o OUT
        gates convert gates -o OUT
        card tiny.vindex --probe probe.json
        verify tiny.vindex
        verify tiny.vindex --source tiny
        gates stats gates
        patch show p.safetensors
        score tiny.vindex a""",
        OUT="out",
    )
    code, number, few = random.choice(sorted(errno.errorcode)), random.randrange(40), random.choice((1, 7, 4096))
    changes = ["tiny.vindex/README.md", "tiny.vindex/SHA256SUMS", "patched/model.safetensors", "patched/vindex_patches"]
    case = Case([random.choice(commands[:8])], makes=["out", "tiny.vindex"], changes=changes)
    if random.random() < 0.6:
        case.before = lambda: fail_at_step(number, code)
    else:
        case.commands = [random.choice(commands)]
        case.before = lambda: read_badly(few, number if random.random() < 0.5 else 1 << 30, code)
    return case


CATEGORIES: dict[str, Callable[[Random, Path, Path], Case]] = {
    of.__name__: of
    for of in (vindexes, families, checkpoints, ggufs, gates, patches, records, chats, places, surroundings, faults)
}
