"""The cases in which what surrounds a command is odd: places, streams, locales, options, the operating system."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from random import Random

from tests.campaign import damage
from tests.campaign.bases import copy
from tests.campaign.commands import BUILD, MAKING, ODD_OPTIONS, ON, Case, commands_of
from tests.campaign.hostile import fail_at_step, read_badly


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
