"""Rank-1 patches as files, and ordinary checkpoints with a patch in them.

1. A patch file is safetensors: `gate_write` (I,) and `gate_read` (H,), float32. Its metadata names the tensor, its
   shape and dtype, the SHA-256 of the tensor's bytes as stored (the base), and where the patch came from.
2. `apply` makes a checkpoint directory that transformers loads: the one shard that holds the tensor is copied and the
   tensor's bytes in it replaced by those of W + outer(gate_write, gate_read), rounded to the stored dtype; every other
   byte is the same. Other weight files are hard-linked (copied where that is impossible), small files copied.
   The original bytes go into `vindex_patches/` beside the weights.
3. `revert` puts the original bytes back and checks the shard's SHA-256 against the one noted before the patch. Adding
   and subtracting ΔW would not give it (nearly half of the entries would differ in the last bit).

Patches apply to exactly the weights they were made for: another base hash is refused. A patch is only saved when the
tensor as stored is the one that was loaded and measured, and only applied when it changes what is stored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from probes.weights.delta import Delta
from probes.weights.tensor_file import read_tensors
from probes.weights.tensors import (
    BLOCK_BYTES,
    DTYPES,
    Place,
    base_sha256,
    carry,
    copied,
    locate,
    overwrite,
    plain_files,
    tensor_bytes,
)
from vindex import places, targets
from vindex.checksums import sha256_of
from vindex.demo import or_bundled
from vindex.directory import WEIGHTS
from vindex.errors import PatchError
from vindex.files import Kind, opened, parse_json
from vindex.format import MOST_LAYERS
from vindex.kinds import HISTORY

FORMAT = "vindex-patch"
VERSION = "1"
OF_A_PATCH = Kind(PatchError, "expected a patch (gate3 --save-patch)", limit=None)


class Patch(NamedTuple):
    """A patch file's content."""

    delta: Delta
    tensor: str
    shape: tuple[int, int]
    dtype: str
    base_sha256: str
    """Of the unpatched tensor's bytes as stored."""
    provenance: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """What it changes, and then where it came from, which cannot stand in for any of that."""
        about = {
            "tensor": self.tensor,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "layer": self.delta.layer,
            "method": self.delta.method,
            "norm": self.delta.norm,
            "base_sha256": self.base_sha256,
        }
        return about | {key: value for key, value in self.provenance.items() if key not in about}


def stored_dtype(checkpoint: Path, layer: int) -> torch.dtype:
    """The dtype in which the checkpoint stores the layer's gate_proj. Raises PatchError if it is no plain float."""
    return _dtype(locate(checkpoint, layer))


def save(path: Path, delta: Delta, checkpoint: Path, provenance: dict[str, Any], loaded: Tensor | None = None) -> Patch:
    """Write `delta` as a patch for the weights now in `checkpoint`. Nothing partial is left at `path`.

    loaded: the unpatched weight (I, H) of the model that was measured, which must be the one that is stored.
    """
    place = locate(checkpoint, delta.layer)
    if place.shape != (delta.gate_write.numel(), delta.gate_read.numel()):
        raise PatchError(f"{place.tensor}: has shape {place.shape}, the patch {tuple(delta.gate_write.shape)} × …")
    if loaded is not None and not torch.equal(stored(place).to(loaded.dtype), loaded.cpu()):
        raise PatchError(
            f"{place.tensor}: as stored in {place.file.name} it is not the weight that was loaded and measured; "
            "a patch would not do there what it did here"
        )
    patch = Patch(delta, place.tensor, place.shape, place.dtype, base_sha256(place), provenance)
    _write(path, patch, {})
    return patch


def stored(place: Place) -> Tensor:
    """The tensor (I, H) as it is stored."""
    return tensor_bytes(place).view(_dtype(place)).reshape(place.shape)


