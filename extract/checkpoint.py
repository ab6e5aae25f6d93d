"""A checkpoint, read one tensor at a time: its config, its tensors by their Hugging Face names, tokenizer and licence.

Tensors are found by their names on disk, never through a module tree. Where the bytes lie and how they are stored is
the business of a store (extract/stores/, extract/dequantise.py); a checkpoint is the same over each of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from extract.dequantise import dequantised
from extract.stores import FLOATS, Files, Memory, Store, TensorInfo
from extract.stores.gguf import Gguf, gguf_config, gguf_names, require_gguf
from extract.stores.safetensors import Safetensors
from extract.stores.tokenizer import WAY_OUT, require_same_tokens, tokenizer_from_gguf
from vindex.directory import LocalFiles
from vindex.errors import CheckpointError
from vindex.files import read_bytes
from vindex.hub import address_of, is_hub_id, refuse_revision, snapshot
from vindex.hub_files import HubFiles
from vindex.manifest import Dequantised, SourceFile
from vindex.quantised import left_over_note, quantisation, unscaled_note
from vindex.weights import CONFIG, TEXT, adapter_note, read_checkpoint, read_small

ROWS_BYTES = 30 << 20
"""Bytes of float32 of the pieces in which large matrices are read.

What is larger than 32 MiB glibc maps anew each time, and the system hands it out page by page, which cost a tenth of a
build's processor time."""
TOKENIZER, CARD = "tokenizer.json", "README.md"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    model: Hub id or the directory's base name; revision: the commit, None when local. config_files: what was read of
    it beside weights and tokenizer. notes: what a user should know of how it was read, a sentence each.
    """

    model: str
    revision: str | None
    config: dict[str, Any]
    files: Files
    weight_files: tuple[str, ...]
    store: Store
    config_files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
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
        return self.stored(name).to(torch.float32)

    def expert(self, name: str, index: int) -> torch.Tensor:
        """Slice `index` along the first dimension of a stack, (E, …) → (…) float32; nothing else of it is read."""
        return self.stored(name, index).to(torch.float32)

    def stored(self, name: str, expert: int | None = None) -> torch.Tensor:
        """A tensor, or slice `expert` of a stack, as its store gives it: float32 holds each of its values exactly."""
        self.info(name)
        return self.store.read(name) if expert is None else self.store.read(name, expert, expert + 1)[0]

    def reading_into(self, memory: Memory) -> Checkpoint:
        """The same checkpoint; what is read as it is stored lies in this memory, what must be dequantised does not."""
        store = self.store.reading_into(memory) if isinstance(self.store, Safetensors) else self.store
        return replace(self, store=store)

    def row_blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows as their store gives them) of a matrix, in pieces of ROWS_BYTES of float32."""
        rows, columns = self.info(name).shape
        step = max(1, ROWS_BYTES // (4 * columns))
        for first in range(0, rows, step):
            yield first, self.store.read(name, first, min(first + step, rows))

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
        text = read_small(self.files, CARD).decode(errors="replace") if CARD in self.files.sizes else ""
        front_matter = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        found = re.search(r"^license:\s*(\S+)", front_matter[1], re.MULTILINE) if front_matter else None
        return found[1] if found else None

    def tokenizer(self) -> bytes:
        """The content of tokenizer.json. Raises CheckpointError when there is none and none can be made."""
        if self.own_tokenizer or TOKENIZER in self.files.sizes:
            own = self.own_tokenizer
            content = read_bytes(own, TEXT) if own else bytes(read_small(self.files, TOKENIZER))
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
        texts = (*self.config_files, *(() if isinstance(self.store, Gguf) else (CARD,)), TOKENIZER)
        return [name for name in texts if name in self.files.sizes] + list(self.weight_files)


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
    if path.exists():
        refuse_revision(name, revision)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: is a file and not GGUF; give the checkpoint's directory")
        return _gguf(LocalFiles(path.parent), path.name, tokenizer)
    if path.is_dir():
        return _directory(path, tokenizer)
    if not is_hub_id(name):
        raise CheckpointError(
            f"{name}: no such directory; give a checkpoint directory, a GGUF file, or a Hub id such as Qwen/Qwen3-0.6B"
        )
    downloaded = snapshot(name, revision)
    return _safetensors(LocalFiles(downloaded), name, downloaded.name, tokenizer)


def _directory(directory: Path, tokenizer: Path | None) -> Checkpoint:
    """What a directory holds: safetensors, or one GGUF model. A snapshot in the Hub's cache is its repository."""
    files = LocalFiles(directory)
    if not any(file.endswith(".safetensors") for file in (*files.sizes, *files.dangling)):
        models = sorted({gguf_names(file, files.sizes)[0] for file in files.sizes if file.endswith(".gguf")})
        if len(models) == 1:
            return _gguf(files, models[0], tokenizer)
        if models:
            raise CheckpointError(
                f"{files.name}: holds {len(models)} GGUF models ({', '.join(models[:4])}); name one of them"
            )
    return _safetensors(files, files.name, files.revision, tokenizer)


def _remote(name: str, revision: str | None, tokenizer: Path | None) -> Checkpoint:
    repo, pinned, file = address_of(name)
    files = HubFiles(repo, revision or pinned)
    if file is None:
        return _safetensors(files, repo, files.revision, tokenizer)
    if file not in files.sizes:
        raise CheckpointError(f"{repo}: has no {file}; it has {', '.join(_ggufs(files)) or 'no GGUF'}")
    return _gguf(files, file, tokenizer)


def _gguf(files: Files, file: str, tokenizer: Path | None) -> Checkpoint:
    require_gguf()
    names = gguf_names(file, files.sizes)
    store = Gguf(files, names)
    model = files.name if files.revision else file
    config = gguf_config(store, file)
    return Checkpoint(model, files.revision, config, files, tuple(names), store, own_tokenizer=tokenizer)


def _safetensors(files: Files, model: str, revision: str | None, tokenizer: Path | None) -> Checkpoint:
    config, weights = read_checkpoint(files)
    quantised = quantisation(files, config)
    plain = Safetensors(files, weights)
    store = dequantised(plain, quantised)
    notes, read = [adapter_note(files, weights.tensors)], [CONFIG, weights.listing]
    if quantised:
        read.append(quantised.file)
        if store is plain:
            notes.append(left_over_note(quantised))
    else:
        notes.append(unscaled_note(plain.tensors))
    return Checkpoint(
        model,
        revision,
        config,
        files,
        weights.files,
        store,
        config_files=tuple(dict.fromkeys(name for name in read if name)),
        notes=tuple(note for note in notes if note),
        own_tokenizer=tokenizer,
    )


def _ggufs(files: Files) -> list[str]:
    return sorted(name for name in files.sizes if name.endswith(".gguf"))
