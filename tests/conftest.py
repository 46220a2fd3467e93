"""Fixtures for all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from hub import Hub

# huggingface_hub reads these when it is imported: no test touches the cache or token of its user.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
os.environ.pop("HF_TOKEN", None)
SERVER = Hub(tempfile.mkdtemp(prefix="hub-"))
os.environ["HF_ENDPOINT"] = SERVER.endpoint
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """One loopback Hub for the whole run; each test uses repos of its own."""
    with SERVER as server:
        yield server


@pytest.fixture
def alice(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub with alice logged in: what the scripts themselves find."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


def load_script(path: str) -> ModuleType:
    """Load a script as a module named after its path: `train/train.py` is script_train_train."""
    name = "script_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = spec_from_file_location(name, ROOT / path)
        module = module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
