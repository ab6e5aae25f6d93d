"""One run of the suite on the tiny model."""

import json

import orjson
import pytest


@pytest.fixture(scope="package")
def made(tiny_checkpoint):
    """Model, result and record of a run over two bundled texts."""
    import probes

    loaded = probes.load(tiny_checkpoint, device="cpu")
    found = probes.constants(loaded, texts=["factual", "code"])
    return loaded, found, json.loads(orjson.dumps(found.record()))
