"""eval/calibrate.py: what it fits, what it refuses, and what it stores where.

pytest tests/test_calibrate.py
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hub import Hub
from huggingface_hub import HfApi
from scipy.special import expit
from tiny import load_script

GROUPS = ["lgbtq", "mexican", "middle_east"]
RESULTS = ("calibration.json", "calibration.md", "reliability.csv", "thresholds.csv")
RUN = {"step": 12, "weights_of_step": 8, "run_sha256": "a" * 64}


@pytest.fixture(scope="module")
def calibrate() -> ModuleType:
    return load_script("eval/calibrate.py")


@pytest.fixture(autouse=True)
def usual(clean_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables of the user's; files go to a folder of the test."""
    monkeypatch.chdir(tmp_path)


def refusal(calibrate: ModuleType, capsys: pytest.CaptureFixture, *argv: Any, code: int = 2) -> str:
    """Run main and return the message it ends with; it must exit with `code`."""
    with pytest.raises(SystemExit) as end:
        calibrate.main([str(word) for word in argv])
    message = capsys.readouterr().err
    assert end.value.code == code, message
    assert message.startswith("error: ") and message.count("error: ") == 1
    assert "Traceback" not in message
    return message


def made_rows(
    prefix: str, n: int, seed: int, temperature: float = 2.0, shift: float = 0.0
) -> list[dict[str, Any]]:
    """Posts whose logits are `temperature` times too large; lgbtq's are moved up by `shift`."""
    chance = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        group = GROUPS[number % 3]
        logit = chance.normal(-0.3, 1.6)
        label = "hate" if chance.random() < expit(logit) else "normal"
        p = float(expit(temperature * (logit + shift * (group == "lgbtq"))))
        groups = [group] if number % 11 else ([] if number % 2 else GROUPS[:2])
        rows.append(
            {
                "id": f"{prefix}{number}",
                "label": label,
                "prediction": "hate" if p >= 0.5 else "normal",
                "p_hate": p,
                "target_groups": "|".join(groups),
            }
        )
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_evaluation(
    adapter: Path, name: str, rows: list[dict[str, Any]], **changes: Any
) -> dict[str, Any]:
    """eval/NAME of an adapter folder: predictions and contract as eval/eval.py writes them."""
    folder = adapter / "eval" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "predictions.csv", rows)
    contract = json.loads((adapter / "contract.json").read_text())
    record = {
        "schema": 1,
        "stage": "evaluation",
        "adapter": {"repo": adapter.name, "kind": "model", "revision": None},
        "training": contract["training"],
        "base_model": {"repo": "base", "kind": "model", "revision": "b" * 40},
        "base_only": False,
        "dataset": {"repo": "alice/data", "kind": "dataset", "revision": "d" * 40},
        "labels": contract["labels"],
        "positive_label": "hate",
        "groups": GROUPS,
        "split": name,
        "prompt": {"name": "simple", "user": "{text}"},
        "rendering": {"max_length": 96},
        "arguments": {"mode": "score"},
        "threshold": 0.5,
    } | changes
    (folder / "contract.json").write_text(json.dumps(record))
    return record


def make_adapter(folder: Path, n: int = 900, **training: Any) -> Path:
    """An adapter folder with finished evaluations on validation and test."""
    folder.mkdir(parents=True)
    contract = {
        "schema": 1,
        "stage": "adapter",
        "labels": ["normal", "hate"],
        "positive_label": "hate",
        "groups": GROUPS,
        "training": RUN
        | {"state": "complete", "early_stopping": True, "calibration_fraction": 0.5}
        | training,
    }
    (folder / "contract.json").write_text(json.dumps(contract))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text("{}")
    write_evaluation(folder, "validation", made_rows("v", n, 1))
    write_evaluation(folder, "test", made_rows("t", n, 2))
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "lora")


def decisions(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "decisions.json").read_text(encoding="utf-8"))
