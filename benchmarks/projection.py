"""How long builds of whole Qwen3 models take, from blocks measured here: no build of these is run.

    python -m benchmarks.projection [MODEL ...]

For each model its config.json is written, `extract.plan` times one block of each kind, and the rest is arithmetic:

1. Processor seconds: directions and tokens by their blocks; hashing, by SHA-256 of one buffer; reading into float32, by
   a piece of bfloat16; casting the embeddings to float16, by a piece of them.
2. Minutes on C cores: those seconds over C, for every block and file can run beside others.
3. Reading: how fast the source must come for the cores not to wait. A slower disk or network is then the limit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

import extract
from benchmarks.synthetic import QWEN3_8B, qwen3_config
from extract.cast import to_half
from extract.estimate import cpu_seconds

CORES = (2, 8, 64)
PIECE = 1 << 24
VOCABULARY = QWEN3_8B.vocabulary


class Model(NamedTuple):
    """Sizes of a published Qwen3 model. experts: of each layer; neurons: of the FFN, or of each expert."""

    layers: int
    hidden: int
    neurons: int
    heads: int
    key_value_heads: int
    tied: bool = False
    experts: int = 0

    def config(self) -> dict[str, Any]:
        mixture = {
            "model_type": "qwen3_moe",
            "moe_intermediate_size": self.neurons,
            "num_experts": self.experts,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        return {
            **qwen3_config(self.layers, self.hidden, self.neurons, VOCABULARY),
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "tie_word_embeddings": self.tied,
            "dtype": "bfloat16",
            **(mixture if self.experts else {}),
        }

    @property
    def parameters(self) -> int:
        attention = 2 * 128 * (self.heads + self.key_value_heads) * self.hidden
        ffn = max(1, self.experts) * 3 * self.neurons * self.hidden
        return self.layers * (attention + ffn) + (2 - self.tied) * VOCABULARY * self.hidden


MODELS = {
    "Qwen3-0.6B": Model(28, 1024, 3072, 16, 8, tied=True),
    "Qwen3-1.7B": Model(28, 2048, 6144, 16, 8, tied=True),
    "Qwen3-4B": Model(36, 2560, 9728, 32, 8, tied=True),
    "Qwen3-8B": Model(36, 4096, 12288, 32, 8),
    "Qwen3-14B": Model(40, 5120, 17408, 40, 8),
    "Qwen3-32B": Model(64, 5120, 25600, 64, 8),
    "Qwen3-30B-A3B": Model(48, 2048, 768, 32, 4, experts=128),
    "Qwen3-235B-A22B": Model(94, 4096, 1536, 64, 4, experts=128),
}


class Rates(NamedTuple):
    """Processor seconds a byte (hashing, reading into float32) and a number (casting to float16)."""

    hash: float
    read: float
    cast: float


def measured_rates(place: Path) -> Rates:
    stored = torch.randn(PIECE).bfloat16()
    file, content = place / "piece", stored.view(torch.uint8).numpy().tobytes()
    file.write_bytes(content)
    wide = stored.float()
    return Rates(
        hash=cpu_seconds(lambda: hashlib.sha256(content).digest()) / len(content),
        read=cpu_seconds(lambda: torch.from_file(str(file), size=PIECE, dtype=torch.bfloat16).float()) / len(content),
        cast=cpu_seconds(lambda: to_half(wide, "piece")) / PIECE,
    )


def row(name: str, model: Model, rates: Rates, place: Path) -> str:
    (place / name).mkdir()
    (place / name / "config.json").write_text(json.dumps(model.config()))
    plan = extract.plan(place / name, measure=True)
    assert plan.seconds
    by_kind = {of.kind: of.blocks * each for of, each in zip(plan.work, plan.seconds, strict=True)}
    tokens = sum(seconds for kind, seconds in by_kind.items() if kind.endswith("tokens"))
    directions = sum(by_kind.values()) - tokens
    read, source = sum(of.read for of in plan.work), 2 * model.parameters
    hashing = rates.hash * (source + sum(of.written for of in plan.work))
    moving = rates.read * read + rates.cast * VOCABULARY * model.hidden
    whole = directions + tokens + hashing + moving
    minutes = " | ".join(f"{whole / cores / 60:,.2g}" for cores in CORES)
    speed = " | ".join(f"{(source + read) * cores / whole / 1e6:,.0f}" for cores in CORES)
    shares = " | ".join(f"{part / whole:.0%}" for part in (directions, tokens, hashing, moving))
    return f"| {name} | {source / 1e9:,.1f} | {whole / 60:,.3g} | {shares} | {minutes} | {speed} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {', '.join(MODELS)}")
    names = parser.parse_args().models or list(MODELS)
    torch.set_num_threads(1)
    columns = ["model", "GB", "core minutes", "directions", "tokens", "hashing", "reading, casting"]
    columns += [f"minutes, {cores} cores" for cores in CORES] + [f"MB/s, {cores} cores" for cores in CORES]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    with tempfile.TemporaryDirectory() as temporary:
        rates = measured_rates(Path(temporary))
        for name in names:
            print(row(name, MODELS[name], rates, Path(temporary)), flush=True)


if __name__ == "__main__":
    main()