def read(path: str | Path) -> Patch:
    """Read a patch file. Raises PatchError when it is none, or its shapes or values cannot be."""
    path = Path(path)
    metadata, tensors = read_tensors(path, OF_A_PATCH)
    if metadata.get("format") != FORMAT:
        raise PatchError(f"{path}: format is {metadata.get('format')!r}, expected a {FORMAT} file (gate3 --save-patch)")
    if metadata.get("version") != VERSION:
        raise PatchError(f"{path}: version is {metadata.get('version')!r}, this release reads {VERSION!r}")
    missing = [name for name in ("gate_write", "gate_read") if name not in tensors]
    if missing:
        raise PatchError(f"{path}: no tensor {', '.join(missing)}")
    shape, provenance = (_parsed(path, metadata, key) for key in ("shape", "provenance"))
    if not isinstance(shape, list) or not all(type(size) is int for size in shape) or not isinstance(provenance, dict):
        raise PatchError(f"{path}: metadata: expected a list of sizes as shape and an object as provenance")
    known = {key: metadata.get(key, "") for key in ("tensor", "dtype", "base_sha256", "method")}
    layer = metadata.get("layer", "")
    if not all(known.values()) or not re.fullmatch("[0-9]{1,9}", layer) or int(layer) >= MOST_LAYERS:
        raise PatchError(
            f"{path}: metadata is incomplete: expected a layer, {', '.join(known)}; got layer {layer[:40]!r}"
            + "".join(f", no {key}" for key, value in known.items() if not value)
        )
    shape = tuple(shape)
    write, gate_read = tensors["gate_write"], tensors["gate_read"]
    if len(shape) != 2 or write.shape != shape[:1] or gate_read.shape != shape[1:]:
        found = f"gate_write {tuple(write.shape)} and gate_read {tuple(gate_read.shape)}"
        raise PatchError(f"{path}: {found} do not make the {shape} weight that the metadata names")
    if not (write.is_floating_point() and gate_read.is_floating_point()):
        raise PatchError(f"{path}: factors are {write.dtype} and {gate_read.dtype}; expected floats")
    if not (torch.isfinite(write).all() and torch.isfinite(gate_read).all()):
        raise PatchError(f"{path}: factors are not all finite")
    delta = Delta(int(layer), write.float(), gate_read.float(), known["method"])
    return Patch(delta, known["tensor"], (shape[0], shape[1]), known["dtype"], known["base_sha256"], provenance)


def apply(checkpoint: str | Path, patch: Patch | str | Path, out: str | Path) -> Path:
    """Write `checkpoint` (or `atlas`) with `patch` in it to the new directory `out`; the checkpoint is not changed.

    patch: as `read` gives it, or its file. Raises PatchError when the checkpoint's tensor is not the one the patch was
    made for, TargetError when `out` exists.
    """
    checkpoint, out = Path(or_bundled(str(checkpoint))), Path(out)
    if not checkpoint.is_dir():
        raise PatchError(f"{checkpoint}: no such directory; give a checkpoint directory, or atlas")
    patch = patch if isinstance(patch, Patch) else read(patch)
    place = require_base(checkpoint, patch)
    latest = f"{HISTORY}/{len(_applied(checkpoint)):04}.safetensors"
    with _carried(checkpoint, out, "patched checkpoint", (latest,), without=place.file.name) as partial:
        with copied(place.file, partial / place.file.name) as shard:
            overwrite(shard, place, _patched_rows(place, patch.delta))
        original = tensor_bytes(place)
        if torch.equal(tensor_bytes(locate(partial, patch.delta.layer)), original):
            raise PatchError(
                f"{place.tensor}: the patch changes no number as {place.dtype} stores it; it is too small for that"
            )
        extra = {"shard": place.file.name, "shard_sha256": sha256_of(place.file, kind=WEIGHTS)}
        _write(partial / latest, patch, extra, original)
    return out


def revert(checkpoint: str | Path, out: str | Path | None = None) -> Path:
    """Undo the latest patch of a directory that `apply` wrote, in place or into the new directory `out`.

    The shard gets its original bytes back and its SHA-256 is compared with the one noted before the patch.
    """
    checkpoint, out = Path(checkpoint), None if out is None else Path(out)
    applied, history = _applied(checkpoint), checkpoint / HISTORY
    if not applied and out is None and history.is_dir() and not any(history.iterdir()):
        history.rmdir()  # a process was killed before this last step
        return checkpoint
    if not applied:
        raise PatchError(
            f"{checkpoint}: no {HISTORY}/ with a patch in it; expected a directory from `vindex patch apply`"
        )
    if out is not None:
        with _carried(checkpoint, out, "reverted checkpoint") as partial:
            _revert(partial, _applied(partial))
        return out
    with targets.locked(checkpoint):
        _revert(checkpoint, applied)
    return checkpoint


@contextmanager
def _carried(checkpoint: Path, out: Path, making: str, more: Sequence[str] = (), without: str = "") -> Iterator[Path]:
    """The new directory `out` with a checkpoint's files and its patches in it, but for the file `without`.

    more: what else will be written there.
    """
    files = {file.name: file for file in plain_files(checkpoint)}
    files |= {f"{HISTORY}/{file.name}": file for file in _applied(checkpoint)}
    with places.new_directory(out, [*files, *more], making=making, reads=[checkpoint]) as partial:
        (partial / HISTORY).mkdir()
        for name, file in files.items():
            if name != without:
                carry(file, partial / name)
        yield partial


