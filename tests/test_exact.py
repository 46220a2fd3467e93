"""A run that is killed and resumed by the same command is, number for number, the one that was not.

pytest tests/test_exact.py

Every run is a process forked from one that has only imported the libraries, so that nothing of an
earlier run is left in it. It dies of SIGKILL after the first backward pass of a step.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["datasets", "peft", "trl.trainer.sft_trainer", "wandb"])
PATIENCE_SECONDS = 300
CLOCK = re.compile(r".*_(runtime|per_second)")
SAVE_STEPS = 4
# 12 rows in batches of 2 are 6 steps an epoch: checkpoint-8 lies in the middle of the second.
RUN = [
    *("--max_steps", "10", "--save_steps", str(SAVE_STEPS), "--logging_steps", "1"),
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--warmup_steps", "2", "--learning_rate", "5e-3", "--lora_r", "4"),
    *("--early_stopping_patience", "0", "--report_to", "none", "--allow_cpu"),
]
EPOCHS = ["--max_steps", "-1", "--num_train_epochs", "3"]
SORTED = ["--train_sampling_strategy", "group_by_length"]
HALF_BATCH = ["--per_device_train_batch_size", "1"]
ACCUMULATED = [*HALF_BATCH, "--gradient_accumulation_steps", "5"]
PACKED = [*HALF_BATCH, "--packing", "true"]
CLASSIFIER = ["--task", "classify"]
# The highest loss counts as the best, so the first evaluation is the best one and none after.
FIRST_IS_BEST = [
    *("--save_steps", "2", "--early_stopping_patience", "3", "--greater_is_better", "true"),
]
# What is killed and how: base model, flags, and the step that does not end.
CASES: dict[str, tuple[str, list[str], int]] = {
    "plain": ("llama", [], 6),
    "several-epochs": ("llama", EPOCHS, 11),
    "accumulation": ("llama", ACCUMULATED, 6),
    "packing": ("llama", PACKED, 10),
    "length-sorted": ("llama", [*SORTED, *EPOCHS], 11),
    "length-sorted-accumulation": ("llama", [*SORTED, *ACCUMULATED], 6),
    "dropout": ("llama", ["--lora_dropout", "0.3"], 7),
    "bfloat16": ("llama", ["--dtype", "bfloat16"], 7),
    "four-bit": ("llama", ["--load_in_4bit"], 7),
    "prompt-once": ("llama", ["--lora_dropout", "0", *EPOCHS], 11),
    "prompt-once-accumulation": ("llama", ["--lora_dropout", "0", *ACCUMULATED], 6),
    "prompt-once-with-dropout": ("llama", ["--share_prompt", "always", *ACCUMULATED], 7),
    "auto-batch": ("llama", ["--auto_batch", *ACCUMULATED], 7),
    "autocast": ("llama", ["--dtype", "float32", "--bf16", "true"], 7),
    "classifier-bert": ("bert", CLASSIFIER, 7),
    "classifier-gpt2": ("gpt2", CLASSIFIER, 7),
    "save-between-logs": ("llama", ["--logging_steps", "5"], 7),
    "classifier-save-between-logs": ("bert", [*CLASSIFIER, "--logging_steps", "3"], 7),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local training files of made posts, and tiny base models."""
    folder = tmp_path_factory.mktemp("exact")
    code, printed = in_process(folder / "log", make_files, folder)
    assert code == 0, printed
    return folder


# --- processes -------------------------------------------------------------------------------


def in_process(log: Path, work: Callable[..., None], *values: Any) -> tuple[int, str]:
    """Run `work` in a process; return its exit code, or minus the signal it died of, and output."""
    process = PROCESSES.Process(target=begin, args=(log, work, *values))
    process.start()
    process.join(PATIENCE_SECONDS)
    process.kill()
    process.join()
    return process.exitcode, log.read_text()


def begin(log: Path, work: Callable[..., None], *values: Any) -> None:
    """Be a process of another machine: own output, environment and random numbers, no GPU."""
    import torch

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in list(os.environ):
        if name.startswith("HSD_") or name in ("DATASET_REPO", "HUB_MODEL_ID", "MAX_STEPS"):
            del os.environ[name]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Trainer collects garbage at its start, which among all the libraries takes half a second.
    gc.freeze()
    random.seed()
    torch.seed()
    work(*values)


def make_files(folder: Path) -> None:
    rows = tiny.post_rows()
    tiny.write_jsonl(folder / "train.jsonl", rows[:12])
    tiny.write_jsonl(folder / "validation.jsonl", rows[12:16])
    tiny.save_model(folder / "llama")
    tiny.save_model(folder / "bert", "bert")
    # GPT-2 has no chat template and no pad token.
    tiny.save_model(folder / "gpt2", "gpt2", None)


