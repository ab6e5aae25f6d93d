"""The leading directions of one weight, on the device and on the CPU, and what they are made of."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from unittest.mock import patch

import torch

from benchmarks import chebyshev
from benchmarks.gpu_bench import TOLERANCE, Bench
from benchmarks.synthetic import real_looking_weight
from extract import svd


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
