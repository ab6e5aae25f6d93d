"""The README.md of a vindex: the published card's sections, every figure from the artifact's own records."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from vindex.checksums import load_sums, renew_card, vindex_id
from vindex.errors import QueryError
from vindex.files import read_text
from vindex.format import CARD, files_of
from vindex.hub import is_hub_id, on_the_hub
from vindex.index import Index
from vindex.manifest import Manifest
from vindex.measured import Constant, Gate3, GatesEvaluation, Probe, read_gate3, read_gates, read_probe
from vindex.reader import Vindex
from vindex.schema import OF_A_VINDEX
from vindex.tokens import Vocabulary

T = TypeVar("T")
CONSTANTS, GATE3, GATES = "## Universal Constants", "## Gate 3 Status (DELETE Patch Test)", "## Lambda Gates"
EXAMPLE_TOKEN = " Paris"
LICENCE_LINE, BASE_LINE = r"^license: (?!other$)([\w.+-]+)$", r"^base_model: ([\w./-]+)$"
ADDRESS = r"vindex\.open\('hf://([\w./-]+)'\)"

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


class Published(NamedTuple):
    """What a card says of a vindex that is shown to others; None where it says no more than the manifest does."""

    licence: str | None = None
    """Its name on the Hub, such as apache-2.0."""
    base_model: str | None = None
    """The Hub id of the source model."""
    repo: str | None = None
    """The Hub id under which the vindex is."""

    def refuse_odd(self) -> None:
        """Raise QueryError for what would be no line of a card."""
        if self.licence is not None and not re.fullmatch(r"[\w.+-]+", self.licence):
            raise QueryError(f"licence {self.licence!r}: expected its name on the Hub, such as apache-2.0")
        for what, name in (("base model", self.base_model), ("repo", self.repo)):
            if name is not None and not is_hub_id(name):
                raise QueryError(f"{what} {name!r}: expected a Hub id, OWNER/NAME")


AS_BUILT = Published()


def write_card(
    v: Vindex,
    probe: Path | None = None,
    gate3: Path | None = None,
    gates: Path | None = None,
    *,
    licence: str | None = None,
    base_model: str | None = None,
    repo: str | None = None,
) -> Path:
    """Write v's README.md anew, with the given records, and its line in SHA256SUMS. Returns its path.

    What is not given stays as the present card has it. licence, base_model, repo: see `Published`. Raises QueryError on
    what is none of these, and on a record of another kind or of other weights; FormatError on one that is damaged.
    """
    if on_the_hub(v.name):
        raise QueryError(f"{v.name} is on the Hub: `vindex pull {v.name[5:]}`, write its card, and push it")
    given, index, source = Published(licence, base_model, repo), v.own_index, v.manifest.source
    given.refuse_odd()
    before = read_text(v.path / CARD.name, OF_A_VINDEX)
    parts = {part.partition("\n")[0]: part.strip("\n") for part in re.split(r"^(?=## )", before, flags=re.MULTILINE)}
    records = (
        read_probe(probe, source) if probe else parts.get(CONSTANTS),
        read_gate3(gate3, source) if gate3 else parts.get(GATE3),
        read_gates(gates, source) if gates else parts.get(GATES),
    )
    published = Published(*(new or old for new, old in zip(given, _published(before), strict=True)))
    text = render_card(index, v.manifest, load_sums(v.path), v.vocabulary, *records, published)
    renew_card(v.path, text.encode())
    return v.path / CARD.name


def with_files(card: str, index: Index) -> str:
    """A card that this or an earlier version rendered, with the files of another index."""
    return re.sub(r"^## Files\n(?:\|.*\n)*", lambda _: _files(index) + "\n", card, flags=re.MULTILINE)


def _published(card: str) -> Published:
    """What a card says already."""
    found = (re.search(line, card, re.MULTILINE) for line in (LICENCE_LINE, BASE_LINE, ADDRESS))
    return Published(*(one[1] if one else None for one in found))


def render_card(
    index: Index,
    manifest: Manifest,
    digests: Mapping[str, str],
    vocabulary: Vocabulary,
    probe: Probe | str | None = None,
    gate3: Gate3 | str | None = None,
    gates: GatesEvaluation | str | None = None,
    published: Published = AS_BUILT,
) -> str:
    """The card as Markdown with YAML front matter.

    digests: {payload file: SHA-256}. probe, gate3, gates: what was measured on the weights the vindex is of, or the
    section of a card that says it.
    """
    licence = published.licence or manifest.source.licence
    base = published.base_model or (index.model if manifest.source.revision else None)
    sections = [
        _front_matter(index, licence, base),
        f"# {index.model} — Vindex",
        _summary(index, manifest, vindex_id(digests)),
        _what_it_is(index),
        _section(probe, _constants),
        _section(gate3, _gate3),
        _section(gates, _gates),
        _certificates(manifest),
        _files(index),
        "## How to Use\n" + _how_to_use(index, vocabulary, published.repo),
        _licence(licence, manifest),
        _citation(index, manifest, vindex_id(digests), published.repo),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _section(record: T | str | None, render: Callable[[T | None], str]) -> str:
    return record if isinstance(record, str) else render(record)


def _front_matter(index: Index, licence: str | None, base: str | None) -> str:
    lines = ["---", f"license: {licence or 'other'}", "tags:", "- vindex", "- larql"]
    lines += ["- mechanistic-interpretability", "- feature-extraction", f"model_name: {index.model}"]
    if base:
        lines.append(f"base_model: {base}")
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
    title = CONSTANTS
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
    title = GATE3
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
    return f"{GATES}\n{made}\n\n" + _table(("Mask", "Area", "Lowest … highest over seeds"), rows)


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
    rows = [(f"`{spec.name}`", spec.content) for spec in files_of(index)]
    return "## Files\n" + _table(("File", "Description"), rows)


def _how_to_use(index: Index, vocabulary: Vocabulary, repo: str | None) -> str:
    found = vocabulary.find(EXAMPLE_TOKEN)
    token_id = 0 if found is None else found
    code = HOW_TO_USE.replace("TOKEN_ID", str(token_id)).replace("TOKEN_TEXT", f'"{vocabulary.piece(token_id)}"')
    place = repr(f"hf://{repo}") if repo else "vindex_dir"
    if not index.has_embeddings:
        return f"Built with `--no-embeddings`: score vectors of length {index.hidden_size} with `vindex.open({place})`."
    short = f"`import vindex; vindex.open({place}).top_features({vocabulary.piece(token_id)!r})`."
    if len(index.feature_shape) == 1:
        return f"{short} Some layers are dense and have fewer rows: `index.json` `layers` says where each one lies."
    return f"{code}\n\nOr {short}"


def _licence(licence: str | None, manifest: Manifest) -> str:
    if licence is None:
        return "## License\nThe source checkpoint names no licence; its terms apply to this derived work."
    if licence != manifest.source.licence:
        return f"## License\n`{licence}`, as its publisher says. This is a derived work of the source model."
    return f"## License\n`{licence}`, the licence of the source model, of which this is a derived work."


def _citation(index: Index, manifest: Manifest, short_id: str, repo: str | None) -> str:
    model = re.sub(r"([#$%&_{}])", r"\\\1", index.model)
    fields = {"title": f"Vindex {short_id} of {model}", "year": manifest.finished_at[:4]}
    if repo:
        fields["url"] = f"https://huggingface.co/{repo}"
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    entry = f"@misc{{vindex-{short_id},\n{lines}\n}}"
    return f"## Citation\nIf you use this vindex in published work, please cite it:\n```bibtex\n{entry}\n```"
