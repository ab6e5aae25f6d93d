"""Run the campaign: `python -m tests.campaign [--cases N | --seconds S] [--from SEED] [--category X] [--seed N]`."""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import multiprocessing
import os
import pkgutil
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

import extract
import probes
import vindex
from tests.campaign import bases, judge
from tests.campaign.cases import CATEGORIES

OUTCOMES = ("success", "verdict", "one line", "usage", "killed")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign")
    parser.add_argument("--category", choices=CATEGORIES, help="only this one")
    parser.add_argument("--seed", type=int, help="only this case, whose files are kept; needs --category")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed; -1: fresh ones")
    parser.add_argument("--cases", type=int, default=0, help="so many cases, the categories in turn")
    parser.add_argument("--seconds", type=float, default=3600, help="without --cases: go on for so long")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="campaign-"))
    base = bases.make(root / "base")
    _warm(base)
    first = chosen.first if chosen.first >= 0 else time.time_ns() % 10**9
    names = [chosen.category] if chosen.category else list(CATEGORIES)
    if chosen.seed is not None:
        found = judge.run(chosen.category, chosen.seed, base, root, keep=True)
        for verdict in found:
            print(f"{verdict.outcome}: {verdict.complaint or 'well'}")
        print(f"files: {root / f'{chosen.category}-{chosen.seed}'}")
        return any(verdict.complaint for verdict in found)
    failed = _all(lambda: _specs(names, first, chosen.cases, chosen.seconds), base, root, chosen.processes)
    shutil.rmtree(root, ignore_errors=True)
    return failed


def _specs(names: list[str], first: int, cases: int, seconds: float) -> Iterator[tuple[str, int]]:
    """(category, seed), the categories in turn, until there are enough or the time is over."""
    end = time.monotonic() + seconds
    for number in count():
        if number >= cases if cases else time.monotonic() > end:
            return
        yield names[number % len(names)], first + number // len(names)


def _all(specs: Callable[[], Iterator[tuple[str, int]]], base: Path, root: Path, processes: int) -> bool:
    """Run cases, print what goes wrong at once and the counts every minute; whether anything went wrong."""
    forking = multiprocessing.get_context("fork")
    queue = forking.SimpleQueue()
    shares = [islice(specs(), number, None, processes) for number in range(processes)]
    workers = [forking.Process(target=_work, args=(share, base, root, queue)) for share in shares]
    for worker in workers:
        worker.start()
    cases: Counter = Counter()
    outcomes: Counter = Counter()  # (category, outcome or "seconds")
    failures, shown, working = 0, time.monotonic(), processes
    while working:
        found = queue.get()
        working -= found is None
        for verdict in found or ():
            outcomes[verdict.category, verdict.outcome] += 1
            outcomes[verdict.category, "seconds"] += verdict.seconds
            if verdict.complaint:
                failures += 1
                print(f"FAILED --category {verdict.category} --seed {verdict.seed}: {verdict.complaint}", flush=True)
        if found:
            cases[found[0].category] += 1
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            _show(cases, outcomes, failures)
    for worker in workers:
        worker.join()
    _show(cases, outcomes, failures)
    return bool(failures)


def _work(share: Iterator[tuple[str, int]], base: Path, root: Path, queue: Any) -> None:
    for category, seed in share:
        try:
            queue.put(judge.run(category, seed, base, root))
        except Exception as error:
            queue.put(
                [judge.Verdict(category, seed, "killed", f"the campaign itself: {type(error).__name__}: {error}")]
            )
    queue.put(None)


def _warm(base: Path) -> None:
    """Load once, before forking, what the commands load."""
    for package in (vindex, extract, probes):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if "demo.train" not in module.name and not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    app = importlib.import_module("vindex.__main__").app
    once = [("verify", "tiny.vindex"), ("gates", "stats", "gates"), ("plan", "tiny", "--features", "4"),
            ("gates", "apply", "tiny", "gates", "--threshold", "0.5", "--prompt", "Hi", "--tokens", "1", "--chat"),
            ("build", "tiny", "-o", "../warm", "--features", "4", "--threads", "1")]  # fmt: skip
    os.chdir(base)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for command in once:
            app(command, standalone_mode=False)
    gc.collect()
    gc.freeze()  # what is there by now is never copied for the sake of a count


def _show(cases: Counter, outcomes: Counter, failures: int) -> None:
    print(f"{'':14}{'cases':>9}" + "".join(f"{name:>10}" for name in (*OUTCOMES, "seconds")))
    for category in cases:
        counts = "".join(f"{outcomes[category, name]:10,.0f}" for name in (*OUTCOMES, "seconds"))
        print(f"{category:14}{cases[category]:9,}{counts}")
    commands = sum(number for (_, name), number in outcomes.items() if name != "seconds")
    print(f"{cases.total():,} cases, {commands:,} commands, {failures} failed", flush=True)


if __name__ == "__main__":
    sys.exit(main())
