"""A checkpoint on disk or on the Hub, read one tensor at a time.

Tensors are found by their names on disk, never through a module tree. A file is mapped only while one of its tensors
is copied out, so that resident memory is one tensor however large the shards are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch
from safetensors import SafetensorError, safe_open

from vindex.errors import CheckpointError

DTYPES = {"BF16", "F16", "F32"}
HUB_FILES = ["*.json", "*.safetensors", "README.md", "LICENSE*"]
ROWS_BYTES = 1 << 26  # read large matrices in pieces of about this size


class TensorInfo(NamedTuple):
    """Where a tensor lies, its shape and its safetensors dtype name."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """An opened checkpoint: `config`, `tensors` {name: TensorInfo}, and readers for one tensor at a time."""

    def __init__(self, directory: Path, model: str, revision: str | None) -> None:
        self.directory, self.model, self.revision = directory, model, revision
        self.config = _load_json(directory / "config.json")
        _refuse_unsupported(directory, self.config)
        self.weight_files = _weight_files(directory)
        self.tensors = {name: info for file in self.weight_files for name, info in _header(file)}

    @property
    def files(self) -> list[Path]:
        """Every file a vindex is made from."""
        names = ("config.json", "tokenizer.json", "README.md", "model.safetensors.index.json")
        return [p for name in names if (p := self.directory / name).is_file()] + self.weight_files

    @property
    def licence(self) -> str | None:
        """The licence named in the front matter of the model's README.md, or None."""
        card = self.directory / "README.md"
        text = card.read_text(errors="replace") if card.is_file() else ""
        front_matter = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        found = re.search(r"^license:\s*(\S+)", front_matter[1], re.MULTILINE) if front_matter else None
        return found[1] if found else None

    def info(self, name: str) -> TensorInfo:
        """Shape and place of a tensor. Raises CheckpointError when the checkpoint has none of that name."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.model}: tensor {name} is missing; the checkpoint is incomplete or not this kind"
            )
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{name} is stored as {info.dtype}; only {', '.join(sorted(DTYPES))} are supported")
        return info

    def tensor(self, name: str) -> torch.Tensor:
        """One whole tensor as float32, on the CPU, in memory of its own."""
        with safe_open(self.info(name).file, framework="pt") as file:
            return file.get_tensor(name).to(torch.float32, copy=True)

    def expert(self, name: str, index: int) -> torch.Tensor:
        """Slice `index` along the first dimension of a 3-d tensor, (rows, columns) float32; the rest is not read."""
        with safe_open(self.info(name).file, framework="pt") as file:
            return file.get_slice(name)[index : index + 1][0].to(torch.float32, copy=True)

    def row_blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, float32 rows) of a matrix, in pieces of about 64 MiB of float32."""
        rows, columns = self.info(name).shape
        step = max(1, ROWS_BYTES // (4 * columns))
        for first in range(0, rows, step):
            with safe_open(self.info(name).file, framework="pt") as file:
                yield first, file.get_slice(name)[first : min(first + step, rows)].to(torch.float32, copy=True)


def open_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Open a local directory, or download a Hub repository into the cache and open that.

    Raises CheckpointError when it is missing, gated, damaged, or of a kind that is not supported.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return Checkpoint(directory, directory.resolve().name, None)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise CheckpointError(
            f"{name}: no such directory; give a checkpoint directory or a Hub id such as Qwen/Qwen3-0.6B"
        )
    snapshot = _download(name, revision)
    return Checkpoint(snapshot, name, snapshot.name)


def _download(repo: str, revision: str | None) -> Path:
    """The snapshot directory of a Hub repository; its name is the commit. HF_HUB_OFFLINE is honoured."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        reason = f"access is gated; accept its terms on https://huggingface.co/{repo}, then run `hf auth login`"
        raise CheckpointError(f"{repo}: {reason}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo}: there is no revision {revision}; leave it out for the newest") from error
    except RepositoryNotFoundError as error:
        reason = "no such directory here and no such model on the Hub; check the spelling, or log in if it is private"
        raise CheckpointError(f"{repo}: {reason}") from error
    except LocalEntryNotFoundError as error:
        reason = (
            "no such directory, not in the Hub cache, and the Hub cannot be reached; download it first or go online"
        )
        raise CheckpointError(f"{repo}: {reason}") from error
    except (HfHubHTTPError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{repo}: download failed ({first_line}); try again") from error


def _load_json(path: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent.name} a checkpoint directory?") from error
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download it again")
    return value


def _refuse_unsupported(directory: Path, config: dict[str, Any]) -> None:
    """Name what was found where it is a kind of checkpoint that is not supported."""
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown method")
        raise CheckpointError(
            f"{directory.name}: quantised weights ({method}) are not supported yet; use BF16, F16 or F32"
        )


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all present."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _load_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{index} has no usable weight_map; download it again")
        files = [directory / shard for shard in sorted(set(weight_map.values()))]
        outside = [file.name for file in files if file.parent != directory or file.name in ("", "..")]
        if outside:
            raise CheckpointError(f"{index} names {outside[0]!r} outside the checkpoint; refused")
    else:
        files = sorted(directory.glob("model*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{directory.name}: {len(missing)} weight file(s) missing, first {missing[0]}; download again"
        )
    if not files:
        raise CheckpointError(f"{directory.name}: {_other_weights(directory)}")
    return files


def _other_weights(directory: Path) -> str:
    """What to say when there is no model*.safetensors."""
    for pattern, kind in (("*.gguf", "GGUF"), ("*.bin", "PyTorch .bin"), ("*.pth", "PyTorch .pth")):
        found = sorted(directory.glob(pattern))
        if found:
            return (
                f"found {kind} weights ({found[0].name}), which are not supported yet; use the safetensors checkpoint"
            )
    return "no model*.safetensors found; is it a checkpoint directory?"


def _header(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """(name, TensorInfo) of every tensor in a file. Raises CheckpointError when it is truncated or not safetensors."""
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                piece = opened.get_slice(name)
                yield name, TensorInfo(file, tuple(piece.get_shape()), piece.get_dtype())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name} is damaged or cut short ({error}); download it again") from error
