"""A vindex of the tiny model, built once; the atlas's tokenizer and the bundled facts, read once."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_vindex(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint's vindex, with all 32 directions its width allows."""
    import extract

    target = tmp_path_factory.mktemp("vindex") / "tiny.vindex"
    extract.build(tiny_checkpoint, target, features=32, threads=1)
    return target


@pytest.fixture(scope="session")
def tokenizer():
    """That of the atlas."""
    from transformers import AutoTokenizer

    from vindex.demo import CHECKPOINT

    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="session")
def panel():
    """The bundled one."""
    from probes.facts import bundled

    return bundled()


@pytest.fixture(scope="session")
def loaded():
    """The atlas, in float32."""
    import probes

    return probes.load("atlas", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def deleted(loaded):
    """France/capital deleted from the atlas by both methods, with a certificate: the one whole run of Gate 3."""
    import probes

    return probes.delete(loaded, "France/capital")
