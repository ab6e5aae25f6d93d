"""Gates in an ordinary checkpoint: the rows of gate_proj and up_proj of every masked neuron become zero.

1. The checkpoint is copied file by file; weights in other formats than safetensors stay behind, for they would still
   hold the unmasked neurons.
2. A safetensors header says where each tensor's bytes lie, and a row of gate_proj or up_proj (I, H) is one run of them:
   the masked rows are overwritten with zero bytes, which is +0.0 in every float format. A bias of that row too.
3. Every other byte of every file is the original's. Memory stays at one row, however large the model is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
from torch import Tensor

from probes.gates.files import read_json
from probes.shards import copy_into
from vindex import targets
from vindex.errors import CheckpointError, PatchError
from vindex.targets import BAKED

TENSOR = re.compile(r"(?:^|.*\.)layers\.(\d+)\.mlp\.(gate_proj|up_proj)\.(weight|bias)$")
OTHER_WEIGHTS = {".bin", ".pth", ".pt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot"}


class Place(NamedTuple):
    """Where a tensor lies in its file."""

    layer: int
    name: str
    offset: int  # of its first byte in the file
    row_bytes: int
    rows: int


def checkpoint_directory(source: str, revision: str | None = None) -> Path:
    """The directory of a local checkpoint, or of a Hub id after downloading it. Raises CheckpointError."""
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise CheckpointError(f"{source}: no such directory; give a checkpoint directory or a Hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source, revision=revision))
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{source}: cannot be downloaded ({str(error).splitlines()[0]})") from error


def bake(
    checkpoint: Path,
    keep: Tensor,
    target: Path,
    *,
    note: dict[str, Any] | None = None,
    force: bool = False,
    reads: Sequence[Path] = (),
    advance: Callable[[int], object] = lambda count: None,
) -> int:
    """Write a copy of `checkpoint` to `target` in which the neurons that `keep` (L, I) bool drops are zero.

    Returns how many rows were zeroed in each of gate_proj and up_proj. `note` goes to baked_gates.json; `advance` is
    told the bytes copied. Raises CheckpointError on a mixture of experts or missing weights, PatchError when the mask
    does not fit, TargetError when the target is taken, or holds the checkpoint or any of `reads`. An interrupted run
    leaves nothing at `target`.
    """
    targets.check_directory(target, force=force, reads=[checkpoint, *reads])
    files = _files(checkpoint)
    places = {file: _places(file) for file in files if file.suffix == ".safetensors"}
    _require_fit([place for found in places.values() for place in found], keep, checkpoint)
    names, reads = [file.name for file in files], [checkpoint, *files, *reads]
    with targets.new_directory(target, [*names, BAKED], making="baked checkpoint", force=force, reads=reads) as partial:
        for file in files:
            with targets.written(partial / file.name) as copy:
                copy_into(file, copy)
                _zero_rows(copy, places.get(file, []), keep)
            advance(file.stat().st_size)
        targets.write_bytes(partial / BAKED, orjson.dumps(note or {}, option=orjson.OPT_INDENT_2))
    return int((~keep).sum())


def _files(checkpoint: Path) -> list[Path]:
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"{checkpoint}: no config.json in this directory; expected a Hugging Face checkpoint")
    config = read_json(checkpoint / "config.json")
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        raise CheckpointError(
            f"{checkpoint}: mixture of experts ({experts} experts); gates belong to the neurons of dense FFN layers"
        )
    left = {BAKED, targets.JOURNAL}
    files = sorted(
        f for f in checkpoint.iterdir() if f.is_file() and f.suffix not in OTHER_WEIGHTS and f.name not in left
    )
    if not any(file.suffix == ".safetensors" for file in files):
        raise CheckpointError(f"{checkpoint}: no .safetensors files; convert the checkpoint first")
    return files


def _places(file: Path) -> list[Place]:
    """The gate_proj and up_proj tensors of a safetensors file: 8 bytes length, a JSON header, then the data."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = orjson.loads(opened.read(length))
        found = []
        for name, info in header.items():
            match = TENSOR.match(name)
            if match:
                begin, end = info["data_offsets"]
                rows = info["shape"][0]
                found.append(Place(int(match[1]), name, 8 + length + begin, (end - begin) // rows, rows))
        return found
    except (OSError, KeyError, TypeError, IndexError, ZeroDivisionError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: damaged or not safetensors ({error}); download it again") from error


def _require_fit(places: list[Place], keep: Tensor, checkpoint: Path) -> None:
    weights = [place for place in places if place.name.endswith(".weight")]
    layers = max((place.layer for place in weights), default=-1) + 1
    if not layers or len(weights) != 2 * layers:
        raise CheckpointError(
            f"{checkpoint}: {len(weights)} gate_proj and up_proj weights for {layers} layers; expected two for each"
        )
    for place in places:
        if (layers, place.rows) != tuple(keep.shape):
            raise PatchError(
                f"{place.name}: the model has {layers} layers × {place.rows} neurons, the gates are "
                f"{keep.shape[0]} × {keep.shape[1]}; give the model they were trained on"
            )


def _zero_rows(opened: BinaryIO, places: list[Place], keep: Tensor) -> None:
    for place in places:
        zeros = bytes(place.row_bytes)
        for row in (~keep[place.layer]).nonzero().flatten().tolist():
            opened.seek(place.offset + row * place.row_bytes)
            opened.write(zeros)
