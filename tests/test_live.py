"""What a run shows and decides while it trains: figures, samples, stops, cells, local files.

pytest tests/test_live.py
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
from hub import Hub
from huggingface_hub import HfApi
from test_exact import end, history, in_process, train_in_two
from test_exact import train as train_in_process
from tiny import load_script

CANARY = "heliotrope"
RUN = [
    *("--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--warmup_steps", "1"),
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
    *("--learning_rate", "5e-3", "--lora_r", "4", "--lora_dropout", "0", "--report_to", "none"),
]
LAST_WEIGHTS = ["--early_stopping_patience", "0"]
REWEIGHTED, BALANCED = ["--reweight", "group_label"], ["--sampler", "group_balanced"]
CLASSIFY = ["--task", "classify"]


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return load_script("train/train.py")


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    return load_script("eval/eval.py")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local files of made posts, each with the canary in it, and tiny base models."""
    folder = tmp_path_factory.mktemp("live")
    rows = [row | {"text": f"{row['text']} {CANARY}"} for row in tiny.post_rows()]
    tiny.write_jsonl(folder / "train.jsonl", rows[:24])
    tiny.write_jsonl(folder / "validation.jsonl", rows[200:360])
    tiny.write_jsonl(folder / "few.jsonl", rows[200:208])
    tiny.save_model(folder / "llama")
    tiny.save_model(folder / "bert", "bert")
    return folder


@pytest.fixture(autouse=True)
def no_flags_of_the_environment(clean_environment: None) -> None:
    pass


def flags(files: Path, model: str, out: Path | None, *more: str, few: bool = True) -> list[str]:
    """A short run on the local files."""
    where = [] if out is None else ["--output_dir", str(out)]
    validation = files / ("few.jsonl" if few else "validation.jsonl")
    return [
        *("--train_file", str(files / "train.jsonl"), "--validation_file", str(validation)),
        *("--model_name_or_path", str(files / model), *where, *RUN, *more),
    ]


def refusal(train: ModuleType, capsys: pytest.CaptureFixture, argv: list[str], code: int) -> str:
    with pytest.raises(SystemExit) as ended:
        train.main(argv)
    message = capsys.readouterr().err
    assert ended.value.code == code, message
    return message


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "more"), [("llama", []), ("bert", CLASSIFY)], ids=["causal", "classifier"]
)
def test_figures_of_an_evaluation_are_those_of_eval_and_local_files_hold_them(
    train: ModuleType,
    evaluate: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    model: str,
    more: list[str],
) -> None:
    """The weights kept are those of the last evaluation: eval/eval.py scores the same posts."""
    scored = []
    figures = train.validation_figures
    monkeypatch.setattr(
        train,
        "validation_figures",
        lambda scores, *rest: scored.append(scores) or figures(scores, *rest),
    )
    out = tmp_path / "out"
    train.main(flags(files, model, out, *more, *LAST_WEIGHTS, "--save_steps", "4", few=False))
    printed = capsys.readouterr().out
    found = json.loads((out / "eval_results.json").read_text())
    assert found["step"] == 4 and found["eval_samples"] == 160

    evaluate.main(
        [
            *("--adapter", str(out), "--model_name_or_path", str(files / model)),
            *("--test_file", str(files / "validation.jsonl"), "--output_dir", str(tmp_path / "e")),
        ]
    )
    with (tmp_path / "e/predictions.csv").open(newline="") as file:
        expected = [float(row["p_hate"]) for row in csv.DictReader(file)]
    labels = json.loads((out / "contract.json").read_text())["labels"]
    p = [train.softmax(row)[labels.index("hate")] for row in scored[-1]]
    assert max(abs(one - other) for one, other in zip(p, expected, strict=True)) < 1e-5

    metrics = json.loads((tmp_path / "e/metrics.json").read_text())
    report = next(one for one in metrics["strategies"] if one["kind"] == "model")
    overall = report["overall"]
    for name in ("roc_auc", "accuracy", "balanced_accuracy", "false_positive_rate"):
        assert found[f"eval_{name}"] == pytest.approx(overall[name]["value"], abs=1e-5)
    assert found["eval_f1"] == pytest.approx(overall["f1_hate"]["value"], abs=1e-5)
    for group in ("lgbtq", "mexican", "middle_east"):
        for rate in ("false_positive_rate", "false_negative_rate"):
            figure = report["groups"][group][rate]
            assert found[f"eval_{group}_{rate}"] == pytest.approx(figure["value"], abs=1e-5)
            assert found[f"eval_{group}_{rate}_n"] == figure["n"]
    for rate, gap in report["bias"]["gaps"].items():
        for key, end_ in (("", "value"), ("_low", "low"), ("_high", "high")):
            assert found[f"eval_{rate}_gap{key}"] == pytest.approx(gap["max_min"][end_], abs=1e-5)

    # One line says it, and the folder is what a user finds.
    (line,) = [line for line in printed.splitlines() if line.startswith("step 4/4 eval_loss")]
    assert "160 posts: F1 " in line and "AUROC" in line and "points (" in line
    assert f"mexican {100 * found['eval_mexican_false_positive_rate']:.0f} % of " in line
    everything = json.loads((out / "all_results.json").read_text())
    of_training = json.loads((out / "train_results.json").read_text())
    assert everything["eval_f1"] == found["eval_f1"] and everything["epoch"] == 0.6667
    losses = [entry["loss"] for entry in history(out) if "loss" in entry]
    assert of_training["train_loss"] == pytest.approx(sum(losses) / 4)
    assert (out / "checkpoint-4/manifest.json").is_file()
    assert "160 posts: F1" in (out / "training.log").read_text()


