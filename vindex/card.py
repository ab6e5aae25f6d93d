"""The README.md of a vindex: the published card's sections, every figure from the artifact's own records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vindex.checksums import load_sums, renew_card, vindex_id
from vindex.format import CARD, files_of
from vindex.index import Index
from vindex.manifest import Manifest
from vindex.measured import Constant, Gate3, GatesEvaluation, Probe, read_gate3, read_gates, read_probe
from vindex.reader import Vindex
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


def write_card(v: Vindex, probe: Path | None = None, gate3: Path | None = None, gates: Path | None = None) -> Path:
    """Write v's README.md anew, with the given records, and its line in SHA256SUMS. Returns its path.

    Raises QueryError on a record of another kind or of other weights, FormatError on one that is damaged.
    """
    index, source = v.own_index, v.manifest.source
    records = (
        read_probe(probe, source) if probe else None,
        read_gate3(gate3, source) if gate3 else None,
        read_gates(gates, source) if gates else None,
    )
    text = render_card(index, v.manifest, load_sums(v.path), v.vocabulary, *records)
    renew_card(v.path, text.encode())
    return v.path / CARD.name


def with_files(card: str, old: Index, new: Index) -> str:
    """A card that was rendered for one index, with the files of another."""
    return card.replace(_files(old), _files(new))


def render_card(
    index: Index,
    manifest: Manifest,
    digests: Mapping[str, str],
    vocabulary: Vocabulary,
    probe: Probe | None = None,
    gate3: Gate3 | None = None,
    gates: GatesEvaluation | None = None,
) -> str:
    """The card as Markdown with YAML front matter.

    digests: {payload file: SHA-256}. probe, gate3, gates: what was measured on the weights the vindex is of.
    """
    sections = [
        _front_matter(index, manifest),
        f"# {index.model} — Vindex",
        _summary(index, manifest, vindex_id(digests)),
        _what_it_is(index),
        _constants(probe),
        _gate3(gate3),
        _gates(gates),
        _certificates(manifest),
        _files(index),
        "## How to Use\n" + _how_to_use(index, vocabulary),
        _licence(manifest),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


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


def _constants(probe: Probe | None) -> str:
    title = "## Universal Constants"
    if probe is None:
        return f"{title}\nNot measured yet: `vindex probe MODEL -o P`, then `vindex card DIR --probe P`."
    made = (
        f"Measured by forward hooks in {_cell(probe.dtype)}, definition set `{_cell(probe.definition)}`. In brackets "
        "the mean's 95 % interval; the null is what the same procedure gives where there is nothing to find."
    )
    rows = [
        (c.name, c.symbol, _mean(c), _over(c), "–" if c.null is None else _number(c.null), c.definition)
        for c in probe.constants
    ]
    return f"{title}\n{made}\n\n" + _table(("Constant", "Symbol", "Mean", "Over", "Null", "Definition"), rows)


def _mean(constant: Constant) -> str:
    if constant.low is None or constant.high is None:
        return _number(constant.mean)
    return f"{_number(constant.mean)} [{_number(constant.low)}, {_number(constant.high)}]"


def _over(constant: Constant) -> str:
    return f"{constant.n} {constant.over if constant.n > 1 else constant.over.removesuffix('s')}"


def _gate3(gate3: Gate3 | None) -> str:
    title = "## Gate 3 Status (DELETE Patch Test)"
    if gate3 is None:
        return f"{title}\nNot evaluated yet: `vindex gate3 MODEL -o G`, then `vindex card DIR --gate3 G`."
    verdicts = "\n".join(
        f"- **{_cell(verdict.standard)}**: {_cell(verdict.result)} — {_cell(verdict.reason)}"
        for verdict in gate3.verdicts
    )
    if gate3.method is None:
        return f"{title}\nFact `{_cell(gate3.fact)}`: the model does not know it.\n\n{verdicts}"
    figures = (gate3.before, gate3.after, gate3.suppression, gate3.reference_loss)
    row = (f"{gate3.fact}: `{gate3.answer}`", gate3.method, _number(gate3.layer), *map(_number, figures))
    head = ("Fact", "Method", "Layer", "P before", "P after", "Suppression", "Loss of the reference answer")
    made = "A rank-1 ΔW on one `gate_proj.weight`, tested by real forward passes on held-out prompts."
    return f"{title}\n{made}\n\n{_table(head, [row])}\n\n{verdicts}"


def _gates(gates: GatesEvaluation | None) -> str:
    """Nothing without a record: published cards have no such section."""
    if gates is None:
        return ""
    made = (
        f"`{_cell(gates.gates)}` on {_cell(gates.asked)}, {_cell(gates.scoring)}. Area under knowledge against "
        "reasoning retained: 1 if facts go first, 0.5 if both go together, 0 if reasoning goes first. "
        f"Gates minus random: {_number(gates.advantage)}."
    )
    rows = [
        (
            area.family,
            _number(area.value),
            "–" if area.low == area.high else f"{_number(area.low)} … {_number(area.high)}",
        )
        for area in gates.areas
    ]
    return f"## Lambda Gates\n{made}\n\n" + _table(("Mask", "Area", "Lowest … highest over seeds"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text from a record as a part of one line of Markdown."""
    return " ".join(text.splitlines()).replace("|", r"\|")


def _number(value: float | int | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _certificates(manifest: Manifest) -> str:
    worst, zero = manifest.worst_certificate, manifest.zero_weights
    title, note = "## Certificates", f" Some weights are {zero}." if zero else ""
    if worst is None:
        return f"{title}\nNone:{note.removeprefix(' Some')}"
    return (
        f"{title}\nEvery direction v of a weight W satisfies ‖WᵀWv − σ²v‖ / σ² ≤ "
        f"{worst.max_residual:.1e} (worst: {worst.tensor}), measured before the cast to float16; the figure for each "
        f"layer, and the spectral gap at the cut, are in `manifest.json`.{note}"
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
