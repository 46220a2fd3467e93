"""train/train.py: its arguments, what it refuses, and runs of tiny models on the loopback Hub.

pytest tests/test_train.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
from hub import Hub
from huggingface_hub import HfApi
from tiny import ROOT, load_script


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return load_script("train/train.py")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local training files of made posts and tiny base models."""
    folder = tmp_path_factory.mktemp("train")
    rows = tiny.post_rows()
    tiny.write_jsonl(folder / "train.jsonl", rows[:64])
    tiny.write_jsonl(folder / "validation.jsonl", rows[64:80])
    tiny.save_model(folder / "llama")
    return folder


@pytest.fixture(scope="module")
def base(hub: Hub, files: Path) -> str:
    """The tiny Llama as a private repo on the Hub."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    repo = api.create_repo("alice/train-base", private=True).repo_id
    api.upload_folder(repo_id=repo, folder_path=files / "llama")
    return repo


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("HSD_") or name in ("DATASET_REPO", "HUB_MODEL_ID", "MAX_STEPS"):
            monkeypatch.delenv(name)


def refusal(train: ModuleType, capsys: pytest.CaptureFixture, *argv: str, code: int = 2) -> str:
    """Run main and return the message it ends with; it must exit with `code`."""
    with pytest.raises(SystemExit) as end:
        train.main(list(argv))
    message = capsys.readouterr().err
    assert end.value.code == code, message
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def short_run(files: Path, *more: str) -> list[str]:
    """Flags of a run of a few steps on the local files."""
    return [
        *("--train_file", str(files / "train.jsonl")),
        *("--validation_file", str(files / "validation.jsonl")),
        *("--max_steps", "8", "--save_steps", "4", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
        *("--warmup_steps", "2", "--learning_rate", "5e-3", "--report_to", "none", *more),
    ]


# --- arguments -------------------------------------------------------------------------------


def test_flag_beats_environment_beats_config_file_beats_preset(
    train: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    config = tmp_path / "run.json"
    config.write_text('{"lora_r": 7, "num_train_epochs": 2, "seed": 3}')
    monkeypatch.setenv("HSD_SEED", "4")
    monkeypatch.setenv("HSD_LORA_RR", "4")
    monkeypatch.setenv("SEED", "99")
    monkeypatch.setenv("MAX_STEPS", "11")
    monkeypatch.setenv("HSD_LORA_ALPHA", "")
    args = train.parse_args(
        ["--preset", "high_capacity", "--config_file", str(config), "--lora-dropout", "0.5"]
    )
    assert (args.lora_r, args.num_train_epochs, args.seed, args.max_steps) == (7, 2.0, 4, 11)
    assert (args.lora_dropout, args.lora_alpha) == (0.5, 32)
    printed = capsys.readouterr().out
    assert "warning: HSD_LORA_RR names no flag" in printed
    assert "seed = 4 (environment)" in printed and "lora_r = 7 (config file)" in printed
    assert "lora_dropout = 0.5 (command line)" in printed and "lora_alpha" not in printed


def test_presets_set_what_they_are_for(train: ModuleType) -> None:
    args = train.parse_args(["--preset", "memory_efficient"])
    found = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_length
    assert found == (2, 8, 256)
    args = train.parse_args(["--preset", "quick_test"])
    assert (args.num_train_epochs, args.lora_r, args.early_stopping_patience) == (1, 16, 0)
    default = train.parse_args([])
    assert (default.lora_r, default.learning_rate, default.warmup_steps) == (32, 2e-4, 100)


def test_a_config_file_of_another_trainer_is_accepted_as_it_stands(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = tmp_path / "default.json"
    settings = {
        "model_name_or_path": "openai/gpt-oss-20b",
        "train_file": "train.jsonl",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "max_seq_length": 256,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_r": 8,
        "bf16": True,
        "gradient_checkpointing": True,
        "optim": "paged_adamw_8bit",
        "evaluation_strategy": "steps",
        "logging_dir": "logs",
        "report_to": "none",
        "load_best_model_at_end": True,
        "_comment": "kept from the first project",
    }
    config.write_text(json.dumps(settings))
    args = train.parse_args(["--config_file", str(config)])
    assert args.load_in_4bit is True and args.max_length == 256 and args.report_to == ["none"]
    assert args.trainer_fields == {
        "bf16": True,
        "activation_checkpointing": True,
        "optim": "paged_adamw_8bit",
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
    }
    assert "--logging_dir has no effect" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--learning_rat", "1"], "Did you mean --learning_rate"),
        (["--preset", "tiny"], "There are: default, high_capacity"),
        (["--lora_r", "many"], "--lora_r"),
        (["--load_in_4bit", "perhaps"], "not 1, 0, true or false"),
        (["--max_steps", "0"], "nothing to train"),
        (["--output_dir", "out"], "needs --dataset_repo"),
        (["--hub_model_id", "./out", "--train_file", "x"], "--output_dir for a local run"),
        (["--train_file", "x", "--dataset_repo", "a/b"], "name one source"),
        (["--output_dir", "out", "--train_file", "none.jsonl"], "does not exist"),
        (["--config_file", "none.json"], "is not a file"),
        (["--hub_token", "hf_secret"], "unknown argument --hub_token"),
    ],
)
def test_wrong_arguments_end_with_one_message(
    train: ModuleType, capsys: pytest.CaptureFixture, argv: list[str], says: str
) -> None:
    assert says in refusal(train, capsys, *argv)


def test_an_unknown_key_of_a_config_file_is_named_with_the_nearest(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("lora_rank: 3\n")
    message = refusal(train, capsys, "--config_file", str(config))
    assert "--lora_rank (config file). Did you mean --lora_r" in message


def test_a_flag_beats_a_variable_of_another_source_of_data(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("DATASET_REPO", "alice/elsewhere")
    args = train.parse_args(["--train_file", "posts.jsonl"])
    train.check_training_arguments(args)
    assert args.dataset_repo is None
    assert "--train_file beats DATASET_REPO" in capsys.readouterr().out


def test_group_by_length_lives_on(train: ModuleType) -> None:
    args = train.parse_args(["--group_by_length", "true", "--deepspeed", "ds.json"])
    assert args.trainer_fields == {
        "train_sampling_strategy": "group_by_length",
        "deepspeed": "ds.json",
    }


# --- what it refuses -------------------------------------------------------------------------


def test_no_token(train: ModuleType, hub: Hub, capsys: pytest.CaptureFixture) -> None:
    assert "hf auth login" in refusal(train, capsys)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("", "is empty"),
        ('{"text": "a"}\n', "needs `text` and `label`"),
        ('{"text": "a", "label": "spam"}\n', "unknown labels ['spam']"),
        ('{"text": "a", "label": 2}\n', "unknown labels ['2']"),
        ("not json\n", "line 1 is not JSON"),
        ('{"text": 1, "label": "hate"}\n', "must be a string"),
        ('{"text": "a", "label": null}\n', "line 1 needs `text` and `label`"),
        ('{"text": "a", "label": "hate", "target_groups": [3]}\n', "must be a list of names"),
        ('{"messages": []}\n', "must end with"),
    ],
)
def test_bad_training_files(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, rows: str, says: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(rows)
    argv = ["--train_file", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert says in refusal(train, capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_write_access_is_proved_before_the_model_is_loaded(
    train: ModuleType,
    hub: Hub,
    files: Path,
    base: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(train, "load_base", lambda *_: pytest.fail("the model was loaded"))
    argv = short_run(files, "--model_name_or_path", base, "--hub_model_id", "alice/refused")
    monkeypatch.setenv("HF_TOKEN", "hf_alice_read")
    assert "write access" in refusal(train, capsys, *argv)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert "token" in refusal(train, capsys, *argv)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert not HfApi(token=hub.token).repo_exists("alice/refused")
    HfApi(token=hub.token).create_repo("alice/open", private=False)
    argv = short_run(files, "--model_name_or_path", base, "--hub_model_id", "alice/open")
    assert "is public" in refusal(train, capsys, *argv)
    assert [commit["message"] for commit in hub.commits("alice/open")] == ["initial commit"]


def test_missing_repos_and_revisions(
    train: ModuleType, alice: Hub, files: Path, base: str, capsys: pytest.CaptureFixture
) -> None:
    message = refusal(train, capsys, "--dataset_repo", "alice/none")
    assert "alice/none" in message and "no such repo" in message
    message = refusal(train, capsys, *short_run(files, "--model_name_or_path", "alice/no-model"))
    assert "alice/no-model" in message
    argv = short_run(files, "--model_name_or_path", base, "--model_revision", "v9")
    assert "no such revision" in refusal(train, capsys, *argv)
    HfApi(token=alice.token).create_repo("alice/bare", repo_type="dataset", private=True)
    assert "holds no contract.json" in refusal(train, capsys, "--dataset_repo", "alice/bare")


def dataset_folder(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    """A dataset repo as a folder, with the rows of the config `simple` by split."""
    from datasets import Dataset

    for split, content in rows.items():
        (folder / "simple").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(content).to_parquet(folder / "simple" / f"{split}.parquet")
    files = "".join(f"\n  - split: {split}\n    path: simple/{split}.parquet" for split in rows)
    card = f"---\nconfigs:\n- config_name: simple\n  data_files:{files}\n---\n"
    (folder / "README.md").write_text(card)
    prompt = {"description": "", "system": "", "user": "{text}", "answer": "{label}"}
    contract = {"schema": 1, "stage": "dataset", "labels": ["normal", "hate"], "groups": []}
    contract |= {"positive_label": "hate", "prompts": {"simple": prompt}}
    (folder / "contract.json").write_text(json.dumps(contract))
    return folder


def simple_row(**changes: Any) -> dict[str, Any]:
    row = {"id": "1", "text": "a", "label": "hate", "target_groups": ["x"]}
    row["prompt"] = [{"role": "user", "content": "a"}]
    row["completion"] = [{"role": "assistant", "content": "hate"}]
    return {key: value for key, value in (row | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("rows", "flags", "says"),
    [
        ({"train": [simple_row(text=None)]}, [], "lacks the columns text"),
        ({"train": [simple_row(prompt=None)]}, [], "lacks the columns prompt"),
        ({"train": [simple_row(label="spam")]}, [], "unknown labels ['spam'], first in the row 1"),
        ({"train": [simple_row()]}, [], "has no split 'validation'"),
        ({"train": [simple_row()]}, ["--dataset_config", "other"], "has no config 'other'"),
    ],
)
def test_bad_dataset_repos(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    rows: dict[str, list[dict[str, Any]]],
    flags: list[str],
    says: str,
) -> None:
    if says.startswith(("lacks", "unknown")):
        rows = rows | {"validation": rows["train"]}
    folder = dataset_folder(tmp_path / "data", rows)
    capsys.readouterr()
    argv = ["--dataset_repo", str(folder), "--output_dir", str(tmp_path / "out"), *flags]
    message = refusal(train, capsys, *argv, "--model_name_or_path", str(files / "llama"))
    assert says in message
    assert not (tmp_path / "out").exists()


def test_an_empty_split_is_named(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from datasets import load_dataset

    rows = {"train": [simple_row()], "validation": [simple_row()]}
    folder = dataset_folder(tmp_path / "data", rows)
    file = str(folder / "simple" / "validation.parquet")
    data = load_dataset(
        "parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache")
    )
    data.select([]).to_parquet(file)
    argv = ["--dataset_repo", str(folder), "--output_dir", str(tmp_path / "out")]
    message = refusal(train, capsys, *argv, "--model_name_or_path", str(files / "llama"))
    assert "(simple/validation) is empty" in message and not (tmp_path / "out").exists()


def test_a_rebuilt_folder_is_read_anew(train: ModuleType, tmp_path: Path) -> None:
    for text in ("first", "second"):
        folder = dataset_folder(tmp_path / text / "data", {"train": [simple_row(text=text)]})
        rows = train.read_rows(train.open_repo(str(folder), "dataset"), "simple", "train")
        assert [row["text"] for row in rows] == [text]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lr_scheduler_type", "cosin"], "cosin"),
        (["--eval_strategy", "epoch"], "strategy"),
        (["--task", "classify", "--packing", "true"], "packing"),
        (["--lora_target_modules", "q_porj"], "no such modules"),
        (["--load_in_4bit", "--model_name_or_path", "MXFP4"], "stored as mxfp4"),
    ],
)
def test_a_start_that_fails_leaves_no_run_behind(
    train: ModuleType,
    alice: Hub,
    files: Path,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    flags: list[str],
    says: str,
) -> None:
    quantised = shutil.copytree(files / "llama", tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (quantised / "config.json").write_text(json.dumps(config))
    argv = short_run(files, "--model_name_or_path", base, "--hub_model_id", "alice/unbegun")
    flags = [str(quantised) if flag == "MXFP4" else flag for flag in flags]
    assert says in refusal(train, capsys, *argv, *flags)
    # What is there, if anything, is a claim: it binds no later start to these arguments.
    assert says in refusal(train, capsys, *argv, *flags, "--lora_r", "4")


def test_a_repo_of_something_else_is_left_alone(
    train: ModuleType, alice: Hub, files: Path, base: str, capsys: pytest.CaptureFixture
) -> None:
    argv = short_run(files, "--model_name_or_path", base, "--hub_model_id", base)
    assert "holds files of something else" in refusal(train, capsys, *argv)


def test_a_base_that_lacks_weights_is_refused(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(files / "llama", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    argv = short_run(files, "--model_name_or_path", str(broken))
    message = refusal(train, capsys, *argv, "--output_dir", str(tmp_path / "out"))
    assert "lacks 1 of its weights, for example model.layers.1.mlp.up_proj.weight" in message


def test_a_large_model_without_a_gpu_is_refused_before_its_weights(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny.save_tokenizer(tmp_path / "large")
    config = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096}
    (tmp_path / "large" / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    argv = short_run(
        files, "--model_name_or_path", str(tmp_path / "large"), "--output_dir", str(out)
    )
    message = refusal(train, capsys, *argv)
    assert (
        "hf jobs uv run --flavor a100-large train/train.py" in message and "B parameters" in message
    )
    assert not out.exists()


def test_an_nvidia_device_that_torch_cannot_use_is_named(
    train: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\n")
    monkeypatch.setattr(train, "NVIDIA_DRIVER", driver)
    with pytest.raises(SystemExit):
        train.check_device(1000, False, "")
    message = capsys.readouterr().err
    assert "470.82.01" in message and "Update the driver" in message
    assert train.check_device(1000, True, "") == "cpu"


def test_a_resumed_run_keeps_its_arguments(
    train: ModuleType,
    alice: Hub,
    files: Path,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    argv = short_run(files, "--model_name_or_path", base, "--hub_model_id", "alice/kept")
    train.main([*argv, "--max_steps", "4"])
    capsys.readouterr()
    message = refusal(train, capsys, *argv, "--lora_r", "4")
    assert re.search(r"lora_r +32 +4\n", message)
    assert message.index("--run_name") < message.index("--fresh")
    train.main([*argv, "--max_steps", "4"])
    assert "complete at step 4: nothing to do" in capsys.readouterr().out
    rows = tiny.post_rows()
    tiny.write_jsonl(tmp_path / "train.jsonl", rows[100:164])
    other = [*argv, "--max_steps", "4", "--train_file", str(tmp_path / "train.jsonl")]
    assert "the training data has changed" in refusal(train, capsys, *other)


# --- posts kept for calibration --------------------------------------------------------------


def test_the_held_back_share_is_the_fraction_and_never_all_or_none(train: ModuleType) -> None:
    names = [f"post-{number}" for number in range(20_000)]
    for fraction in (0.1, 0.5, 0.9):
        held = train.held_back_ids(names, fraction)
        assert held == {name for name in names if train.is_held_back(name, fraction)}
        assert abs(len(held) / len(names) - fraction) < 0.012
    # A larger fraction keeps what a smaller one does, and other posts make no difference.
    assert train.held_back_ids(names, 0.1) < train.held_back_ids(names, 0.5)
    assert train.held_back_ids(names[:500], 0.5) == train.held_back_ids(names, 0.5) & {*names[:500]}
    for start in range(50):
        few = names[start : start + 3]
        for fraction in (0.001, 0.5, 0.999):
            assert 0 < len(train.held_back_ids(few, fraction)) < 3
    assert train.held_back_ids(names[:1], 0.5) == set()
    assert train.held_back_ids(names, 0.0) == set()
    assert train.is_held_back(7, 0.5) == train.is_held_back("7", 0.5)


def test_early_stopping_does_not_see_the_posts_kept_for_calibration(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = short_run(files, "--model_name_or_path", str(files / "llama"))
    names = [f"validation-{number}" for number in range(1, 17)]
    for fraction in ("0.5", "0.25"):
        held = train.held_back_ids(names, float(fraction))
        out = tmp_path / fraction
        train.main([*argv, "--output_dir", str(out), "--calibration_fraction", fraction])
        printed = capsys.readouterr().out
        assert f"{len(held)} of 16 validation posts are kept from early stopping" in printed
        assert f"validation: {16 - len(held)} rows" in printed
        training = json.loads((out / "contract.json").read_text())["training"]
        assert training["early_stopping"] is True
        assert training["calibration_fraction"] == float(fraction)
    other = [*argv, "--output_dir", str(tmp_path / "0.25"), "--max_steps", "12"]
    assert re.search(r"calibration_fraction +0.25 +0.5\n", refusal(train, capsys, *other))


def test_without_early_stopping_all_validation_posts_are_free(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = short_run(files, "--model_name_or_path", str(files / "llama"), "--max_steps", "4")
    train.main([*argv, "--output_dir", str(tmp_path), "--early_stopping_patience", "0"])
    assert "validation: 16 rows" in capsys.readouterr().out
    training = json.loads((tmp_path / "contract.json").read_text())["training"]
    assert training["early_stopping"] is False and training["calibration_fraction"] == 0
    assert "is not from 0 to below 1" in refusal(train, capsys, *argv, "--calibration_fraction=1")


def test_a_run_of_an_older_version_goes_on_with_all_validation_posts(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its early stopping compares losses on the same posts before and after."""
    argv = short_run(files, "--model_name_or_path", str(files / "llama"))
    argv += ["--output_dir", str(tmp_path)]
    train.main([*argv, "--max_steps", "4"])
    contract = json.loads((tmp_path / "contract.json").read_text())
    del contract["arguments"]["calibration_fraction"]
    del contract["training"]["calibration_fraction"], contract["training"]["early_stopping"]
    (tmp_path / "contract.json").write_text(json.dumps(contract))
    for steps in ("8", "12"):
        capsys.readouterr()
        train.main([*argv, "--max_steps", steps])
        printed = capsys.readouterr().out
        assert "validation: 16 rows" in printed and "resuming from checkpoint-" in printed
        contract = json.loads((tmp_path / "contract.json").read_text())
        assert "calibration_fraction" not in contract["training"] | contract["arguments"]


