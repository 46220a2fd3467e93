"""Compare train/train.py's LoRA classifier with a stock full fine-tune of the same encoder.

    python tests/bench_quality.py --dataset_repo ./hsd-data --encoder FOLDER --dir OUT

Needs the packages of requirements.txt, a folder of datasets/build_unified.py and a pretrained
encoder as a folder. Everything is local: no token, no network.

For each seed, on the same posts: train/train.py with the flags of tests/real_posts.py, and
transformers' Trainer with its defaults (all weights, learning rate 5e-5, batches of 8, 3 epochs,
linear decay). Of both the weights with the best AUROC of six evaluations on the validation posts
are kept; the threshold is 0.5. TF-IDF + logistic regression is eval.py's baseline. What differs is
said by eval/compare.py, which pools the seeds and pairs the posts. The same command again takes up
what has ended.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from real_posts import TRAINING, run
from tiny import load_script

# Both sides choose on all validation posts.
SELECTION = ("--calibration_fraction", "0")
EVALUATIONS = 6


def read_posts(data: Path) -> dict[str, list[dict[str, Any]]]:
    """The splits of the configuration that classifiers are trained on."""
    evaluation = load_script("eval/eval.py")
    repo = evaluation.open_repo(str(data), "dataset")
    splits = ("train", "validation", "test")
    return {split: evaluation.read_rows(repo, "unified", split) for split in splits}


def full_fine_tune(data: Path, encoder: Path, seed: int, out: Path) -> None:
    """A stock Trainer over all weights; its predictions of the test posts as JSONL."""
    import transformers
    from datasets import Dataset
    from sklearn.metrics import roc_auc_score

    posts, labels = read_posts(data), ["normal", "hate"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    sets = {}
    for split, rows in posts.items():
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=128)
        sets[split] = Dataset.from_dict(
            {**encoded, "labels": [labels.index(row["label"]) for row in rows]}
        )

    def figures(found: Any) -> dict[str, float]:
        margins = found.predictions[:, 1] - found.predictions[:, 0]
        return {"roc_auc": roc_auc_score(found.label_ids, margins)}

    settings = transformers.TrainingArguments(
        str(out / "trainer"),
        seed=seed,
        eval_strategy="steps",
        eval_steps=1 / EVALUATIONS,
        save_strategy="steps",
        save_steps=1 / EVALUATIONS,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="roc_auc",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    transformers.set_seed(seed)
    trainer = transformers.Trainer(
        transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2),
        settings,
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=figures,
    )
    trainer.train()
    logits = trainer.predict(sets["test"]).predictions.astype("float64")
    scores = [1 / (1 + math.exp(normal - hate)) for normal, hate in logits]
    write_scores(out / "predictions.jsonl", posts["test"], scores)


def words(data: Path, out: Path) -> None:
    """The scores of eval.py's TF-IDF + logistic regression."""
    posts, model = read_posts(data), load_script("eval/eval.py").words_model()
    model.fit(*([row[key] for row in posts["train"]] for key in ("text", "label")))
    scores = model.predict_proba([row["text"] for row in posts["test"]])
    write_scores(out, posts["test"], scores[:, list(model.classes_).index("hate")].tolist())


def write_scores(file: Path, posts: list[dict[str, Any]], scores: list[float]) -> None:
    """Ids, labels, groups and p(hate), as eval/compare.py reads them."""
    kept = [{key: row[key] for key in ("id", "label", "target_groups")} for row in posts]
    lines = [
        json.dumps(row | {"score": score}) + "\n" for row, score in zip(kept, scores, strict=True)
    ]
    file.write_text("".join(lines), encoding="utf-8")


def one_run(options: argparse.Namespace, kind: str, seed: int) -> Path:
    """Train and predict in a process of its own; return the folder or file of predictions."""
    out = options.dir / f"{kind}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    common = ("--dataset_repo", str(options.dataset_repo))
    if kind == "full" and not (out / "predictions.jsonl").exists():
        again = ("--encoder", str(options.encoder), "--dir", str(out), "--full_seed", str(seed))
        subprocess.run([sys.executable, __file__, *common, *again], check=True)
    if kind == "full":
        return out / "predictions.jsonl"
    base = ("--model_name_or_path", str(options.encoder))
    seeded = ("--seed", str(seed), "--output_dir", str(out))
    run("train/train.py", *common, *base, *TRAINING, *SELECTION, *seeded)
    run("eval/eval.py", "--adapter", str(out), *common, *base, "--eval_name", "test")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("dataset_repo", "encoder", "dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--at_once", type=int, default=os.cpu_count(), help="runs beside another")
    parser.add_argument("--full_seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("dataset_repo", "encoder", "dir"):
        setattr(options, name, getattr(options, name).resolve())
    if options.full_seed is not None:
        full_fine_tune(options.dataset_repo, options.encoder, options.full_seed, options.dir)
        return
    # Each run has one thread, so that they do not disturb each other.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    wanted = [(kind, seed) for kind in ("lora", "full") for seed in options.seeds]
    with ThreadPoolExecutor(options.at_once) as pool:
        found = [*pool.map(lambda which: one_run(options, *which), wanted)]
    paths = [str(path) for path in found]
    ours, theirs = paths[: len(options.seeds)], paths[len(options.seeds) :]
    baseline = options.dir / "tfidf.jsonl"
    words(options.dataset_repo, baseline)
    pools = ("--pool", ",".join(ours), "--pool", ",".join(theirs))
    out = ("--output_dir", str(options.dir / "compare"))
    run("eval/compare.py", *ours, *theirs, str(baseline), *pools, *out)


if __name__ == "__main__":
    main()
