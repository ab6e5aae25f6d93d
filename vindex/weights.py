"""The weights of a checkpoint: which files transformers would load, and where every tensor lies in them.

Extractor, probes, patches and baking all ask here, so that what is measured, changed and certified is one model.

1. The files, in transformers' order: what config.json names as `transformers_weights`; else `model.safetensors`; else
   the shards that `model.safetensors.index.json` lists. Other files are not the model, whatever they are called.
2. Their headers: an 8-byte little-endian length, a JSON object {name: {dtype, shape, data_offsets}}, and the data that
   the tensors fill without gap or overlap (https://github.com/huggingface/safetensors#format).
3. A tensor that stands in two of the files is an error: transformers takes the last, others the one the index names.

Which of them are the text tower's is asked in vindex/tower.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import Any, NamedTuple, Protocol

from vindex.errors import CheckpointError
from vindex.files import TEXT_LIMIT, Kind, parse_json
from vindex.model_config import checked

TEXT = Kind(CheckpointError, "download it again")
CONFIG = "config.json"
SINGLE, WEIGHT_MAP = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
LARGEST_HEADER = 100_000_000  # the format's own limit
AT_ONCE = 8  # headers read at the same time
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip


class Readable(Protocol):
    """The files of one checkpoint, on disk or on the Hub, read in pieces."""

    name: str

    @property
    def dangling(self) -> tuple[str, ...]:
        """Names of links to nothing."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file there is."""

    def read(self, file: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Bytes start … stop − 1 of a file. Raises CheckpointError when they cannot be had."""

    def missing(self, names: Sequence[str]) -> str:
        """What to say of files that are not there, with the way out."""


class Stored(NamedTuple):
    """Where a tensor lies. dtype: as safetensors writes it (F32, BF16, F8_E4M3). start, stop: bytes in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Weights(NamedTuple):
    """The weights of a checkpoint. files: in the order they are loaded. listing: the index they come from, or None."""

    files: tuple[str, ...]
    tensors: dict[str, Stored]
    listing: str | None


def read_json(files: Readable, name: str) -> dict[str, Any]:
    """A JSON object of the checkpoint. Raises CheckpointError when it is missing or no such thing."""
    if name in files.dangling:
        raise CheckpointError(files.missing([name]))
    if name not in files.sizes:
        raise CheckpointError(f"{name} is missing; is {files.name} a checkpoint directory?")
    value = parse_json(read_small(files, name), f"{files.name}: {name}", TEXT)
    if not isinstance(value, dict):
        raise CheckpointError(f"{files.name}: {name} does not hold a JSON object; download it again")
    return value


def read_small(files: Readable, name: str) -> bytearray:
    """The content of a file that is not weights. Raises CheckpointError as `require_small`."""
    require_small(files, name)
    return files.read(name)


def require_small(files: Readable, name: str) -> None:
    """Raise CheckpointError when a file that is not weights is large."""
    if files.sizes[name] > TEXT_LIMIT:
        raise TEXT.refusal(f"{files.name}: {name}", f"has {files.sizes[name]:,} bytes, at most {TEXT_LIMIT:,} are read")


def read_checkpoint(files: Readable) -> tuple[dict[str, Any], Weights]:
    """config.json, each of whose keys holds what it should, and where every tensor lies.

    Raises CheckpointError when there is only an adapter, the config says what cannot be, or as `read_weights` does.
    """
    refuse_adapter(files)
    config = checked(read_json(files, CONFIG), files.name)
    return config, read_weights(files, config)


def read_weights(files: Readable, config: Mapping[str, Any]) -> Weights:
    """Every tensor of the checkpoint; headers are read and nothing else.

    Raises CheckpointError when a file is missing or damaged, a tensor stands twice, or there are no weights.
    """
    names, listed, index = weight_files(files, config)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        headers = list(pool.map(lambda name: read_header(files, name), names))
    tensors: dict[str, Stored] = {}
    for header in headers:
        for name, stored in header.items():
            if name in tensors:
                both = f"{tensors[name].file} and {stored.file}"
                raise CheckpointError(
                    f"{files.name}: tensor {name} stands in {both}; which of them is the model's? remove the other"
                )
            tensors[name] = stored
    lost = sorted(set(listed) - tensors.keys())
    if lost:
        raise CheckpointError(
            f"{files.name}: {listed[lost[0]]} does not hold {lost[0]}, which {index} lists there"
            f" ({len(lost)} such tensor(s)); download it again"
        )
    return Weights(tuple(names), tensors, index)


def weight_files(files: Readable, config: Mapping[str, Any]) -> tuple[list[str], dict[str, str], str | None]:
    """The files that transformers loads, all present; {tensor: file} where an index lists them, and that index."""
    explicit = config.get("transformers_weights")
    if explicit is not None and not (isinstance(explicit, str) and explicit.endswith((".safetensors", ".index.json"))):
        raise CheckpointError(
            f"{files.name}: {CONFIG} transformers_weights is {explicit!r}; expected a safetensors file or its index"
        )
    sharded = SINGLE not in files.sizes and WEIGHT_MAP in (*files.sizes, *files.dangling)
    chosen = explicit or (WEIGHT_MAP if sharded else SINGLE)
    index = chosen if chosen.endswith(".index.json") and chosen in files.sizes else None
    listed = _listed(files, index) if index else {}
    names = sorted(set(listed.values())) or [chosen]
    outside = [name for name in names if PurePath(name).name != name]
    if outside:
        raise CheckpointError(f"{files.name}: {chosen} names {outside[0]!r} outside the checkpoint; refused")
    absent = [name for name in names if name not in files.sizes]
    if absent == [SINGLE] and SINGLE not in files.dangling:
        raise CheckpointError(f"{files.name}: {_other_weights(files)}")
    if absent:
        raise CheckpointError(files.missing(absent))
    return names, listed, index


def refuse_adapter(files: Readable) -> None:
    """Raise CheckpointError when there is an adapter, and no model that it belongs to."""
    model = CONFIG in files.sizes and any(name in files.sizes for name in (SINGLE, WEIGHT_MAP))
    if ADAPTER in files.sizes and not model:
        base = _base_of_adapter(files)
        raise CheckpointError(
            f"{files.name}: is a LoRA adapter of {base} and not a model; merge it first "
            "(peft: merge_and_unload, then save_pretrained) and give the merged checkpoint"
        )


def adapter_note(files: Readable, tensors: Iterable[str]) -> str | None:
    """What to say of an adapter that stands beside a whole model, or among its tensors; None where there is none."""
    beside = ADAPTER in files.sizes
    if not beside and not any(".lora_" in name for name in tensors):
        return None
    where = f"beside it ({ADAPTER})" if beside else "among its tensors (lora_A, lora_B)"
    return f"the model without the adapter {where}; merge it (peft: merge_and_unload) to look at both"


def read_header(files: Readable, file: str) -> dict[str, Stored]:
    """Every tensor of a safetensors file. Raises CheckpointError when the file is not just what its header says."""
    size = files.sizes[file]
    start = bytes(files.read(file, 0, 8)) if size >= 8 else b""
    if start == b"version ":  # https://git-lfs.github.com/spec/v1
        raise CheckpointError(f"{files.name}: {file} is a git-lfs pointer, not the weights; run `git lfs pull`")
    length = int.from_bytes(start, "little") if start else LARGEST_HEADER + 1
    if length > min(LARGEST_HEADER, size - 8):
        raise _damaged(files, file, "its header is longer than the file")
    try:
        entries = json.loads(bytes(files.read(file, 8, 8 + length)), object_pairs_hook=_unique)
        entries.pop("__metadata__", None)
        found = {name: _stored(file, 8 + length, entry) for name, entry in entries.items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(files, file, f"header: {error}") from error
    _require_filled(files, file, 8 + length, found)
    return found


def _require_filled(files: Readable, file: str, end: int, found: Mapping[str, Stored]) -> None:
    """The tensors fill the file from the end of its header to its last byte, each beginning where another ends."""
    if max((stored.stop for stored in found.values()), default=0) > files.sizes[file]:
        raise _damaged(files, file, "its tensors are longer than the file")
    for name, stored in sorted(found.items(), key=lambda item: item[1][3:]):
        if stored.start != end:
            what = "overlaps the tensor before it" if stored.start < end else "leaves a hole before it"
            raise _damaged(files, file, f"{name} {what}")
        end = stored.stop
    if end < files.sizes[file]:
        raise _damaged(files, file, f"{files.sizes[file] - end} bytes after its last tensor")


def _stored(file: str, data: int, entry: Mapping[str, Any]) -> Stored:
    shape, dtype, (start, stop) = tuple(entry["shape"]), entry["dtype"], entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, start, stop)) or stop < start:
        raise ValueError(f"shape {shape}, data_offsets {[start, stop]}")
    if dtype in BITS and 8 * (stop - start) != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{stop - start} bytes for {dtype} of shape {shape}")
    return Stored(file, dtype, shape, data + start, data + stop)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for at, (name, _) in enumerate(pairs) if name in dict(pairs[:at]))
        raise ValueError(f"{twice} stands twice")
    return found


