"""Where a tensor's bytes lie in a checkpoint on disk, and how to copy a checkpoint with some of them replaced.

A safetensors file is an 8-byte little-endian header length, a JSON header with every tensor's dtype, shape and offsets,
and the data. Reading the headers is enough to find a tensor; nothing else is loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from probes.model import Loaded
from vindex import targets
from vindex.errors import CheckpointError, PatchError

BLOCK_BYTES = 1 << 22


class Place(NamedTuple):
    """A tensor's bytes in a checkpoint."""

    file: Path
    tensor: str
    dtype: str
    """As safetensors writes it: F32, BF16, F16."""
    shape: tuple[int, int]
    start: int
    """Byte offsets in the file."""
    stop: int


def checkpoint_directory(loaded: Loaded) -> Path:
    """The directory that a loaded model came from: the local one, or the snapshot in the Hub cache."""
    if loaded.path is not None:
        return loaded.path
    config = try_to_load_from_cache(loaded.name, "config.json", revision=loaded.revision or "main")
    if not isinstance(config, str):
        raise CheckpointError(f"{loaded.name}: its snapshot is not in the Hub cache; download it to a directory first")
    return Path(config).parent


def locate(checkpoint: Path, layer: int) -> Place:
    """Find `layers.<layer>.mlp.gate_proj.weight` in a checkpoint directory without reading any weight."""
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        names = set(_json(index)["weight_map"].values())
    elif (checkpoint / "model.safetensors").is_file():
        names = {"model.safetensors"}
    else:
        raise CheckpointError(f"{checkpoint}: no model.safetensors and no model.safetensors.index.json")
    ending = f"layers.{layer}.mlp.gate_proj.weight"
    for name in sorted(names):
        file = checkpoint / Path(name).name
        header, data = _header(file)
        for tensor, entry in header.items():
            if tensor == ending or tensor.endswith(f".{ending}"):
                start, stop = entry["data_offsets"]
                return Place(file, tensor, entry["dtype"], tuple(entry["shape"]), data + start, data + stop)
    raise PatchError(f"{checkpoint}: has no {ending}; expected a dense checkpoint with that layer")


def base_sha256(place: Place) -> str:
    """SHA-256 of the tensor's bytes as stored."""
    return sha256(place.file, place.start, place.stop)


def tensor_bytes(place: Place) -> Tensor:
    with place.file.open("rb") as file:
        file.seek(place.start)
        return torch.frombuffer(bytearray(file.read(place.stop - place.start)), dtype=torch.uint8)


def overwrite(handle: BinaryIO, place: Place, blocks: Iterator[bytes]) -> None:
    """Write a tensor's bytes into a copy of its file that is open."""
    handle.seek(place.start)
    for block in blocks:
        handle.write(block)
    assert handle.tell() == place.stop, "a tensor was not written whole"
    handle.flush()


def copy_into(file: Path, handle: BinaryIO) -> None:
    """The whole of a file into another that is open."""
    with file.open("rb") as source:
        shutil.copyfileobj(source, handle, BLOCK_BYTES)
    handle.flush()


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors header without its metadata, and the offset at which the data begins."""
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= file.stat().st_size - 8:
                raise CheckpointError(f"{file}: is not a safetensors file (its header claims {length} bytes)")
            header = orjson.loads(handle.read(length))
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
    header.pop("__metadata__", None)
    return header, 8 + length


def _json(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def sha256(file: Path, start: int = 0, stop: int | None = None) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        handle.seek(start)
        left = (file.stat().st_size if stop is None else stop) - start
        while left > 0:
            block = handle.read(min(left, BLOCK_BYTES))
            if not block:
                raise CheckpointError(f"{file}: ends before the tensor does; is the download complete?")
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def carry(file: Path, target: Path) -> None:
    """Weights are linked, so that a patched 16 GB model costs one shard; small files are copied."""
    if file.suffix == ".safetensors":
        try:
            os.link(file.resolve(), target)
            return
        except OSError:
            pass
    with targets.written(target) as handle:
        copy_into(file, handle)
