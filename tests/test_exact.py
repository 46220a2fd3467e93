"""A run that is killed and resumed by the same command is, number for number, the run that was not.

pytest tests/test_exact.py

Every run is a process of its own, forked from one that has only imported the libraries: nothing of
a run before it is left in it, and a kill is SIGKILL from within a step.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "transformers", "datasets", "peft", "trl"])
CLOCKS = re.compile(r"_runtime$|_per_second$")
# A run of 24 rows in batches of 4 has epochs of 6 steps; step 8 is in the middle of the second.
EPOCHS = ["--num_train_epochs", "3", "--max_steps", "-1"]
# With the highest loss as the best, the first evaluation stays the best one.
FIRST_IS_BEST = ["--greater_is_better", "true", "--save_steps", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local training files of made posts, and tiny base models."""
    folder = tmp_path_factory.mktemp("exact")
    assert finished([run_process(make_files, folder)], folder / "make.log") == [0]
    return folder


# --- in the processes ------------------------------------------------------------------------


def make_files(log: Path, folder: Path) -> None:
    rows = tiny.post_rows()
    tiny.write_jsonl(folder / "train.jsonl", rows[:24])
    tiny.write_jsonl(folder / "validation.jsonl", rows[24:32])
    tiny.save_model(folder / "llama")
    tiny.save_model(folder / "bert", "bert")
    # GPT-2 has no chat template and no pad token.
    tiny.save_model(folder / "gpt2", "gpt2", None)
