"""A checkpoint, read one tensor at a time: its config, its tensors by their Hugging Face names, tokenizer and licence.

Tensors are found by their names on disk, never through a module tree. Where the bytes lie and how they are stored is
the business of a store (extract/stores/, extract/dequantise.py); a checkpoint is the same over each of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from extract.config import checked
from extract.dequantise import dequantised
from extract.stores import FLOATS, Files, Store, TensorInfo
from extract.stores.gguf import Gguf, gguf_config, gguf_names, require_gguf
from extract.stores.hub import HubFiles
from extract.stores.local import LocalFiles
from extract.stores.safetensors import Safetensors
from extract.stores.tokenizer import WAY_OUT, require_same_tokens, tokenizer_from_gguf
from vindex.errors import CheckpointError
from vindex.files import TEXT_LIMIT, Kind, parse_json, read_bytes
from vindex.hub import is_hub_id, snapshot
from vindex.manifest import Dequantised, SourceFile

TEXT = Kind(CheckpointError, "download it again")
ROWS_BYTES = 1 << 26  # read large matrices in pieces of about this size
CONFIG, TOKENIZER, CARD, WEIGHT_MAP = "config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. model: Hub id or the directory's base name; revision: the commit, None when local."""

    model: str
    revision: str | None
    config: dict[str, Any]
    files: Files
    weight_files: tuple[str, ...]
    store: Store
    own_tokenizer: Path | None = None
    """A tokenizer.json that stands elsewhere."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Place, shape and dtype of every tensor."""
        return self.store.tensors

    def info(self, name: str) -> TensorInfo:
        """Shape and place of a tensor. Raises CheckpointError when there is none of that name, or none readable."""
        if name not in self.store.tensors:
            raise CheckpointError(
                f"{self.model}: tensor {name} is missing; the checkpoint is incomplete or not this kind"
            )
        info = self.store.tensors[name]
        if info.dtype not in self.store.dtypes:
            known = ", ".join(sorted(self.store.dtypes))
            raise CheckpointError(f"{name} is stored as {info.dtype}; only {known} are supported here")
        return info

    def tensor(self, name: str) -> torch.Tensor:
        """One whole tensor as float32, on the CPU, in memory of its own."""
        self.info(name)
        return self.store.read(name).to(torch.float32)

    def expert(self, name: str, index: int) -> torch.Tensor:
        """Slice `index` along the first dimension of a stack, (E, …) → (…) float32; nothing else of it is read."""
        self.info(name)
        return self.store.read(name, index, index + 1)[0].to(torch.float32)

    def row_blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, float32 rows) of a matrix, in pieces of about 64 MiB of float32."""
        rows, columns = self.info(name).shape
        step = max(1, ROWS_BYTES // (4 * columns))
        for first in range(0, rows, step):
            yield first, self.store.read(name, first, min(first + step, rows)).to(torch.float32)

    def dequantised(self, names: Iterable[str]) -> tuple[Dequantised, ...]:
        """Which of these tensors are not stored as plain floats: one record for each dtype."""
        counts = Counter(self.info(name).dtype for name in names)
        return tuple(
            Dequantised(self.store.method, dtype, number)
            for dtype, number in sorted(counts.items())
            if dtype not in FLOATS
        )

    @property
    def licence(self) -> str | None:
        """The licence named in the front matter of the model's README.md or in GGUF metadata, or None."""
        if isinstance(self.store, Gguf):
            return self.store.metadata.get("general.license")
        text = _text(self.files, CARD).decode(errors="replace") if CARD in self.files.sizes else ""
        front_matter = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        found = re.search(r"^license:\s*(\S+)", front_matter[1], re.MULTILINE) if front_matter else None
        return found[1] if found else None

    def tokenizer(self) -> bytes:
        """The content of tokenizer.json. Raises CheckpointError when there is none and none can be made."""
        if self.own_tokenizer or TOKENIZER in self.files.sizes:
            own = self.own_tokenizer
            content = read_bytes(own, TEXT) if own else bytes(_text(self.files, TOKENIZER))
            if isinstance(self.store, Gguf):
                require_same_tokens(content, self.store.tokens, str(self.own_tokenizer or TOKENIZER))
            return content
        if isinstance(self.store, Gguf) and isinstance(self.files, LocalFiles):
            return tokenizer_from_gguf(self.files.directory / self.weight_files[0], self.store.tokens)
        raise CheckpointError(
            f"{self.model}: {TOKENIZER} is missing; download the checkpoint with its tokenizer, or {WAY_OUT}"
        )

    def fingerprint(self, threads: int, advance: Callable[[int], object]) -> tuple[SourceFile, ...]:
        """Name, size and SHA-256 of every file a vindex is made from; `advance` is told the bytes accounted for."""
        found = self.files.fingerprint(self._used(), threads, advance)
        if not self.own_tokenizer:
            return found
        (given,) = LocalFiles(self.own_tokenizer.parent).fingerprint([self.own_tokenizer.name], 1, advance)
        return (*(file for file in found if file.name != TOKENIZER), given)

    @property
    def source_bytes(self) -> int:
        """The size of all files a vindex is made from."""
        own = self.own_tokenizer.stat().st_size if self.own_tokenizer else 0
        return own + sum(self.files.sizes[name] for name in self._used())

    def _used(self) -> list[str]:
        texts = () if isinstance(self.store, Gguf) else (CONFIG, CARD, WEIGHT_MAP)
        return [name for name in (*texts, TOKENIZER) if name in self.files.sizes] + list(self.weight_files)


