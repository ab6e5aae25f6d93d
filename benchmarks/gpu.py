"""Everything that a GPU can tell of this project in eight minutes, for a machine that is there for minutes only.

    python -m benchmarks.gpu [--quick] [--device cuda] [--only methods build] [--json FILE] [--scratch DIR]

Each stage (benchmarks/gpu_stages.py) runs in a process of its own with a limit of its own: one that fails, hangs or
breaks the CUDA context becomes a row that says so, and what it had measured before stays. One table at the end;
--json is written anew after each stage, so that a run cut short leaves what it had. `--device cpu` runs everything
small on the CPU in under two minutes, as a test of the script and of nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

WHOLE = 465  # seconds for all stages; a start of Python and the table fit into what is left of eight minutes
LEAST = 10  # with less time left a stage is not begun

# stage -> seconds it may take
LIMITS = {"machine": 40, "methods": 110, "transfer": 45, "build": 120, "tests": 120, "atlas": 100}


class Row(NamedTuple):
    """One line of the table. value: a number, or words."""

    stage: str
    what: str
    value: float | int | str
    unit: str = ""
    note: str = ""


def run_stage(name: str, arguments: argparse.Namespace, scratch: Path, seconds: float) -> list[Row]:
    """A stage's rows, and one that says how it failed where it did."""
    rows_file, log_file = scratch / f"{name}.rows", scratch / f"{name}.log"
    command = [sys.executable, "-m", "benchmarks.gpu_stages", name, "--rows", str(rows_file)]
    command += ["--device", arguments.device, "--scratch", str(scratch)] + ["--quick"] * arguments.quick
    started, failure = time.monotonic(), ""
    with log_file.open("w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = running.wait(seconds)
            failure = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"stopped after its {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)  # and what it started itself
            running.wait()
    rows = [Row(*json.loads(line)) for line in rows_file.read_text().splitlines()] if rows_file.is_file() else []
    if failure:
        last = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()][-1:]
        rows.append(Row(name, "FAILED", failure, "", last[0].strip() if last else "it printed nothing"))
    return [*rows, Row(name, "the whole stage", round(time.monotonic() - started, 1), "s")]


def shown(value: float | int | str) -> str:
    """Four digits of a number."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(rows: list[Row]) -> None:
    """One line a row, notes at the end."""
    width = max(len(row.what) for row in rows)
    values = max(len(shown(row.value)) for row in rows if len(shown(row.value)) < 30)
    print(f"{'stage':9} {'what':{width}} {'value':>{values}} unit")
    for row in rows:
        print(f"{row.stage:9} {row.what:{width}} {shown(row.value):>{values}} {row.unit:6} {row.note}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller vocabulary, two layers, fewer repeats")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", choices=tuple(LIMITS), default=tuple(LIMITS), help="these stages alone")
    parser.add_argument("--json", type=Path, help="write all rows here, anew after each stage")
    parser.add_argument("--scratch", type=Path, help="keep checkpoints and logs in this directory; needs 12 GB")
    arguments = parser.parse_args()
    started = time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        for name in arguments.only:
            left = WHOLE - (time.monotonic() - started)
            if left < LEAST:
                rows.append(Row(name, "FAILED", "not begun", "", f"{WHOLE} s are over"))
            else:
                rows += run_stage(name, arguments, scratch, min(LIMITS[name], left))
            print(f"{time.monotonic() - started:6.1f} s  {name} done", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))
    print_table(rows)


if __name__ == "__main__":
    main()
