"""Fixtures for all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hub import Hub

# huggingface_hub reads these when it is imported: no test touches the cache or token of its user.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
os.environ["TQDM_DISABLE"] = "1"
os.environ.pop("HF_TOKEN", None)
# Tiny models are no faster on two threads, and much slower where another process is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
SERVER = Hub(tempfile.mkdtemp(prefix="hub-"))
os.environ["HF_ENDPOINT"] = SERVER.endpoint


# Files of minutes, the longest first. Begun last, one of them would keep one core busy alone.
LONGEST = ("resume", "faults", "loggers", "train", "models", "build_unified", "eval", "live")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


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


@pytest.fixture(autouse=True)
def kept_environment() -> Iterator[None]:
    """Undo what a script sets for its own process: above all W&B's run."""
    before = dict(os.environ)
    yield
    wandb = sys.modules.get("wandb")
    if wandb and wandb.run:  # It would be the next test's.
        wandb.teardown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset the variables that the scripts read as flags."""
    for name in [*os.environ]:
        if name.startswith("HSD_") or name in ("DATASET_REPO", "HUB_MODEL_ID", "MAX_STEPS"):
            monkeypatch.delenv(name)
