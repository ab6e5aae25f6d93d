"""What the manifest says of a build: the files read, the libraries, the clock and the memory."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import vindex
from extract.checkpoint import Checkpoint
from vindex.errors import QueryError
from vindex.manifest import Manifest, Source
from vindex.progress import Progress

LAST_SECOND = 253402300799  # of the year 9999


def hash_source(checkpoint: Checkpoint, threads: int, progress: Progress) -> Source:
    """Size and SHA-256 of every file that the build reads; those of large files on the Hub are the Hub's word."""
    files = checkpoint.fingerprint(threads, progress("hash source", checkpoint.source_bytes))
    return Source(checkpoint.model, checkpoint.revision, checkpoint.licence, files)


def index_source(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, Any]:
    """LARQL's source keys; its loader takes no null for the last two, and the version is that of what extracted."""
    return {
        "huggingface_repo": checkpoint.model if checkpoint.revision else None,
        "huggingface_revision": checkpoint.revision,
        "safetensors_sha256": manifest.source.weights_sha256,
        "extracted_at": manifest.finished_at,
        "larql_version": f"vindex {manifest.versions['vindex']}",
    }


def library_versions() -> dict[str, str]:
    packages = ("torch", "numpy", "safetensors")
    return {"python": platform.python_version(), "vindex": vindex.__version__} | {
        package: _version(package) for package in packages
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def now() -> str:
    """UTC to the second; SOURCE_DATE_EPOCH stands in for the clock when set. Raises QueryError when it is no time."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch and not (re.fullmatch(r"[0-9]{1,12}", epoch) and int(epoch) <= LAST_SECOND):
        raise QueryError(
            f"SOURCE_DATE_EPOCH is {epoch[:40]!r}: expected whole seconds since 1970, at most {LAST_SECOND}; unset it"
        )
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes.

    Linux carries ru_maxrss over from the parent when a program is started, so the kernel's own mark is read there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
