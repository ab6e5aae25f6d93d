"""Whether a directory is a whole vindex: the files of the format, each of its exact size, listed in SHA256SUMS."""

from __future__ import annotations

from vindex.errors import FormatError
from vindex.files import TEXT_LIMIT
from vindex.format import SUMS, files_of
from vindex.index import Index
from vindex.schema import listed
from vindex.shelf import OF_NUMBERS, Shelf


def check_files(shelf: Shelf, index: Index, digests: dict[str, str]) -> int:
    """Every file of the table is there with its exact size, and SHA256SUMS lists the same files; their bytes."""
    problems: list[str] = []
    total = 0
    for spec in files_of(index):
        try:
            size = shelf.size(spec.name)
        except FormatError as error:
            problems.append(str(error).removeprefix(f"{shelf.place}/").removesuffix(f"; {OF_NUMBERS.way_out}"))
            continue
        total += size
        if spec.byte_size and size != spec.byte_size(index):
            problems.append(f"{spec.name}: expected {spec.byte_size(index)} bytes, got {size}")
        if not spec.byte_size and size > TEXT_LIMIT:
            problems.append(f"{spec.name}: expected at most {TEXT_LIMIT} bytes, got {size}")
        if spec is not SUMS and spec.name not in digests:
            problems.append(f"{spec.name}: not listed in SHA256SUMS")
    for name, digest in index.checksums.items():
        if digests.get(name) not in (None, digest):
            problems.append(f"{name}: index.json and SHA256SUMS give different checksums")
    if problems:
        raise OF_NUMBERS.refusal(shelf.place, listed(problems))
    return total
