"""A whole build on the device, and where its time goes."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_bench import TOLERANCE, Bench
from benchmarks.synthetic import QWEN3_8B, write_checkpoint
from extract.cast import to_half
from extract.checkpoint import open_checkpoint

QWEN3_8B_LAYERS, QWEN3_8B_SHARD = 36, 4.0e9  # bytes of the largest of its five files


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
        "scores": "extract.vocab_stage.scores_of",
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
