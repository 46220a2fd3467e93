# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate==1.15.0",
#     "datasets==5.2.0",
#     "huggingface-hub==2.4.0",
#     "jinja2==3.1.6",
#     "peft==0.21.2",
#     "scikit-learn==1.9.1",
#     "scipy==1.17.1",
#     "torch==2.13.0",
#     "transformers==5.23.0",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-20T00:00:00Z"
#
# [tool.hf-jobs]
# flavor = "a100-large"
# timeout = "1h"
# name = "hsd-eval"
# secrets = ["HF_TOKEN"]
# ///
"""Score posts with an adapter and report its errors, overall and per protected group.

Reads:  the adapter repo (contract.json, adapter; default {you}/hsd-lora), its base model and its
        dataset at the recorded commits, or a local --test_file.
Writes: --output_dir and eval/NAME/ of the adapter repo: predictions.csv (ids and scores, no text),
        performance_metrics.csv, bias_metrics.csv, metrics.json, report.html, report.md and
        contract.json.

    hf jobs uv run --flavor a100-large eval/eval.py --adapter user/hsd-lora
    uv run eval/eval.py --adapter user/hsd-lora

A post's score is the likelihood of each label as the answer, normalised over the labels; no text
is generated. Running it again scores again and replaces the files of the same NAME.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

SCRIPT = "eval/eval.py"
SCHEMA = 1
CONTRACT = "contract.json"
# Variables with these names are read as they stand; every other flag is HSD_<FLAG>, because an
# unprefixed SEED or TASK in somebody's shell must not change an audited run.
PLAIN_VARIABLES = ("DATASET_REPO", "HUB_MODEL_ID", "MAX_STEPS")
# What a run shows its tokenizer and template to prove that they are those of another run.
PROBE_POST = "My neighbours moved in last week, said <|endoftext|> nobody. 42 % é \u4f60\u597d"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
LABELS, POSITIVE_LABEL = ["normal", "hate"], "hate"
# Also the strategy of a local training file of posts, which brings no prompt of its own.
INSTRUCTION = {
    "description": "instruction, post and classification under headings; needs no chat template",
    "system": "",
    "user": (
        "### Instruction:\nDecide whether the post is hate speech: an attack on people, or a call "
        "for one, because of a group they belong to. Reporting, quoting in order to object, and "
        "plain mentions of a group are no hate speech. Answer {labels}.\n\n"
        "### Post:\n{text}\n\n### Classification:"
    ),
    "answer": "{label}",
}
# Everything that an evaluation writes, the proof that it is whole last.
FILES = (
    *("predictions.csv", "performance_metrics.csv", "bias_metrics.csv", "metrics.json"),
    *("report.html", "report.md", CONTRACT),
)
# The row of the posts that are aimed at no group.
NO_TARGET = "no_target"
# The last four are the wide forms, which some spreadsheets also read.
FORMULA_SIGNS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
CONFUSION = ("true_positive", "true_negative", "false_positive", "false_negative")
LIMITS = (
    "An interval (95 %, Wilson) says how far a rate could move if other posts of the same kind "
    "were drawn. It knows nothing of wrong labels, of unlike posts, or of a platform's real mix.",
    "Groups differ in their posts, not only in how the model treats them, and their rates differ "
    "by chance: with 90 posts in each, a gap of ten points is nothing unusual.",
    "A post that is aimed at several groups counts in each of them, so the rows overlap.",
    "A rate without a post to count is undefined, not zero.",
    "F1 rises with the share of the positive label: compare it with the constant baselines here, "
    "not with figures from other data.",
    "The labels are the judgement of the dataset's annotators. This is a research measurement, "
    "not a licence to remove posts unattended.",
)


def build_parser() -> Parser:
    """The flags; the report's command leaves out those at their defaults."""
    switch: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "default": False}
    parser = Parser(prog=SCRIPT, description=__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--adapter", help="Hub id[@revision] or folder ({you}/hsd-lora)")
    model.add_argument("--model_name_or_path", help="base model (the adapter's own)")
    model.add_argument("--model_revision", help="branch, tag or commit of the base model")
    model.add_argument("--base_only", **switch, help="score the base model without the adapter")
    model.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    model.add_argument("--tokens_per_batch", type=int, default=8192, help="padding included")
    model.add_argument("--allow_cpu", **switch, help="run a large model without a GPU")
    data = parser.add_argument_group("posts")
    data.add_argument("--dataset_repo", help="Hub id[@revision] or folder (the adapter's own)")
    data.add_argument("--split", default="test")
    data.add_argument("--test_file", help="JSONL of text, label, optional id and target_groups")
    data.add_argument("--prompt", help="prompt strategy of the dataset (the trained one)")
    data.add_argument("--max_samples", type=int, help="the first N posts of a seeded shuffle")
    data.add_argument("--max_length", type=int, help="tokens; a longer post is cut (as trained)")
    data.add_argument("--threshold", type=float, default=0.5, help="of the positive label's p")
    data.add_argument("--seed", type=int, default=42)
    output = parser.add_argument_group("output")
    output.add_argument("--eval_name", help="folder below eval/ (the split or the file's stem)")
    output.add_argument("--output_dir", help="(ADAPTER/eval/NAME or ./hsd-eval/REPO/NAME)")
    output.add_argument(
        "--push", **(switch | {"default": None}), help="(if the adapter has a repo)"
    )
    output.add_argument("--allow_public", **switch, help="push to a public repo")
    output.add_argument("--log_text", **switch, help="write the posts into predictions.csv")
    output.add_argument("--config_file", help="JSON or YAML file of these flags")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = resolve_arguments(build_parser(), argv)
    if not 0 <= args.threshold <= 1:
        fail(f"--threshold {args.threshold} is no probability.")
    for name in ("tokens_per_batch", "max_samples", "max_length"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            fail(f"--{name} {vars(args)[name]} is not positive.")
    alone = args.base_only and not args.adapter
    if alone and not (args.model_name_or_path and (args.dataset_repo or args.test_file)):
        fail(
            "--base_only without --adapter needs --model_name_or_path and the posts: "
            "--dataset_repo or --test_file."
        )
    if args.eval_name and not re.fullmatch(r"\w[\w.-]*", args.eval_name, re.ASCII):
        fail(f"--eval_name {args.eval_name!r}: use letters, digits, dots, dashes, underscores.")
    return args


def main(argv: list[str] | None = None) -> None:
    quiet_libraries()
    args = parse_args(argv)
    adapter, contract = open_subject(args)
    pushes = check_push(args, adapter)
    dataset = open_dataset(args, contract)
    task = build_task(args, contract, dataset)
    posts = read_posts(args, contract, task, dataset)
    training, no_training = read_training_posts(args, task, dataset)
    base = pick_base(args, contract)
    config = read_base_config(base)
    device = check_device(count_parameters(config), args.allow_cpu, job_command(args, adapter))
    tokenizer = load_tokenizer(adapter or base)
    encoded, answers = encode_posts(tokenizer, task, contract, posts)
    name, target = name_output(args, adapter)
    with draft_folder(target) as draft:
        dtype = choose_dtype(args.dtype, device)
        model = load_model(args, task, base, config, adapter, tokenizer, dtype, device)
        scores = score_posts(model, tokenizer, encoded, answers, args.tokens_per_batch)
        for post, row in zip(posts, scores, strict=True):
            post["probabilities"] = dict(zip(task.labels, row, strict=True))
            post["prediction"] = decide(post["probabilities"], task, args.threshold)
        metrics = build_metrics(task, posts, training, no_training, args.threshold)
        record = build_record(args, contract, [adapter, base, dataset], task, metrics)
        record |= {"name": name, "dtype": dtype, "device": device_name(device)}
        write_files(draft, args, task, posts, metrics, record)
        publish_draft(draft, target)
    print_summary(metrics)
    print(f"report: {target / 'report.html'}", flush=True)
    if adapter and pushes:
        push_files(adapter, name, target)


# --- what is scored --------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What is asked of the model: the adapter's contract and the arguments that override it.

    `prompt` is None for a sequence classifier.
    """

    name: str
    labels: list[str]
    positive: str
    groups: list[str]
    prompt: dict[str, str] | None
    max_length: int
    date: str
    effort: str

    @property
    def negative(self) -> str:
        """What a post is that does not have the positive label."""
        others = [label for label in self.labels if label != self.positive]
        return others[0] if len(others) == 1 else f"not {self.positive}"


def open_subject(args: argparse.Namespace) -> tuple[Repo | None, dict[str, Any]]:
    """The adapter and its contract; None and an empty one for a base model alone."""
    if args.base_only and not args.adapter:
        return None, {}
    adapter, contract = open_adapter(args.adapter or f"{own_namespace()}/hsd-lora")
    needed = ("task", "labels", "positive_label", "groups", "base_model", "dataset", "prompt")
    missing = [key for key in (*needed, "rendering", "training") if key not in contract]
    if missing:
        fail(f"{CONTRACT} of {adapter.name} lacks {', '.join(missing)}. Run its stage again.")
    if args.base_only and contract["task"] == "classify":
        fail("--base_only scores a language model; a classifier's base has no trained head.")
    training = contract["training"]
    print(
        f"adapter {adapter.name} at {adapter.revision or 'its folder'}, training "
        f"{training['state']} at step {training['step']}",
        flush=True,
    )
    return adapter, contract


def check_push(args: argparse.Namespace, adapter: Repo | None) -> bool:
    """Say whether the files will be pushed, after proof that this token may."""
    has_repo = adapter is not None and adapter.folder is None
    if args.push and not has_repo:
        fail("--push has no repo to push to: give the adapter by its Hub id.")
    if not has_repo or args.push is False:
        return False
    prepare_repo(adapter.name, "model", "adapter", args.allow_public)
    return True


def open_dataset(args: argparse.Namespace, contract: dict[str, Any]) -> Repo | None:
    """The dataset that the arguments name, or the adapter's at the commit it was trained on.

    With --test_file it only serves the baselines, and None says that there is none to open.
    """
    recorded = contract.get("dataset") or {}
    trained_on = recorded.get("repo", recorded.get("file"))
    if args.dataset_repo:
        if trained_on:
            print(f"dataset {args.dataset_repo} overrides {trained_on} of the contract", flush=True)
        return open_repo(args.dataset_repo, "dataset")
    if recorded.get("revision") is None:
        if args.test_file:
            return None
        fail(
            f"the adapter was trained on the local {trained_on!r}: say what to score with "
            "--dataset_repo or --test_file."
        )
    name = f"{trained_on}@{recorded['revision']}"
    if args.test_file and not is_readable(name):
        return None
    print(f"dataset {name} (from the contract)", flush=True)
    return open_repo(name, "dataset")


def is_readable(dataset: str) -> bool:
    """Say whether this machine and token can read a dataset repo."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi

    name, _, revision = dataset.partition("@")
    try:
        HfApi().repo_info(name, repo_type="dataset", revision=revision)
    except (HTTPError, OSError):
        return False
    return True


def build_task(args: argparse.Namespace, contract: dict[str, Any], dataset: Repo | None) -> Task:
    """Labels, groups, prompt and rendering, printed with where they come from."""
    prompt = choose_prompt(args, contract, dataset)
    if contract:
        origin, source = "the adapter's contract", contract
    elif dataset:
        origin, source = f"the contract of {dataset.name}", read_contract(dataset, "dataset")
    else:
        origin = "the defaults"
        source = {"labels": LABELS, "positive_label": POSITIVE_LABEL, "groups": []}
    rendering = contract.get("rendering", {})
    task = Task(
        name=prompt["name"] if prompt else "classify",
        labels=source["labels"],
        positive=source["positive_label"],
        groups=source["groups"],
        prompt=prompt,
        max_length=args.max_length or rendering.get("max_length", 512),
        date=rendering.get("date", datetime.now(UTC).date().isoformat()),
        effort=rendering.get("reasoning_effort", "low"),
    )
    if task.positive not in task.labels or len(task.labels) < 2:
        fail(f"{origin} names {task.positive!r} as the positive one of {task.labels}.")
    summary = (
        f"labels {', '.join(task.labels)} (positive: {task.positive}), groups "
        f"{', '.join(task.groups) or 'none'} (from {origin}); strategy {task.name}, "
        f"max_length {task.max_length}"
    )
    print(visible(summary, 1000), flush=True)
    return task


def choose_prompt(
    args: argparse.Namespace, contract: dict[str, Any], dataset: Repo | None
) -> dict[str, str] | None:
    """The prompt strategy: the trained one, or with --prompt another of the dataset's."""
    if contract.get("task") == "classify":
        if args.prompt:
            fail(f"--prompt {args.prompt}: the adapter is a sequence classifier; it has no prompt.")
        return None
    trained = contract.get("prompt")
    if trained and args.prompt in (None, trained["name"]):
        return trained
    if trained:
        print(f"prompt {args.prompt} overrides {trained['name']} of the contract", flush=True)
    if dataset is None:
        if args.prompt not in (None, "instruction"):
            fail(f"a test file brings no prompt {args.prompt!r}: name its --dataset_repo.")
        return {"name": "instruction"} | {
            key: text.replace("{labels}", " or ".join(LABELS)) for key, text in INSTRUCTION.items()
        }
    name, prompts = args.prompt or "simple", read_contract(dataset, "dataset")["prompts"]
    if name not in prompts:
        fail(f"{dataset.name} has no prompt {name!r}. There are: {', '.join(prompts)}.")
    return {"name": name, **prompts[name]}


def read_posts(
    args: argparse.Namespace, contract: dict[str, Any], task: Task, dataset: Repo | None
) -> list[dict[str, Any]]:
    """The posts to score, checked."""
    if args.test_file:
        origin, columns = args.test_file, ("id", "text", "label", "target_groups")
        rows = read_jsonl(args.test_file, task.labels)
        posts = [{column: row.get(column) for column in columns} for row in rows]
    else:
        # A dataset other than the trained one may ask another question by the same name.
        another = contract and args.dataset_repo and not args.prompt
        config = task.name if task.prompt and not another else "unified"
        origin = f"{dataset.name} ({config}/{args.split})"
        posts = read_rows(dataset, config, args.split)
    check_posts(posts, origin)
    check_labels(posts, task.labels, origin)
    roles = [message["role"] for message in prompt_messages(task.prompt, "")] if task.prompt else []
    for post in posts:
        found = [message["role"] for message in post.get("prompt") or []]
        if task.prompt and found and found != roles:
            fail(f"post {post['id']} of {origin} has the roles {found}; the prompt's are {roles}.")
    if args.max_samples and args.max_samples < len(posts):
        random.Random(args.seed).shuffle(posts)
        posts = posts[: args.max_samples]
    counts = Counter(post["label"] for post in posts)
    listed = ", ".join(f"{counts[label]} {label}" for label in task.labels)
    print(f"{len(posts)} posts of {origin}: {listed}", flush=True)
    return posts


def check_posts(posts: list[dict[str, Any]], origin: str) -> None:
    """Make ids text and groups a list; end on a post without usable text."""
    for number, post in enumerate(posts, start=1):
        groups = post.get("target_groups") or []
        post["target_groups"] = groups if isinstance(groups, list) else [groups]
        post["id"] = str(post["id"])
        words = [post.get("text"), *post["target_groups"]]
        if not all(isinstance(word, str) for word in words):
            fail(f"post {number} of {origin} needs a `text`, and names as its `target_groups`.")
        try:
            "".join([post["id"], *words]).encode()
        except UnicodeEncodeError as error:
            fail(f"post {number} of {origin} is no valid Unicode: {error}")


def read_training_posts(
    args: argparse.Namespace, task: Task, dataset: Repo | None
) -> tuple[list[dict[str, Any]], str]:
    """The train split for the TF-IDF baseline, or no posts and the reason."""
    if dataset is None:
        return [], "there is no dataset with a train split"
    if args.split == "train" and not args.test_file:
        return [], "the scored split is the train split"
    from datasets import get_dataset_config_names, get_dataset_split_names

    place = str(dataset.folder) if dataset.folder else dataset.name
    with hub_errors(f"list the splits of {dataset.name}"):
        if "unified" not in get_dataset_config_names(place, revision=dataset.revision):
            return [], "the dataset has no config unified"
        if "train" not in get_dataset_split_names(place, "unified", revision=dataset.revision):
            return [], "the dataset has no train split"
    posts, origin = read_rows(dataset, "unified", "train"), f"{dataset.name} (unified/train)"
    check_posts(posts, origin)
    check_labels(posts, task.labels, origin)
    return posts, ""


def pick_base(args: argparse.Namespace, contract: dict[str, Any]) -> Repo:
    """The base model: the contract's, or the one that the arguments name."""
    if contract and not args.model_revision:
        return open_trained_base(args, contract)
    name = args.model_name_or_path or contract["base_model"]["repo"]
    if args.model_revision:
        name += f"@{args.model_revision}"
    print(f"base model {name} (from the arguments)", flush=True)
    return open_repo(name, "model")


def job_command(args: argparse.Namespace, adapter: Repo | None) -> str:
    """The command of this evaluation as a Job; a Job sees repos, not this machine's folders."""
    place = f"hf jobs uv run --flavor a100-large {SCRIPT}"
    if adapter:
        return f"{place} --adapter {'USER/' if adapter.folder else ''}{adapter.as_input()['repo']}"
    return f"{place} --base_only --model_name_or_path {args.model_name_or_path} ..."


# --- scores ----------------------------------------------------------------------------------


def encode_posts(
    tokenizer: Any, task: Task, contract: dict[str, Any], posts: list[dict[str, Any]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each post's prompt, and of each label's answer (for a classifier: no answers).

    Notes at each post whether it was `cut`. Ends where the tokenizer or the template is not that
    of the training.
    """
    if contract:
        trained = trained_scaffold(tokenizer, contract)
        found = probe_ids(tokenizer, trained, contract["prompt"])
        check_probe(tokenizer, found, contract["rendering"]["probe_ids"], "the adapter")
    if task.prompt is None:
        encoded = [encode_post(tokenizer, post["text"], task.max_length) for post in posts]
        answers: dict[str, list[int]] = {}
    else:
        roles = [message["role"] for message in prompt_messages(task.prompt, "")]
        scaffold = build_scaffold(tokenizer, roles, task.date, task.effort)
        answers = label_completions(tokenizer, scaffold, task.prompt["answer"], task.labels)
        if task.prompt == contract.get("prompt"):
            for label, ids in contract["rendering"]["label_completions"].items():
                check_probe(tokenizer, answers[label], ids, "the adapter")
        room = task.max_length - max(map(len, answers.values()))
        encoded = []
        for post in posts:
            messages = post.get("prompt") or prompt_messages(task.prompt, post["text"], post)
            encoded.append(encode_prompt(tokenizer, scaffold, messages, post["text"], room))
    for post, (_, cut) in zip(posts, encoded, strict=True):
        post["cut"] = cut
    return [ids for ids, _ in encoded], [answers[label] for label in task.labels if answers]


def choose_dtype(name: str, device: str) -> str:
    """`auto` is bfloat16 on a GPU that computes in it, else float32."""
    import torch

    if name != "auto":
        return name
    # Emulated bfloat16, as on a T4, is slower than float32.
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def load_model(
    args: argparse.Namespace,
    task: Task,
    base: Repo,
    config: Any,
    adapter: Repo | None,
    tokenizer: Any,
    dtype: str,
    device: str,
) -> Any:
    """The base model with the adapter on it, ready to score."""
    import torch

    kind = "causal" if task.prompt else "classify"
    model = load_base(base, config, kind, task.labels, getattr(torch, dtype), device)
    # A decoder with a classification head finds a row's last token by this id.
    model.config.pad_token_id = tokenizer.pad_token_id
    if adapter and not args.base_only:
        model = load_adapter(model, adapter, base)
    print(f"scoring on {device_name(device)} in {dtype}", flush=True)
    return model.eval()


def device_name(device: str) -> str:
    """The name of the GPU, or "cpu"."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


def score_posts(
    model: Any, tokenizer: Any, encoded: list[list[int]], completions: list[list[int]], budget: int
) -> list[list[float]]:
    """Probability of each label for each post, shape posts x labels, with a line of progress."""
    pad = tokenizer.pad_token_id or 0
    scores: list[list[float]] = []
    begun = reported = time.monotonic()
    for start in range(0, len(encoded), 1024):
        part = encoded[start : start + 1024]
        if completions:
            scores += score_completions(model, part, completions, pad, budget)
        else:
            scores += score_classes(model, part, pad, budget)
        if time.monotonic() - reported > 20 or len(scores) == len(encoded):
            reported = time.monotonic()
            rate = len(scores) / (reported - begun)
            print(f"scored {len(scores)} of {len(encoded)} posts, {rate:.1f}/s", flush=True)
    probabilities = [softmax(row) for row in scores]
    if any(math.isnan(p) for row in probabilities for p in row):
        fail("the model's scores are not numbers. Try --dtype float32.", code=1)
    return probabilities


def softmax(scores: list[float]) -> list[float]:
    """Probabilities from log-likelihoods or logits."""
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def decide(probabilities: dict[str, float], task: Task, threshold: float) -> str:
    """The predicted label: with two labels by the threshold, with more the likeliest."""
    if len(task.labels) > 2:
        return max(task.labels, key=probabilities.__getitem__)
    return task.positive if probabilities[task.positive] >= threshold else task.negative


# --- figures ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """One strategy's answers to all posts; without `predicted`, the reason why there are none."""

    strategy: str
    kind: str
    predicted: list[str] | None
    scores: list[float]
    reason: str | None = None


def share(part: int, whole: int, empty: str) -> dict[str, Any]:
    """A rate with its count and 95 % Wilson interval; null with the reason `empty` for 0 of 0."""
    from scipy.stats import binomtest

    if whole == 0:
        return {"value": None, "n": 0, "low": None, "high": None, "reason": empty}
    interval = binomtest(part, whole).proportion_ci(confidence_level=0.95, method="wilson")
    return {
        "value": part / whole,
        "n": whole,
        "low": float(interval.low),
        "high": float(interval.high),
        "reason": None,
    }


def number(value: float | None, n: int, reason: str) -> dict[str, Any]:
    """A figure that is no rate and has no interval here; null with a reason where undefined."""
    return {
        "value": None if value is None else float(value),
        "n": n,
        "low": None,
        "high": None,
        "reason": reason if value is None else None,
    }


def build_figures(
    truth: list[str], predicted: list[str], scores: list[float], task: Task
) -> dict[str, Any]:
    """Counts and figures of some posts, the positive label against the rest.

    `scores` are p of the positive label. F1 is 2 TP / (2 TP + FP + FN); macro F1 is the mean over
    labels and undefined where a label has no post.
    """
    from sklearn.metrics import f1_score, roc_auc_score

    pairs = Counter(
        (label == task.positive, answer == task.positive)
        for label, answer in zip(truth, predicted, strict=True)
    )
    tp, tn, fp, fn = (pairs[key] for key in ((1, 1), (0, 0), (0, 1), (1, 0)))
    labels = {label: truth.count(label) for label in task.labels}
    absent = [label for label, count in labels.items() if count == 0]
    correct = sum(label == answer for label, answer in zip(truth, predicted, strict=True))
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None
    macro = None
    if not absent:
        macro = f1_score(truth, predicted, labels=task.labels, average="macro", zero_division=0)
    both = tp + fn and tn + fp
    auc = roc_auc_score([label == task.positive for label in truth], scores) if both else None
    no_positive, no_negative = f"no {task.positive} posts", f"no {task.negative} posts"
    return {
        "n": len(truth),
        "labels": labels,
        **dict(zip(CONFUSION, (tp, tn, fp, fn), strict=True)),
        "accuracy": share(correct, len(truth), "no posts"),
        "precision": share(tp, tp + fp, "none predicted"),
        "recall": share(tp, tp + fn, no_positive),
        "false_positive_rate": share(fp, fp + tn, no_negative),
        "false_negative_rate": share(fn, fn + tp, no_positive),
        f"f1_{task.positive}": number(
            f1, len(truth), f"no {task.positive} posts and none predicted"
        ),
        "f1_macro": number(macro, len(truth), f"no {', '.join(absent)} posts"),
        "roc_auc": number(auc, len(truth), no_negative if tp + fn else no_positive),
    }


def group_members(posts: list[dict[str, Any]], groups: list[str]) -> dict[str, list[int]]:
    """Indices of each group's posts: the contract's groups, then others found, then no target.

    A post that is aimed at several groups stands in each.
    """
    found = {group for post in posts for group in post["target_groups"]}
    names = [*groups, *sorted(found - {*groups, NO_TARGET})]
    members: dict[str, list[int]] = {name: [] for name in [*names, NO_TARGET]}
    for index, post in enumerate(posts):
        for name in set(post["target_groups"]) or {NO_TARGET}:
            members[name].append(index)
    return members


def answer_baselines(
    task: Task, posts: list[dict[str, Any]], training: list[dict[str, Any]], no_training: str
) -> list[Answers]:
    """The same answer to every post, positive or the commonest other; TF-IDF and regression."""
    counts = Counter(post["label"] for post in posts)
    others = [label for label in task.labels if label != task.positive]
    baselines = []
    for label in (task.positive, max(others, key=lambda other: counts[other])):
        p = float(label == task.positive)
        name = f"always_{label}"
        baselines.append(Answers(name, "baseline", [label] * len(posts), [p] * len(posts)))
    reason, known = no_training, {post["label"] for post in training}
    if training and (len(known) < 2 or task.positive not in known):
        reason = f"the train split holds only {', '.join(sorted(known))} posts"
    if not reason:
        try:
            return [*baselines, answer_by_words(task, posts, training)]
        except ValueError as error:
            reason = f"TF-IDF cannot be fitted to the train split: {error}"
    return [*baselines, Answers("tfidf_lr", "baseline", None, [], reason)]


def answer_by_words(
    task: Task, posts: list[dict[str, Any]], training: list[dict[str, Any]]
) -> Answers:
    """The answers of `words_model`, fitted to the train split."""
    model = words_model()
    model.fit([post["text"] for post in training], [post["label"] for post in training])
    probabilities = model.predict_proba([post["text"] for post in posts])
    labels = [str(label) for label in model.classes_]
    predicted = [labels[row.argmax()] for row in probabilities]
    return Answers(
        "tfidf_lr", "baseline", predicted, probabilities[:, labels.index(task.positive)].tolist()
    )


def words_model() -> Any:
    """TF-IDF of words and parts of words, and logistic regression: what a laptop learns at once."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    return make_pipeline(
        make_union(
            TfidfVectorizer(ngram_range=(1, 2)),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5)),
        ),
        LogisticRegression(max_iter=1000),
    )


def build_metrics(
    task: Task,
    posts: list[dict[str, Any]],
    training: list[dict[str, Any]],
    no_training: str,
    threshold: float,
) -> dict[str, Any]:
    """Figures of the model and, after it, of the baselines: over all posts and per target group."""
    model = Answers(
        task.name,
        "model",
        [post["prediction"] for post in posts],
        [post["probabilities"][task.positive] for post in posts],
    )
    truth = [post["label"] for post in posts]
    members = group_members(posts, task.groups)
    baselines = answer_baselines(task, posts, training, no_training)
    return {
        "schema": SCHEMA,
        "labels": task.labels,
        "positive_label": task.positive,
        "negative": task.negative,
        "threshold": threshold if len(task.labels) == 2 else None,
        "n": len(posts),
        "cut_posts": sum(post["cut"] for post in posts),
        "strategies": [build_strategy(one, truth, members, task) for one in (model, *baselines)],
    }


def build_strategy(
    answers: Answers, truth: list[str], members: dict[str, list[int]], task: Task
) -> dict[str, Any]:
    """A strategy's entry in metrics.json; null figures where it gave no answers."""

    def figures_of(indices: list[int] | range) -> dict[str, Any] | None:
        if answers.predicted is None:
            return None
        return build_figures(
            [truth[index] for index in indices],
            [answers.predicted[index] for index in indices],
            [answers.scores[index] for index in indices],
            task,
        )

    return {
        "name": answers.strategy,
        "kind": answers.kind,
        "reason": answers.reason,
        "overall": figures_of(range(len(truth))),
        "groups": {name: figures_of(indices) for name, indices in members.items()},
    }


# --- files -----------------------------------------------------------------------------------


def csv_text(value: str) -> str:
    """Text that a spreadsheet does not take for a formula: an apostrophe goes before its sign."""
    return f"'{value}" if value.lstrip(" ").startswith(FORMULA_SIGNS) else value


def visible(text: str, most: int = 60) -> str:
    """Text as shown to people: control and direction characters as escapes, long text cut."""
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return text if len(text) <= most else f"{text[: most - 1]}…"


def markdown_cell(text: str) -> str:
    """Text as it stands in a Markdown table: no markup, no link, no image, no tag."""
    text = re.sub(r"([\\|`\[\]!*~])", r"\\\1", visible(text, 5000))
    for sign, entity in (("<", "&lt;"), (">", "&gt;"), ("://", "&#58;//"), ("www.", "www&#46;")):
        text = text.replace(sign, entity)
    return text


def write_csv(file: Path, header: list[str], rows: list[list[Any]]) -> None:
    """Write a CSV file in UTF-8; None is an empty cell, text is made safe for spreadsheets."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        for row in [header, *rows]:
            writer.writerow([csv_text(cell) if isinstance(cell, str) else cell for cell in row])


def write_predictions(file: Path, task: Task, posts: list[dict[str, Any]], with_text: bool) -> None:
    """One row a post: its labels, its probabilities, its groups, whether it was cut."""
    others = [label for label in task.labels if label != task.positive]
    shown = [task.positive, *(others if len(others) > 1 else [])]
    header = ["id", "label", "prediction", *(f"p_{label}" for label in shown), "target_groups"]
    rows = [
        [
            post["id"],
            post["label"],
            post["prediction"],
            *(post["probabilities"][label] for label in shown),
            "|".join(post["target_groups"]),
            str(post["cut"]).lower(),
            *([post["text"]] if with_text else []),
        ]
        for post in posts
    ]
    write_csv(file, [*header, "cut", *(["text"] if with_text else [])], rows)


def write_metric_tables(folder: Path, metrics: dict[str, Any]) -> None:
    """performance_metrics.csv (a row per strategy) and bias_metrics.csv (per strategy, group)."""
    overall = ("accuracy", "precision", "recall", f"f1_{metrics['positive_label']}")
    rates = ("false_positive_rate", "false_negative_rate")
    performance, bias = [], []
    for strategy in metrics["strategies"]:
        name, figures = strategy["name"], strategy["overall"]
        if figures is None:
            performance.append([name, *[None] * (len(overall) + len(CONFUSION))])
            bias += [[name, group, *[None] * 7] for group in strategy["groups"]]
            continue
        values = [figures[key]["value"] for key in overall]
        performance.append([name, *values, *(figures[key] for key in CONFUSION)])
        for group, figures in strategy["groups"].items():
            values = [figures[key]["value"] for key in rates]
            counts = [figures[key] for key in CONFUSION]
            bias.append([name, group, figures["n"], *values, *counts])
    header = ["strategy", "accuracy", "precision", "recall", "f1_score", *CONFUSION]
    write_csv(folder / "performance_metrics.csv", header, performance)
    header = ["strategy", "persona_tag", "sample_count", *rates, *CONFUSION]
    write_csv(folder / "bias_metrics.csv", header, bias)


def build_record(
    args: argparse.Namespace,
    contract: dict[str, Any],
    repos: list[Repo | None],
    task: Task,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """contract.json of an evaluation: what was scored, at which commits, with which outcome.

    `repos` are the adapter, the base model and the dataset.
    """
    adapter, base, dataset = (repo and repo.as_input() for repo in repos)
    test_file = None
    if args.test_file:
        file = Path(args.test_file).expanduser()
        test_file = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    figures = metrics["strategies"][0]["overall"]
    return stage_record("evaluation", SCRIPT, args, [repo for repo in repos if repo]) | {
        "adapter": adapter,
        "training": contract.get("training"),
        "base_model": base,
        "base_only": args.base_only,
        "dataset": dataset,
        "split": None if args.test_file else args.split,
        "test_file": test_file,
        "prompt": task.prompt,
        "rendering": {
            "date": task.date,
            "reasoning_effort": task.effort,
            "max_length": task.max_length,
        },
        "threshold": metrics["threshold"],
        "posts": metrics["n"],
        "cut_posts": metrics["cut_posts"],
        "headline": {name: figures[name]["value"] for name in figure_names(task.positive)},
    }


def write_files(
    folder: Path,
    args: argparse.Namespace,
    task: Task,
    posts: list[dict[str, Any]],
    metrics: dict[str, Any],
    record: dict[str, Any],
) -> None:
    """Write everything that an evaluation leaves behind."""
    from jinja2 import Environment

    write_predictions(folder / "predictions.csv", task, posts, args.log_text)
    write_metric_tables(folder, metrics)
    write_json(folder / "metrics.json", metrics)
    page = build_page(metrics, record)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    (folder / "report.html").write_text(template.render(page), encoding="utf-8")
    (folder / "report.md").write_text(build_markdown(page), encoding="utf-8")
    write_json(folder / CONTRACT, record)


def name_output(args: argparse.Namespace, adapter: Repo | None) -> tuple[str, Path]:
    """The evaluation's name and its folder here."""
    name = args.eval_name or args.split
    if not args.eval_name:
        if args.test_file:
            name = Path(args.test_file).stem
        name = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip(".-") or "posts"
        name += "-base" if args.base_only else ""
    if args.output_dir:
        return name, Path(args.output_dir).expanduser().resolve()
    if adapter and adapter.folder:
        return name, adapter.folder / "eval" / name
    subject = adapter.name if adapter else args.model_name_or_path
    return name, Path("hsd-eval", Path(subject.partition("@")[0]).name, name).resolve()


@contextlib.contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """A folder inside the target, on its file system, that is gone at the end."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        draft = TemporaryDirectory(dir=target, prefix=".draft-")
    except OSError as error:
        fail(f"cannot write to {target}: {error.strerror}. Name another --output_dir.")
    with draft as folder:
        yield Path(folder)


def publish_draft(draft: Path, target: Path) -> None:
    """Move the files into the target; one with a contract.json holds a whole report."""
    (target / CONTRACT).unlink(missing_ok=True)
    for name in FILES:
        (draft / name).replace(target / name)


def push_files(adapter: Repo, name: str, folder: Path) -> None:
    """Commit the evaluation's files to eval/NAME/ of the adapter repo, all at once."""
    from huggingface_hub import CommitOperationAdd

    operations = [
        CommitOperationAdd(path_in_repo=f"eval/{name}/{file}", path_or_fileobj=folder / file)
        for file in FILES
    ]
    with hub_errors(f"push the report in {folder} to {adapter.name}"):
        made = commit(adapter.name, "model", operations, f"Evaluate: {name}")
    print(f"pushed: {adapter.name}@{made} eval/{name}/", flush=True)


# --- report ----------------------------------------------------------------------------------


def figure_names(positive: str) -> tuple[str, ...]:
    """The figures of the table over all posts."""
    return ("accuracy", "precision", "recall", f"f1_{positive}", "f1_macro", "roc_auc")


def shown(figure: dict[str, Any]) -> str:
    """A figure as people read it: `8.5 % [6.1, 11.6]`, `0.812`, `undefined (no hate posts)`."""
    if figure["value"] is None:
        return f"undefined ({visible(figure['reason'])})"
    if figure["low"] is None:
        return f"{figure['value']:.3f}"
    low, high = 100 * figure["low"], 100 * figure["high"]
    return f"{100 * figure['value']:.1f} % [{low:.1f}, {high:.1f}]"


def overall_table(metrics: dict[str, Any]) -> list[list[str]]:
    """The strategies over all posts, header first."""
    positive = metrics["positive_label"]
    header = ["strategy", "accuracy", "precision", "recall"]
    rows = [[*header, f"F1 {visible(positive)}", "macro F1", "AUROC"]]
    for strategy in metrics["strategies"]:
        figures = strategy["overall"]
        if figures is None:
            cells = [f"undefined ({visible(strategy['reason'], 100)})", *[""] * 5]
        else:
            cells = [shown(figures[name]) for name in figure_names(positive)]
        rows.append([visible(strategy["name"]), *cells])
    return rows


def group_table(metrics: dict[str, Any], strategies: list[dict[str, Any]]) -> list[list[str]]:
    """A row per target group and strategy that gave answers, header first."""
    positive = metrics["positive_label"]
    columns = ("false_positive_rate", "false_negative_rate", "precision", f"f1_{positive}")
    titles = ["false positive rate", "false negative rate", "precision", f"F1 {visible(positive)}"]
    rows = [["target group", "posts", visible(positive), "strategy", *titles]]
    for group in metrics["strategies"][0]["groups"]:
        for strategy in strategies:
            figures = strategy["groups"][group]
            if figures is None or (figures["n"] == 0 and strategy["kind"] == "baseline"):
                continue
            counts = [str(figures["n"]), str(figures["labels"][positive])]
            cells = [shown(figures[column]) for column in columns]
            rows.append([visible(group), *counts, visible(strategy["name"]), *cells])
    return rows


def build_lead(metrics: dict[str, Any]) -> str:
    """The result in three sentences, each figure with its interval."""
    positive, negative = visible(metrics["positive_label"]), visible(metrics["negative"])
    model = metrics["strategies"][0]
    figures, name = model["overall"], visible(model["name"])
    flagged, missed = figures["false_positive_rate"], figures["false_negative_rate"]
    sentences = [
        f"{name} takes {figures['false_positive']} of {flagged['n']} {negative} posts for "
        f"{positive} (false positive rate {shown(flagged)}) and misses "
        f"{figures['false_negative']} of {missed['n']} {positive} posts (false negative rate "
        f"{shown(missed)})."
    ]
    rates = {
        visible(group): one["false_positive_rate"]
        for group, one in model["groups"].items()
        if group != NO_TARGET and one["n"] and one["false_positive_rate"]["n"]
    }
    ordered = sorted(rates, key=lambda group: rates[group]["value"])
    if rates and rates[ordered[0]]["value"] < rates[ordered[-1]]["value"]:
        ends = [
            f"{group} ({shown(rates[group])}, {rates[group]['n']} {negative} posts)"
            for group in (ordered[-1], ordered[0])
        ]
        sentences.append(
            f"Its false positive rate is highest for {ends[0]} and lowest for {ends[1]}."
        )
    f1 = f"f1_{metrics['positive_label']}"
    scores = [
        f"{visible(one['name'])} {shown(one['overall'][f1])}"
        for one in metrics["strategies"]
        if one["overall"]
    ]
    return " ".join([*sentences, f"F1 of {positive}: {', '.join(scores)}."])


def build_plots(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """What the dot-and-whisker plots show: the model and TF-IDF in each target group."""
    positive, negative = visible(metrics["positive_label"]), visible(metrics["negative"])
    drawn = [
        strategy
        for strategy in metrics["strategies"]
        if strategy["overall"] and not strategy["name"].startswith("always_")
    ]
    plots = []
    for key, title, meaning in (
        ("false_positive_rate", "False positive rate", f"{negative} posts taken for {positive}"),
        ("false_negative_rate", "False negative rate", f"{positive} posts missed"),
    ):
        rows = []
        for group in metrics["strategies"][0]["groups"]:
            figures = [(one["kind"], one["groups"][group][key]) for one in drawn]
            marks = [
                {"kind": kind, "text": shown(figure).partition(" (")[0], **figure}
                for kind, figure in figures
            ]
            rows.append({"name": visible(group, 22), "n": figures[0][1]["n"], "marks": marks})
        plots.append(
            {
                "title": title,
                "meaning": meaning,
                "overall": drawn[0]["overall"][key]["value"],
                "rows": rows,
                "names": [visible(one["name"]) for one in drawn],
            }
        )
    return plots


def build_page(metrics: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Everything that report.html and report.md say, as text that is safe to escape."""
    subject = (record["adapter"] or record["base_model"])["repo"]
    if record["base_only"]:
        subject = f"{record['base_model']['repo']} without adapter"
    groups = group_table(metrics, metrics["strategies"])
    return {
        "title": f"Error report: {visible(subject)}",
        "subtitle": f"{visible(record['name'])} · {metrics['n']} posts · {record['created'][:10]}",
        "lead": build_lead(metrics),
        "overall": overall_table(metrics),
        "groups": groups,
        "plots": build_plots(metrics),
        "positive": visible(metrics["positive_label"]),
        "negative": visible(metrics["negative"]),
        "limits": LIMITS,
        "made": describe_run(metrics, record),
    }


def describe_run(metrics: dict[str, Any], record: dict[str, Any]) -> list[tuple[str, str]]:
    """How the figures were made: commits, settings, packages and the command."""

    def pinned(repo: dict[str, Any] | None) -> str:
        if repo is None:
            return "none"
        return (
            f"{repo['repo']}@{repo['revision']}" if repo["revision"] else f"{repo['repo']} (folder)"
        )

    file, prompt, rendering = record["test_file"], record["prompt"], record["rendering"]
    scored = f"{file['file']}, SHA-256 {file['sha256']}" if file else f"split {record['split']}"
    limits = f"{rendering['max_length']} tokens; {metrics['cut_posts']} posts cut to it"
    threshold = metrics["threshold"]
    rule = "the likeliest label"
    if threshold is not None:
        rule = f"{metrics['positive_label']} from p = {threshold} on"
    made = [
        ("Adapter", pinned(record["adapter"]) + (" (not used)" if record["base_only"] else "")),
        ("Base model", pinned(record["base_model"])),
        ("Dataset", pinned(record["dataset"])),
        ("Posts", scored),
        (
            "Prompt",
            f"{prompt['name']}, dated {rendering['date']}" if prompt else "none (classifier)",
        ),
        ("Decision", rule),
        ("Length", limits),
        ("Computed on", f"{record['device']}, {record['dtype']}"),
        ("Script", f"{SCRIPT}, SHA-256 {record['script_sha256']}"),
        ("Packages", ", ".join(f"{name} {number}" for name, number in record["packages"].items())),
        ("Made", record["created"]),
        ("Command", repeat_command(record)),
    ]
    return [(name, visible(value, 400)) for name, value in made]


def repeat_command(record: dict[str, Any]) -> str:
    """The command that makes this evaluation again, with every repo it names at its commit."""
    parser, words, arguments = build_parser(), ["uv", "run", SCRIPT], record["arguments"]
    repos = {"model_name_or_path": record["base_model"], "dataset_repo": record["dataset"]}
    named = {name: repo for name, repo in repos.items() if arguments[name]}
    if record["adapter"]:
        named = {"adapter": record["adapter"]} | named
    for name, repo in named.items():
        pinned = f"{repo['repo']}@{repo['revision']}" if repo["revision"] else f"./{repo['repo']}"
        words += [f"--{name}", pinned]
    left_out = {"config_file", "output_dir", "push", *named}
    if "model_name_or_path" in named:
        left_out.add("model_revision")
    for name, value in arguments.items():
        if name not in left_out and value != parser.get_default(name):
            words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(words)


def build_markdown(page: dict[str, Any]) -> str:
    """report.md: the same as report.html without the plots."""

    def table(rows: list[list[str]]) -> list[str]:
        lines = [f"| {' | '.join(markdown_cell(cell) for cell in row)} |" for row in rows]
        return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:], ""]

    return "\n".join(
        [
            f"# {markdown_cell(page['title'])}",
            "",
            markdown_cell(page["subtitle"]),
            "",
            markdown_cell(page["lead"]),
            "",
            "## All posts",
            "",
            *table(page["overall"]),
            "## By target group",
            "",
            *table(page["groups"]),
            "Brackets hold 95 % intervals (Wilson).",
            "",
            "## What these figures do not say",
            "",
            *(f"- {limit}" for limit in page["limits"]),
            "",
            "## How they were made",
            "",
            *table([["", ""], *map(list, page["made"])]),
        ]
    )


def print_summary(metrics: dict[str, Any]) -> None:
    """Print the figures over all posts and per target group as aligned tables."""
    learned = [one for one in metrics["strategies"] if not one["name"].startswith("always_")]
    for rows in (overall_table(metrics), group_table(metrics, learned)):
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        print()
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())
    print("\n[low, high]: 95 % interval (Wilson)\n", flush=True)


PAGE = """{% macro figure(cell) -%}
<td{% if cell.startswith("undefined") %} class="undefined"{% endif %}>{{ cell }}</td>
{%- endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2127; --soft: #57606a; --line: #d5dae0;
  --band: #f4f6f8; --model: #0a5bb0; --other: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e8ec; --soft: #a0abb6;
  --line: #343c45; --band: #1c2229; --model: #74b3ff; --other: #dca94f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 0; font-size: 1rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft { color: var(--soft); font-size: .9rem; }
.lead { margin: 1.25rem 0 0; padding-left: 1rem; border-left: 3px solid var(--model);
  font-size: 1.08rem; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: baseline; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 600; }
.figures td, .figures th { white-space: nowrap; }
.figures .undefined { color: var(--soft); white-space: normal; }
.model td, .model th { color: var(--model); }
tr.first td, tr.first th { border-top: 2px solid var(--line); }
.made th { width: 9rem; color: var(--soft); }
.made td { overflow-wrap: anywhere; }
.plots { display: grid; gap: 2rem; margin: 1.25rem 0 1.75rem;
  grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); }
figure { margin: 0; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 24rem; height: auto; }
svg text { fill: var(--ink); font-size: 13px; }
svg .faint { fill: var(--soft); font-size: 11.5px; }
svg .grid { stroke: var(--line); }
svg .whole { stroke: var(--model); stroke-dasharray: 4 3; opacity: .7; }
svg .model { stroke: var(--model); fill: var(--model); stroke-width: 2; }
svg .baseline { stroke: var(--other); fill: var(--paper); stroke-width: 2; }
.key { margin-right: 1rem; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: .65em; height: .65em;
  margin-right: .35em; border: 2px solid; border-radius: 50%; }
.key.model { color: var(--model); }
.key.baseline { color: var(--other); }
.key.model::before { background: var(--model); }
li { max-width: 46rem; margin: .35rem 0; }
@media print { main { padding: 0; } .plots, tr { break-inside: avoid; } }
@media (max-width: 34rem) { .plots { grid-template-columns: 1fr; } h1 { font-size: 1.35rem; } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
<p class="lead">{{ lead }}</p>

<h2>All posts</h2>
<div class="scroll"><table class="figures">
<thead><tr>{% for cell in overall[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in overall[1:] %}
<tr{% if loop.first %} class="model"{% endif %}><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}{{ figure(cell) }}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="soft">In brackets: 95 % interval (Wilson). The first row is the evaluated model; below it
answer-all baselines, and logistic regression on words fitted to the train split.</p>

<h2>By target group</h2>
<p class="soft">Dots are rates, whiskers their 95 % intervals; the dashed line is the model's rate
over all posts.
{% for name in plots[0].names %}<span class="key {{ 'model' if loop.first else 'baseline' }}">
{{- name }}</span>{% endfor %}</p>
<div class="plots">
{% for plot in plots %}
<figure>
<h3>{{ plot.title }}</h3><p class="soft">{{ plot.meaning }}</p>
{% set bottom = 30 + 46 * plot.rows | length %}
<svg viewBox="0 0 520 {{ bottom + 24 }}" role="img" aria-label="{{ plot.title }} per target group">
{% for tick in (0, 25, 50, 75, 100) %}
{% set x = 130 + 2.2 * tick %}
<line class="grid" x1="{{ x }}" x2="{{ x }}" y1="14" y2="{{ bottom }}"/>
<text class="faint" x="{{ x }}" y="{{ bottom + 16 }}" text-anchor="middle">{{ tick }} %</text>
{% endfor %}
{% if plot.overall is not none %}
{% set x = (130 + 220 * plot.overall) | round(1) %}
<line class="whole" x1="{{ x }}" x2="{{ x }}" y1="14" y2="{{ bottom }}"/>
{% endif %}
{% for row in plot.rows %}
{% set top = 18 + 46 * loop.index0 %}
<text x="0" y="{{ top + 16 }}">{{ row.name }}</text>
<text class="faint" x="0" y="{{ top + 31 }}">{{ row.n }} posts</text>
{% for mark in row.marks %}
{% set y = top + 11 + 17 * loop.index0 %}
{% if mark.value is not none %}
<line class="{{ mark.kind }}" x1="{{ (130 + 220 * mark.low) | round(1) }}" x2="
{{- (130 + 220 * mark.high) | round(1) }}" y1="{{ y }}" y2="{{ y }}"/>
<circle class="{{ mark.kind }}" cx="{{ (130 + 220 * mark.value) | round(1) }}" cy="{{ y }}" r="4"/>
{% endif %}
<text class="faint" x="366" y="{{ y + 4 }}">{{ mark.text }}</text>
{% endfor %}
{% endfor %}
</svg>
</figure>
{% endfor %}
</div>
<div class="scroll"><table class="figures">
<thead><tr>{% for cell in groups[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in groups[1:] %}
{% set model = loop.first or row[0] != loop.previtem[0] %}
<tr{% if model %} class="model first"{% endif %}><th scope="row">{{ row[0] if model }}</th>
{%- for cell in row[1:3] %}<td>{{ cell if model }}</td>{% endfor %}
{%- for cell in row[3:] %}{{ figure(cell) }}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="soft">False positive rate: share of the {{ negative }} posts that are taken for
{{ positive }}. False negative rate: share of the {{ positive }} posts that are missed. Precision:
share of the posts taken for {{ positive }} that are.</p>

<h2>What these figures do not say</h2>
<ul>{% for limit in limits %}<li>{{ limit }}</li>{% endfor %}</ul>

<h2>How they were made</h2>
<table class="made"><tbody>
{% for name, value in made %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</tbody></table>
</main>
</body>
</html>
"""


# --- shared: the same text in every script that has it ---------------------------------------


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one message that says what is wrong, what there is and what to do.

    Exit codes: 1 the Hub or the run failed, 2 arguments, config or data that the user must change.
    """
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def quiet_libraries() -> None:
    """Keep a Job's log to the lines that say something; called before any library is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # The pins make deprecations a matter of the next upgrade, not of this run.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations and usage dump: an error is one line and exit 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage="%(prog)s [flags]",
            **options,
        )

    def format_help(self) -> str:
        """Say each flag's default where its help does not."""
        for action in self._actions:
            if action.default not in (None, False, argparse.SUPPRESS):
                value = action.default
                shown = " ".join(value) if isinstance(value, list) else value
                action.help = (
                    f"{action.help}; default {shown}" if action.help else f"default {shown}"
                )
                action.default = argparse.SUPPRESS
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        fail(f"{message}. See --help.")


def boolean(text: str) -> bool:
    """Read 1/0/true/false, the form that flags, variables and config files share."""
    values = {"1": True, "true": True, "0": False, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1, 0, true or false")
    return values[text.lower()]


def flag_names(tokens: list[str], aliases: dict[str, str]) -> list[str]:
    """Write flags with underscores and by their present names; an empty value unsets its flag."""
    named: list[str] = []
    for token in tokens:
        if token.startswith("--") and len(token) > 2:
            flag, equals, value = token.partition("=")
            name = flag[2:].replace("-", "_")
            if name in aliases:
                print(f"--{name} is now --{aliases[name]}", flush=True)
            token = f"--{aliases.get(name, name)}{equals}{value}"
            if equals and not value:
                continue
        elif token == "" and named and named[-1].startswith("--"):
            named.pop()
            continue
        named.append(token)
    return named


def settings_as_flags(settings: dict[str, Any]) -> list[str]:
    """Turn a config file's or a preset's entries into flags, so that one parser checks them all."""
    flags: list[str] = []
    for key, value in settings.items():
        name = str(key)
        if value in (None, "", []) or name.startswith("_"):
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            flags.append(f"--{name}={json.dumps(value)}")
        else:
            flags.append(f"--{name}={value}")
    return flags


def parse_layer(
    parser: Parser, tokens: list[str], aliases: dict[str, str], origin: str
) -> dict[str, Any]:
    """Return only what these tokens set; an unknown flag ends the run and names the nearest one."""
    unset = object()
    actions = [action for action in parser._actions if action.dest != "help"]
    blank = argparse.Namespace(**{action.dest: unset for action in actions})
    known, unknown = parser.parse_known_args(flag_names(tokens, aliases), blank)
    if unknown:
        name = unknown[0].partition("=")[0]
        # The documented flags first: undocumented ones are many, and one is always near.
        shown = [action for action in actions if action.help != argparse.SUPPRESS]
        flags = [[flag for one in some for flag in one.option_strings] for some in (shown, actions)]
        near = difflib.get_close_matches(name, flags[0], n=1, cutoff=0.7)
        near = near or difflib.get_close_matches(name, flags[1], n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else "See --help for the flags there are."
        fail(f"unknown argument {name} ({origin}). {hint}")
    return {name: value for name, value in vars(known).items() if value is not unset}


def read_settings(path: str) -> dict[str, Any]:
    """Read a JSON or YAML file of flags."""
    file = Path(path).expanduser()
    if not file.is_file():
        fail(f"--config_file {path} is not a file. Give a JSON or YAML file of flags.")
    import yaml

    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"--config_file {path} is neither JSON nor YAML: {error}")
    if not isinstance(settings, dict):
        fail(f"--config_file {path} holds no mapping of flags to values.")
    return settings


def resolve_arguments(
    parser: Parser,
    argv: list[str] | None = None,
    presets: dict[str, dict[str, Any]] | None = None,
    aliases: dict[str, str] | None = None,
) -> argparse.Namespace:
    """Merge flag > environment > --config_file > --preset > default; print what is no default."""
    aliases = aliases or {}
    environment: dict[str, str] = {}
    for action in parser._actions:
        name = action.dest.upper()
        if action.help == argparse.SUPPRESS or name == "HELP":
            continue
        for variable in (f"HSD_{name}", *([name] if name in PLAIN_VARIABLES else [])):
            if os.environ.get(variable):
                environment.setdefault(action.dest, os.environ[variable])
    known = {f"HSD_{action.dest.upper()}" for action in parser._actions}
    for variable in sorted(name for name in os.environ if name.startswith("HSD_")):
        if variable not in known:
            print(f"warning: {variable} names no flag of this script", flush=True)
    layers = [
        (
            "environment",
            parse_layer(parser, settings_as_flags(environment), aliases, "environment"),
        ),
        (
            "command line",
            parse_layer(parser, sys.argv[1:] if argv is None else argv, aliases, "command line"),
        ),
    ]
    chosen = {name: value for _, layer in layers for name, value in layer.items()}
    if chosen.get("config_file"):
        settings = settings_as_flags(read_settings(chosen["config_file"]))
        layers.insert(0, ("config file", parse_layer(parser, settings, aliases, "config file")))
        chosen = layers[0][1] | chosen
    if chosen.get("preset"):
        if chosen["preset"] not in (presets or {}):
            fail(f"unknown preset {chosen['preset']!r}. There are: {', '.join(presets or {})}.")
        settings = settings_as_flags((presets or {})[chosen["preset"]])
        origin = f"preset {chosen['preset']}"
        layers.insert(0, (origin, parse_layer(parser, settings, aliases, origin)))
    return merge_layers(parser, layers)


def merge_layers(parser: Parser, layers: list[tuple[str, dict[str, Any]]]) -> argparse.Namespace:
    """Lay the later over the earlier and print every value that is not the default."""
    arguments = {
        action.dest: action.default
        for action in parser._actions
        if action.dest != "help" and action.default is not argparse.SUPPRESS
    }
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for name, value in layer.items():
            arguments[name] = list_of_words(value) if isinstance(value, list) else value
            origins[name] = origin
    for name, origin in origins.items():
        if arguments[name] != parser.get_default(name):
            print(f"{name} = {arguments[name]} ({origin})", flush=True)
    return argparse.Namespace(**arguments)


def list_of_words(values: list[Any]) -> list[Any]:
    """Split list values at commas and spaces: `q_proj,v_proj` is `q_proj v_proj`."""
    words: list[Any] = []
    for value in values:
        words += re.split(r"[,\s]+", value.strip(", ")) if isinstance(value, str) else [value]
    return words


@dataclass(frozen=True)
class Repo:
    """A Hub repo at one commit, or a local folder of the same layout (`revision` is then None)."""

    name: str
    kind: str
    revision: str | None
    folder: Path | None = None

    def fetch(self, *patterns: str) -> Path:
        """Return a folder that holds the files matching the patterns."""
        if self.folder:
            return self.folder
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with hub_errors(f"download {', '.join(patterns)} of {self.name}"):
            if patterns == (CONTRACT,):
                # One file by its name needs no listing of the repo.
                with contextlib.suppress(RemoteEntryNotFoundError):
                    file = hf_hub_download(
                        self.name, CONTRACT, repo_type=self.kind, revision=self.revision
                    )
                    return Path(file).parent
            return Path(
                snapshot_download(
                    self.name,
                    repo_type=self.kind,
                    revision=self.revision,
                    allow_patterns=list(patterns),
                )
            )

    def as_input(self) -> dict[str, str | None]:
        """The contract's record of this repo; of a folder it names only the last part."""
        return {
            "repo": self.folder.name if self.folder else self.name,
            "kind": self.kind,
            "revision": self.revision,
        }


def is_folder(argument: str) -> bool:
    """Say whether a repo argument means a local folder: ids never begin with ./, ../, ~ or /."""
    return argument in (".", "..") or argument.startswith(("./", "../", "~", "/"))


def open_repo(argument: str, kind: str) -> Repo:
    """Resolve `user/name[@revision]` to its commit hash, or a folder to its path."""
    if is_folder(argument):
        folder = Path(argument).expanduser().resolve()
        if not folder.is_dir():
            fail(f"the folder {argument} does not exist. Give a folder or a Hub id (user/name).")
        return Repo(argument, kind, None, folder)
    name, _, revision = argument.partition("@")
    from huggingface_hub import HfApi

    with hub_errors(f"open the {kind} repo {argument}"):
        info = HfApi().repo_info(name, repo_type=kind, revision=revision or None)
    return Repo(name, kind, info.sha)


@contextlib.contextmanager
def hub_errors(action: str) -> Iterator[None]:
    """Turn the Hub client's errors into one message: exit 2 where the user can mend it, else 1."""
    from httpx2 import HTTPError
    from huggingface_hub import errors, get_token

    try:
        yield
    except errors.LocalTokenNotFoundError:
        fail(f"cannot {action}: there is no Hub token. Set HF_TOKEN or run `hf auth login`.")
    except errors.GatedRepoError as error:
        reason = str(error).splitlines()[0]
        fail(f"cannot {action}: it is gated. Accept its terms on its page. ({reason})")
    except errors.RepositoryNotFoundError:
        fail(
            f"cannot {action}: no such repo, or it is private and this token may not see it. "
            "Check the id (user/name) and HF_TOKEN."
        )
    except errors.RevisionNotFoundError:
        fail(f"cannot {action}: the repo has no such revision. Give a branch, tag or commit hash.")
    except errors.LocalEntryNotFoundError as error:
        fail(f"cannot {action}: the Hub does not answer. {error}", code=1)
    except (errors.EntryNotFoundError, errors.HFValidationError) as error:
        fail(f"cannot {action}: {error}")
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401 and get_token() is None:
            fail(f"cannot {action}: there is no Hub token. Set HF_TOKEN or run `hf auth login`.")
        if status == 401:
            fail(f"cannot {action}: the Hub does not accept this token. Run `hf auth login` again.")
        if status == 403:
            fail(
                f"cannot {action}: this token may not. It needs write access to the repo's "
                "namespace: name a repo of your own, or make a token of role `write` in the Hub's "
                "settings."
            )
        fail(f"cannot {action}: the Hub answered {status}. {str(error).splitlines()[0]}", code=1)
    except (HTTPError, OSError, RuntimeError) as error:
        # transformers and datasets wrap a gated repo's refusal into an error of their own.
        gated = re.search("gated (repo|dataset)", str(error))
        fail(f"cannot {action}: {type(error).__name__}: {error}", code=2 if gated else 1)
    except ValueError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fail(f"cannot {action}: a file is damaged or of another form. {reason}")


def own_namespace() -> str:
    """Return the user name of the token: the namespace of repos that no flag names."""
    from huggingface_hub import HfApi

    with hub_errors("ask the Hub who you are"):
        return HfApi().whoami()["name"]


def prepare_repo(name: str, kind: str, stage: str, allow_public: bool) -> None:
    """Create the repo, private, where it is missing, and prove that this token may write to it.

    The proof asks where an upload would go and leaves nothing behind. Refused are an existing
    public repo (unless `allow_public`) and one that holds anything but an earlier result of the
    same stage.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with hub_errors(f"write to the {kind} repo {name}"):
        api.create_repo(name, repo_type=kind, private=True, exist_ok=True)
        info = api.repo_info(name, repo_type=kind)
        if not info.private and not allow_public:
            fail(
                f"the {kind} repo {name} is public. Make it private, name another one, "
                "or say --allow_public true."
            )
        probe = CommitOperationAdd(path_in_repo=CONTRACT, path_or_fileobj=b"{}")
        api.preupload_lfs_files(name, [probe], repo_type=kind)
    files = {file.rfilename for file in info.siblings or []} - {".gitattributes", "README.md"}
    if CONTRACT in files:
        read_contract(Repo(name, kind, info.sha), stage)
    elif files:
        fail(f"the {kind} repo {name} holds files of something else, such as {min(files)}.")


def retried(
    action: str,
    attempt: Callable[[int], Any],
    pause: Callable[[float], Any] = time.sleep,
    tries: int | None = 5,
) -> Any:
    """Return `attempt(number)`, called again after a pause where the Hub or the line fails.

    The pauses grow from 1 to 60 s, or last as long as the Hub's rate-limit headers ask. The last
    error is raised after `tries` calls, where `pause` returns False, and at once where no waiting
    mends it.
    """
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers

    for number in itertools.count():
        try:
            return attempt(number)
        except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: hf_xet's only kind.
            response = error.response if isinstance(error, HfHubHTTPError) else None
            final = response is not None and response.status_code not in (429, 500, 502, 503, 504)
            if final or number + 1 == tries:
                raise
            seconds = min(2**number, 60)
            if response is not None:
                limit = parse_ratelimit_headers(response.headers)
                asked = response.headers.get("Retry-After", "")
                seconds = max(seconds, limit.reset_in_seconds + 1 if limit else 0)
                seconds = max(seconds, int(asked) if asked.isdigit() else 0)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"cannot {action} ({reason}); next try in {seconds} s", flush=True)
            if pause(seconds) is False:
                raise
    raise AssertionError("the loop returns or raises")


def commit(
    name: str,
    kind: str,
    operations: list[Any],
    message: str,
    parent: str | None = None,
    pause: Callable[[float], Any] = time.sleep,
    tries: int | None = 5,
) -> str:
    """Commit all operations at once and return the commit's hash; see `retried` for the tries.

    Where `parent` is given and not the newest commit, the Hub answers 412. The token in the
    description recognises a commit that was made although its answer was lost.
    """
    from huggingface_hub import HfApi

    api, token = HfApi(), os.urandom(8).hex()

    def attempt(number: int) -> str:
        for earlier in api.list_repo_commits(name, repo_type=kind) if number else []:
            if token in earlier.message:
                return earlier.commit_id
        return api.create_commit(
            name,
            operations,
            repo_type=kind,
            commit_message=message,
            commit_description=token,
            parent_commit=parent,
        ).oid

    return retried(f"commit to {name}", attempt, pause, tries)


def without_paths(value: Any) -> Any:
    """Arguments with local paths cut to their last part: the rest speaks only of the machine."""
    if isinstance(value, dict):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and is_folder(value) else value


def stage_record(
    stage: str, script: str, arguments: argparse.Namespace, inputs: list[Repo]
) -> dict[str, Any]:
    """The part of contract.json that every stage writes: who made this, from what, with what."""
    source = Path(__file__).read_text(encoding="utf-8")
    packages = {}
    for package in re.findall(r'(?m)^#\s+"([\w.-]+)==', source):
        with contextlib.suppress(PackageNotFoundError):
            packages[package] = version(package)
    return {
        "schema": SCHEMA,
        "stage": stage,
        "script": script,
        "script_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "arguments": without_paths(vars(arguments)),
        "inputs": [repo.as_input() for repo in inputs],
        "packages": packages,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read_contract(repo: Repo, stage: str) -> dict[str, Any]:
    """Read contract.json and refuse one of another schema or another stage."""
    file = repo.fetch(CONTRACT) / CONTRACT
    if not file.is_file():
        fail(
            f"{repo.name} holds no {CONTRACT}: it was not written by this project's {stage} stage."
        )
    try:
        contract = json.loads(file.read_text(encoding="utf-8"))
        schema, found = contract["schema"], contract["stage"]
    except (ValueError, KeyError, TypeError) as error:
        fail(
            f"{CONTRACT} of {repo.name} is damaged ({error}). Restore it from the repo's history, "
            "or run its stage again into a new repo or folder."
        )
    if schema != SCHEMA:
        fail(f"{repo.name} has a contract of schema {schema}; this script reads {SCHEMA}.")
    if found != stage:
        fail(f"{repo.name} was written by the stage {found!r}; give a repo of the stage {stage!r}.")
    return contract


def write_json(file: Path, content: Any) -> None:
    """Write strict JSON (no NaN) that a person can read: a list of numbers stands on one line."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    # Strings hold no raw line break, so only a list can begin with one.
    text = re.sub(r"\[\n[-\d,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    file.write_text(text + "\n", encoding="utf-8")


def read_rows(repo: Repo, config: str, split: str) -> list[dict[str, Any]]:
    """Load one split of a dataset repo as rows with `id`, `text`, `label` (name), `target_groups`.

    A row of an SFT config also has `prompt` and `completion`, both lists of messages.
    """
    from datasets import ClassLabel, get_dataset_config_names, get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetGenerationError

    place = str(repo.folder) if repo.folder else repo.name
    with hub_errors(f"read {config}/{split} of {repo.name}"), TemporaryDirectory() as fresh:
        configs = get_dataset_config_names(place, revision=repo.revision)
        if config not in configs:
            fail(f"{repo.name} has no config {config!r}. There are: {', '.join(configs)}.")
        splits = get_dataset_split_names(place, config, revision=repo.revision)
        if split not in splits:
            fail(f"{repo.name} has no split {split!r} in {config}. There are: {', '.join(splits)}.")
        # The library's cache knows a folder by its name alone and would return an older build.
        cache = fresh if repo.folder else None
        try:
            data = load_dataset(
                place, config, split=split, revision=repo.revision, cache_dir=cache
            ).with_format("arrow")
        except DatasetGenerationError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            fail(f"{repo.name} ({config}/{split}) cannot be read: {reason}")
        except ValueError as error:
            # Where all files of a split are empty, the library does not know the split.
            if "corresponds to no data" in str(error):
                fail(f"{repo.name} ({config}/{split}) is empty.")
            raise
        table, features = data[:], data.features
    missing = {"id", "text", "label", "target_groups"} - set(table.column_names)
    if missing:
        fail(
            f"{repo.name} ({config}/{split}) lacks the columns {', '.join(sorted(missing))}. "
            f"It has: {', '.join(table.column_names)}."
        )
    if not len(table):
        fail(f"{repo.name} ({config}/{split}) is empty.")
    rows = table.to_pylist()
    if isinstance(features["label"], ClassLabel):
        for row in rows:
            row["label"] = features["label"].int2str(row["label"])
    return rows


def read_jsonl(path: str, labels: list[str]) -> list[dict[str, Any]]:
    """Read a local JSONL file of posts (`text`, `label`, optional `id`, `target_groups`).

    A label is a name of `labels` or its index. Rows with `messages` are returned as they stand.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        fail(f"the file {path} does not exist.")
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8: {error}")
    rows = []
    # Not splitlines: that also splits at signs such as U+2028, which stand in posts.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            fail(
                f"{path} line {number} is not JSON: {error}. Each line is to be an object with "
                "`text` and `label`, or with `messages`."
            )
        check_line(row, f"{path} line {number}")
        if "messages" not in row:
            names = {str(index): name for index, name in enumerate(labels)}
            row["label"] = names.get(str(row["label"]), row["label"])
        groups = row.get("target_groups") or []
        row["target_groups"] = [groups] if isinstance(groups, str) else groups
        row.setdefault("id", f"{file.stem}-{number}")
        rows.append(row)
    if not rows:
        fail(f"{path} is empty.")
    return rows


def check_line(row: Any, origin: str) -> None:
    """End on a row of a JSONL file that has neither a post with a label nor messages."""
    if not isinstance(row, dict) or not ("messages" in row or {"text", "label"} <= set(row)):
        fail(f"{origin} needs `text` and `label`, or `messages`.")
    messages = row.get("messages", [{"role": "user", "content": row.get("text")}])
    valid = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not valid:
        fail(f"{origin}: a `text`, and each message's `role` and `content`, must be a string.")
    if "messages" in row and [message["role"] for message in messages][-2:] != [
        "user",
        "assistant",
    ]:
        fail(f"{origin}: `messages` must end with one of the user and the assistant's answer.")
    groups = row.get("target_groups") or []
    if not isinstance(groups, (str, list)) or not all(isinstance(group, str) for group in groups):
        fail(f"{origin}: `target_groups` must be a list of names.")


def check_labels(rows: list[dict[str, Any]], labels: list[str], origin: str) -> None:
    """End on a label that the contract does not name."""
    unknown = sorted({str(row["label"]) for row in rows if row.get("label") not in labels})
    if unknown:
        fail(f"{origin} has unknown labels {unknown[:5]}. The labels are: {', '.join(labels)}.")


@dataclass(frozen=True)
class Scaffold:
    """The text that a chat template puts around the messages, rendered once per run.

    `pieces` are the literal texts before, between and after the contents of `roles`; the last
    role is the assistant, whose content is the answer. Contents never pass through the template,
    so a post can neither change it nor be changed by it.
    """

    roles: tuple[str, ...]
    pieces: tuple[str, ...]
    answer_prefix: str = ""


def pinned_template(template: str, date: str) -> str:
    """Replace a template's clock by a date (YYYY-MM-DD): else prompts change at midnight."""
    day = datetime.fromisoformat(date)

    def literal(call: re.Match[str]) -> str:
        return json.dumps(day.strftime(call["format"]))

    return re.sub(r"strftime_now\(\s*(['\"])(?P<format>.*?)\1\s*\)", literal, template)


def build_scaffold(tokenizer: Any, roles: list[str], date: str, effort: str) -> Scaffold:
    """Render the chat template once with markers for the contents of `roles` plus the answer.

    A template that refuses a system role gets its text at the head of the user's. Without a
    template: contents joined by blank lines, the answer after a space, closed by the end token.
    """
    roles = [*roles, "assistant"]
    if not tokenizer.chat_template:
        between = ["\n\n"] * (len(roles) - 2)
        return Scaffold(tuple(roles), ("", *between, "", tokenizer.eos_token or ""), " ")
    marks = [f"[[content-{index}]]" for index in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    template = pinned_template(tokenizer.chat_template, date)
    from jinja2 import TemplateError

    def render(conversation: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, reasoning_effort=effort
        )

    try:
        text = render(messages)
    except TemplateError:
        joined = "\n\n".join(marks[:-1])
        text = render([{"role": "user", "content": joined}, messages[-1]])
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            fail("the chat template drops or reorders messages; give a model with a usable one.")
        pieces.append(piece)
    # Whatever follows the end-of-turn token is the template's spacing before a next turn.
    return Scaffold(tuple(roles), (*pieces, text.rstrip()))


def encode_prompt(
    tokenizer: Any, scaffold: Scaffold, messages: list[dict[str, str]], post: str, room: int
) -> tuple[list[int], bool]:
    """Token ids of the prompt up to where the answer begins, and whether the post was cut.

    At most `room` ids: an over-long post is cut at its end, the template never. Control tokens
    that stand in a message are encoded as plain text.
    """
    contents = [message["content"] for message in messages]
    ids = encode_contents(tokenizer, scaffold, contents)
    if len(ids) <= room:
        return ids, False
    place = max(range(len(contents)), key=lambda index: post in contents[index])
    start = contents[place].rfind(post)
    if start < 0:
        fail(f"a prompt of {len(ids)} tokens does not hold its post's text, so it cannot be cut.")
    head, tail = contents[place][:start], contents[place][start + len(post) :]
    # The longest beginning of the post that fits: an emoji can be four tokens, a word one.
    keep, most = 0, len(post)
    while keep < most:
        middle = (keep + most + 1) // 2
        contents[place] = head + post[:middle] + tail
        if len(encode_contents(tokenizer, scaffold, contents)) <= room:
            keep = middle
        else:
            most = middle - 1
    contents[place] = head + post[:keep] + tail
    ids = encode_contents(tokenizer, scaffold, contents)
    if len(ids) > room:
        fail(f"the prompt without its post has {len(ids)} tokens; raise --max_length.")
    return ids, True


def encode_contents(tokenizer: Any, scaffold: Scaffold, contents: list[str]) -> list[int]:
    """Token ids of the scaffold filled with the prompt's contents."""
    # A template writes its own start token; without one the tokenizer's own is due.
    ids = [] if tokenizer.chat_template else list(tokenizer("")["input_ids"])
    # Not all_special_tokens: that lacks most control tokens of Llama 3 and gpt-oss.
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if any(token in content for content in contents for token in special):
        for piece, content in zip(scaffold.pieces, contents, strict=False):
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += tokenizer(content, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
        return (
            ids + tokenizer(scaffold.pieces[len(contents)], add_special_tokens=False)["input_ids"]
        )
    filled = "".join(
        piece + content for piece, content in zip(scaffold.pieces, contents, strict=False)
    )
    filled += scaffold.pieces[len(contents)]
    return ids + tokenizer(filled, add_special_tokens=False)["input_ids"]


def encode_answer(tokenizer: Any, scaffold: Scaffold, answer: str) -> list[int]:
    """Token ids of an answer with its end-of-turn token: what is trained on."""
    text = scaffold.answer_prefix + answer
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids + tokenizer(scaffold.pieces[-1], add_special_tokens=False)["input_ids"]


def label_completions(
    tokenizer: Any, scaffold: Scaffold, answer: str, labels: list[str]
) -> dict[str, list[int]]:
    """Token ids that stand for each label: the answer up to the label's end.

    Where nothing follows the label in the answer template the end-of-turn token belongs to it,
    so that no label is the beginning of another.
    """
    head, _, tail = answer.partition("{label}")
    completions = {}
    for label in labels:
        if tail:
            text = scaffold.answer_prefix + head + label
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        else:
            ids = encode_answer(tokenizer, scaffold, head + label)
        completions[label] = ids
    for label, ids in completions.items():
        for other, longer in completions.items():
            if other != label and longer[: len(ids)] == ids:
                fail(f"the label {label!r} is the beginning of {other!r} for this tokenizer.")
    return completions


def prompt_messages(
    strategy: dict[str, str], text: str, post: dict[str, Any] | None = None
) -> list[dict[str, str]]:
    """The messages that ask about one post: the strategy's system and user templates, filled.

    A user template may also ask for the {target_group} and the {persona} of the post.
    """
    post = post or {}
    values = {
        "{text}": text,
        "{target_group}": ", ".join(post.get("target_groups") or []) or "unknown",
        "{persona}": post.get("persona") or "unknown",
    }
    # One pass: a post that reads {persona} stays as it is.
    pattern = "|".join(map(re.escape, values))
    user = re.sub(pattern, lambda match: values[match[0]], strategy["user"])
    messages = [{"role": "user", "content": user}]
    if strategy.get("system"):
        messages.insert(0, {"role": "system", "content": strategy["system"]})
    return messages


def encode_post(tokenizer: Any, text: str, max_length: int) -> tuple[list[int], bool]:
    """Token ids of a post for a sequence classifier, and whether it was cut to `max_length`."""
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    if len(ids) <= max_length:
        return ids, False
    cut = tokenizer(text, split_special_tokens=True, truncation=True, max_length=max_length)
    return cut["input_ids"], True


def common_prefix(rows: list[list[int]]) -> list[int]:
    """The longest list that every row begins with."""
    shared: list[int] = []
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return shared


def probe_ids(
    tokenizer: Any, scaffold: Scaffold | None, prompt: dict[str, str] | None
) -> list[int]:
    """Token ids of a fixed post as a model of this run sees it (without prompt: a classifier)."""
    if scaffold is None or prompt is None:
        return encode_post(tokenizer, PROBE_POST, 512)[0]
    contents = [message["content"] for message in prompt_messages(prompt, PROBE_POST)]
    return encode_contents(tokenizer, scaffold, contents)


def check_probe(tokenizer: Any, found: list[int], expected: list[int], origin: str) -> None:
    """End where the prompt is not, token for token, the one the adapter was trained on."""
    if found == expected:
        return
    place = len(common_prefix([found, expected]))
    was, now = (tokenizer.decode(ids[place : place + 1]) for ids in (expected, found))
    fail(
        f"{origin} was trained on another prompt than this tokenizer and template give: token "
        f"{place} was {was!r} and is {now!r}. Use the base model and revision of its contract."
    )


def check_device(parameters: int, allow_cpu: bool, job_command: str) -> str:
    """Return the device to run on, "cuda" or "cpu", before any weight is downloaded.

    Ends on an NVIDIA device that torch cannot use, and on a model of more than 2B parameters
    without a GPU: on a CPU it would take hours where a Job takes minutes.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if NVIDIA_DRIVER.is_file() and not allow_cpu:
        driver = re.search(r"\d+\.\d[\d.]*", NVIDIA_DRIVER.read_text(encoding="utf-8"))
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        fail(
            f"this machine has an NVIDIA driver ({driver[0] if driver else 'unknown version'}) but "
            f"torch {torch.__version__}, built {built}, cannot use the device. Update the driver "
            "or install the torch build that fits it; --allow_cpu true runs on the CPU."
        )
    if parameters > 2e9 and not allow_cpu:
        fail(
            f"the model has {parameters / 1e9:.1f}B parameters and there is no GPU. Run it as a "
            f"Job: {job_command}  (--allow_cpu true runs it here all the same.)"
        )
    return "cpu"


def count_parameters(config: Any) -> int:
    """Number of parameters of the model's body, from its config alone: nothing is downloaded."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModel.from_config(config).parameters())


def read_base_config(base: Repo) -> Any:
    """Load a base model's config; no code of a repo is ever executed."""
    from transformers import AutoConfig

    place = str(base.folder) if base.folder else base.name
    with hub_errors(f"read the config of {base.name}"):
        try:
            return AutoConfig.from_pretrained(place, revision=base.revision)
        except ValueError as error:
            fail(f"{base.name} is no model that transformers can load: {error}")


def load_tokenizer(repo: Repo) -> Any:
    """Load a tokenizer; one without a pad token pads with its end token."""
    from transformers import AutoTokenizer

    place = str(repo.folder) if repo.folder else repo.name
    with hub_errors(f"read the tokenizer of {repo.name}"):
        tokenizer = AutoTokenizer.from_pretrained(place, revision=repo.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    base: Repo,
    config: Any,
    task: str,
    labels: list[str],
    dtype: Any,
    device: str,
    quantization: Any = None,
) -> Any:
    """Load the base model for `causal` or `classify` (a new head with one output per label).

    MXFP4 (gpt-oss) and FP8 (Ministral) checkpoints are dequantised, because neither can be
    trained or merged as stored.
    """
    import transformers

    stored = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if quantization is None and stored == "mxfp4":
        quantization = transformers.Mxfp4Config(dequantize=True)
    if quantization is None and stored == "fp8":
        quantization = transformers.FineGrainedFP8Config(dequantize=True)
    # Safetensors only: a .bin file is a pickle, which can run a stranger's code.
    options: dict[str, Any] = {
        "revision": base.revision,
        "dtype": dtype,
        "use_safetensors": True,
    }
    if quantization is not None:
        options["quantization_config"] = quantization
    if device == "cuda":
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    if task == "classify":
        kind = transformers.AutoModelForSequenceClassification
        options["num_labels"] = len(labels)
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    elif config.model_type == "mistral3":
        kind = transformers.AutoModelForImageTextToText
    else:
        kind = transformers.AutoModelForCausalLM
    place = str(base.folder) if base.folder else base.name
    from safetensors import SafetensorError

    # The library only warns of weights it draws at random; here they are checked.
    transformers.logging.set_verbosity_error()
    with hub_errors(f"load the base model {base.name}"):
        try:
            model, report = kind.from_pretrained(place, output_loading_info=True, **options)
        except (SafetensorError, ValueError) as error:
            fail(f"{base.name} cannot be loaded for the task {task}: {error}")
    transformers.logging.set_verbosity_warning()
    body = f"{model.base_model_prefix}."
    lost = [
        name
        for name in report["missing_keys"]
        if task == "causal" or (name.startswith(body) and ".pooler." not in name)
    ]
    if lost:
        fail(f"{base.name} lacks {len(lost)} of its weights, for example {sorted(lost)[0]}.")
    return model


def token_batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Yield lists of row indices, longest rows first, of at most `budget` padded tokens each."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def score_completions(
    model: Any, prompts: list[list[int]], completions: list[list[int]], pad: int, budget: int
) -> list[list[float]]:
    """Log-likelihood (nats) of each label's completion after each prompt, shape posts x labels.

    What all completions begin with is part of the prompt: it is the same for every label and
    cancels in the softmax over labels. Where they then differ in one token each, a post costs one
    row, else one row per label. Rows are padded on the left, so the logits that count stand last.
    """
    import torch

    shared = common_prefix(completions)
    tails = [completion[len(shared) :] for completion in completions]
    branches = [[]] if all(len(tail) == 1 for tail in tails) else [tail[:-1] for tail in tails]
    rows = [prompt + shared + branch for prompt in prompts for branch in branches]
    keep = max(len(branch) for branch in branches) + 1
    scores = [[0.0] * len(tails) for _ in prompts]
    for batch in token_batches([len(row) for row in rows], budget):
        width = len(rows[batch[0]])
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for line, index in enumerate(batch):
            ids[line, width - len(rows[index]) :] = torch.tensor(rows[index])
            mask[line, width - len(rows[index]) :] = 1
        with torch.inference_mode():
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(model.device),
                use_cache=False,
                logits_to_keep=keep,
            ).logits
        likelihood = torch.log_softmax(logits[:, -keep:].float(), dim=-1).cpu()
        for line, index in enumerate(batch):
            post, branch = divmod(index, len(branches))
            for label in range(len(tails)) if len(branches) == 1 else [branch]:
                tail = tails[label]
                last = likelihood[line, -len(tail) :]
                scores[post][label] = sum(last[n, token].item() for n, token in enumerate(tail))
    return scores


def score_classes(model: Any, encoded: list[list[int]], pad: int, budget: int) -> list[list[float]]:
    """Logits of a sequence classifier, shape posts x labels, in the order of `encoded`."""
    import torch

    scores: list[list[float]] = [[] for _ in encoded]
    for batch in token_batches([len(row) for row in encoded], budget):
        width = len(encoded[batch[0]])
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for line, index in enumerate(batch):
            ids[line, : len(encoded[index])] = torch.tensor(encoded[index])
            mask[line, : len(encoded[index])] = 1
        with torch.inference_mode():
            logits = model(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device)
            ).logits
        for line, index in enumerate(batch):
            scores[index] = logits[line].float().tolist()
    return scores


def open_adapter(argument: str) -> tuple[Repo, dict[str, Any]]:
    """Open an adapter repo and read its contract, after a look that its files are there."""
    adapter = open_repo(argument, "model")
    contract = read_contract(adapter, "adapter")
    files = adapter.fetch("adapter_config.json", "adapter_model.safetensors")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (files / name).is_file():
            fail(
                f"{adapter.name} holds no {name}: its training is {contract['training']['state']} "
                f"at step {contract['training']['step']}. Finish it first."
            )
    return adapter, contract


def open_trained_base(args: argparse.Namespace, contract: dict[str, Any]) -> Repo:
    """The base model at the commit the adapter was trained on."""
    base = contract["base_model"]
    if args.model_name_or_path:
        print(f"base model {args.model_name_or_path} overrides {base['repo']} of the contract")
        return open_repo(args.model_name_or_path, "model")
    if base["revision"] is None:
        fail(
            f"the adapter was trained on the local folder {base['repo']!r}: say where that base "
            "model is with --model_name_or_path."
        )
    print(f"base model {base['repo']} at {base['revision']} (from the contract)", flush=True)
    return open_repo(f"{base['repo']}@{base['revision']}", "model")


def load_adapter(model: Any, adapter: Repo, base: Repo) -> Any:
    """Put the adapter on its base; end where its files are damaged or do not fit."""
    import peft
    from safetensors import SafetensorError

    folder = adapter.fetch("adapter_config.json", "adapter_model.safetensors")
    with hub_errors(f"load the adapter {adapter.name}"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return peft.PeftModel.from_pretrained(model, folder).eval()
        except (SafetensorError, UserWarning, RuntimeError, ValueError) as error:
            fail(f"the adapter {adapter.name} does not fit the base {base.name}: {error}")


def trained_scaffold(tokenizer: Any, contract: dict[str, Any]) -> Scaffold | None:
    """The scaffold of the adapter's prompt, rendered anew with its date; None for a classifier."""
    rendering = contract["rendering"]
    if contract["prompt"] is None:
        return None
    roles = rendering["roles"][:-1]
    return build_scaffold(tokenizer, roles, rendering["date"], rendering["reasoning_effort"])


if __name__ == "__main__":
    main()
