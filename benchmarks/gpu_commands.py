"""The tests that need a device, and the commands on the bundled model: there, and on the CPU at the same time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from benchmarks.gpu_bench import Bench


def tests(bench: Bench) -> None:
    """`pytest -m cuda`."""
    report = bench.scratch / "tests.xml"
    files = ["tests/extract/test_cuda.py", "tests/probes/test_cuda.py"]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    (bench.scratch / "tests.out").write_text(done.stdout + done.stderr)
    cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes: dict[str, list[ElementTree.Element]] = {"passed": []} | {"failure": [], "error": [], "skipped": []}
    for case in cases:
        kind = next((child.tag for child in case if child.tag in outcomes), "passed")
        outcomes[kind].append(case)
    for kind, found in outcomes.items():
        bench.say(f"tests: {kind}", len(found))
    for case in outcomes["failure"] + outcomes["error"]:
        lines = (next(iter(case)).get("message") or "").strip().splitlines()
        bench.say(f"{case.get('name')}", "FAILED", "", (lines[0] if lines else "")[:150])


def atlas(bench: Bench) -> None:
    """The commands on the bundled model: on the device, beside the CPU at the same time."""
    bench.attempt("build atlas", lambda: _atlas_build(bench))
    bench.attempt("probe atlas", lambda: _atlas_probe(bench))
    bench.attempt("gate3 atlas", lambda: _atlas_gate3(bench))


def _both(bench: Bench, what: str, *command: str, output: str) -> list[Path]:
    """Run a command on the device and on the CPU at once; where each wrote, the device's first."""
    started = time.perf_counter()
    running, targets = [], []
    for device in (bench.device, "cpu"):
        target = bench.scratch / f"{what.replace(' ', '-')}-{device}-{len(targets)}"
        shutil.rmtree(target, ignore_errors=True)
        whole = [sys.executable, "-m", "vindex", *command, "--device", device, output, str(target)]
        one = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(whole, env=one, **pipes))
        targets.append(target)
    for process, device in zip(running, (bench.device, "cpu"), strict=True):
        said, _ = process.communicate()
        bench.say(f"{what} on {device}", time.perf_counter() - started, "s", "at the same time as the other")
        if process.returncode:
            raise RuntimeError(f"{device}: exit code {process.returncode}: {said.strip().splitlines()[-1:]}")
    return targets


def _atlas_build(bench: Bench) -> None:
    from vindex.reader import open_vindex

    ours, theirs = (open_vindex(path) for path in _both(bench, "build atlas", "build", "atlas", output="-o"))
    apart = np.abs(ours.singular_values / theirs.singular_values - 1).max()
    bench.say("build atlas: σ apart", float(apart), "", "relative, at most 1e-4")
    check = [sys.executable, "-m", "vindex", "verify", str(ours.path), "--source", "atlas", "--json"]
    said = json.loads(subprocess.run(check, capture_output=True, text=True).stdout)
    bench.say(
        "build atlas: verify --source", "holds" if said["holds"] else "FAILED", "", f"{len(said['checks'])} checks"
    )


def _atlas_probe(bench: Bench) -> None:
    paths = _both(bench, "probe atlas", "probe", "atlas", "--dtype", "float32", output="-o")
    ours, theirs = (json.loads(path.read_text())["constants"] for path in paths)
    apart = {
        (symbol, name): abs(mine["value"] - other["value"]) / max(abs(other["value"]), 0.1)
        for symbol in theirs
        for name, mine, other in [
            ("", ours[symbol], theirs[symbol]),
            *((name, ours[symbol]["variants"][name], variant) for name, variant in theirs[symbol]["variants"].items()),
        ]
    }
    worst = max(apart, key=lambda place: apart[place])
    bench.say(
        "probe atlas: constants apart", apart[worst], "", f"{' '.join(worst)}; at most 2e-3 of the value or of 0.1"
    )


def _atlas_gate3(bench: Bench) -> None:
    paths = _both(bench, "gate3 atlas", "gate3", "atlas", "--dtype", "float32", output="-o")
    ours, theirs = (json.loads(path.read_text())["methods"] for path in paths)
    for method, mine in ours.items():
        other = theirs[method]
        same = all(found["result"] == other["verdicts"][name]["result"] for name, found in mine["verdicts"].items())
        results = "/".join(found["result"] for found in mine["verdicts"].values())
        note = f"{results}; layer {mine['layer']} and {other['layer']}; ‖ΔW‖ {mine['norm']:.4g} and {other['norm']:.4g}"
        bench.say(f"gate3 atlas, {method}: verdicts", "same" if same else "DIFFER", "", note)
    bench.say(
        "gate3 atlas: seconds of its stages", sum(mine["seconds"] for mine in ours.values()), "s", "without loading"
    )
