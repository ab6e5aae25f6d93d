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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import chebyshev
from benchmarks.gpu import Row
from benchmarks.synthetic import QWEN3_8B, Shapes, real_looking_weight, write_checkpoint
from extract import svd
from extract.cast import to_half
from extract.checkpoint import open_checkpoint
from extract.device import fetched, page_locked, wide
from extract.stores.safetensors import fresh

TOLERANCE = 1e-4
QWEN3_8B_LAYERS, QWEN3_8B_SHARD = 36, 4.0e9  # bytes of the largest of its five files


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
        bench.attempt(name, lambda name=name, by_neuron=by_neuron: _contenders(bench, name, by_neuron))
    bench.attempt("flat spectra", lambda: _flat_spectra(bench))
    bench.attempt("Gram products", lambda: _gram_products(bench, weight))
    bench.attempt("small factorisations", lambda: _factorisations(bench, hidden, features))
    bench.attempt("the CPU", lambda: _cpu_directions(bench, weight.cpu()))
    bench.attempt("probe", lambda: _exact(bench, hidden))


def _contenders(bench: Bench, name: str, weight: torch.Tensor) -> None:
    """Rows for each method on one weight: ms from the weight to certified directions, residual, products."""
    features = bench.sizes.features
    products = []

    def lanczos() -> svd.Directions:
        return svd.top_directions(weight, features, TOLERANCE, "w")

    def filtered() -> svd.Directions:
        gram = svd.gram_matrix(svd._shorter_columns(weight))
        found = chebyshev.leading(gram, features + 1, svd.RITZ_TARGET)
        products.append(found.products)
        return svd._certified(weight, svd._Eigenpairs(found.values, found.vectors), features, "chebyshev")

    def measure(what: str, run: Callable[[], svd.Directions]) -> None:
        kept: list[svd.Directions] = []
        spent = bench.milliseconds(lambda: kept.append(run()))
        note = f"residual {_residual(weight, kept[-1].rows):.1e}, certificate {kept[-1].residuals.max():.1e}"
        bench.say(what, spent, "ms", note + (f", {products[-1]} products" if run is filtered else ""))

    bench.attempt(name, lambda: measure(f"{name}: block Lanczos, as built", lanczos))
    bench.attempt(name, lambda: measure(f"{name}: Chebyshev", filtered))
    gram = svd.gram_matrix(svd._shorter_columns(weight))
    pairs = svd._block_lanczos(gram, features + 1)
    alone = bench.milliseconds(lambda: svd._block_lanczos(gram, features + 1))
    bench.say(f"{name}: Lanczos iteration alone", alone, "ms")
    if pairs:
        alone = bench.milliseconds(lambda: svd._certified(weight, pairs, features, ""))
        bench.say(f"{name}: certificate alone", alone, "ms")


def _flat_spectra(bench: Bench) -> None:
    """The largest certificate of a random weight, whose small eigenproblem has 256 rows: where it comes from."""
    weight = torch.randn(768, 512, generator=torch.Generator().manual_seed(0)).bfloat16().float()

    def largest(device: str) -> float:
        return float(svd.top_directions(weight.to(device), 24, TOLERANCE, "w").residuals.max())

    bench.say("flat 768×512: certificate", largest(bench.device))
    with patch.object(svd, "JACOBI_ROWS", 0):
        bench.say("flat 768×512: certificate, eigh in float32", largest(bench.device))
    bench.say("flat 768×512: certificate, on the CPU", largest("cpu"))


def _residual(weight: torch.Tensor, rows: torch.Tensor) -> float:
    """The largest ‖WᵀWv − σ²v‖/σ², in float64."""
    exact, wide = rows.double(), weight.double()
    loadings = exact @ wide.T
    squares = loadings.square().sum(1, keepdim=True)
    return float(((loadings @ wide - squares * exact).norm(dim=1) / squares[:, 0]).max())


def _gram_products(bench: Bench, weight: torch.Tensor) -> None:
    exact = weight.double().T @ weight.double()
    for name, product in (("panels", svd.gram_matrix), ("one product", lambda matrix: matrix.T @ matrix)):
        error = float((product(weight) - exact).norm() / exact.norm())
        spent = bench.milliseconds(lambda product=product: product(weight))
        bench.say(f"Gram, {name}", spent, "ms", f"‖G − exact‖/‖exact‖ {error:.1e}")


