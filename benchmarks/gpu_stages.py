"""The stages of benchmarks/gpu.py, each in a process of its own: `python -m benchmarks.gpu_stages NAME --rows FILE`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import chebyshev
from benchmarks.gpu import Row
from benchmarks.synthetic import QWEN3_8B, Shapes, real_looking_weight, write_checkpoint
from extract import svd
from extract.cast import to_half
from extract.checkpoint import open_checkpoint
from extract.device import narrow

TOLERANCE = 1e-4
TIGHT = svd.RITZ_TARGET
LOOSE = TOLERANCE / 2  # so that the certificate, from the weight itself, stays below the tolerance


class Sizes(NamedTuple):
    """What a run measures on."""

    shapes: Shapes
    layers: int
    features: int
    repeat: int
    square: int
    """Side of the matrices whose product shows the machine's rate."""


SIZES = {
    "cuda": Sizes(QWEN3_8B, 4, 128, 5, 8192),
    "quick": Sizes(QWEN3_8B._replace(vocabulary=32768), 2, 128, 3, 8192),
    "cpu": Sizes(Shapes(512, 1024, 4096), 2, 24, 1, 512),
}


@dataclass
class Bench:
    """Where a stage measures, and where its rows go as soon as they are known."""

    stage: str
    device: str
    sizes: Sizes
    rows: Path
    scratch: Path

    def say(self, what: str, value: float | int | str, unit: str = "", note: str = "") -> None:
        with self.rows.open("a") as file:
            file.write(json.dumps(Row(self.stage, what, value, unit, note)) + "\n")

    def milliseconds(self, work: Callable[[], object], repeat: int | None = None) -> float:
        """Median of the repeats after one to warm up, from before the call to when the device has done it."""
        times = []
        for _ in range(1 + (repeat or self.sizes.repeat)):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times[1:])

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def attempt(self, what: str, work: Callable[[], object]) -> None:
        """Do it; an error becomes a row, and the stage goes on."""
        try:
            work()
        except Exception as error:
            first = str(error).strip().splitlines()[:1]
            self.say(what, "FAILED", "", f"{type(error).__name__}: {first[0] if first else ''}"[:150])


