"""What `vindex info` says of a vindex, from its index and its manifest."""

from __future__ import annotations

from typing import Any

from vindex.index import Index, Projection
from vindex.manifest import Manifest


def facts_of(index: Index, manifest: Manifest) -> dict[str, Any]:
    """Shape, source and certificates as plain values."""
    return {
        "model": index.model,
        "revision": manifest.source.revision,
        "licence": manifest.source.licence,
        "layers": index.num_layers,
        "features_per_layer": index.num_feats,
        **_experts(index),
        "hidden_size": index.hidden_size,
        "intermediate_size": index.intermediate_size,
        "vocab_size": index.vocab_size,
        "down_meta_projection": _projection(index.projection),
        **({"notes": "; ".join(manifest.notes)} if manifest.notes else {}),
        "worst_certificate": manifest.worst,
        **({"zero_weights": manifest.zero_weights} if manifest.zero_weights else {}),
        "responses": _responses(manifest),
        "built_at": manifest.finished_at,
        "built_with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }


def _projection(projection: Projection) -> str:
    """The matrix that unembeds down directions, and whether it is the model's head."""
    if projection.down_meta != "embed_tokens":
        return projection.down_meta
    return "embed_tokens (tied)" if projection.tied else "embed_tokens (the model has no head)"


def _responses(manifest: Manifest) -> str:
    found = manifest.responses
    return "none (vindex respond)" if found is None else f"over {', '.join(found.texts)}"


def _experts(index: Index) -> dict[str, str | int]:
    """What there is to say of a mixture; nothing for a dense model."""
    if not index.num_experts:
        return {}
    dense = [str(entry.layer) for entry in index.layers if not entry.num_experts]
    return {
        "experts_per_layer": index.num_experts,
        "shared_experts_per_layer": index.num_shared_experts or 0,
        "features_per_expert": index.num_features_per_expert or 0,
        "dense_layers": ", ".join(dense) or "none",
    }
