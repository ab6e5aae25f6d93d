"""The README.md of a vindex: the published card's sections, every figure from the artifact's own records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vindex.checksums import load_sums, renew_card, vindex_id
from vindex.errors import QueryError
from vindex.format import files_of
from vindex.index import Index
from vindex.manifest import Manifest
from vindex.reader import Vindex
from vindex.schema import load_record
from vindex.tokens import Vocabulary

EXAMPLE_TOKEN = " Paris"

HOW_TO_USE = """\
```python
import numpy as np, json

vindex_dir = "path/to/downloaded/vindex"
with open(f"{vindex_dir}/index.json") as f:
    idx = json.load(f)
L, F, H = idx["num_layers"], idx["num_feats"], idx["hidden_size"]
V = idx["vocab_size"]
# Load gate feature directions [L, F, H]
gate = np.frombuffer(
    open(f"{vindex_dir}/gate_vectors.bin", "rb").read(),
    dtype=np.float16
).reshape(L, F, H).astype(np.float32)
# Load embeddings [V, H]
emb = np.frombuffer(
    open(f"{vindex_dir}/embeddings.bin", "rb").read(),
    dtype=np.float16
).reshape(V, H).astype(np.float32)
# Score a token against all features (cosine similarity)
emb_n = emb / (np.linalg.norm(emb, axis=1, keepdims=True) + 1e-8)
gate_n = gate / (np.linalg.norm(gate, axis=2, keepdims=True) + 1e-8)
token_id = TOKEN_ID  # e.g., TOKEN_TEXT
scores = gate_n @ emb_n[token_id]  # [L, F]
l_max, f_max = np.unravel_index(scores.argmax(), scores.shape)
print(f"Top feature: layer={l_max}, feature={f_max}, score={scores[l_max, f_max]:.4f}")
```"""


def rewrite_card(v: Vindex, probe: Path | None, gate3: Path | None) -> None:
    """Write v's README.md anew, with the given records, and its line in SHA256SUMS."""
    records = [
        _load(path, kind, v.index) if path else None
        for path, kind in ((probe, "vindex-probe/1"), (gate3, "vindex-gate3/1"))
    ]
    text = render_card(v.index, v.manifest, load_sums(v.path), v.vocabulary, *records)
    renew_card(v.path, text.encode())


def _load(path: Path, kind: str, index: Index) -> dict[str, Any]:
    """A record of the given kind, of a model with this vindex's shape."""
    record = load_record(path)
    if record.get("record") != kind:
        raise QueryError(f"{path}: expected a record of kind {kind}, got {record.get('record')!r}")
    for what in ("num_layers", "hidden_size", "intermediate_size"):
        theirs, ours = record["model"][what], getattr(index, what)
        if theirs != ours:
            raise QueryError(f"{path}: measured on a model with {what} {theirs}, and this vindex has {ours}")
    return record


