"""Ways to spoil what a program reads. Each takes a seeded `random.Random`, so that a case can be made again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path
from random import Random
from typing import Any

ESCAPES = "\x1b[31mred\x07\r\x85\u202eevil\u2066 [/INST] [bold]x[/]"
HUGE = [2**31, 2**32, 2**40, 2**53, 2**62, 2**63, 2**64 - 1, 10**30]
VALUES: list[Any] = [
    None, True, False, "", "x", "NaN", "0", ESCAPES, "../../outside/made", "/etc/passwd", "\ud800", "é" * 3,
    "a" * 20_000,
    0, 1, -1, 2, 3, 0.5, -0.0, 1e-300, 1e308, 100_000, 10_000_000, *HUGE, *(-number for number in HUGE),
    [], {}, [[]], [None], [0], ["x"], {"a": {}}, {"": None}, [1, 2, 3], list(range(5_000)),
]  # fmt: skip
RAW = [
    b"", b"null", b"[]", b"{}", b"0", b'"x"', b"NaN", b"[" * 100_000, b"{" * 99, b'{"a":' * 5_000, b"\xff\xfe",
    b"\x00" * 99,
    b"\xef\xbb\xbf{}", b"1e999", b"-", b'{"a":1,"a":2}', b"[" + b"0," * 300_000 + b"0]", b'{"a":"\\ud800"}',
    b"9" * 10_000,
]  # fmt: skip


def raw_bytes(random: Random, content: bytes) -> bytes:
    """The same bytes with flips, holes, cuts, repetitions or numbers past all bounds in them."""
    spoiled = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        early = random.random() < 0.5
        at = random.randrange(max(1, min(len(spoiled), 4096 if early else len(spoiled))))
        length = random.choice((1, 2, 7, 8, 64, 1000))
        match random.randrange(9):
            case 0 | 1 | 2:
                if spoiled:
                    spoiled[at] ^= 1 << random.randrange(8)
            case 3:
                del spoiled[at:]
            case 4:
                spoiled += bytes(length) if random.random() < 0.5 else random.randbytes(length)
            case 5:
                spoiled[at : at + length] = bytes(len(spoiled[at : at + length]))
            case 6:
                spoiled[at : at + 8] = (random.choice(HUGE) % 2**64).to_bytes(8, "little")
            case 7:
                spoiled[at:at] = spoiled[at : at + length]
            case 8:
                del spoiled[at : at + length]
    return bytes(spoiled)


def json_text(random: Random, content: bytes) -> bytes:
    """The same JSON with one or some of its values, keys or bytes replaced."""
    if (way := random.random()) < 0.1:
        return raw_bytes(random, content)
    if way < 0.15:
        return random.choice(RAW)
    value = json.loads(content)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        value = json_value(random, value)
    text = json.dumps(value).encode()
    if way > 0.95 and b'": ' in text:  # a key twice, or a number that is none
        at = text.index(b'": ') + 3
        return random.choice(
            (b"{" + text[1:at] + b"1, " + text[1:], text[:at] + b"NaN" + text[at:].lstrip(b'"0123456789'))
        )
    return text


def json_value(random: Random, value: Any) -> Any:
    """One value somewhere in it replaced, moved, left out or added."""
    places = [(value, key) for key in _keys(value)]
    for holder, key in places:
        places += [(holder[key], inner) for inner in _keys(holder[key])][:200]
    if not places or random.random() < 0.03:
        return random.choice(VALUES)
    holder, key = random.choice(places[: random.choice((8, 50, 5000))])
    old = holder[key]
    match random.randrange(8):
        case 0:
            del holder[key]
        case 1 if type(old) in (int, float):
            holder[key] = random.choice((-old, old + 1, old - 1, old * 1000, float(old), old + 0.5, str(old)))
        case 2:
            holder[key] = random.choice(places)[0] if random.random() < 0.3 else [old, old]
        case 3 if isinstance(holder, dict):
            holder[random.choice(["", "x", ESCAPES, "__class__", "auto_map", "0", "9" * 50])] = old
        case 4 if isinstance(holder, list):
            holder.insert(0, random.choice(VALUES))
        case _:
            holder[key] = random.choice(VALUES)
    try:
        json.dumps(value)
    except ValueError:  # it holds itself
        holder[key] = None
    return value


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


def safetensors(random: Random, content: bytes) -> bytes:
    """The same file with its header's JSON, its header's length or any of its bytes spoiled."""
    if random.random() < 0.4:
        return raw_bytes(random, content)
    length = int.from_bytes(content[:8], "little")
    header = json_text(random, content[8 : 8 + length])
    stated = len(header) if random.random() < 0.9 else random.choice(HUGE) % 2**64
    return stated.to_bytes(8, "little") + header + content[8 + length :]


def lines(random: Random, content: bytes) -> bytes:
    """JSON lines with one of them spoiled, repeated, or followed by something else."""
    found = content.splitlines()
    at = random.randrange(len(found))
    found[at] = random.choice((json_text, json_text, raw_bytes))(random, found[at])
    if random.random() < 0.2:
        found.insert(at, random.choice((*RAW, *found)))
    return b"\n".join(found) + random.choice((b"\n", b"", b"\n\n\n"))


def file(random: Random, path: Path) -> None:
    """Spoil a file in the way of its kind, or put something else in its place."""
    if random.random() < 0.15 or not path.is_file():
        odd(random, path)
        return
    ways = {".json": json_text, ".jsonl": lines, ".safetensors": safetensors}
    spoil = ways.get(path.suffix, raw_bytes)
    content = path.read_bytes()
    path.unlink()  # it may be a link to a base
    path.write_bytes(spoil(random, content))


def odd(random: Random, path: Path) -> str:
    """Put something at a path that is no sound file: what it is."""
    kind = random.choice(
        ("nothing", "empty", "directory", "fifo", "socket", "dangling", "loop", "device", "full", "zero", "outside",
         "terabyte", "holes", "folder")
    )  # fmt: skip
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    links = {
        "dangling": "nowhere", "loop": path.name, "device": "/dev/null", "full": "/dev/full", "zero": "/dev/zero",
        "outside": "../../outside/file", "folder": "../../outside",
    }  # fmt: skip
    if kind in links:
        path.symlink_to(links[kind])
    elif kind == "directory":
        path.mkdir()
        (path / "mine").write_text("kept")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            os.chdir(path.parent)  # its name may have 107 bytes
            made.bind(path.name)
    elif kind != "nothing":
        with path.open("wb") as made:
            made.truncate({"empty": 0, "terabyte": 1 << 40, "holes": 3 << 30}[kind])
    return kind


def agree(directory: Path) -> None:
    """Make SHA256SUMS of a vindex anew, as whoever damages it on purpose would."""
    sums = directory / "SHA256SUMS"
    if sums.is_symlink() or not sums.is_file():
        return
    found = []
    for line in sums.read_text(errors="replace").splitlines():
        path = directory / line[66:]
        plain = path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 24
        found.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {line[66:]}" if plain else line)
    sums.write_text("\n".join(found) + "\n")