# --- runs ------------------------------------------------------------------------------------


def states(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """The logged curve without clock times, and the final weights' bytes."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    curve = [{key: entry[key] for key in kept if key in entry} for entry in history]
    return curve, (folder / "adapter_model.safetensors").read_bytes()


def test_a_killed_run_continues_as_if_nothing_had_happened(
    train: ModuleType, alice: Hub, files: Path, base: str, capsys: pytest.CaptureFixture
) -> None:
    argv = [*short_run(files, "--model_name_or_path", base), "--max_steps", "40"]
    argv += ["--early_stopping_patience", "0"]
    killed = [*argv, "--hub_model_id", "alice/killed"]
    command = [sys.executable, str(ROOT / "train/train.py"), *killed]
    process = subprocess.Popen(
        command, env={**os.environ, **alice.env()}, stdout=subprocess.PIPE, text=True
    )
    with process:
        for line in process.stdout:
            if "checkpoint-4 is on the Hub" in line:
                process.kill()
    assert process.returncode == -9
    train.main(killed)
    resumed = re.search(r"resuming from checkpoint-(\d+) of alice/killed@", capsys.readouterr().out)
    assert 4 <= int(resumed[1]) < 40
    train.main([*argv, "--hub_model_id", "alice/straight"])
    assert states(alice.repo_folder("alice/killed")) == states(alice.repo_folder("alice/straight"))


def test_what_is_pushed_is_private_complete_and_free_of_machine_paths(
    train: ModuleType, alice: Hub, files: Path, base: str, tmp_path: Path
) -> None:
    out = tmp_path / "work"
    out.mkdir()
    (out / "passwords.txt").write_text("mine")
    argv = short_run(files, "--model_name_or_path", base, "--hub_model_id", "alice/pushed")
    train.main([*argv, "--output_dir", str(out), "--max_steps", "12", "--keep_checkpoints", "1"])
    folder = alice.repo_folder("alice/pushed")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"adapter_config.json", "adapter_model.safetensors", "contract.json"} <= names
    assert {"README.md", "tokenizer.json", "checkpoint-12/optimizer.pt"} <= names
    assert not [name for name in names if "training_args" in name or "passwords" in name]
    assert HfApi(token=alice.token).repo_info("alice/pushed").private
    for name in names:
        content = (folder / name).read_bytes()
        assert str(out).encode() not in content and str(files).encode() not in content, name
        assert alice.token.encode() not in content, name
    contract = json.loads((folder / "contract.json").read_text())
    assert contract["training"]["state"] == "complete" and contract["training"]["step"] == 12
    head = HfApi(token=alice.token).repo_info(base).sha
    assert contract["base_model"] == {"repo": base, "kind": "model", "revision": head}
    kept = {name.split("/")[0] for name in names if name.startswith("checkpoint-")}
    state = json.loads((folder / "checkpoint-12/trainer_state.json").read_text())
    assert kept == {"checkpoint-12", state["best_model_checkpoint"]}


def test_the_best_weights_survive_a_resume_on_another_machine(
    train: ModuleType, alice: Hub, files: Path, base: str
) -> None:
    """With the highest loss as the best one, step 4 must be the result of both runs."""
    argv = short_run(files, "--model_name_or_path", base, "--greater_is_better", "true")
    argv += ["--early_stopping_patience", "9"]
    train.main([*argv, "--hub_model_id", "alice/best"])
    whole = alice.repo_folder("alice/best")
    best = json.loads((whole / "checkpoint-8/trainer_state.json").read_text())
    assert best["best_model_checkpoint"] == "checkpoint-4"
    weights = (whole / "adapter_model.safetensors").read_bytes()
    contract = json.loads((whole / "contract.json").read_text())
    assert (contract["training"]["step"], contract["training"]["weights_of_step"]) == (8, 4)
    assert "the weights of step\n  4" in (whole / "README.md").read_text()
    assert weights == (whole / "checkpoint-4/adapter_model.safetensors").read_bytes()
    train.main([*argv, "--hub_model_id", "alice/best", "--max_steps", "12"])
    assert (whole / "adapter_model.safetensors").read_bytes() == weights
    assert json.loads((whole / "contract.json").read_text())["training"]["step"] == 12


def test_a_commit_that_fails_or_loses_its_answer_is_made_once(
    train: ModuleType, alice: Hub
) -> None:
    from huggingface_hub import CommitOperationAdd

    pauses: list[float] = []
    HfApi(token=alice.token).create_repo("alice/faulty", private=True)
    path = r"/commit/main$"
    alice.add_fault(method="POST", path=path, status=429, headers={"Retry-After": "7"})
    alice.add_fault(method="POST", path=path, drop="after", skip=1)
    for number in (1, 2):
        add = CommitOperationAdd("file", path_or_fileobj=str(number).encode())
        oid = train.commit("alice/faulty", "model", [add], f"Write {number}", pause=pauses.append)
        assert alice.commits("alice/faulty")[0]["oid"] == oid
    messages = [commit["message"] for commit in alice.commits("alice/faulty")]
    assert messages == ["Write 2", "Write 1", "initial commit"]
    assert 7 in pauses
    alice.clear_faults()


def test_the_hubs_own_rate_limit_header_is_waited_for(train: ModuleType, alice: Hub) -> None:
    from huggingface_hub import CommitOperationAdd

    pauses: list[float] = []
    HfApi(token=alice.token).create_repo("alice/limited", private=True)
    limit = {"RateLimit": '"api";r=0;t=55'}
    alice.add_fault(method="POST", path=r"/commit/main$", status=429, headers=limit)
    add = CommitOperationAdd("file", b"1")
    train.commit("alice/limited", "model", [add], "Write", pause=pauses.append)
    assert 56 in pauses
    alice.clear_faults()


def test_a_best_checkpoint_whose_push_failed_follows_with_the_next(
    train: ModuleType, alice: Hub, files: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    alice.add_fault(method="POST", path="alice/late/commit/", status=500, skip=1, times=5)
    argv = short_run(files, "--model_name_or_path", base, "--hub_model_id", "alice/late")
    train.main([*argv, "--greater_is_better", "true"])
    alice.clear_faults()
    folder = alice.repo_folder("alice/late")
    assert (folder / "checkpoint-4/adapter_model.safetensors").is_file()
    train.main([*argv, "--greater_is_better", "true", "--max_steps", "12"])
    state = json.loads((folder / "contract.json").read_text())["training"]
    assert state["step"] == 12


def test_an_incomplete_checkpoint_is_named_and_skipped(
    train: ModuleType, alice: Hub, files: Path, base: str, capsys: pytest.CaptureFixture
) -> None:
    argv = short_run(files, "--model_name_or_path", base, "--hub_model_id", "alice/holes")
    train.main([*argv, "--early_stopping_patience", "0"])
    api = HfApi(token=alice.token)
    api.delete_file("checkpoint-8/optimizer.pt", "alice/holes")
    capsys.readouterr()
    train.main([*argv, "--early_stopping_patience", "0", "--max_steps", "12"])
    printed = capsys.readouterr().out
    assert "checkpoint-8 lacks optimizer.pt: skipped" in printed
    assert "resuming from checkpoint-4" in printed


def test_by_default_wandb_runs_offline_without_a_key_and_tensorboard_beside_it(
    train: ModuleType,
    alice: Hub,
    files: Path,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_PROJECT"):
        # Set first, so that what the script sets is undone at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    out = tmp_path / "out"
    argv = short_run(files, "--model_name_or_path", base, "--hub_model_id", "alice/logged")
    at = argv.index("--report_to")
    del argv[at : at + 2]
    argv += ["--output_dir", str(out)]
    for steps in ("4", "6"):
        train.main([*argv, "--max_steps", steps])
    run = json.loads((out / "contract.json").read_text())["training"]["wandb_run_id"]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run}"))) == 2
    events = EventAccumulator(str(out / "runs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    # They stay here: neither the Hub nor the receipt names them.
    assert "resuming from checkpoint-4" in (printed := capsys.readouterr().out)
    assert "tfevents" not in printed and "runs/" not in printed
    assert not [path for path in HfApi().list_repo_files("alice/logged") if "runs" in path]


def test_a_hub_that_refuses_checkpoints_does_not_stop_the_training(
    train: ModuleType,
    alice: Hub,
    files: Path,
    base: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    # The first commit is the contract's; five tries of checkpoint-4 fail, checkpoint-8 is pushed.
    alice.add_fault(method="POST", path="alice/refusing/commit/", status=500, skip=1, times=5)
    train.main(short_run(files, "--model_name_or_path", base, "--hub_model_id", "alice/refusing"))
    printed = capsys.readouterr().out
    assert "checkpoint-4 is NOT on the Hub" in printed and "checkpoint-8 is on the Hub" in printed
    alice.clear_faults()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_classifier_saves_its_head_and_resumes(
    train: ModuleType, files: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    from safetensors.torch import load_file

    # GPT-2 has no chat template and no pad token.
    template = None if kind == "gpt2" else tiny.CHAT_TEMPLATE
    base = tiny.save_model(tmp_path / kind, kind, template)
    argv = short_run(files, "--task", "classify", "--model_name_or_path", str(base))
    train.main([*argv, "--output_dir", str(tmp_path / "straight")])
    train.main([*argv, "--output_dir", str(tmp_path / "halves"), "--max_steps", "4"])
    # The schedule of the first half ends at step 4, so only the second half's being one is shown.
    capsys.readouterr()
    train.main([*argv, "--output_dir", str(tmp_path / "halves")])
    assert "resuming from checkpoint-4" in capsys.readouterr().out
    weights = load_file(tmp_path / "straight/adapter_model.safetensors")
    assert [name for name in weights if "classifier" in name or "score" in name]
    contract = json.loads((tmp_path / "straight/contract.json").read_text())
    assert contract["task"] == "classify" and contract["prompt"] is None


@pytest.mark.parametrize(("task", "kind"), [("classify", "bert"), ("causal", "llama")])
def test_accumulated_batches_have_the_loss_of_one_large_batch(
    train: ModuleType, files: Path, tmp_path: Path, task: str, kind: str
) -> None:
    base = tiny.save_model(tmp_path / kind, kind)
    losses = []
    for batch, accumulation in ((8, 1), (2, 4)):
        out = tmp_path / f"{batch}"
        argv = short_run(files, "--model_name_or_path", str(base), "--task", task)
        argv += ["--per_device_train_batch_size", str(batch), "--lora_dropout", "0"]
        argv += ["--gradient_accumulation_steps", str(accumulation), "--output_dir", str(out)]
        train.main([*argv, "--max_steps", "1", "--save_steps", "1"])
        state = json.loads((out / "checkpoint-1/trainer_state.json").read_text())
        losses.append(next(entry["loss"] for entry in state["log_history"] if "loss" in entry))
    # BERT's own dropout is drawn batch by batch, so the two are near, not equal.
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_four_bit_training_keeps_its_adapter_in_float32(
    train: ModuleType, files: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    argv = short_run(files, "--model_name_or_path", str(files / "llama"), "--load_in_4bit")
    train.main([*argv, "--output_dir", str(tmp_path / "out"), "--max_steps", "4"])
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {"torch.float32"}


def test_a_model_without_a_chat_template_gets_plain_text(
    train: ModuleType, files: Path, tmp_path: Path
) -> None:
    """GPT-2 in miniature: no template, no pad token, no module named q_proj."""
    base = tiny.save_model(tmp_path / "gpt2", "gpt2", None)
    argv = short_run(files, "--model_name_or_path", str(base), "--max_steps", "2")
    train.main([*argv, "--output_dir", str(tmp_path / "out")])
    contract = json.loads((tmp_path / "out/contract.json").read_text())
    assert contract["prompt"]["name"] == "instruction"
    rendering = contract["rendering"]
    assert rendering["chat_template_sha256"] is None
    assert rendering["pieces"] == ["", "", "<|end|>"] and rendering["answer_prefix"] == " "


def test_messages_bring_their_own_prompt(train: ModuleType, files: Path, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Label the post."},
                {"role": "user", "content": row["text"]},
                {"role": "assistant", "content": row["label"]},
            ]
        }
        for row in tiny.post_rows()[:16]
    ]
    tiny.write_jsonl(tmp_path / "messages.jsonl", rows)
    argv = ["--train_file", str(tmp_path / "messages.jsonl"), "--output_dir", str(tmp_path / "out")]
    argv += ["--model_name_or_path", str(files / "llama"), "--max_steps", "1"]
    train.main([*argv, "--report_to", "none"])
    contract = json.loads((tmp_path / "out/contract.json").read_text())
    assert contract["rendering"]["roles"] == ["system", "user", "assistant"]
    assert "Label the post." in contract["prompt"]["system"]