def _damaged(files: Readable, file: str, what: str) -> CheckpointError:
    return CheckpointError(f"{files.name}: {file} is damaged or cut short ({what}); download it again")


def _listed(files: Readable, index: str) -> dict[str, str]:
    """{tensor: file} of an index."""
    listed = read_json(files, index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(shard, str) for shard in listed.values()):
        raise CheckpointError(f"{files.name}: {index} has no usable weight_map; download it again")
    return listed


def _base_of_adapter(files: Readable) -> str:
    base = read_json(files, ADAPTER).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else "a model that it does not name"


def _other_weights(files: Readable) -> str:
    """What to say when there is no model.safetensors, and no index."""
    ggufs = sorted(name for name in files.sizes if name.endswith(".gguf"))
    if ggufs:
        return f"holds GGUF and no {SINGLE}; name one, such as hf://{files.name}/{ggufs[0]}"
    shards = sorted(name for name in files.sizes if re.fullmatch(r"model.*\.safetensors", name))
    if shards:
        return f"has {shards[0]}, and neither {SINGLE} nor {WEIGHT_MAP} that says what it is of; download it again"
    for suffix in (".bin", ".pth"):
        found = sorted(name for name in files.sizes if name.endswith(suffix))
        if found:
            return (
                f"found PyTorch {suffix} weights ({found[0]}), which are not supported; use the safetensors checkpoint"
            )
    return f"no {SINGLE} found; is it a checkpoint directory?"
