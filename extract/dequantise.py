"""Float8 weights times their scales, over any store of safetensors.

The checkpoint's quantisation settings say how a matrix W (R, C) of float8 numbers was scaled in blocks of r × c:

    W[i, j] = float32(stored[i, j]) · scale[i // r, j // c],    scale of shape (⌈R/r⌉, ⌈C/c⌉)

1. `quant_method: fp8` (Qwen3-*-FP8, DeepSeek-V3, transformers): r × c is `weight_block_size`, the scale is stored as
   `NAME_scale_inv`. Without a block size there is one scale for the matrix.
2. `quant_method: compressed-tensors` with 8-bit float weights (vLLM's llm-compressor): the scale is stored as
   `NAME_scale`; its strategy is tensor (R × C), channel (1 × C), group (1 × group_size) or block (`block_structure`).
3. What the config leaves out (`modules_to_not_convert`, `ignore`) is stored in BF16 and is read as it is: which tensors
   are scaled is decided by their dtype and must agree with the scales that are there.
4. A fused stack of experts (E, R, C) has a scale for each expert, (E, ⌈R/r⌉, ⌈C/c⌉).
5. ModelOpt (`quant_method: modelopt`, or hf_quant_config.json): with quant_algo FP8 one scale a matrix, `NAME_scale`.
6. Settings that were left in config.json when a model was merged to 16 bits say nothing: where no tensor is quantised,
   the tensors are read as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from extract.stores import FLOATS, Store, TensorInfo
from vindex.errors import CheckpointError
from vindex.quantised import FLOAT8, Quantisation, is_quantised

SUPPORTED = "fp8 (float8 with weight_scale_inv), compressed-tensors with 8-bit float weights, and GGUF files"


class Scaling(NamedTuple):
    """How the float8 weights of a checkpoint are scaled. rows, columns: of a block, 0 for the whole side."""

    method: str
    suffix: str
    rows: int
    columns: int


def dequantised(store: Store, found: Quantisation | None) -> Store:
    """The store itself, or a view of it that multiplies float8 weights by their scales, as the settings say.

    Raises CheckpointError, naming the key or the tensor, when the checkpoint is quantised in another way.
    """
    if found is None or not is_quantised(store.tensors):
        return store
    try:
        scaling = _scaling(found.settings, store, found.path)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{found.path} holds a value of the wrong type ({error}); supported are {SUPPORTED}"
        ) from error
    return ScaledFloat8(store, scaling)


def _scaling(settings: Mapping[str, Any], store: Store, path: str) -> Scaling:
    method = settings.get("quant_method")
    if method == "fp8":
        block = settings.get("weight_block_size") or (0, 0)
        if len(block) != 2 or not all(type(side) is int and side >= 0 for side in block):
            what = f"{path}.weight_block_size is {block}"
            raise CheckpointError(f"{what}; expected two positive integers, such as [128, 128]")
        return Scaling(f"fp8, {_block(*block)}", "_scale_inv", *block)
    if method == "compressed-tensors":
        return _compressed_tensors(settings, path)
    if method == "modelopt" and settings.get("quant_algo") == "FP8":
        return Scaling("ModelOpt float8, one scale a matrix", "_scale", 0, 0)
    packed = next((name for name in store.tensors if name.endswith((".qweight", ".absmax", "_blocks"))), None)
    kind = settings.get("quant_algo") or (f"{settings['bits']} bits" if "bits" in settings else None)
    bits = f" ({kind})" if kind else ""
    found = f", tensor {packed}" if packed else ""
    raise CheckpointError(
        f"{path}.quant_method is {method!r}{bits}{found}; supported are {SUPPORTED}; "
        "use one of those or the BF16 original"
    )


def _compressed_tensors(settings: Mapping[str, Any], path: str) -> Scaling:
    """The one scaling that all config_groups share."""
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise CheckpointError(f"{path}.sparsity_config.format is {sparsity!r}; only dense is supported")
    groups = settings.get("config_groups") or {}
    schemes = {_scheme(f"{path}.config_groups.{name}", group) for name, group in groups.items()}
    if len(schemes) != 1:
        raise CheckpointError(
            f"{path}.config_groups holds {len(schemes)} different schemes of weights; one is supported"
        )
    return schemes.pop()


def _scheme(path: str, group: Mapping[str, Any]) -> Scaling:
    weights = group.get("weights") or {}
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    if kind != "float" or bits != 8:
        raise CheckpointError(
            f"{path}.weights is {bits}-bit {kind}; supported are {SUPPORTED}; use one of those or the BF16 original"
        )
    blocks: dict[Any, Any] = {
        "tensor": (0, 0),
        "channel": (1, 0),
        "group": (1, weights.get("group_size")),
        "block": weights.get("block_structure"),
    }
    block = blocks.get(strategy)
    if block is None or not all(type(side) is int for side in block):
        known = "tensor, channel, group with group_size, block with block_structure"
        raise CheckpointError(f"{path}.weights.strategy is {strategy!r}; supported are {known}")
    return Scaling(f"compressed-tensors float8, {_block(*block)}", "_scale", *block)


def _block(rows: int, columns: int) -> str:
    return {(0, 0): "one scale a matrix", (1, 0): "one scale a row"}.get((rows, columns), f"{rows}×{columns} blocks")


class ScaledFloat8:
    """A store whose float8 tensors come out as float32 numbers; their scales are not tensors of its own."""

    dtypes = FLOATS | FLOAT8

    def __init__(self, store: Store, scaling: Scaling) -> None:
        self._store, self._scaling, self.method = store, scaling, scaling.method
        self.tensors = {name: info for name, info in store.tensors.items() if not self._is_scale(name, scaling.suffix)}
        for name, info in self.tensors.items():
            self._check(name, info)

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        stored = self._store.read(name, first, last)
        info = self.tensors[name]
        if info.dtype not in FLOAT8:
            return stored
        numbers, scale = stored.to(torch.float32), self._scale(name)
        if len(info.shape) == 3:
            for expert, matrix in enumerate(numbers, first):
                self._multiply(matrix, scale[expert], 0)
        else:
            self._multiply(numbers, scale, first)
        return numbers

    def _multiply(self, rows: torch.Tensor, scale: torch.Tensor, first: int) -> None:
        """Multiply the rows of a matrix from `first` on by their blocks of (⌈R/r⌉, ⌈C/c⌉) scales, in place."""
        block_rows, block_columns = self._scaling.rows or 1 << 62, self._scaling.columns or rows.shape[1]
        of_rows = scale[torch.arange(first, first + len(rows)) // block_rows]
        for at in range(scale.shape[1]):
            rows[:, at * block_columns : (at + 1) * block_columns] *= of_rows[:, at, None]

    def _scale(self, name: str) -> torch.Tensor:
        *experts, rows, columns = self._scale_shape(self.tensors[name].shape)
        return self._store.read(name + self._scaling.suffix).to(torch.float32).view(*experts, rows, columns)

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        *experts, rows, columns = shape
        block_rows, block_columns = self._scaling.rows or rows, self._scaling.columns or columns
        return *experts, -(-rows // block_rows), -(-columns // block_columns)

    def _is_scale(self, name: str, suffix: str) -> bool:
        return name.endswith(suffix) and name.removesuffix(suffix) in self._store.tensors

    def _check(self, name: str, info: TensorInfo) -> None:
        """Float8 if and only if there is a scale, and a scale of the right shape."""
        scale = self._store.tensors.get(name + self._scaling.suffix)
        if info.dtype not in FLOAT8:
            if scale is not None and info.dtype in FLOATS:
                raise CheckpointError(f"{name} is stored as {info.dtype} and yet has a {name}{self._scaling.suffix}")
            return
        if scale is None:
            raise CheckpointError(
                f"{name} is stored as {info.dtype} and its scale {name}{self._scaling.suffix} is missing"
            )
        if len(info.shape) not in (2, 3):
            raise CheckpointError(f"{name} is float8 of shape {info.shape}; expected a matrix or a stack of them")
        expected = self._scale_shape(info.shape)
        same = tuple(side for side in scale.shape if side != 1) == tuple(side for side in expected if side != 1)
        if scale.dtype not in FLOATS or not same:
            raise CheckpointError(
                f"{name}{self._scaling.suffix} is {scale.dtype} of shape {scale.shape}; expected {expected} in "
                f"{', '.join(sorted(FLOATS))}, for {self._scaling.method}"
            )
