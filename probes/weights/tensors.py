"""Where a tensor's bytes lie in a checkpoint on disk, and how to copy a checkpoint with some of them replaced."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from vindex import places, targets
from vindex.directory import WEIGHTS, LocalFiles
from vindex.errors import PatchError
from vindex.files import opened
from vindex.hub import cached
from vindex.tower import Tower, read_tower, require_equal_layers

BLOCK_BYTES = 1 << 22
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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


def whole(files: LocalFiles) -> Tower:
    """Where a checkpoint's tensors lie; headers are read and nothing else.

    Raises CheckpointError when it is damaged, only an adapter, or lacks a layer or a tensor of one.
    """
    tower = read_tower(files)
    require_equal_layers(tower, files.name)
    return tower


def locate(checkpoint: Path, layer: int) -> Place:
    """Find the text tower's `layers.<layer>.mlp.gate_proj.weight` in a checkpoint without reading any weight.

    Raises CheckpointError when the directory is no whole checkpoint, PatchError when it has no such matrix.
    """
    tower = whole(LocalFiles(checkpoint))
    weights, name = tower.weights, f"{tower.prefix}layers.{layer}.mlp.gate_proj.weight"
    if name not in weights.tensors or len(weights.tensors[name].shape) != 2:
        raise PatchError(f"{checkpoint}: has no matrix {name}; expected a dense checkpoint with that layer")
    file, dtype, (rows, columns), start, stop = weights.tensors[name]
    return Place(checkpoint / file, name, dtype, (rows, columns), start, stop)


def base_sha256(place: Place) -> str:
    """SHA-256 of the tensor's bytes as stored."""
    return hashlib.sha256(tensor_bytes(place).numpy().data).hexdigest()


def tensor_bytes(place: Place) -> Tensor:
    with opened(place.file, WEIGHTS) as file:
        file.seek(place.start)
        return torch.frombuffer(bytearray(file.read(place.stop - place.start)), dtype=torch.uint8)


def overwrite(handle: BinaryIO, place: Place, blocks: Iterator[bytes]) -> None:
    """Write a tensor's bytes into a copy of its file that is open."""
    handle.seek(place.start)
    for block in blocks:
        handle.write(block)
    assert handle.tell() == place.stop, "a tensor was not written whole"
    handle.flush()


@contextmanager
def copied(file: Path, target: Path) -> Iterator[BufferedRandom]:
    """A copy of a file to write into, which appears at `target`, whole, when this is left without an error."""
    with targets.written(target) as copy:
        with opened(file, WEIGHTS) as source:
            shutil.copyfileobj(source, copy, BLOCK_BYTES)
        copy.flush()
        yield copy


def plain_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint, which a copy of it takes; in the Hub's cache they are links to its blobs.

    Raises PatchError on any other link that leads out of the directory: whose it is, nobody can know.
    """
    top = checkpoint.resolve()
    top = top.parent.parent if cached(checkpoint) else top
    files = [file for file in sorted(checkpoint.iterdir()) if file.is_file() and file.name != places.JOURNAL]
    for file in files:
        if file.is_symlink() and top not in file.resolve().parents:
            raise PatchError(f"{file}: is a link out of the checkpoint, which is not copied; put the file itself there")
    return files


def carry(file: Path, target: Path) -> None:
    """Weights are linked, so that a patched 16 GB model costs one shard; small files are copied."""
    if file.suffix == ".safetensors":
        with suppress(OSError):
            return os.link(file.resolve(), target)
    with copied(file, target):
        pass
