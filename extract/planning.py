"""What a build will do, before it does anything: the index it will write, its independent blocks, and its size."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from extract.checkpoint import Checkpoint
from extract.families import find_attention
from extract.ffn import Weight
from extract.layouts import Layout
from vindex import format as form
from vindex.errors import NumericError
from vindex.index import EffectiveRank, Index, LayerEntry, NormEntry, Projection, layer_entry
from vindex.options import BuildOptions

DENSE_FEATURES, EXPERT_FEATURES = 128, 32  # kept of each weight unless the options say otherwise
SINGLE = 4  # bytes of a single-precision number
TEXT_ALLOWANCE, BLOCK_ALLOWANCE = 1 << 20, 1 << 10  # bytes of index, manifest and card: at most, with each block's


class DirectionBlock(NamedTuple):
    """One weight and where its F directions go, as plain data that travels. Offsets are bytes.

    expert: None in a dense layer; E is the shared expert of a mixture of E.
    """

    name: str
    layer: int
    side: str
    expert: int | None
    weight: Weight
    features: int
    file: str
    offset: int
    sigma_offset: int


def plan_index(checkpoint: Checkpoint, layout: Layout, options: BuildOptions) -> Index:
    """The index of the vindex to be built; ranks, checksums and times are filled in at the end.

    Raises NumericError when more features are asked for than the weights have.
    """
    features = options.features or (EXPERT_FEATURES if layout.mixture else DENSE_FEATURES)
    _require_room(layout, features)
    layers = _plan_layers(layout, features)
    shared = max(entry.num_shared_experts or 0 for entry in layers)
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
        num_feats=max(entry.num_features for entry in layers),
        hidden_size=layout.hidden_size,
        intermediate_size=layout.intermediate_size,
        vocab_size=layout.vocab_size,
        layers=layers,
        norms=_plan_norms(checkpoint, layout),
        projection=Projection(
            "lm_head" if layout.unembedding != layout.embeddings else "embed_tokens", True, layout.tied
        ),
        checksums={},
        source={},
        model_config=_model_config(checkpoint.model, layout),
        num_experts=layout.mixture.num_experts if layout.mixture else None,
        num_features_per_expert=features if layout.mixture else None,
        num_shared_experts=shared or None,
        has_gate_stats=True,
    )


def direction_blocks(layout: Layout, index: Index) -> list[DirectionBlock]:
    """One block for each gate_proj and down_proj of every layer and expert, gate before down."""
    num_rows = index.num_rows
    blocks = []
    for entry, ffn in zip(index.layers, layout.ffns, strict=True):
        for at, weights in enumerate(zip(ffn.gate, ffn.down, strict=True)):
            expert = at if entry.num_experts else None
            first = index.first_row(entry.layer) + at * entry.features
            for row, (weight, file) in enumerate(zip(weights, (form.GATE, form.DOWN), strict=True)):
                name = f"{weight.side}.{entry.layer}" + ("" if expert is None else f".{expert}")
                offset, sigma_offset = first * index.hidden_size * form.HALF, (row * num_rows + first) * SINGLE
                place = (file.name, offset, sigma_offset)
                blocks.append(DirectionBlock(name, entry.layer, weight.side, expert, weight, entry.features, *place))
    return blocks


def total_size(index: Index, tokenizer_bytes: int) -> int:
    """Bytes the finished vindex takes."""
    binaries = sum(spec.byte_size(index) for spec in form.files_of(index) if spec.byte_size)
    texts = TEXT_ALLOWANCE + BLOCK_ALLOWANCE * sum(entry.groups for entry in index.layers)
    return binaries + tokenizer_bytes + texts


def _require_room(layout: Layout, features: int) -> None:
    """Refuse more features than some weight has."""
    weights = [weight for ffn in layout.ffns for weight in ffn.gate]
    smallest = min(weights, key=lambda weight: weight.neurons)
    most = min(layout.hidden_size, smallest.neurons)
    if features > most:
        raise NumericError(
            f"{smallest.name} is {smallest.neurons}×{layout.hidden_size}: it has at most {most} "
            f"directions, and {features} were asked for; use --features {most} or fewer"
        )


def _plan_layers(layout: Layout, features: int) -> tuple[LayerEntry, ...]:
    """The layers one after the other, each expert with as many features as a dense layer."""
    entries: list[LayerEntry] = []
    offset = 0
    for layer, ffn in enumerate(layout.ffns):
        rank = EffectiveRank(features, features)
        entry = layer_entry(layer, len(ffn.gate) * features, offset, layout.hidden_size, rank)
        if ffn.num_experts:
            shared = len(ffn.gate) - ffn.num_experts or None
            entry = replace(
                entry, num_experts=ffn.num_experts, num_features_per_expert=features, num_shared_experts=shared
            )
        entries.append(entry)
        offset += entry.length
    return tuple(entries)


def _plan_norms(checkpoint: Checkpoint, layout: Layout) -> tuple[NormEntry, ...]:
    entries, offset = [], 0
    for norm in layout.norms:
        length = math.prod(checkpoint.info(norm.tensor).shape)
        entries.append(NormEntry(norm.name, offset, length))
        offset += length
    return tuple(entries)


def _model_config(model: str, layout: Layout) -> dict[str, Any]:
    """LARQL's keys. Its loader takes no null, so what config.json leaves out is the family's default."""
    attention = find_attention(model, layout.family, layout.config, layout.hidden_size)
    described: dict[str, Any] = {
        "model_type": layout.family,
        "head_dim": attention.head_dim,
        "num_q_heads": attention.heads,
        "num_kv_heads": attention.kv_heads,
        "rope_base": attention.rope_base,
        "tie_word_embeddings": layout.tied,
    }
    if layout.mixture:
        described["moe"] = {
            "num_experts": layout.mixture.num_experts,
            "top_k": attention.experts_per_token,
            "shared_expert": any(ffn.shared_gate for ffn in layout.ffns),
            "router_type": "top_k_softmax",
        }
    return described