def render_card(
    index: Index,
    manifest: Manifest,
    digests: Mapping[str, str],
    vocabulary: Vocabulary,
    probe: Mapping[str, Any] | None = None,
    gate3: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown with YAML front matter.

    digests: {payload file: SHA-256}. probe, gate3: records written by `vindex probe --json` and `vindex gate3 --json`.
    """
    sections = [
        _front_matter(index, manifest),
        f"# {index.model} — Vindex",
        _summary(index, manifest, vindex_id(digests)),
        _what_it_is(index),
        _constants(probe),
        _gate3(gate3),
        _certificates(manifest),
        _files(index),
        "## How to Use\n" + _how_to_use(index, vocabulary),
        _licence(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(index: Index, manifest: Manifest) -> str:
    lines = ["---", f"license: {manifest.source.licence or 'other'}", "tags:", "- vindex", "- larql"]
    lines += ["- mechanistic-interpretability", "- feature-extraction", f"model_name: {index.model}"]
    if manifest.source.revision:
        lines.append(f"base_model: {index.model}")
    return "\n".join([*lines, "---"])


def _summary(index: Index, manifest: Manifest, short_id: str) -> str:
    name, revision = index.model, manifest.source.revision
    source = f"[{name}](https://huggingface.co/{name}) at revision `{revision}`" if revision else f"`{name}` (local)"
    return (
        f"**Source model**: {source}  \n**Vindex short ID**: `{short_id}`  \n"
        f"{_dequantised(manifest)}"
        f"**Layers**: {index.num_layers} **Hidden size**: {index.hidden_size} "
        f"**Features per layer**: {index.num_feats}{_per_expert(index)}"
    )


def _per_expert(index: Index) -> str:
    if not index.num_experts:
        return ""
    shared = f" and {index.num_shared_experts} shared" if index.num_shared_experts else ""
    return f" ({index.num_features_per_expert} of each of {index.num_experts} experts{shared})"


def _dequantised(manifest: Manifest) -> str:
    stored = ", ".join(f"{found.tensors} tensors as {found.dtype} ({found.method})" for found in manifest.dequantised)
    return f"**Stored quantised**: {stored}; the vindex is of the dequantised numbers  \n" if stored else ""


def _what_it_is(index: Index) -> str:
    every, routers = ("expert's", "the routers, ") if index.num_experts else ("MLP", "")
    return (
        f"## What This Is\nA **vindex** (vector index): a compact record of the feature geometry of `{index.model}`. "
        f"It holds the top-{index.num_features_per_expert or index.num_feats} singular directions of every {every} "
        f"gate_proj and down_proj matrix, {routers}the token embeddings, the norm weights, and each direction's "
        "nearest tokens.\n\n"
        "## What This Is NOT\nThis is **not** a model that can be run: it has no attention weights and only the "
        "leading FFN directions. It is for probing, comparing and editing what the source model has learned."
    )


def _constants(probe: Mapping[str, Any] | None) -> str:
    title = "## Universal Constants"
    if probe is None:
        return f"{title}\nNot measured yet: `vindex probe MODEL --json P`, then `vindex card DIR --probe P`."
    rows = [
        f"| {entry['name']} | {symbol} | {_number(entry['value'])} | {_cell(entry['definition'])} |"
        for symbol, entry in probe["constants"].items()
    ]
    head = "| Constant | Symbol | Value | Definition |\n|---|---|---|---|\n"
    made = f"Measured by forward hooks in {probe['model']['dtype']}, definition set `{probe['definition']}`, "
    made += f"{len(probe['texts'])} text(s)."
    return f"{title}\n{made}\n\n{head}" + "\n".join(rows)


def _gate3(gate3: Mapping[str, Any] | None) -> str:
    title = "## Gate 3 Status (DELETE Patch Test)"
    if gate3 is None:
        return f"{title}\nNot evaluated yet: `vindex gate3 MODEL --json G`, then `vindex card DIR --gate3 G`."
    fact = gate3["fact"]
    verdicts = "\n".join(
        f"- **{name}**: {verdict['result']} — {verdict['reason']}" for name, verdict in gate3["verdicts"].items()
    )
    if gate3["method"] is None:
        return f"{title}\nFact `{fact['name']}`: the model does not know it.\n\n{verdicts}"
    cells = [f"{fact['name']}: `{fact['answer']}`", gate3["method"], gate3["layer"]]
    cells += [_number(gate3[key]) for key in ("before", "after", "suppression", "reference_loss")]
    return (
        f"{title}\nA rank-1 ΔW on one `gate_proj.weight`, tested by real forward passes on held-out prompts.\n\n"
        "| Fact | Method | Layer | P before | P after | Suppression | Loss of the reference answer |\n"
        f"|---|---|---|---|---|---|---|\n| {' | '.join(map(str, cells))} |\n\n{verdicts}"
    )


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _number(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _certificates(manifest: Manifest) -> str:
    worst = manifest.worst_certificate
    return (
        "## Certificates\nEvery direction v of a weight W satisfies ‖WᵀWv − σ²v‖ / σ² ≤ "
        f"{worst.max_residual:.1e} (worst: {worst.tensor}), measured before the cast to float16; the figure for each "
        "layer, and the spectral gap at the cut, are in `manifest.json`."
    )


def _files(index: Index) -> str:
    rows = [f"| `{spec.name}` | {spec.content} |" for spec in files_of(index)]
    return "## Files\n| File | Description |\n|---|---|\n" + "\n".join(rows)


def _how_to_use(index: Index, vocabulary: Vocabulary) -> str:
    found = vocabulary.find(EXAMPLE_TOKEN)
    token_id = 0 if found is None else found
    code = HOW_TO_USE.replace("TOKEN_ID", str(token_id)).replace("TOKEN_TEXT", f'"{vocabulary.piece(token_id)}"')
    if not index.has_embeddings:
        return f"Built with `--no-embeddings`: score vectors of length {index.hidden_size} with `vindex.open`."
    short = f"`import vindex; vindex.open(vindex_dir).top_features({vocabulary.piece(token_id)!r})`."
    if len(index.feature_shape) == 1:
        return f"{short} Some layers are dense and have fewer rows: `index.json` `layers` says where each one lies."
    return f"{code}\n\nOr {short}"


def _licence(manifest: Manifest) -> str:
    licence = manifest.source.licence
    if licence is None:
        return "## License\nThe source checkpoint names no licence; its terms apply to this derived work."
    return f"## License\n`{licence}`, the licence of the source model, of which this is a derived work."