def _revert(checkpoint: Path, applied: list[Path]) -> None:
    """Undo the last of these patches in place: first the weights, then its file. Either step may be done again."""
    latest = applied[-1]
    patch = read(latest)
    metadata, tensors = read_tensors(latest, OF_A_PATCH)
    place = locate(checkpoint, patch.delta.layer)
    kept = tensors.get("original", torch.empty(0))
    original = kept.numpy().tobytes() if kept.dtype == torch.uint8 else b""
    same = (patch.tensor, metadata.get("shard"), len(original)) == (
        place.tensor,
        place.file.name,
        place.stop - place.start,
    )
    if not same:
        raise PatchError(f"{latest}: does not belong to {place.tensor} in {place.file.name}")
    if hashlib.sha256(original).hexdigest() != patch.base_sha256:
        raise PatchError(f"{latest}: the bytes it would put back are not those the patch was made for; it is damaged")
    with copied(place.file, place.file) as shard:
        overwrite(shard, place, iter([original]))
        shard.seek(0)
        if hashlib.file_digest(shard, "sha256").hexdigest() != metadata.get("shard_sha256"):
            raise PatchError(f"{place.file}: was changed since the patch was applied; the original cannot be restored")
    with targets.explained(checkpoint):
        targets.step(f"remove {latest.name}")
        latest.unlink()
        if len(applied) == 1:
            targets.step(f"remove {HISTORY}")
            latest.parent.rmdir()


def _applied(checkpoint: Path) -> list[Path]:
    """The patches in a checkpoint, in the order in which they were applied. Raises PatchError when one is missing."""
    history = checkpoint / HISTORY
    if history.is_symlink():
        raise PatchError(f"{history}: is a link, which is not followed; move it away")
    files = (file for file in sorted(history.glob("*.safetensors")) if file.is_file() and not file.is_symlink())
    found = [file for file in files if not targets.TEMPORARY.fullmatch(file.name)]
    for number, file in enumerate(found):
        if file.name != f"{number:04}.safetensors":
            raise PatchError(f"{file}: expected {number:04}.safetensors there, a patch that was applied; it is missing")
    return found


def require_base(checkpoint: Path, patch: Patch) -> Place:
    """Where the checkpoint's tensor is that the patch was made for. Raises PatchError when it has another."""
    place = locate(checkpoint, patch.delta.layer)
    _dtype(place)
    ours, theirs = (place.tensor, place.dtype, place.shape), (patch.tensor, patch.dtype, patch.shape)
    if ours[1:] != theirs[1:]:
        raise PatchError(
            f"{place.tensor}: is {place.dtype} {place.shape}, the patch was made for {patch.dtype} {patch.shape}; "
            "give the model it was made from (vindex patch show says which)"
        )
    if ours != theirs:
        raise PatchError(f"{place.tensor}: the patch was made for {patch.tensor}, layer {patch.delta.layer}")
    found = base_sha256(place)
    if found != patch.base_sha256:
        raise PatchError(
            f"{place.tensor}: sha256 {found[:12]}…, but the patch was made for {patch.base_sha256[:12]}…: "
            "other weights, or already patched (vindex patch revert)"
        )
    return place


def _dtype(place: Place) -> torch.dtype:
    if place.dtype not in DTYPES:
        raise PatchError(f"{place.tensor}: stored as {place.dtype}; patches apply to {', '.join(DTYPES)} weights")
    return DTYPES[place.dtype]


def _patched_rows(place: Place, delta: Delta) -> Iterator[bytes]:
    """The new weight's bytes, a block of rows at a time."""
    dtype, width = _dtype(place), place.shape[1]
    rows = max(1, BLOCK_BYTES // (width * dtype.itemsize))
    with opened(place.file, WEIGHTS) as file:
        file.seek(place.start)
        for first in range(0, place.shape[0], rows):
            block = delta.gate_write[first : first + rows]
            raw = bytearray(file.read(len(block) * width * dtype.itemsize))
            old = torch.frombuffer(raw, dtype=dtype).reshape(len(block), width).float()
            new = (old + torch.outer(block, delta.gate_read)).to(dtype)
            if not torch.isfinite(new).all():
                raise PatchError(f"{place.tensor}: the patched weight is not finite in {place.dtype}")
            yield new.view(torch.uint8).numpy().tobytes()


def _write(path: Path, patch: Patch, extra: dict[str, str], original: Tensor | None = None) -> None:
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "layer": str(patch.delta.layer),
        "method": patch.delta.method,
        "tensor": patch.tensor,
        "shape": orjson.dumps(patch.shape).decode(),
        "dtype": patch.dtype,
        "base_sha256": patch.base_sha256,
        "provenance": orjson.dumps(patch.provenance).decode(),
        **extra,
    }
    tensors = {"gate_write": patch.delta.gate_write.contiguous(), "gate_read": patch.delta.gate_read.contiguous()}
    if original is not None:
        tensors["original"] = original
    targets.write_bytes(path, to_bytes(tensors, metadata))


def _parsed(path: Path, metadata: dict[str, str], key: str) -> Any:
    """The JSON value in an entry of the metadata."""
    return parse_json(metadata.get(key, "").encode(), f"{path}: metadata is incomplete: {key}", OF_A_PATCH)