def _factorisations(bench: Bench, hidden: int, features: int) -> None:
    """What is neither a large product nor a copy: QR of a block, and eigenproblems of the sizes both methods have."""
    width = max(svd.SMALLEST_BLOCK, (features + 1) // svd.PAIRS_PER_VECTOR)
    block, wide = (torch.randn(hidden, columns, device=bench.device) for columns in (width, width * 7))
    bench.say(f"QR of {hidden}×{width}", bench.milliseconds(lambda: torch.linalg.qr(block)), "ms", "Householder")
    for each in (block, wide):
        spent = bench.milliseconds(lambda each=each: chebyshev.orthonormal(each))
        bench.say(f"CholeskyQR2 of {hidden}×{each.shape[1]}", spent, "ms")
    for size in (round(svd.FIRST_CHECK * (features + 1)), 256):
        random = torch.randn(size, size, device=bench.device)
        for dtype, device in itertools.product((torch.float32, torch.float64), dict.fromkeys((bench.device, "cpu"))):
            matrix = (random @ random.T).to(device, dtype)
            spent = bench.milliseconds(lambda matrix=matrix: torch.linalg.eigh(matrix))
            values, vectors = (found.double() for found in torch.linalg.eigh(matrix))
            error = float((matrix.double() @ vectors - vectors * values).norm(dim=0).max() / values[-1])
            what = f"eigh of {size}×{size} on {device}, {str(dtype).removeprefix('torch.')}"
            bench.say(what, spent, "ms", f"residual over the largest value {error:.1e}")


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

    size = stored.nbytes
    say("read into fresh memory, small pages", lambda: _read(path, bytearray(size)))
    say("read into fresh memory, huge pages", lambda: _read(path, fresh(size).numpy()), "; as built for a CPU")
    say("up from memory of small pages", lambda: wide(stored, bench.device), "; by a page-locked copy")
    if bench.device != "cuda":
        return

    def straight() -> torch.Tensor:
        memory = page_locked(size)
        _read(path, memory.numpy())
        return wide(memory.view(torch.bfloat16).view(neurons, hidden), "cuda")

    locked = page_locked(size).view(torch.bfloat16).view(neurons, hidden)
    there = locked.to("cuda")
    say("read into page-locked memory", lambda: _read(path, page_locked(size).numpy()))
    say("up from page-locked memory, widened there", lambda: wide(locked, "cuda"))
    say("read, up, widened there", straight, "; as built")
    say("float32, up from small pages", lambda: stored.float().to("cuda"), "; widened on the CPU")
    say("back to small pages", lambda: there.cpu())
    say("back to page-locked memory", lambda: fetched(there), "; as built")


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
    a_weight = marks["directions"] / weights * 1e3
    bench.say("build: directions, a weight", a_weight, "ms", f"{weights} weights, reading ahead")
    bench.say("build: whole", sum(marks.values()), "s")
    if samples:
        bench.say("GPU busy, by NVML", statistics.mean(samples) / 100, "", f"{len(samples)} samples of the whole build")
    bench.attempt("certificates", lambda: _certificates(bench, bench.scratch / "plain.vindex"))
    if bench.device == "cuda":
        bench.attempt("busy share", lambda: _busy(bench, source))
    bench.attempt("stages", lambda: _projection(bench, source, marks, _in_turn(bench, source, weights)))
    bench.attempt("beside the CPU", lambda: _beside_cpu(bench, source))


def _build(bench: Bench, source: Path, name: str) -> dict[str, float]:
    """Build, and seconds by stage."""
    from extract.pipeline import build as build_vindex
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


def _in_turn(bench: Bench, source: Path, weights: int) -> dict[str, float]:
    """A build that reads nothing ahead and waits for the device after each part: {part: its own seconds}."""
    spent: dict[str, float] = {}
    of_a_weight = {
        "read": "extract.ffn.Weight.by_neuron",
        "up": "extract.blocks.wide",
        "Gram": "extract.svd.gram_matrix",
        "iteration": "extract.svd._block_lanczos",
        "certificate": "extract.svd._certified",
        "back, as float16": "extract.blocks.to_half",
    }
    of_the_vocabulary = {
        "read": "extract.stores.safetensors.Safetensors.read",
        "up": "extract.vocab_stage.wide",
        "embeddings as float16": "extract.vocab_stage.to_half",
        "finite?": "extract.vocab_stage.require_finite",
        "unit rows": "extract.vocab_stage.unit_rows",
        "gate scores": "extract.vocab_stage.gate_scores",
        "down scores": "extract.vocab_stage.down_scores",
        "poles": "extract.vocab.TopTokens.update",
        "write": "vindex.writer.Writer.write",
    }
    parts = of_a_weight | {f"vocabulary: {part}": place for part, place in of_the_vocabulary.items()}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            bench.wait()
            began = time.perf_counter()
            found = function(*args, **kwargs)
            bench.wait()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return found

        return call

    with ExitStack() as stack:
        for name, place in parts.items():
            module, _, attribute = place.rpartition(".")
            stack.enter_context(patch.object(resolve_name(module), attribute, timed(name, resolve_name(place))))
        for place in ("extract.engines.ahead", "extract.vocab_stage.ahead"):
            stack.enter_context(patch(place, lambda items: items))
        marks = _build(bench, source, "in-turn")
    spent["vocabulary: read"] -= spent["read"]  # all reading, but for a few norms, is of one of the two
    for name in parts:
        vocabulary = name not in of_a_weight
        seconds, unit = spent.get(name, 0.0), "s" if vocabulary else "ms"
        bench.say(
            f"in turn: {name}",
            seconds if vocabulary else seconds / weights * 1e3,
            unit,
            "" if vocabulary else "a weight",
        )
    note = "; ".join(f"{what} {seconds:.1f} s" for what, seconds in marks.items())
    bench.say("in turn: whole", sum(marks.values()), "s", note)
    return spent


def _projection(bench: Bench, source: Path, marks: dict[str, float], in_turn: dict[str, float]) -> None:
    """The whole of Qwen3-8B from the stages of these few layers; its files as here, in memory when they are read.

    Directions go with the layers. The pass over the vocabulary is the same, but for the scores of more directions.
    Hashing goes with the largest file, as each has one thread; of the files written, the embeddings are the largest.
    """
    times = QWEN3_8B_LAYERS / bench.sizes.layers
    rows = QWEN3_8B.vocabulary / bench.sizes.shapes.vocabulary
    scores = sum(in_turn.get(f"vocabulary: {part}", 0.0) for part in ("gate scores", "down scores", "poles"))
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    whole = {
        "opening": marks["opening"],
        "hash source": marks["hash source"] * QWEN3_8B_SHARD / largest,
        "directions": marks["directions"] * times,
        "vocabulary": (marks["vocabulary"] + scores * (times - 1)) * rows,
        "checksums": marks["checksums"] * rows,
    }
    note = "; ".join(f"{what} {seconds:.1f} s" for what, seconds in whole.items())
    bench.say("projected: all of Qwen3-8B", sum(whole.values()), "s", note)


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
    paths = _both(bench, "gate3 atlas", "gate3", "atlas", "--dtype", "float32", output="--json")
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
