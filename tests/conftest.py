"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hub import Hub


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One loopback Hub for the whole run; each test uses repos of its own."""
    with Hub(tmp_path_factory.mktemp("hub")) as server:
        yield server
