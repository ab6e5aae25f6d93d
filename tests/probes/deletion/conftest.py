"""The atlas checkpoint on the bench, and France deleted from it once."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def bench(deleted):
    return deleted.bench


@pytest.fixture(scope="session")
def result(deleted):
    return deleted


@pytest.fixture(scope="session")
def sets(result):
    return result.sets
