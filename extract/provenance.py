"""What the manifest says of a build: the files read, the libraries, the clock and the memory."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from extract.checkpoint import Checkpoint
from vindex.checksums import render_sums
from vindex.manifest import Manifest, Source


def hash_source(checkpoint: Checkpoint, threads: int, stages: Callable[[str, int], Callable[[int], object]]) -> Source:
    """Size and SHA-256 of every file that the build reads; those of large files on the Hub are the Hub's word."""
    files = checkpoint.fingerprint(threads, stages("hash source", checkpoint.source_bytes))
    return Source(checkpoint.model, checkpoint.revision, checkpoint.licence, files)


def index_source(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, Any]:
    """LARQL's source keys; its loader takes no null for the last two, and the version is that of what extracted.

    One weight file gives its own SHA-256; several, that of their sorted SHA256SUMS lines.
    """
    shards = manifest.source.weights
    several = hashlib.sha256(render_sums(shards).encode()).hexdigest() if shards else None
    return {
        "huggingface_repo": checkpoint.model if checkpoint.revision else None,
        "huggingface_revision": checkpoint.revision,
        "safetensors_sha256": next(iter(shards.values())) if len(shards) == 1 else several,
        "extracted_at": manifest.finished_at,
        "larql_version": f"vindex {manifest.versions['vindex']}",
    }


def library_versions() -> dict[str, str]:
    packages = ("vindex", "torch", "numpy", "safetensors")
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def now() -> str:
    """UTC to the second; SOURCE_DATE_EPOCH stands in for the clock when set."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
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
