"""Run a case's commands, each in a process of its own, and say whether every promise was kept.

1. It ends within SECONDS, in MEMORY more than it began with, by an exit and not by a signal.
2. It says nothing on stderr but notes, progress, and for a failure one line `vindex: …` at the end with exit status 1;
   2 is for usage. It says nothing anywhere that a terminal must not see.
3. Nothing beside the case's directory is touched, no file that was there is changed but those that may be, and what is
   new is where it may be and whole.
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import os
import re
import resource
import select
import signal
import stat
import subprocess
import sys
import time
import traceback
from pathlib import Path
from random import Random
from typing import NamedTuple

from probes.live import chat
from tests.campaign.cases import CATEGORIES
from tests.campaign.commands import Case, Command
from vindex.console import HIDDEN
from vindex.directory import LocalFiles
from vindex.files import ANY, read_json
from vindex.weights import read_header

SECONDS, CPU_SECONDS, MEMORY = 60, 20, 2 << 30  # the clock has to allow for a machine that is busy
HASHED = 1 << 22
TRACEBACK, KILLED = 70, -signal.SIGKILL
CHATTER = re.compile(r"note: |stopped; |.*[━╸╺]|.*\d% ?\d+:\d\d:\d\d|.*-:--:--|\s*$")
ALLOCATION = re.compile(r"MemoryError|allocate memory|out of memory|Unable to allocate")


class Ended(NamedTuple):
    """How a command ended: exit status (negative: signal), what it wrote, seconds of the processor."""

    status: int
    out: str
    err: str
    seconds: float


class Verdict(NamedTuple):
    """outcome: success, verdict, one line, usage. complaint: the promise that was broken, or nothing."""

    category: str
    seed: int
    outcome: str
    complaint: str
    seconds: float = 0.0


def run(category: str, seed: int, base: Path, root: Path, keep: bool = False) -> list[Verdict]:
    """Make a case in a directory of its own and judge each of its commands."""
    home = root / f"{category}-{seed}"
    place, outside = home / "case" / "here", home / "case" / "outside"
    place.mkdir(parents=True)
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text('{"not": "yours"}')
    (outside / "folder" / "file").write_text("not yours")
    case = CATEGORIES[category](Random(f"{category} {seed}"), base, place)
    os.chdir(root)
    found = []
    for number, command in enumerate(case.commands):
        before = snapshot(home / "case")
        ended = execute(command, case, place, home / f"log{number}")
        complaint = broken_promise(command, case, ended, before, snapshot(home / "case"), place)
        told = complaint and f"vindex {' '.join(command)[:300]}: {complaint}"
        found.append(Verdict(category, seed, outcome(command, ended), told, ended.seconds))
    if not keep:
        subprocess.run(["rm", "-rf", home])  # what is too deep for shutil, too
    return found


def outcome(command: Command, ended: Ended) -> str:
    if ended.status == 1 and command[:1] in (("verify",), ("audit",), ("gates",)) and len(ended.out.splitlines()) > 2:
        return "verdict"
    return {0: "success", 1: "one line", 2: "usage"}.get(ended.status, "killed")


def execute(command: Command, case: Case, place: Path, log: Path) -> Ended:
    """Run a command as a process of its own; it is killed when it takes too long."""
    log.mkdir()
    child = os.fork()
    if child == 0:
        _become(command, case, place, log)
    gone = os.pidfd_open(child)
    if not select.select([gone], [], [], SECONDS)[0]:
        os.killpg(child, signal.SIGKILL)
    os.close(gone)
    _, status, usage = os.wait4(child, 0)
    texts = [(log / name).read_bytes().decode(case.encoding, "replace") for name in ("out", "err")]
    return Ended(os.waitstatus_to_exitcode(status), *texts, usage.ru_utime + usage.ru_stime)


def _become(command: Command, case: Case, place: Path, log: Path) -> None:
    """The child. It does not come back."""
    status = TRACEBACK
    try:
        os.setsid()
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT), descriptor)
        os.chdir(place)
        os.environ |= {"COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28,) * 2)
        status = _replaced(command, case) if case.environment is not None else _called(command, case)
    except SystemExit as done:
        status = int(done.code or 0)
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(status)


def _replaced(command: Command, case: Case) -> int:
    inherited = {key: value for key, value in os.environ.items() if key not in ("LANG", "LC_ALL")}
    words = [os.fsencode(word) for word in command]
    os.execve(sys.executable, [sys.executable, "-m", "vindex", *words], inherited | (case.environment or {}))


def _called(command: Command, case: Case) -> int:
    from vindex import __main__

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    faulthandler.dump_traceback_later(CPU_SECONDS, file=2)
    chat.SECONDS = 2.0
    os.fsync = lambda descriptor: None  # what the kernel has outlives the process
    sys.argv = ["vindex", *command]
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), case.encoding)
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), case.encoding)
    if case.stdout == "closed":
        os.close(1)
    elif case.stdout == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif case.stdout == "gone":
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
    if case.before:
        case.before()
    __main__.main()
    return TRACEBACK


def broken_promise(command: Command, case: Case, ended: Ended, before: dict, after: dict, place: Path) -> str:
    """The first promise that was broken, or nothing."""
    lines = ended.err.splitlines()
    told = [line for line in lines if line.startswith("vindex: ")]
    others = [line for line in lines if not CHATTER.match(line) and line not in told]
    if ended.status not in (0, 1, 2) or "Traceback" in ended.err:
        return f"exit status {ended.status} after {ended.seconds:.1f} s: {ended.err[-3000:]}"
    if ended.seconds > CPU_SECONDS:
        return f"{ended.seconds:.0f} s"
    if ALLOCATION.search(ended.err) and case.before is None:  # else ENOMEM may be the fault that was asked for
        return f"memory: {ended.err[-500:]}"
    if found := HIDDEN.search(ended.out) or HIDDEN.search(ended.err):
        return f"writes {found[0]!r} to the terminal: {ended.err[-300:]!r}"
    if ended.status == 1 and not (len(told) == 1 and lines[-1] == told[0]) and not (case.stdout == "gone" and not told):
        return f"exit status 1 without one line at the end of stderr: {ended.err[-1000:]!r}"
    if (told and ended.status != 1) or (others and ended.status != 2):
        return f"says on stderr, with exit status {ended.status}: {(told + others)[:3]}"
    return _changed(case, before, after) or next(
        filter(None, (_not_whole(name, place, case) for name in _made(case, before, after))), ""
    )


def snapshot(top: Path) -> dict[str, tuple]:
    """What there is, by path: kind and mode, and of files size, time and content."""
    found: dict[str, tuple] = {}
    pending = [str(top)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                more: tuple = ()
                if stat.S_ISREG(about.st_mode):
                    more = (about.st_size, about.st_mtime_ns, about.st_ino)
                    if about.st_size < HASHED:
                        more = (hashlib.sha256(Path(entry.path).read_bytes()).hexdigest(),)
                elif stat.S_ISLNK(about.st_mode):
                    more = (os.readlink(entry.path),)
                elif stat.S_ISDIR(about.st_mode):
                    pending.append(entry.path)
                found[os.path.relpath(entry.path, top)] = (about.st_mode, *more)
    return found


def _changed(case: Case, before: dict, after: dict) -> str:
    """What was changed, or made, where it may not be."""
    allowed = [os.path.normpath(f"here/{name}") for name in (*case.changes, *case.makes)]
    allowed += [name + suffix for name in allowed for suffix in (".partial", ".replacing")]
    parents = {parent for name in allowed for parent in _parents(name)}
    for name in sorted(before.keys() | after.keys()):
        within = any(name == one or name.startswith(one + "/") for one in allowed)
        new_parent = name in parents and name not in before
        if before.get(name) != after.get(name) and not within and not new_parent:
            what = "made" if name not in before else "removed" if name not in after else "changed"
            return f"{what} {name}"
    return ""


def _parents(name: str) -> list[str]:
    pieces = name.split("/")
    return ["/".join(pieces[:count]) for count in range(1, len(pieces))]


def _made(case: Case, before: dict, after: dict) -> list[str]:
    """What a command put, or changed, where it may."""

    def under(state: dict, name: str) -> dict:
        top = os.path.normpath(f"here/{name}")
        return {path: what for path, what in state.items() if path == top or path.startswith(top + "/")}

    return [name for name in case.makes if under(after, name) and under(before, name) != under(after, name)]


def _not_whole(name: str, place: Path, case: Case) -> str:
    """What is wrong with something that was made."""
    path = place / name
    if path.is_file():
        return "" if read_json(path, ANY) else f"{name} is empty"
    kinds = {
        "index.json": ("verify", name),
        "gate_stats.json": ("gates", "stats", name),
    }
    check = next((command for mark, command in kinds.items() if (path / mark).exists()), None)
    if (path / "config.json").exists():
        files = LocalFiles(path)
        return "" if all(read_header(files, file) for file in files.sizes if file.endswith(".safetensors")) else name
    if check is None:
        return "" if not any(path.iterdir()) else f"{name} is no whole thing: {sorted(os.listdir(path))[:9]}"
    log = place.parent.parent / f"check{time.monotonic_ns()}"
    ended = execute(check, Case([check]), place, log)
    return f"{name} is not whole: {ended.err[-500:]}" if ended.status else ""
