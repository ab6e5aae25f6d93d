"""manifest.json as a frozen record: where a vindex came from and how it was computed. Field names are the JSON keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vindex.format import MANIFEST
from vindex.options import BuildOptions
from vindex.schema import Fields, load_fields, refuse_problems


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


@dataclass(frozen=True)
class Certificate:
    """How well the kept directions of one weight satisfy WᵀWv = σ²v, in float32 before the f16 cast.

    max_residual, median_residual: of ‖WᵀWv − σ²v‖/σ² over the kept directions.
    gap_at_cut: (σ_F − σ_F+1)/σ_F, None when F is the whole side or σ_F is zero.
    close_neighbours: adjacent kept singular values closer than 1e-3 (relative): single vectors are arbitrary there.
    method: "block-lanczos" or "lapack". expert: which one of a mixture; None in a dense layer.
    """

    layer: int
    projection: str
    tensor: str
    max_residual: float
    median_residual: float
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
class Manifest:
    """manifest.json, validated. Under SOURCE_DATE_EPOCH the measured wall time and peak memory are None."""

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

    @property
    def worst_certificate(self) -> Certificate:
        return max(self.certificates, key=lambda certificate: certificate.max_residual)


def load_manifest(directory: Path) -> Manifest:
    """Read and validate `directory`/manifest.json. Raises FormatError listing every problem."""
    fields = load_fields(directory / MANIFEST.name)
    manifest = _parse_manifest(fields)
    refuse_problems(MANIFEST.name, fields.problems)
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
        options=BuildOptions(
            options.integer("features", 1),
            options.text("device"),
            options.integer("threads", 1),
            options.number("tolerance"),
            options.flag("embeddings"),
        ),
        certificates=tuple(parse_certificate(entry) for entry in fields.records("certificates")),
        casts=tuple(parse_cast(entry) for entry in fields.records("casts")),
        versions=fields.mapping("versions"),
        started_at=fields.text("started_at"),
        finished_at=fields.text("finished_at"),
        wall_seconds=fields.number_or_none("wall_seconds"),
        peak_memory_bytes=fields.integer_or_none("peak_memory_bytes"),
    )


def parse_source_file(entry: Fields) -> SourceFile:
    return SourceFile(
        entry.text("name"),
        entry.integer("size"),
        entry.text("sha256"),
        entry.text("hashed_by", choices=("vindex", "hub")),
    )


def parse_certificate(entry: Fields) -> Certificate:
    return Certificate(
        entry.integer("layer"),
        entry.text("projection", choices=("gate", "down")),
        entry.text("tensor"),
        entry.number("max_residual"),
        entry.number("median_residual"),
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
        entry.number("max_relative_error"),
    )