def train(argv: list[str], dies_in: int | None) -> None:
    """Run train/train.py; kill it within a step, or at step 0: between its end and its finish."""
    from transformers import Trainer

    step = Trainer.training_step

    def last_step(trainer: Trainer, *values: Any, **options: Any) -> Any:
        loss = step(trainer, *values, **options)
        if trainer.state.global_step == dies_in - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    if dies_in == 0:
        Trainer._finalize_training = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    elif dies_in is not None:
        Trainer.training_step = last_step
    tiny.load_script("train/train.py").main(argv)


def train_in_two(argv: list[str], dies_in: int | None) -> None:
    """Run train() as torch.distributed.run does, whose agent ends both ranks when one dies."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    config = LaunchConfig(1, 1, 2, **options, start_method="fork", max_restarts=0)
    elastic_launch(config, train)(argv, dies_in)


# --- runs ------------------------------------------------------------------------------------


def run(
    files: Path, out: Path, model: str, flags: list[str], dies_in: int | None = None, ranks: int = 1
) -> str:
    """A run in a folder, to its end or to its death; return what it printed."""
    argv = [
        *("--train_file", str(files / "train.jsonl")),
        *("--validation_file", str(files / "validation.jsonl")),
        *("--model_name_or_path", str(files / model), "--output_dir", str(out), *RUN, *flags),
    ]
    work, death = (train, -signal.SIGKILL) if ranks == 1 else (train_in_two, 1)
    code, printed = in_process(out.with_name("log"), work, argv, dies_in)
    assert code == (0 if dies_in is None else death), printed
    assert code != 1 or "Signal 9 (SIGKILL)" in printed
    return printed


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged curve of a run: every number but clock times."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    entries = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [
        {key: value for key, value in entry.items() if not CLOCK.fullmatch(key)}
        for entry in entries
    ]


def end(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the final weights, and what the contract says of them."""
    training = json.loads((folder / "contract.json").read_text())["training"]
    kept = ("state", "step", "epoch", "weights_of_step", "best_metric")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return weights, {key: training[key] for key in kept}


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_ends_as_the_whole_one(files: Path, tmp_path: Path, name: str) -> None:
    model, flags, dies_in = CASES[name]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(files, whole, model, flags)
    curve = history(whole)
    assert {"loss", "grad_norm", "learning_rate", "eval_loss"} <= set().union(*curve)
    assert curve[-1]["step"] >= dies_in
    run(files, killed, model, flags, dies_in)
    printed = run(files, killed, model, flags)
    assert f"resuming from checkpoint-{(dies_in - 1) // SAVE_STEPS * SAVE_STEPS} " in printed
    assert history(killed) == curve
    assert end(killed) == end(whole)


def test_patience_and_the_best_weights_outlive_a_kill(files: Path, tmp_path: Path) -> None:
    """Evaluations at 4, 6 and 8 use up the patience; the one at 8 comes after the kill."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(files, whole, "llama", FIRST_IS_BEST)
    assert history(whole)[-1]["step"] == 8
    run(files, killed, "llama", FIRST_IS_BEST, dies_in=8)
    assert "resuming from checkpoint-6 " in run(files, killed, "llama", FIRST_IS_BEST)
    assert history(killed) == history(whole)
    assert end(killed) == end(whole)
    best = (killed / "checkpoint-2/adapter_model.safetensors").read_bytes()
    assert end(killed)[0] == best and end(killed)[1]["weights_of_step"] == 2


@pytest.mark.parametrize(
    ("model", "flags", "last", "ranks"),
    [
        pytest.param("llama", [], 10, 1, id="steps"),
        pytest.param("llama", FIRST_IS_BEST, 8, 1, id="patience"),
        pytest.param("llama", ["--load_in_4bit"], 10, 1, id="four-bit"),
        pytest.param("bert", [*CLASSIFIER, *HALF_BATCH], 10, 2, id="classifier-two-processes"),
    ],
)
def test_a_run_that_lost_only_its_finish_trains_no_further(
    files: Path, tmp_path: Path, model: str, flags: list[str], last: int, ranks: int
) -> None:
    """Both ends lie within an epoch, where Trainer by itself would train one more step."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(files, whole, model, flags, ranks=ranks)
    run(files, killed, model, flags, dies_in=0, ranks=ranks)
    assert not (killed / "adapter_model.safetensors").exists()
    assert f"resuming from checkpoint-{last} " in run(files, killed, model, flags, ranks=ranks)
    assert history(killed) == history(whole)
    assert end(killed) == end(whole)


@pytest.mark.parametrize("flags", [[], SORTED], ids=["shuffled", "length-sorted"])
def test_two_processes_continue_as_one_run(files: Path, tmp_path: Path, flags: list[str]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*EPOCHS, *HALF_BATCH, *flags]
    run(files, whole, "llama", flags, ranks=2)
    run(files, killed, "llama", flags, dies_in=11, ranks=2)
    assert "resuming from checkpoint-8 " in run(files, killed, "llama", flags, ranks=2)
    assert history(killed) == history(whole)
    assert end(killed) == end(whole)