def machine(bench: Bench) -> None:
    """Versions, card and driver, and the two rates that everything else is measured against."""
    names = ("torch", "transformers", "numpy", "accelerate")
    bench.say("Python", platform.python_version(), "", ", ".join(f"{name} {metadata.version(name)}" for name in names))
    bench.say("CPU threads", torch.get_num_threads(), "", platform.processor() or platform.machine())
    if bench.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        bench.say("card", card.name, "", f"{card.total_memory / 1e9:.0f} GB, {card.multi_processor_count} SMs")
        bench.say("CUDA of torch", str(torch.version.cuda), "", f"TF32 {torch.backends.cuda.matmul.fp32_precision}")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        bench.attempt("driver", lambda: bench.say("driver", subprocess.check_output(query, text=True).strip()))
    side = bench.sizes.square
    big = torch.empty(side, side, 4, device=bench.device)
    spent = bench.milliseconds(lambda: big.clone())
    bench.say("copy on the device", 2 * big.nbytes / spent / 1e6, "GB/s", "bytes read and written")
    for dtype, size in ((torch.bfloat16, side), (torch.float32, side // 2), (torch.float64, side // 2)):
        left, right = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
        spent = bench.milliseconds(lambda left=left, right=right: left @ right)
        bench.say(
            f"product in {str(dtype).removeprefix('torch.')}", 2 * size**3 / spent / 1e9, "TFLOP/s", f"side {size}"
        )


def methods(bench: Bench) -> None:
    """The leading directions of one weight, as gate_proj and as down_proj lie: this project's way beside another."""
    hidden, neurons, _ = bench.sizes.shapes
    features = bench.sizes.features
    weight = real_looking_weight(neurons, hidden, device=bench.device)
    turned = weight.T.contiguous().T
    for name, by_neuron in ((f"{neurons}×{hidden}", weight), (f"{hidden}×{neurons}", turned)):
        small = by_neuron.bfloat16() if bench.device == "cuda" else by_neuron
        bench.attempt(name, lambda name=name, small=small, wide=by_neuron: _contenders(bench, name, small, wide))
    bench.attempt("Gram products", lambda: _gram_products(bench, weight))
    bench.attempt("small factorisations", lambda: _factorisations(bench, hidden, features))
    bench.attempt("the CPU", lambda: _cpu_directions(bench, weight.cpu()))
    bench.attempt("probe", lambda: _exact(bench, hidden))


def _contenders(bench: Bench, name: str, small: torch.Tensor, wide: torch.Tensor) -> None:
    """Rows for each method on one weight: ms from the weight to certified directions, products, residual."""
    features = bench.sizes.features
    shorter = svd._shorter_columns(small)

    def lanczos() -> tuple[svd.Directions, str]:
        return svd.top_directions(small, features, TOLERANCE, "w"), ""

    def chebyshev_to(target: float, **options: Any) -> Callable[[], tuple[svd.Directions, str]]:
        def run() -> tuple[svd.Directions, str]:
            found = chebyshev.leading(svd.gram_matrix(shorter), features + 1, target, **options)
            pairs = svd._Eigenpairs(found.values, found.vectors)
            return svd._certified(wide, pairs, features, "chebyshev"), f", {found.products} products"

        return run

    contenders = {
        "block Lanczos, as built": lanczos,
        "Chebyshev, tight": chebyshev_to(TIGHT),
        "Chebyshev, to 1e-4": chebyshev_to(LOOSE),
        "Chebyshev, bfloat16 first, tight": chebyshev_to(TIGHT, rough=True),
        "Chebyshev, bfloat16 first, to 1e-4": chebyshev_to(LOOSE, rough=True),
        "Chebyshev, tight, small eigh on the device": chebyshev_to(TIGHT, small=bench.device),
    }

    def measure(what: str, run: Callable[[], tuple[svd.Directions, str]]) -> None:
        kept: list[tuple[svd.Directions, str]] = []
        spent = bench.milliseconds(lambda: kept.append(run()))
        directions, products = kept[-1]
        note = f"residual {_residual(wide, directions.rows):.1e}, certificate {directions.residuals.max():.1e}"
        bench.say(what, spent, "ms", note + products)

    for method, run in contenders.items():
        what = f"{name}: {method}"
        bench.attempt(what, lambda what=what, run=run: measure(what, run))
    gram = svd.gram_matrix(shorter)
    pairs = svd._block_lanczos(gram, features + 1)
    alone = bench.milliseconds(lambda: svd._block_lanczos(gram, features + 1))
    bench.say(f"{name}: Lanczos iteration alone", alone, "ms")
    if pairs:
        alone = bench.milliseconds(lambda: svd._certified(wide, pairs, features, ""))
        bench.say(f"{name}: certificate alone", alone, "ms")


def _residual(weight: torch.Tensor, rows: torch.Tensor) -> float:
    """The largest ‖WᵀWv − σ²v‖/σ², in float64."""
    exact, wide = rows.double(), weight.double()
    loadings = exact @ wide.T
    squares = loadings.square().sum(1, keepdim=True)
    return float(((loadings @ wide - squares * exact).norm(dim=1) / squares[:, 0]).max())


def _gram_products(bench: Bench, weight: torch.Tensor) -> None:
    small = weight.bfloat16()
    bench.say("Gram, float32, panels", bench.milliseconds(lambda: svd.gram_matrix(weight)), "ms")
    bench.say("Gram, float32, one product", bench.milliseconds(lambda: weight.T @ weight), "ms")
    bench.say("Gram, bfloat16, panels", bench.milliseconds(lambda: svd.gram_matrix(small)), "ms")
    bench.say("Gram, bfloat16, one product", bench.milliseconds(lambda: svd._product(small.T, small)), "ms")
    once, panels = svd._product(small.T, small), svd.gram_matrix(small)
    exact = weight.double().T @ weight.double()
    for name, gram in (("one product", once), ("panels", panels), ("float32", weight.T @ weight)):
        bench.say(f"Gram error, {name}", float((gram - exact).norm() / exact.norm()), "", "‖G − exact‖/‖exact‖")


def _factorisations(bench: Bench, hidden: int, features: int) -> None:
    """What is neither a large product nor a copy: QR of a block, and eigenproblems of the sizes both methods have."""
    width = max(svd.SMALLEST_BLOCK, (features + 1) // svd.PAIRS_PER_VECTOR)
    block, wide = (torch.randn(hidden, columns, device=bench.device) for columns in (width, width * 7))
    bench.say(f"QR of {hidden}×{width}", bench.milliseconds(lambda: torch.linalg.qr(block)), "ms", "Householder")
    for each in (block, wide):
        spent = bench.milliseconds(lambda each=each: chebyshev.orthonormal(each))
        bench.say(f"CholeskyQR2 of {hidden}×{each.shape[1]}", spent, "ms")
    for size in (round(svd.FIRST_CHECK * (features + 1)), round(chebyshev.OVER * features)):
        random = torch.randn(size, size, device=bench.device)
        matrix = random + random.T
        for device in dict.fromkeys((bench.device, "cpu")):
            there = matrix.to(device)
            spent = bench.milliseconds(lambda there=there: torch.linalg.eigh(there))
            bench.say(f"eigh of {size}×{size} on {device}", spent, "ms")


def _cpu_directions(bench: Bench, weight: torch.Tensor) -> None:
    started = time.perf_counter()
    directions = svd.top_directions(weight, bench.sizes.features, TOLERANCE, "w")
    note = f"{torch.get_num_threads()} threads, certificate {directions.residuals.max():.1e}"
    bench.say("block Lanczos on the CPU", (time.perf_counter() - started) * 1e3, "ms", note)


def _exact(bench: Bench, hidden: int) -> None:
    """The float64 eigenproblem that `vindex probe` solves for each weight."""
    random = torch.randn(hidden, hidden, device=bench.device, dtype=torch.float64)
    matrix = random @ random.T
    bench.say(f"eigh of {hidden}×{hidden}, float64", bench.milliseconds(lambda: torch.linalg.eigh(matrix), 1), "ms")


def transfer(bench: Bench) -> None:
    """One stored weight's way up."""
    hidden, neurons, _ = bench.sizes.shapes
    stored = torch.randn(neurons, hidden).bfloat16()
    path = bench.scratch / "weight.bin"
    stored.view(torch.uint8).numpy().tofile(path)

    def say(what: str, work: Callable[[], object], note: str = "") -> None:
        def measured() -> None:
            spent = bench.milliseconds(work)
            bench.say(what, spent, "ms", f"{stored.nbytes / spent / 1e6:.1f} GB/s of stored bytes{note}")

        bench.attempt(what, measured)

    say("read into fresh memory", lambda: _read(path, bytearray(stored.nbytes)))
    say("float32, pageable", lambda: stored.float().to(bench.device), "; widened on the CPU")
    say("as built: bfloat16", lambda: narrow(stored, bench.device), "; torch's own page-locked memory")
    if bench.device != "cuda":
        return
    say(
        "float32, page-locked",
        lambda: stored.float().pin_memory().to("cuda", non_blocking=True),
        "; widened on the CPU",
    )
    started = time.perf_counter()
    locked = torch.empty(stored.nbytes, dtype=torch.uint8, pin_memory=True)
    bench.say(
        "lock one buffer's pages", (time.perf_counter() - started) * 1e3, "ms", f"{locked.nbytes / 1e6:.0f} MB, once"
    )
    buffer = locked.view(torch.bfloat16).view(neurons, hidden)
    say("read into that buffer", lambda: _read(path, locked.numpy()))
    say("bfloat16, copied to that buffer, up", lambda: buffer.copy_(stored).to("cuda", non_blocking=True))
    say("that buffer, up", lambda: buffer.to("cuda", non_blocking=True))
    there = buffer.to("cuda")
    say("widened on the device", lambda: there.float())

    def straight() -> torch.Tensor:
        _read(path, locked.numpy())
        return buffer.to("cuda", non_blocking=True).float()

    say("read into that buffer, up, widened there", straight)


def _read(path: Path, buffer: Any) -> None:
    view, done = memoryview(buffer).cast("B"), 0
    with path.open("rb", buffering=0) as opened:
        while done < len(view) and (count := opened.readinto(view[done:])):
            done += count


def build(bench: Bench) -> None:
    """A checkpoint of Qwen3-8B's shapes, built: as it is, with the profiler, and one stage after the other."""
    source, threads = bench.scratch / "checkpoint", torch.get_num_threads()
    shutil.rmtree(source, ignore_errors=True)
    started = time.perf_counter()
    write_checkpoint(source, bench.sizes.shapes, bench.sizes.layers, bench.device)
    bench.say("write the checkpoint", time.perf_counter() - started, "s", "not part of a build")
    weights = 2 * bench.sizes.layers
    marks = _build(bench, source, "warm")
    bench.say("first build", sum(marks.values()), "s", "kernels are loaded and memory is taken")
    with _sampled_by_nvml() as samples:
        marks = _build(bench, source, "plain")
    for what, spent in marks.items():
        bench.say(f"build: {what}", spent, "s", f"{threads} threads" if "source" in what or "checksums" in what else "")
    bench.say(
        "build: directions, a weight", marks["directions"] / weights * 1e3, "ms", f"{weights} weights, reading ahead"
    )
    if samples:
        bench.say("GPU busy, by NVML", statistics.mean(samples) / 100, "", f"{len(samples)} samples of the whole build")
    bench.attempt("certificates", lambda: _certificates(bench, bench.scratch / "plain.vindex"))
    if bench.device == "cuda":
        bench.attempt("busy share", lambda: _busy(bench, source))
    bench.attempt("stages", lambda: _in_turn(bench, source, weights))
    bench.attempt("beside the CPU", lambda: _beside_cpu(bench, source))


def _build(bench: Bench, source: Path, name: str) -> dict[str, float]:
    """Build, and seconds by stage."""
    from extract.build import build as build_vindex
    from vindex.options import BuildOptions

    marks: list[tuple[str, float]] = [("opening", time.perf_counter())]

    def stages(what: str, _total: int) -> Callable[[int], None]:
        bench.wait()
        marks.append((what, time.perf_counter()))
        return lambda steps: None

    options = BuildOptions(bench.sizes.features, bench.device, torch.get_num_threads(), TOLERANCE, True)
    target = bench.scratch / f"{name}.vindex"
    build_vindex(open_checkpoint(str(source)), target, options, stages, resume=False, force=True)
    bench.wait()
    marks.append(("end", time.perf_counter()))
    return {what: after - began for (what, began), (_, after) in itertools.pairwise(marks)}


def _certificates(bench: Bench, path: Path) -> None:
    certificates = json.loads((path / "manifest.json").read_text())["certificates"]
    worst = max(certificate["max_residual"] for certificate in certificates)
    methods = ", ".join(sorted({certificate["method"] for certificate in certificates}))
    bench.say("largest certificate", worst, "", f"of {len(certificates)}; {methods}")


def _busy(bench: Bench, source: Path) -> None:
    """Share of the wall time of a build's two computing stages in which kernels run, and bytes move."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        marks = _build(bench, source, "profiled")
    computing = marks["directions"] + marks["vocabulary"]
    events = [(event.key, event.self_device_time_total / 1e6) for event in seen.key_averages()]
    copies = sum(spent for key, spent in events if key.startswith(("Memcpy", "Memset")))
    kernels = sum(spent for _, spent in events) - copies
    bench.say("GPU busy with kernels", kernels / computing, "", f"{kernels:.2f} s of {computing:.2f} s of both stages")
    bench.say("GPU busy with copies", copies / computing)
    for key, spent in sorted(events, key=lambda event: -event[1])[:6]:
        bench.say(f"kernel {key[:40]}", spent * 1e3, "ms", "in that build")


@contextmanager
def _sampled_by_nvml() -> Iterator[list[int]]:
    """Utilisation of the card in percent, 20 times a second; nothing where NVML is not to be had."""
    samples: list[int] = []
    done = threading.Event()
    try:
        import pynvml

        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:
        yield samples
        return

    def sample() -> None:
        while not done.wait(0.05):
            samples.append(pynvml.nvmlDeviceGetUtilizationRates(card).gpu)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def _in_turn(bench: Bench, source: Path, weights: int) -> None:
    """A build that reads nothing ahead and waits for the device after each part: each part's time is its own."""
    from unittest.mock import patch

    spent: dict[str, float] = {}
    parts = {
        "read": "extract.stores.safetensors.Safetensors.read",
        "up": "extract.blocks.narrow",
        "Gram": "extract.svd.gram_matrix",
        "iteration": "extract.svd._block_lanczos",
        "certificate": "extract.svd._certified",
        "back, as float16": "extract.blocks.to_half",
        "vocabulary: up": "extract.vocab_stage.wide",
        "vocabulary: embeddings as float16": "extract.vocab_stage.to_half",
        "vocabulary: finite?": "extract.vocab_stage.require_finite",
        "vocabulary: unit rows": "extract.vocab_stage.unit_rows",
        "vocabulary: gate scores": "extract.vocab_stage.gate_scores",
        "vocabulary: down scores": "extract.vocab_stage.down_scores",
        "vocabulary: poles": "extract.vocab.TopTokens.update",
        "write": "vindex.writer.Writer.write",
    }

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            bench.wait()
            began = time.perf_counter()
            found = function(*args, **kwargs)
            bench.wait()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return found

        return call

    from contextlib import ExitStack
    from pkgutil import resolve_name

    with ExitStack() as stack:
        for name, place in parts.items():
            module, _, attribute = place.rpartition(".")
            stack.enter_context(patch.object(resolve_name(module), attribute, timed(name, resolve_name(place))))
        for place in ("extract.engines.ahead", "extract.vocab_stage.ahead"):
            stack.enter_context(patch(place, lambda items: items))
        marks = _build(bench, source, "in-turn")
    for name in parts:
        bench.say(f"in turn: {name}", spent.get(name, 0.0) / weights * 1e3, "ms", "a weight")
    note = "; ".join(f"{what} {seconds:.1f} s" for what, seconds in marks.items())
    bench.say("in turn: whole", sum(marks.values()), "s", note)


def _beside_cpu(bench: Bench, source: Path) -> None:
    """The last layer's two weights derived again on the CPU, and what a whole weight takes there."""
    from extract.rederive import rederive, sample_blocks
    from vindex.reader import open_vindex

    v, checkpoint = open_vindex(bench.scratch / "plain.vindex"), open_checkpoint(str(source))
    started = time.perf_counter()
    found = list(rederive(v, checkpoint, sample_blocks(v, checkpoint, [bench.sizes.layers - 1], 1)))
    spent = (time.perf_counter() - started) / len(found)
    worst = max(found, key=lambda weight: weight.largest_angle / weight.angle_limit)
    bench.say("a weight on the CPU", spent * 1e3, "ms", f"read, float32, {torch.get_num_threads()} threads")
    holds = "holds" if all(weight.holds for weight in found) else "DIFFERS"
    note = f"angle {worst.largest_angle:.1e} (limit {worst.angle_limit:.1e}), σ {worst.sigma_error:.1e}"
    bench.say("the CPU finds the same", holds, "", note)
    halves = torch.randn(bench.sizes.shapes.hidden, bench.sizes.shapes.hidden)
    bench.say("to float16 on the CPU", halves.nbytes / bench.milliseconds(lambda: to_half(halves, "h")) / 1e6, "GB/s")


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
    paths = _both(bench, "probe atlas", "probe", "atlas", "--dtype", "float32", output="--json")
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
    paths = _both(bench, "gate3 atlas", "gate3", "atlas", "--dtype", "float32", output="--json")
    ours, theirs = (json.loads(path.read_text())["methods"] for path in paths)
    for method, mine in ours.items():
        other = theirs[method]
        same = all(mine["verdicts"][name]["result"] == other["verdicts"][name]["result"] for name in ("seed", "strict"))
        results = "/".join(mine["verdicts"][name]["result"] for name in ("seed", "strict"))
        note = f"{results}; layer {mine['layer']} and {other['layer']}; ‖ΔW‖ {mine['norm']:.4g} and {other['norm']:.4g}"
        bench.say(f"gate3 atlas, {method}: verdicts", "same" if same else "DIFFER", "", note)
    bench.say(
        "gate3 atlas: seconds of its stages", sum(mine["seconds"] for mine in ours.values()), "s", "without loading"
    )


STAGES = {each.__name__: each for each in (machine, methods, transfer, build, tests, atlas)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    sizes = SIZES["cpu" if arguments.device == "cpu" else "quick" if arguments.quick else "cuda"]
    arguments.rows.unlink(missing_ok=True)
    STAGES[arguments.stage](Bench(arguments.stage, arguments.device, sizes, arguments.rows, arguments.scratch))


if __name__ == "__main__":
    main()