def open_checkpoint(name: str, revision: str | None = None, tokenizer: Path | None = None) -> Checkpoint:
    """Open what `name` stands for; nothing but headers is read.

    A local directory of safetensors or GGUF; a GGUF file; `owner/model`, downloaded into the Hub's cache; or
    `hf://owner/model[@revision][/FILE.gguf]`, read from the Hub by byte range and kept nowhere. revision: a branch, tag
    or commit, instead of the one in `name`. tokenizer: a tokenizer.json to use instead of the checkpoint's own.
    Raises CheckpointError when it is missing, gated, damaged, or of a kind that is not supported.
    """
    if tokenizer and not tokenizer.is_file():
        raise CheckpointError(f"{tokenizer}: no such file; --tokenizer takes the path of a tokenizer.json")
    if name.startswith("hf://"):
        return _remote(name, revision, tokenizer)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: is a file and not GGUF; give the checkpoint's directory")
        return _gguf(LocalFiles(path.parent), path.name, None, tokenizer)
    if path.is_dir():
        return _directory(path, path.resolve().name, None, tokenizer)
    if not is_hub_id(name):
        raise CheckpointError(
            f"{name}: no such directory; give a checkpoint directory, a GGUF file, or a Hub id such as Qwen/Qwen3-0.6B"
        )
    downloaded = snapshot(name, revision)
    return _directory(downloaded, name, downloaded.name, tokenizer)


def _directory(directory: Path, model: str, revision: str | None, tokenizer: Path | None) -> Checkpoint:
    files = LocalFiles(directory)
    if not any(file.endswith(".safetensors") for file in files.sizes):
        models = sorted({gguf_names(file, files.sizes)[0] for file in files.sizes if file.endswith(".gguf")})
        if len(models) == 1:
            return _gguf(files, models[0], None, tokenizer)
        if models:
            raise CheckpointError(
                f"{model}: holds {len(models)} GGUF models ({', '.join(models[:4])}); name one of them"
            )
    return _safetensors(files, model, revision, tokenizer)


def _remote(name: str, revision: str | None, tokenizer: Path | None) -> Checkpoint:
    parts = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+|refs/[^/]+/[^/]+))?(?:/(.+\.gguf))?", name)
    if not parts or not is_hub_id(parts[1]):
        raise CheckpointError(f"{name}: expected hf://owner/model[@revision], or that and /FILE.gguf")
    repo, pinned, file = parts.groups()
    files = HubFiles(repo, revision or pinned)
    if file is None:
        return _safetensors(files, repo, files.revision, tokenizer)
    if file not in files.sizes:
        raise CheckpointError(f"{repo}: has no {file}; it has {', '.join(_ggufs(files)) or 'no GGUF'}")
    return _gguf(files, file, files.revision, tokenizer)


def _gguf(files: Files, file: str, revision: str | None, tokenizer: Path | None) -> Checkpoint:
    require_gguf()
    names = gguf_names(file, files.sizes)
    store = Gguf(files, names)
    model = files.name if revision else file
    return Checkpoint(model, revision, gguf_config(store, file), files, tuple(names), store, tokenizer)


def _safetensors(files: Files, model: str, revision: str | None, tokenizer: Path | None) -> Checkpoint:
    config = checked(_json(files, CONFIG), files.name)
    names = _weight_files(files)
    store = dequantised(Safetensors(files, names), config)
    return Checkpoint(model, revision, config, files, tuple(names), store, tokenizer)


def _json(files: Files, name: str) -> dict[str, Any]:
    if name not in files.sizes:
        raise CheckpointError(f"{name} is missing; is {files.name} a checkpoint directory?")
    value = parse_json(_text(files, name), f"{files.name}: {name}", TEXT)
    if not isinstance(value, dict):
        raise CheckpointError(f"{files.name}: {name} does not hold a JSON object; download it again")
    return value


def _text(files: Files, name: str) -> bytearray:
    """The content of a file that is not weights, and so not large."""
    if files.sizes[name] > TEXT_LIMIT:
        raise TEXT.refusal(f"{files.name}: {name}", f"has {files.sizes[name]:,} bytes, at most {TEXT_LIMIT:,} are read")
    return files.read(name)


def _weight_files(files: Files) -> list[str]:
    """The safetensors files of a checkpoint, all present."""
    if WEIGHT_MAP in files.sizes:
        weight_map = _json(files, WEIGHT_MAP).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{files.name}: {WEIGHT_MAP} has no usable weight_map; download it again")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CheckpointError(f"{files.name}: {WEIGHT_MAP} names {outside[0]!r} outside the checkpoint; refused")
    else:
        names = sorted(name for name in files.sizes if re.fullmatch(r"model.*\.safetensors", name))
    missing = [name for name in names if name not in files.sizes]
    if missing:
        raise CheckpointError(
            f"{files.name}: {len(missing)} weight file(s) missing, first {missing[0]}; download again"
        )
    if not names:
        raise CheckpointError(f"{files.name}: {_other_weights(files)}")
    return names


def _other_weights(files: Files) -> str:
    """What to say when there is no model*.safetensors."""
    if ggufs := _ggufs(files):
        return f"holds GGUF and no model*.safetensors; name one, such as hf://{files.name}/{ggufs[0]}"
    for suffix in (".bin", ".pth"):
        found = sorted(name for name in files.sizes if name.endswith(suffix))
        if found:
            return (
                f"found PyTorch {suffix} weights ({found[0]}), which are not supported; use the safetensors checkpoint"
            )
    return "no model*.safetensors found; is it a checkpoint directory?"


def _ggufs(files: Files) -> list[str]:
    return sorted(name for name in files.sizes if name.endswith(".gguf"))
