"""manifest.json as a frozen record: where a vindex came from and how it was computed. Field names are the JSON keys."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from vindex.checksums import render_sums
from vindex.errors import QueryError
from vindex.format import MANIFEST
from vindex.options import BuildOptions
from vindex.schema import Fields, parse_fields, to_json
from vindex.shelf import Shelf

ZERO_SHOWN = 4


@dataclass(frozen=True)
class SourceFile:
    """One file of the checkpoint. hashed_by: "vindex" when its bytes were hashed here, "hub" when the Hub says so."""

    name: str
    size: int
    sha256: str
    hashed_by: str


@dataclass(frozen=True)
class Dequantised:
    """Tensors that were not stored as plain floats. dtype: as the file names it. method: how they became numbers."""

    method: str
    dtype: str
    tensors: int


@dataclass(frozen=True)
class Source:
    """The checkpoint. model: the Hub repo or the directory's base name. revision: None for a local directory."""

    model: str
    revision: str | None
    licence: str | None
    files: tuple[SourceFile, ...]

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 of each safetensors file by name; empty where the weights were in GGUF."""
        return {file.name: file.sha256 for file in self.files if file.name.endswith(".safetensors")}

    @property
    def weights_sha256(self) -> str | None:
        """The SHA-256 of the one safetensors file; of several, that of their SHA256SUMS lines; None without any."""
        if len(self.weights) == 1:
            return next(iter(self.weights.values()))
        return hashlib.sha256(render_sums(self.weights).encode()).hexdigest() if self.weights else None


@dataclass(frozen=True)
class Certificate:
    """How well the kept directions of one weight satisfy WᵀWv = σ²v, in float32 before the f16 cast.

    max_residual, median_residual: of ‖WᵀWv − σ²v‖/σ² over the kept directions, None for a weight that is zero: it has
    none.
    gap_at_cut: (σ_F − σ_F+1)/σ_F, None when F is the whole side or σ_F is zero.
    close_neighbours: adjacent kept singular values closer than 1e-3 (relative): single vectors are arbitrary there.
    method: "block-lanczos" or "lapack". expert: which one of a mixture; None in a dense layer.
    """

    layer: int
    projection: str
    tensor: str
    max_residual: float | None
    median_residual: float | None
    gap_at_cut: float | None
    close_neighbours: int
    method: str
    expert: int | None = None


@dataclass(frozen=True)
class CastReport:
    """What the f16 cast did to one block: values flushed to zero, and the largest relative error of the rest."""

    block: str
    values: int
    flushed_to_zero: int
    max_relative_error: float


@dataclass(frozen=True)
class MeasuredResponses:
    """How responses were measured: when, on the model in which dtype and where, over which texts of so many tokens.

    texts: {name: SHA-256}. permutations, seed: of the null. versions: of the libraries.
    """

    created: str
    dtype: str
    device: str
    tokens: int
    texts: dict[str, str]
    permutations: int
    seed: int
    versions: dict[str, str]


@dataclass(frozen=True, repr=False)
class Manifest:
    """manifest.json, validated. Under SOURCE_DATE_EPOCH the measured wall time and peak memory are None.

    notes: what a user should know of how the checkpoint was read, a sentence each; None where there is nothing to say.
    responses: of what was added later; None in a vindex without responses.
    """

    source: Source
    dequantised: tuple[Dequantised, ...]
    options: BuildOptions
    certificates: tuple[Certificate, ...]
    casts: tuple[CastReport, ...]
    versions: dict[str, str]
    started_at: str
    finished_at: str
    wall_seconds: float | None
    peak_memory_bytes: int | None
    notes: tuple[str, ...] | None = None
    responses: MeasuredResponses | None = None

    def __repr__(self) -> str:
        return (
            f"<manifest of a vindex of {self.source.model}, built {self.finished_at}: worst certificate {self.worst}>"
        )

    @property
    def worst_certificate(self) -> Certificate | None:
        """That of the largest residual; None where every weight is zero."""
        held = [one for one in self.certificates if one.max_residual is not None]
        return max(held, key=lambda one: one.max_residual or 0.0, default=None)

    @property
    def worst(self) -> str:
        """The largest residual, and of which tensor."""
        found = self.worst_certificate
        return "none" if found is None else f"{found.max_residual:.1e} ({found.tensor})"

    @property
    def zero_weights(self) -> str:
        """Which tensors are zero and have no direction, in a few words; empty where none is."""
        names = [one.tensor for one in self.certificates if one.max_residual is None]
        shown = ", ".join(names[:ZERO_SHOWN]) + (f" and {len(names) - ZERO_SHOWN} more" * (len(names) > ZERO_SHOWN))
        return f"zero, without a direction: {shown}" if names else ""


def load_manifest(shelf: Shelf) -> Manifest:
    """Read and validate manifest.json. Raises FormatError listing every problem."""
    fields = parse_fields(shelf.read(MANIFEST.name), MANIFEST.name)
    manifest = _parse_manifest(fields)
    if not fields.problems and not manifest.certificates:
        fields.problems.append("certificates: expected one for each weight, got none")
    fields.problems.refuse()
    return manifest


def _parse_manifest(fields: Fields) -> Manifest:
    source, options = fields.record("source"), fields.record("options")
    return Manifest(
        source=Source(
            source.text("model"),
            source.text_or_none("revision"),
            source.text_or_none("licence"),
            tuple(parse_source_file(entry) for entry in source.records("files")),
        ),
        dequantised=tuple(
            Dequantised(entry.text("method"), entry.text("dtype"), entry.integer("tensors"))
            for entry in fields.records("dequantised")
        ),
        options=_parse_options(options),
        certificates=tuple(parse_certificate(entry) for entry in fields.records("certificates")),
        casts=tuple(parse_cast(entry) for entry in fields.records("casts")),
        versions=fields.texts("versions"),
        started_at=fields.text("started_at"),
        finished_at=fields.text("finished_at"),
        wall_seconds=fields.number_or_none("wall_seconds"),
        peak_memory_bytes=fields.integer_or_none("peak_memory_bytes"),
        notes=fields.optional_texts("notes"),
        responses=_parse_responses(fields.record("responses")) if fields.has("responses") else None,
    )


def _parse_responses(entry: Fields) -> MeasuredResponses:
    return MeasuredResponses(
        entry.text("created"),
        entry.text("dtype"),
        entry.text("device"),
        entry.integer("tokens", 1),
        entry.texts("texts"),
        entry.integer("permutations", 1),
        entry.integer("seed"),
        entry.texts("versions"),
    )


def _parse_options(entry: Fields) -> BuildOptions:
    features, threads = entry.integer("features", 1), entry.integer("threads", 1)
    device, tolerance, embeddings = entry.text("device"), entry.number("tolerance"), entry.flag("embeddings")
    if entry.problems:
        return BuildOptions()
    try:
        return BuildOptions(features, device, threads, tolerance, embeddings)
    except QueryError as error:
        entry.problems.append(f"options: {error}")
        return BuildOptions()


def require_readable(manifest: Manifest) -> None:
    """Raise FormatError unless what would be written of this manifest is what `load_manifest` takes."""
    content = to_json(manifest)
    fields = parse_fields(content, MANIFEST.name)
    _parse_manifest(fields)
    fields.problems.refuse()


def parse_source_file(entry: Fields) -> SourceFile:
    return SourceFile(
        entry.text("name"),
        entry.integer("size"),
        entry.digest("sha256"),
        entry.text("hashed_by", choices=("vindex", "hub")),
    )


def parse_certificate(entry: Fields) -> Certificate:
    return Certificate(
        entry.integer("layer"),
        entry.text("projection", choices=("gate", "down")),
        entry.text("tensor"),
        entry.share_or_none("max_residual"),
        entry.share_or_none("median_residual"),
        entry.number_or_none("gap_at_cut"),
        entry.integer("close_neighbours"),
        entry.text("method"),
        entry.optional_integer("expert"),
    )


def parse_cast(entry: Fields) -> CastReport:
    return CastReport(
        entry.text("block"),
        entry.integer("values"),
        entry.integer("flushed_to_zero"),
        entry.share("max_relative_error"),
    )