def test_every_label_of_many_tokens_is_scored_as_its_definition_says(
    train: ModuleType, files: Path
) -> None:
    """Completions that share a beginning, and one that is a token longer, batched with padding."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(files / "llama", dtype=torch.float32)
    completions = [[7, 8, 2], [7, 9, 2], [7, 9, 5, 2]]
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 200) for _ in range(size)] for size in (3, 17, 5, 9, 17, 1)]
    watch = train.Watch(
        SimpleNamespace(
            model=model.train(),
            args=SimpleNamespace(per_device_eval_batch_size=4, device=model.device),
            autocast_smart_context_manager=torch.no_grad,
        ),
        SimpleNamespace(pad_token_id=0),
        ["a", "b", "c"],
        *(1, completions, prompts, [], {}, [], 0, print),
    )
    found = watch.score(prompts)
    assert model.training
    model.eval()
    for prompt, scores in zip(prompts, found, strict=True):
        for completion, score in zip(completions, scores, strict=True):
            ids = torch.tensor([prompt + completion])
            steps = model(input_ids=ids).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1 + 1, len(prompt) + len(completion) - 1)
            naive = sum(steps[place, ids[0, place + 1]].item() for place in places)
            assert score == pytest.approx(naive, abs=1e-4)


def test_the_best_checkpoint_is_that_of_the_highest_f1(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The loss falls on, but F1 does not: it stops after the second evaluation without gain."""
    values = iter([0.2, 0.6, 0.5, 0.4, 0.9])
    monkeypatch.setattr(train, "logged_figures", lambda _: {"eval_f1": next(values)})
    monkeypatch.setattr(train.Run, "report", lambda *_: None)
    argv = flags(files, "bert", tmp_path / "out", *CLASSIFY, "--metric_for_best_model", "f1")
    argv += ["--max_steps", "10", "--learning_rate", "1e-3", "--num_train_epochs", "9"]
    train.main(argv)
    contract = json.loads((tmp_path / "out/contract.json").read_text())
    training = contract["training"]
    assert (training["step"], training["weights_of_step"]) == (8, 4)
    assert training["best_metric"] == 0.6
    weights = [
        tmp_path / "out" / part / "adapter_model.safetensors" for part in ("", "checkpoint-4")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert json.loads((tmp_path / "out/eval_results.json").read_text())["step"] == 4
    message = refusal(train, capsys, [*argv, "--metric_for_best_model", "roc_auc"], 2)
    assert "metric_for_best_model" in message and "f1" in message


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--metric_for_best_model", "fpr_gap"], "6 points on average"),
        (["--metric_for_best_model", "eval_lgbtq_false_positive_rate"], "by chance"),
        (["--metric_for_best_model", "f2"], "none of eval_loss, f1, roc_auc"),
        (["--metric_for_best_model", "false_positive_rate"], "one kind of error alone"),
        (
            ["--metric_for_best_model", "eval_auroc", "--greater_is_better", "false"],
            "would choose the lowest roc_auc",
        ),
        (["--reweight", "group_label", "--packing", "true"], "packed row"),
        ([*CLASSIFY, *REWEIGHTED, "--class_weights", "balanced"], "leave one out"),
        ([*CLASSIFY, *BALANCED, "--class_weights", "balanced"], "twice"),
        (
            [*CLASSIFY, "--class_weights", "hate=2", "--label_smoothing_factor", "0.1"],
            "leave --label_smoothing_factor out",
        ),
        ([*REWEIGHTED, *BALANCED], "twice"),
        (["--sampler", "group_balanced", "--train_sampling_strategy", "group_by_length"], "order"),
        (["--reweight", "group_label", "--loss_type", "dft"], "--loss_type"),
        (["--sample_steps", "-1"], "is negative"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(
    train: ModuleType, capsys: pytest.CaptureFixture, more: list[str], says: str
) -> None:
    argv = ["--train_file", "none.jsonl", "--output_dir", "out", *more]
    assert says in refusal(train, capsys, argv, 2)


def test_a_figure_that_the_validation_posts_leave_undefined_chooses_nothing(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    normal = [row for row in rows_of(files / "validation.jsonl") if row["label"] == "normal"]
    tiny.write_jsonl(tmp_path / "normal.jsonl", normal)
    for metric in ("f1", "roc_auc", "balanced_accuracy", "f1_macro"):
        argv = flags(files, "bert", tmp_path / "out", *CLASSIFY, "--metric_for_best_model", metric)
        argv += ["--validation_file", str(tmp_path / "normal.jsonl")]
        assert f"{metric} needs validation posts of" in refusal(train, capsys, argv, 2)
    assert not (tmp_path / "out").exists()


def test_answers_of_one_label_only_warn_loudly(train: ModuleType) -> None:
    said: list[str] = []
    watch = train.Watch(
        *(None, None, ["normal", "hate"], 1, [], [[1]] * 4, [1, 0, 0, 0]),
        *({"g": [0, 1]}, [], 0, said.append),
    )
    watch.score = lambda _: [[1.0, 0.0]] * 4
    logged = watch.evaluate(pytest.fail)
    assert "WARNING: all 4 validation posts are predicted 'normal', and 75% are" in said[0]
    assert logged["eval_f1"] == 0.0 and logged["eval_roc_auc"] == 0.5
    assert all(math.isfinite(value) for value in logged.values())
    watch.score = lambda _: [[1.0, 0.0]] * 3 + [[0.0, 1.0]]
    watch.evaluate(pytest.fail)
    assert len(said) == 1
    # Where the posts have one label only, that answer is right.
    watch.truth, watch.score = [0] * 4, lambda _: [[1.0, 0.0]] * 4
    watch.evaluate(pytest.fail)
    assert len(said) == 1


def test_reweighting_posts_without_groups_says_what_it_balances(
    train: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    args = train.parse_args(REWEIGHTED)
    rows = [{"label": label, "target_groups": []} for label in ("normal", "normal", "hate")]
    data = train.Data(rows, [], ["normal", "hate"], "hate", [], None, None, {})
    assert [cell["weight"] for cell in train.record_cells(args, data)] == [1.5, 0.75]
    assert "has target_groups, so the labels alone are balanced" in capsys.readouterr().out
    rows[0]["target_groups"] = ["lgbtq"]
    train.record_cells(args, data)
    assert "the labels alone" not in capsys.readouterr().out


@pytest.mark.parametrize(("only", "unknown"), [("hate", "FPR"), ("normal", "F1, FNR")])
def test_posts_of_one_label_are_named_at_the_start(
    train: ModuleType, capsys: pytest.CaptureFixture, only: str, unknown: str
) -> None:
    rows = [{"label": only}] * 3
    both = [*rows, {"label": "other"}]
    for training, validation, lines in ((rows, rows, 2), (both, rows, 1), (both, [], 0)):
        data = train.Data(training, validation, ["normal", "hate"], "hate", [], None, None, {})
        train.warn_of_one_label(data)
        said = capsys.readouterr().out
        assert said.count("WARNING: all 3 ") == said.count("\n") == lines
        assert (f"AUROC, balanced accuracy, macro F1, {unknown} cannot" in said) == (lines > 0)


# --- samples ---------------------------------------------------------------------------------


def test_samples_are_shown_without_a_real_post_and_change_nothing(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    # What an earlier test of the same process left: the run's own defaults stay in its environment.
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    weights = {}
    for name, more in {
        "off": ["--sample_steps", "0"],
        "on": ["--sample_steps", "2", "--report_to", "wandb"],
        "text": ["--sample_steps", "2", "--log_text"],
    }.items():
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / name))
        (tmp_path / name).mkdir()
        out = tmp_path / name / "out"
        argv = flags(files, "llama", out, *LAST_WEIGHTS, "--lora_dropout", "0.3", *more)
        train.main(argv)
        printed = capsys.readouterr().out
        weights[name] = (out / "adapter_model.safetensors").read_bytes()
        samples = [line for line in printed.splitlines() if line.startswith("sample at step ")]
        log = (out / "training.log").read_text()
        assert len(samples) == (0 if name == "off" else 16)
        assert all(line in log for line in samples)
        assert (CANARY in printed + log) == (name == "text")
        if samples:
            assert (
                "p(hate) 0." in samples[0] and " tokens, " in samples[0] and " ms; " in samples[0]
            )
    assert weights["off"] == weights["on"] == weights["text"]

    import wandb

    wandb.finish()
    kept = list((tmp_path / "on/wandb").glob("offline-run-*/**/*"))
    tables = sorted(path for path in kept if path.name.endswith(".table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"][:4] == ["step", "prompt", "answer", "p_hate"]
    assert table["columns"][4:] == ["label", "tokens", "latency_ms"]
    for row, post in zip(table["data"], train.SAMPLE_POSTS, strict=True):
        assert row[0] == 2 and post in row[1] and 0 < row[3] < 1 and row[5] > 0 and row[6] > 0
    recorded = b"".join(path.read_bytes() for path in kept if path.is_file())
    assert b"eval/roc_auc" in recorded and b"eval/mexican_false_negative_rate" in recorded
    assert CANARY.encode() not in recorded


def test_samples_are_mild_and_name_no_group(train: ModuleType) -> None:
    names = [name for _, names in tiny.GROUPS.values() for name in names]
    for post in train.SAMPLE_POSTS:
        assert not any(name.lower() in post.lower() for name in names)


# --- stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["loss", "gradient", "validation"])
def test_a_loss_that_is_not_finite_stops_the_run_and_the_command_goes_on_before_it(
    train: ModuleType,
    alice: Hub,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    broken: str,
) -> None:
    """At step 4, where a checkpoint is due; the one of step 2 stays, here and on the Hub."""
    import torch
    from transformers import Trainer

    repo = f"alice/live-{broken}"
    on_hub = broken == "loss"
    argv = flags(files, "bert", tmp_path / "out", *CLASSIFY, "--early_stopping_patience", "3")
    argv += ["--hub_model_id", repo] if on_hub else []
    step, loop = Trainer.training_step, Trainer.evaluation_loop

    def broken_step(trainer: Any, *values: Any, **options: Any) -> Any:
        loss = step(trainer, *values, **options)
        if trainer.state.global_step == 3 and broken == "gradient":
            weight = next(one for one in trainer.model.parameters() if one.grad is not None)
            weight.grad[0] = math.inf
        nan = trainer.state.global_step == 3 and broken == "loss"
        return loss * math.nan if nan else loss

    def broken_loop(trainer: Any, *values: Any, **options: Any) -> Any:
        output = loop(trainer, *values, **options)
        if trainer.state.global_step == 4 and broken == "validation":
            output.metrics["eval_loss"] = math.inf
        return output

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", broken_step)
        patched.setattr(Trainer, "evaluation_loop", broken_loop)
        message = refusal(train, capsys, argv, 1)
    assert "not finite" in message and "at step 4 of 4" in message
    assert "goes on from checkpoint-2" in message and "lower --learning_rate" in message
    assert not list((tmp_path / "out").glob("checkpoint-4/manifest.json"))
    assert "nothing of this step is saved" in (tmp_path / "out/training.log").read_text()
    if on_hub:
        there = {path.split("/")[0] for path in HfApi(token=alice.token).list_repo_files(repo)}
        assert "checkpoint-2" in there and "checkpoint-4" not in there
    train.main(argv)
    assert "resuming from checkpoint-2 " in capsys.readouterr().out
    contract = json.loads((tmp_path / "out/contract.json").read_text())
    assert contract["training"]["state"] == "complete" and contract["training"]["step"] == 4
    assert torch.isfinite(torch.tensor(contract["training"]["best_metric"]))


# --- cells -----------------------------------------------------------------------------------


def made_rows(counts: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
    """Rows of some cells in a mixed order; a group `a+b` is aimed at two."""
    rows = [
        {"target_groups": [] if group == "-" else group.split("+"), "label": label}
        for (group, label), count in counts.items()
        for _ in range(count)
    ]
    random.Random(1).shuffle(rows)
    return rows


COUNTS = {("a", "hate"): 900, ("a", "normal"): 60, ("b+a", "hate"): 25, ("-", "normal"): 3}


def test_weights_are_inverse_to_the_cells_capped_and_one_on_average(train: ModuleType) -> None:
    cells = train.group_cells(made_rows(COUNTS))
    counts = [len(cell.rows) for cell in cells]
    assert {cell.name: len(cell.rows) for cell in cells} == {
        "no_target/normal": 3,
        "a/hate": 900,
        "a/normal": 60,
        "a+b/hate": 25,
    }
    weights = dict(zip([cell.name for cell in cells], train.cell_weights(counts), strict=True))
    # Naive: 988 / (4 n) is 82 for three posts, so it is capped; then 958 / (3 n) is 12.8 for 25.
    assert weights["no_target/normal"] == weights["a+b/hate"] == train.MOST_WEIGHT
    assert weights["a/hate"] == pytest.approx((988 - 280) / 2 / 900)
    assert weights["a/normal"] == pytest.approx((988 - 280) / 2 / 60)
    total = sum(weights[cell.name] * len(cell.rows) for cell in cells)
    assert total / sum(counts) == pytest.approx(1)
    assert train.cell_weights([10, 10]) == [1, 1]
    for seed in range(200):
        counts = [random.Random(seed + one).randint(1, 4 ** (1 + one % 6)) for one in range(9)]
        weights = train.cell_weights(counts)
        mean = sum(w * n for w, n in zip(weights, counts, strict=True)) / sum(counts)
        assert mean == pytest.approx(1) and 0 < max(weights) <= train.MOST_WEIGHT
        free = [w * n for w, n in zip(weights, counts, strict=True) if w < train.MOST_WEIGHT]
        assert max(free) == pytest.approx(min(free))


def test_an_epoch_draws_every_cell_equally_often(train: ModuleType) -> None:
    rows = made_rows(COUNTS)
    cells = train.group_cells(rows)
    sampler = train.GroupBalanced(cells, seed=3)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert list(sampler) == epochs[-1] and len(epochs[-1]) == len(sampler) == len(rows)
        of = {row: cell.name for cell in cells for row in cell.rows}
        assert set(Counter(of[row] for row in epochs[-1]).values()) == {247}
        drawn = Counter(epochs[-1])
        for cell in cells:
            times = [drawn[row] for row in cell.rows]
            assert max(times) - min(times) <= 1
    assert epochs[0] != epochs[1]
    assert list(train.GroupBalanced(cells, seed=4)) != epochs[0]
    uneven = train.GroupBalanced(train.group_cells(made_rows({("a", "x"): 5, ("b", "x"): 2})), 0)
    assert len(list(uneven)) == 7


@pytest.mark.parametrize("form", ["common-prompt", "padded", "all-logits", "classifier"])
def test_a_reweighted_loss_is_the_naive_one(
    train: ModuleType,
    evaluate: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    form: str,
) -> None:
    """One step on all posts, with a learning rate that changes nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    model = "bert" if form == "classifier" else "llama"
    more = CLASSIFY if form == "classifier" else []
    if form == "common-prompt":
        more = ["--share_prompt", "always"]
    if form == "padded":
        more = ["--share_prompt", "never"]
    if form == "classifier":
        copied = shutil.copytree(files / "bert", tmp_path / "bert")
        config = json.loads((copied / "config.json").read_text())
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (copied / "config.json").write_text(json.dumps(config))
        model = str(copied)
    if form == "all-logits":
        monkeypatch.setattr(train, "choose_logits", lambda *_: None)
    encoded: list[list[dict[str, Any]]] = []
    encode = train.encode_rows
    monkeypatch.setattr(train, "encode_rows", lambda *v: encoded.extend(encode(*v)) or encoded)
    more = [*more, "--reweight", "group_label", "--max_steps", "1", "--save_steps", "1"]
    more += ["--learning_rate", "1e-12", "--warmup_steps", "0", *LAST_WEIGHTS]
    more += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "3"]
    out = tmp_path / "out"
    train.main(flags(files, model, out, *more))
    printed = capsys.readouterr().out
    (loss,) = [entry["loss"] for entry in history(out) if "loss" in entry]
    assert ("prompt tokens once a step" in printed) == (form == "common-prompt")
    assert ("supervised tokens only" in printed) == (form in ("common-prompt", "padded"))

    rows = rows_of(files / "train.jsonl")
    cells = Counter((row["target_groups"][0], row["label"]) for row in rows)
    weights = [24 / len(cells) / cells[row["target_groups"][0], row["label"]] for row in rows]
    assert len(set(weights)) > 1 and sum(weights) == pytest.approx(24)
    recorded = json.loads((out / "contract.json").read_text())["training"]["cells"]
    assert [one["posts"] for one in recorded] == [cells[key] for key in sorted(cells)]
    assert "--reweight group_label: 6 cells of groups and label" in printed
    if form == "classifier":
        argv = ["--adapter", str(out), "--model_name_or_path", model]
        argv += ["--test_file", str(files / "train.jsonl"), "--output_dir", str(tmp_path / "e")]
        evaluate.main(argv)
        with (tmp_path / "e/predictions.csv").open(newline="") as file:
            p = [float(row["p_hate"]) for row in csv.DictReader(file)]
        losses = [
            -math.log(one if row["label"] == "hate" else 1 - one)
            for row, one in zip(rows, p, strict=True)
        ]
        expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / 24
        plain = sum(losses) / 24
    else:
        base = AutoModelForCausalLM.from_pretrained(files / "llama", dtype=torch.float32).eval()
        total = plain = tokens = 0.0
        for row, weight in zip(encoded[0], weights, strict=True):
            steps = base(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            for place, label in enumerate(row["labels"][1:]):
                if label != -100:
                    total -= weight * steps[place, label].item()
                    plain -= steps[place, label].item()
                    tokens += 1
        expected, plain = total / tokens, plain / tokens
    assert loss == pytest.approx(expected, abs=1e-5)
    assert abs(loss - plain) > 5e-4


@pytest.mark.parametrize(
    ("model", "more", "ranks"),
    [
        ("llama", [*REWEIGHTED, "--metric_for_best_model", "f1", "--lora_dropout", "0.1"], 1),
        ("bert", [*CLASSIFY, *BALANCED, "--gradient_accumulation_steps", "2"], 1),
        ("bert", [*CLASSIFY, *BALANCED], 2),
    ],
    ids=["reweight", "sampler", "sampler-two-processes"],
)
def test_a_balanced_run_that_is_killed_ends_as_the_whole_one(
    files: Path, tmp_path: Path, model: str, more: list[str], ranks: int
) -> None:
    """Three steps are an epoch, so step 4 lies in one; the starts show other samples."""
    rows = 8 // ranks // (2 if "--gradient_accumulation_steps" in more else 1)
    length = ["--max_steps", "6", "--early_stopping_patience", "9"]
    more = [*length, "--per_device_train_batch_size", str(rows), *more]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    work = train_in_process if ranks == 1 else train_in_two

    def run(out: Path, dies_in: int | None, *extra: str) -> str:
        argv = flags(files, model, out, *more, *extra)
        code, printed = in_process(out.with_name("log"), work, argv, dies_in)
        assert (code == 0) == (dies_in is None), printed
        return printed

    run(whole, None, "--sample_steps", "4")
    run(killed, 6, "--sample_steps", "0")
    assert "resuming from checkpoint-4 " in run(killed, None, "--sample_steps", "5")
    assert history(killed) == history(whole) and end(killed) == end(whole)
    assert sum("eval_f1" in entry for entry in history(whole)) == 3


# --- the line of progress --------------------------------------------------------------------


def test_a_line_of_progress_tells_speed_share_of_the_peak_and_money(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    layer = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16 + 2 * 8
    assert train.body_parameters(config) == 2 * layer + 8
    clock = [1000.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(train, "machine_peak", lambda *_: (1e6, "the 1e-06 TFLOP/s of a test"))
    settings = argparse.Namespace(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        device=torch.device("cpu"),
        bf16=True,
        fp16=False,
    )
    trainer = SimpleNamespace(
        args=settings,
        train_dataset={"input_ids": [[1] * 10, [1] * 20]},
        _total_train_tokens=5,
        speed=train.Speed(),
    )
    job = SimpleNamespace(dollars_per_hour=2.5, dollars=lambda: 1.25)
    meter = train.Meter(trainer, config, "bfloat16", job, 0.5)
    meter.began(4)
    clock[0] += 12
    meter.aside = 2.0
    trainer._total_train_tokens = 2005
    tokens, share, money = meter.read(14)
    assert tokens == "200 tokens/s" and money == "1.75 $ so far"
    part = 100 * 4 * train.body_parameters(config) * 200 / 1e6
    assert share == f"{part:.1f} % of the 1e-06 TFLOP/s of a test"
    # What is computed once or not at all is no work: 8 prompt tokens, the last layer's MLP.
    trainer.speed = train.Speed(prompt_tokens=8, last_layer="labelled")
    trainer.last_parts = [torch.nn.Linear(8, 3 * 16, bias=False)]
    meter = train.Meter(trainer, config, "bfloat16", job, 0.5)
    meter.began(4)
    clock[0] += 10
    trainer._total_train_tokens = 4005
    part = 100 * 4 * (train.body_parameters(config) - 3 * 8 * 16) * (200 - 5 * 8) / 1e6
    assert meter.read(14)[1] == f"{part:.1f} % of the 1e-06 TFLOP/s of a test"
    del trainer._total_train_tokens
    meter.began(14)
    clock[0] += 10
    assert meter.read(24)[0] == f"{10 * 6 * 15 / 10:.0f} tokens/s"
    assert len(meter.read(24)) == 1


def test_the_peak_is_listed_by_name_or_measured(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    rate, origin = train.machine_peak(torch.device("cpu"), "float32")
    assert rate > 1e8 and origin.endswith("measured in float32")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    assert train.machine_peak(torch.device("cuda"), "bfloat16")[0] == 121e12


def test_only_the_experts_that_a_token_is_sent_to_count(train: ModuleType) -> None:
    from transformers import MixtralConfig

    sizes = {
        "vocab_size": 50, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    }  # fmt: skip
    some, more = (MixtralConfig(**sizes, num_local_experts=count) for count in (2, 8))
    routers = 6 * 8
    assert train.body_parameters(more) == train.body_parameters(some) + routers


@pytest.mark.gpu
def test_a_line_of_progress_tells_the_memory_of_the_gpu(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    train.main(flags(files, "llama", tmp_path / "out", "--sample_steps", "2", *BALANCED))
    printed = capsys.readouterr().out
    assert " GiB" in printed and " tokens/s, " in printed and "sample at step 2" in printed


def test_tensorboard_gets_the_figures(train: ModuleType, files: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    more = ("--report_to", "tensorboard", "--calibration_fraction", "0")
    train.main(flags(files, "bert", out, *CLASSIFY, *more))
    events = EventAccumulator(str(out / "runs"))
    events.Reload()
    assert {"eval/f1", "eval/roc_auc"} <= set(events.Tags()["scalars"])


# --- starts ----------------------------------------------------------------------------------


def test_a_start_says_what_its_launcher_made(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    train.say_processes()
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    train.say_processes()
    said = capsys.readouterr().out
    assert "accelerate launch" in said and "1 process" in said and "torchrun" in said
    monkeypatch.setattr(train, "WORLD_SIZE", 4)
    train.say_processes()
    assert capsys.readouterr().out == "accelerate launch: 4 processes\n"
