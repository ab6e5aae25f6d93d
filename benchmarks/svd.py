"""The leading 128 singular directions of a 12288×4096 weight: this project beside its peers.

    python -m benchmarks.svd [--threads 1] [--repeat 2] [--json FILE]

One matrix with the spectrum of a real gate_proj in bfloat16, one run, one thread count, best of the repeats for
every contender. `residual` is the largest ‖WᵀWv − σ²v‖/σ² over the 128 directions, in float64; `angle` the largest
principal angle to the subspace of a float64
eigendecomposition, in radians (π/2 is orthogonal).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import svds
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from benchmarks.synthetic import QWEN3_8B, real_looking_weight
from extract.svd import gram_matrix, top_directions
from vindex.differences import principal_angles

FEATURES = 128


class Result(NamedTuple):
    method: str
    seconds: float
    residual: float
    angle: float


def contenders(weight: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """{name: function that gives (F, H) right singular vectors}."""
    array = weight.numpy()
    return {
        "vindex (block Lanczos)": lambda: top_directions(weight, FEATURES, 1e-4, "w").rows,
        "torch.linalg.svd": lambda: torch.linalg.svd(weight, full_matrices=False).Vh[:FEATURES],
        "scipy svds (ARPACK)": lambda: torch.from_numpy(svds(array, k=FEATURES, random_state=0)[2].copy()),
        "sklearn randomized_svd": lambda: torch.from_numpy(randomized_svd(array, FEATURES, random_state=0)[2]),
        "torch.svd_lowrank": lambda: torch.svd_lowrank(weight, q=FEATURES)[2].T,
    }


def measure(
    name: str, run: Callable[[], torch.Tensor], weight: torch.Tensor, reference: np.ndarray, repeat: int
) -> Result:
    seconds = float("inf")
    for _ in range(repeat):
        started = time.perf_counter()
        rows = run()
        seconds = min(seconds, time.perf_counter() - started)
    exact = rows.double()
    loadings = exact @ weight.double().T
    squares = loadings.square().sum(1, keepdim=True)
    residual = ((loadings @ weight.double() - squares * exact).norm(dim=1) / squares[:, 0]).max()
    return Result(name, seconds, float(residual), float(principal_angles(rows.numpy(), reference).max()))


def gram_seconds(weight: torch.Tensor, repeat: int) -> float:
    """Best of the repeats for the symmetric rank-k update alone."""
    best = float("inf")
    for _ in range(repeat):
        started = time.perf_counter()
        gram_matrix(weight)
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    weight = real_looking_weight(QWEN3_8B.neurons, QWEN3_8B.hidden)
    gram = weight.double().T @ weight.double()
    reference = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :FEATURES].T.numpy()
    del gram
    results = []
    limits = {
        "half Gram, float32": gram_seconds(weight * (1 + 2**-20), arguments.repeat),  # no longer bfloat16 numbers
        "half Gram, as here": gram_seconds(weight, arguments.repeat),
    }
    print(f"{weight.shape[0]}×{weight.shape[1]}, {FEATURES} directions, {arguments.threads} thread(s)")
    print(f"{'':26}{'seconds':>9}{'× ours':>9}{'residual':>11}{'angle':>9}")
    with threadpool_limits(arguments.threads):
        for name, run in contenders(weight).items():
            results.append(measure(name, run, weight, reference, arguments.repeat))
            last = results[-1]
            times = last.seconds / results[0].seconds
            print(f"{name:26}{last.seconds:9.2f}{times:9.1f}{last.residual:11.1e}{last.angle:9.1e}", flush=True)
    for name, seconds in limits.items():
        print(f"{name:26}{seconds:9.2f}{seconds / results[0].seconds:9.2f}   the limit: one product, no directions yet")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([result._asdict() for result in results], file, indent=1)


if __name__ == "__main__":
    main()
