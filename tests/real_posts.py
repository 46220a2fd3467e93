"""Measure the chain on real posts: build, train an encoder with LoRA, evaluate, print the table.

    python tests/real_posts.py --hatexplain dataset.json.gz \
        --hatexplain_splits post_id_divisions.json --toxigen annotated_train.csv.gz \
        --encoder FOLDER --dir OUT

Needs the packages of requirements.txt, local copies of the official files, and a pretrained
encoder as a folder. Everything is local: no token, no network. The row `frozen encoder` is
logistic regression on the encoder's mean-pooled embeddings, the same posts and splits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny import ROOT, load_script

TRAINING = [
    *("--task", "classify", "--lora_target_modules", "all-linear", "--lora_r", "16"),
    *("--learning_rate", "5e-4", "--num_train_epochs", "3", "--warmup_steps", "0.06"),
    *("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1"),
    *("--max_length", "128", "--save_steps", "106", "--early_stopping_patience", "6"),
    *("--early_stopping_threshold", "0", "--train_sampling_strategy", "group_by_length"),
    *("--metric_for_best_model", "roc_auc"),
    *("--bf16", "true", "--logging_steps", "53", "--report_to", "none"),
]


def run(script: str, *flags: str) -> None:
    """Run a script as a user does; its output passes through."""
    subprocess.run([sys.executable, str(ROOT / script), *flags], check=True)


def embed(folder: Path, texts: list[str]) -> Any:
    """Mean-pooled last hidden states of the frozen encoder, shape texts x hidden size."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    pooled = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(
            texts[start : start + 64],
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(pooled).numpy()


def frozen_encoder(folder: Path, data: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """The figures of logistic regression on frozen embeddings, in the shape of metrics.json."""
    from sklearn.linear_model import LogisticRegression

    evaluation = load_script("eval/eval.py")
    repo = evaluation.open_repo(str(data), "dataset")
    rows = {split: evaluation.read_rows(repo, "unified", split) for split in ("train", "test")}
    labels = {split: [row["label"] for row in posts] for split, posts in rows.items()}
    model = LogisticRegression(max_iter=2000)
    model.fit(embed(folder, [row["text"] for row in rows["train"]]), labels["train"])
    column = list(model.classes_).index(metrics["positive_label"])
    scores = model.predict_proba(embed(folder, [row["text"] for row in rows["test"]]))[:, column]
    others = [label for label in metrics["labels"] if label != metrics["positive_label"]]
    predicted = [metrics["positive_label"] if score >= 0.5 else others[0] for score in scores]
    groups = [group for group in metrics["strategies"][0]["groups"] if group != "no_target"]
    answers = evaluation.Answers("frozen encoder", "baseline", predicted, scores.tolist())
    members = evaluation.group_members(rows["test"], groups)
    labels_, positive = metrics["labels"], metrics["positive_label"]
    sample = evaluation.build_sample(labels_, positive, labels["test"], members, [answers])
    counted, ranked = (
        find(sample, [], 42) for find in (evaluation.count_intervals, evaluation.rank_intervals)
    )
    return evaluation.build_strategy(sample, answers, ranked, counted, 42)


def shown(figure: dict[str, Any]) -> str:
    """A figure with its 95 % interval, where it has one."""
    if figure["low"] is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def print_table(strategies: list[dict[str, Any]], positive: str) -> None:
    """A Markdown table: F1, AUROC, and the worst group's false positive rate with its interval."""
    print(f"| strategy | F1 {positive} | AUROC | worst group's false positive rate |")
    print("|---|---|---|---|")
    for strategy in strategies:
        if strategy["overall"] is None:
            continue
        rates = {
            group: figures["false_positive_rate"]
            for group, figures in strategy["groups"].items()
            if figures["false_positive_rate"]["value"] is not None
        }
        worst = max(rates, key=lambda group: rates[group]["value"])
        rate = rates[worst]
        print(
            f"| {strategy['name']} | {shown(strategy['overall'][f'f1_{positive}'])} "
            f"| {shown(strategy['overall']['roc_auc'])} "
            f"| {worst} {100 * rate['value']:.1f} % [{100 * rate['low']:.1f}, "
            f"{100 * rate['high']:.1f}], n {rate['n']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("hatexplain", "hatexplain_splits", "toxigen", "encoder", "dir"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    work = Path(args.dir).resolve()
    data, adapter, encoder = work / "data", work / "adapter", Path(args.encoder).resolve()
    sources = ("hatexplain", "hatexplain_splits", "toxigen")
    flags = [part for name in sources for part in (f"--{name}", vars(args)[name])]
    run("datasets/build_unified.py", *flags, "--dataset_repo", str(data))
    common = ("--dataset_repo", str(data), "--model_name_or_path", str(encoder))
    run("train/train.py", *common, "--output_dir", str(adapter), *TRAINING)
    report = ("--eval_name", "test", "--evasion", "--identity_swap", "--prevalence", "0.01", "0.1")
    run("eval/eval.py", "--adapter", str(adapter), *common, *report)
    file = adapter / "eval" / "test" / "metrics.json"
    metrics = json.loads(file.read_text(encoding="utf-8"))
    strategies = [*metrics["strategies"], frozen_encoder(encoder, data, metrics)]
    print_table(strategies, metrics["positive_label"])


if __name__ == "__main__":
    main()
