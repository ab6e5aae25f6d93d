"""A build straight from the Hub, of a checkpoint larger than the disk should ever hold.

    python -m benchmarks.remote [--layers 36] [--features 8]

A local server speaks the Hub's endpoints and makes the bytes up as they are asked for: Qwen3-8B's tensors (36 layers,
16.4 GB in BF16, four layers a shard), attention included, which no build needs. It answers one request in fifty with
a 500 and breaks one in fifty off in the middle. `vindex build hf://…` runs in a process of its own; printed are the
bytes that travelled, the peak of its memory, and how much was ever on disk besides the vindex itself: the Hub's cache
and the temporary directory, looked at twice a second. Few features keep the computing small; it is not measured here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.synthetic import QWEN3_8B, qwen3_config, real_spectrum, write_tokenizer
from tests.hub_server import Bytes, HubServer

CHUNK = 1 << 20


class Synthetic:
    """A safetensors file whose data is computed when it is read: bfloat16 noise, scaled by column."""

    large = True

    def __init__(self, name: str, tensors: dict[str, tuple[int, ...]]) -> None:
        at, header = 0, {}
        for tensor, shape in tensors.items():
            size = 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        self._head = len(text).to_bytes(8, "little") + text
        self.size = len(self._head) + at
        self.sha256 = hashlib.sha256(name.encode()).hexdigest()

    def read(self, start: int, stop: int) -> bytes:
        head = self._head[start:stop]
        first, last = max(start - len(self._head), 0), max(stop - len(self._head), 0)
        pieces = [_noise(chunk) for chunk in range(first // CHUNK, -(-last // CHUNK))]
        skipped = first % CHUNK
        return head + b"".join(pieces)[skipped : skipped + last - first]


_COLUMNS = (real_spectrum(QWEN3_8B.hidden) / QWEN3_8B.neurons**0.5).numpy()
_TABLE = np.random.default_rng(0).standard_normal((64, CHUNK // 2), np.float32)


def _noise(chunk: int) -> bytes:
    """One mebibyte of bfloat16: a row of a fixed table, turned by an amount of its own, and scaled by column."""
    values = np.roll(_TABLE[chunk % len(_TABLE)], chunk * 7919 % (CHUNK // 2))
    scaled = (values.reshape(-1, len(_COLUMNS)) * _COLUMNS).astype(np.float32)
    return (scaled.view(np.uint32) >> 16).astype("<u2").tobytes()


def repository(layers: int) -> dict:
    """The files of a Qwen3-8B of so many layers."""
    hidden, neurons, vocabulary = QWEN3_8B
    shards: dict[str, dict[str, tuple[int, ...]]] = {"ends": {}}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shards.setdefault(f"layers-{layer // 4}", {}).update(
            {
                f"{at}.mlp.gate_proj.weight": (neurons, hidden),
                f"{at}.mlp.up_proj.weight": (neurons, hidden),
                f"{at}.mlp.down_proj.weight": (hidden, neurons),
                f"{at}.self_attn.q_proj.weight": (hidden, hidden),
                f"{at}.self_attn.k_proj.weight": (1024, hidden),
                f"{at}.self_attn.v_proj.weight": (1024, hidden),
                f"{at}.self_attn.o_proj.weight": (hidden, hidden),
                f"{at}.self_attn.q_norm.weight": (128,),
                f"{at}.self_attn.k_norm.weight": (128,),
                f"{at}.input_layernorm.weight": (hidden,),
                f"{at}.post_attention_layernorm.weight": (hidden,),
            }
        )
    ends = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    shards["ends"] = ends | {"model.norm.weight": (hidden,)}
    files: dict = {f"model-{name}.safetensors": Synthetic(name, tensors) for name, tensors in shards.items()}
    weight_map = {tensor: f"model-{name}.safetensors" for name, tensors in shards.items() for tensor in tensors}
    config = qwen3_config(layers, hidden, neurons, vocabulary)
    with tempfile.TemporaryDirectory() as scratch:
        write_tokenizer(Path(scratch) / "tokenizer.json", vocabulary)
        files["tokenizer.json"] = Bytes((Path(scratch) / "tokenizer.json").read_bytes(), large=False)
    files["config.json"] = Bytes(json.dumps(config).encode(), large=False)
    files["model.safetensors.index.json"] = Bytes(json.dumps({"weight_map": weight_map}).encode(), large=False)
    return files


class Trouble:
    """One storage request in fifty gets a 500, one in fifty is broken off."""

    def __init__(self) -> None:
        self.seen = self.count = 0

    def __call__(self, path: str, nth: int) -> str | None:  # noqa: ARG002 - what a HubServer calls
        self.seen += path.startswith("/storage/")
        action = {7: "500", 31: "drop"}.get(self.seen % 50) if path.startswith("/storage/") else None
        self.count += action is not None
        return action


class DiskWatch(threading.Thread):
    """The most bytes that were ever under some directories."""

    def __init__(self, *directories: Path) -> None:
        super().__init__(daemon=True)
        self._directories, self.most, self.stop = directories, 0, threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.5):
            used = 0
            for directory in self._directories:
                for path in directory.rglob("*"):
                    try:
                        used += path.stat().st_blocks * 512
                    except OSError:
                        continue  # gone meanwhile
            self.most = max(self.most, used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    files = repository(arguments.layers)
    total = sum(content.size for content in files.values())
    with tempfile.TemporaryDirectory() as temporary, HubServer({"someone/large": files}) as server:
        failed = server.trouble = Trouble()
        cache, scratch, target = (Path(temporary) / name for name in ("cache", "scratch", "out.vindex"))
        cache.mkdir()
        scratch.mkdir()
        places = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "TMPDIR": str(scratch)}
        watch = DiskWatch(cache, scratch)
        watch.start()
        started = time.perf_counter()
        command = [sys.executable, "-m", "vindex", "build", "hf://someone/large", "-o", str(target), "--no-embeddings"]
        command += ["--features", str(arguments.features), "--threads", str(arguments.threads)]
        subprocess.run(command, check=True, env=os.environ | places, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - started
        watch.stop.set()
        manifest = json.loads((target / "manifest.json").read_text())
        print(f"checkpoint on the Hub          {total / 1e9:8.2f} GB in {len(files)} files")
        asked = f"{len(server.requests)} requests, of which {failed.count} were made to fail"
        print(f"bytes that travelled           {server.bytes_sent / 1e9:8.2f} GB in {asked}")
        print(f"most ever in cache and TMPDIR  {watch.most / 1e6:8.2f} MB")
        print(f"the vindex                     {sum(p.stat().st_size for p in target.iterdir()) / 1e6:8.2f} MB")
        print(f"peak memory of the build       {manifest['peak_memory_bytes'] / 1e6:8.0f} MB")
        print(f"wall time                      {wall:8.0f} s, the server's work on the same cores included")


if __name__ == "__main__":
    main()
