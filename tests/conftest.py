"""Fixtures for all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
from hub import Hub

# huggingface_hub reads these when it is imported: no test touches the cache or token of its user.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
for name in ("HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One loopback Hub for the whole run; each test uses repos of its own."""
    with Hub(tmp_path_factory.mktemp("hub")) as server:
        yield server
