"""`vindex verify`: everything that can be checked in a vindex, and with its source, against the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vindex.cli import Json, VindexPath
from vindex.console import print_json, print_table, progress, styled
from vindex.demo import or_bundled

if TYPE_CHECKING:
    from vindex.progress import Progress
    from vindex.reader import Vindex


def verify(
    path: VindexPath,
    source: Annotated[
        str | None, typer.Option(help="Checkpoint it was built from: re-derive a sample from it.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers in that sample, evenly spread.")] = 3,
    experts: Annotated[int, typer.Option(min=1, help="Experts of each of them, where there are experts.")] = 4,
    json: Json = False,
) -> None:
    """Check sizes, checksums, numbers and directions.

    With --source CHECKPOINT a sample of the directions is derived again from the weights.
    """
    from vindex.reader import open_vindex
    from vindex.verify import verify as checks_of

    v = open_vindex(path)
    with progress() as stage:
        advance = stage("checksums", v.size_bytes)
        checks = list(checks_of(v, advance))
        if source is not None:
            checks += _check_source(v, source, layers, experts, stage)
    failed = [check for check in checks if not check.holds]
    if json:
        print_json({"id": v.id, "holds": not failed, "checks": [check._asdict() for check in checks]})
    else:
        said = {True: styled("ok", "green"), False: styled("FAILED", "red")}
        rows = [(check.what, said[check.holds], check.detail) for check in checks]
        print_table(f"{path} ({v.id})", ["check", "", "detail"], rows)
    if failed:
        from vindex.errors import FormatError
        from vindex.format import CARD

        first = failed[0]
        way_out = "" if first.what == CARD.name else "; build it again"  # that check says its own
        raise FormatError(f"{path} failed {len(failed)} check(s); first: {first.what}: {first.detail}{way_out}")


def _check_source(v: Vindex, source: str, layers: int, experts: int, stage: Progress) -> list:
    from extract.checkpoint import open_checkpoint
    from extract.rederive import compare_embeddings, evenly, rederive, require_same_weights, sample_blocks
    from vindex.verify import Check

    checkpoint = open_checkpoint(or_bundled(source))
    size = sum(checkpoint.files.sizes[name] for name in checkpoint.weight_files)
    require_same_weights(v, checkpoint, 1, stage("hash source", size))
    blocks = sample_blocks(v, checkpoint, evenly(v.index.num_layers, layers), experts)
    advance = stage("re-derive", len(blocks))
    checks = []
    for found in rederive(v, checkpoint, blocks):
        detail = f"angle {found.largest_angle:.0e} (limit {found.angle_limit:.0e}), σ error {found.sigma_error:.0e}"
        what = found.tensor[found.tensor.index("layers.") :].removesuffix(".weight")
        checks.append(Check(what, found.holds, detail))
        advance(1)
    if v.index.has_embeddings:
        compared = compare_embeddings(v, checkpoint)
        other = compared.first_other
        detail = f"{compared.rows:,} rows, bit by bit" if other is None else f"row {other} is not the source's"
        checks.append(Check("embeddings", other is None, detail))
    return checks
