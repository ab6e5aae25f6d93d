"""What a build will do, before it does anything: the index it will write, its independent blocks, and its size."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from extract.checkpoint import Checkpoint
from extract.layouts import Layout
from vindex import format as form
from vindex.errors import NumericError
from vindex.index import EffectiveRank, Index, NormEntry, Projection, layer_entry
from vindex.options import BuildOptions

TEXT_ALLOWANCE = 1 << 20  # index, manifest and card together are well under a mebibyte


class DirectionBlock(NamedTuple):
    """One weight and where its directions go, as plain data that travels. Offsets are bytes."""

    name: str
    layer: int
    side: str
    tensor: str
    file: str
    offset: int
    sigma_offset: int


def plan_index(checkpoint: Checkpoint, layout: Layout, options: BuildOptions) -> Index:
    """The index of the vindex to be built; ranks, checksums and times are filled in at the end.

    Raises NumericError when more features are asked for than the weights have.
    """
    most = min(layout.hidden_size, layout.intermediate_size)
    if options.features > most:
        raise NumericError(
            f"{layout.projection(0, 'gate')} is {layout.intermediate_size}×{layout.hidden_size}: it has at most {most} "
            f"directions, and {options.features} were asked for; use --features {most} or fewer"
        )
    full = EffectiveRank(options.features, options.features)
    return Index(
        format={"name": form.FORMAT_NAME, "version": form.FORMAT_VERSION},
        version=form.LARQL_VERSION,
        model=checkpoint.model,
        family=layout.family,
        dtype="f16",
        quant="none",
        extract_level="browse",
        has_model_weights=False,
        has_embeddings=options.embeddings,
        embed_scale=1.0,
        down_top_k=form.META_TOP_K,
        num_layers=layout.num_layers,
        num_feats=options.features,
        hidden_size=layout.hidden_size,
        intermediate_size=layout.intermediate_size,
        vocab_size=layout.vocab_size,
        layers=tuple(
            layer_entry(layer, options.features, layout.hidden_size, full) for layer in range(layout.num_layers)
        ),
        norms=_plan_norms(checkpoint, layout),
        projection=Projection(
            "lm_head" if layout.unembedding != layout.embeddings else "embed_tokens", True, layout.tied
        ),
        checksums={},
        source={},
        model_config=_model_config(checkpoint.config, layout),
    )


def direction_blocks(layout: Layout, index: Index) -> list[DirectionBlock]:
    """One block for each gate_proj and down_proj, in the order their files hold them."""
    return [
        DirectionBlock(
            name=f"{side}.{entry.layer}",
            layer=entry.layer,
            side=side,
            tensor=layout.projection(entry.layer, side),
            file=file.name,
            offset=entry.offset,
            sigma_offset=(row * index.num_layers + entry.layer) * index.num_feats * 4,
        )
        for entry in index.layers
        for row, (side, file) in enumerate((("gate", form.GATE), ("down", form.DOWN)))
    ]


def total_size(index: Index, tokenizer_bytes: int) -> int:
    """Bytes the finished vindex takes."""
    binaries = sum(spec.byte_size(index) for spec in form.files_of(index) if spec.byte_size)
    return binaries + tokenizer_bytes + TEXT_ALLOWANCE


def _plan_norms(checkpoint: Checkpoint, layout: Layout) -> tuple[NormEntry, ...]:
    entries, offset = [], 0
    for name, tensor in layout.norms:
        length = math.prod(checkpoint.info(tensor).shape)
        entries.append(NormEntry(name, offset, length))
        offset += length
    return tuple(entries)


def _model_config(config: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """LARQL's keys, from either generation of config.json."""
    heads = config.get("num_attention_heads")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        "model_type": layout.family,
        "head_dim": config.get("head_dim") or (layout.hidden_size // heads if heads else None),
        "num_q_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads", heads),
        "rope_base": config.get("rope_theta", rope.get("rope_theta")),
        "tie_word_embeddings": layout.tied,
    }
