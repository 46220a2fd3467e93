# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate==1.15.0",
#     "bitsandbytes==0.50.2",
#     "datasets==5.2.0",
#     "huggingface-hub==2.4.0",
#     "jinja2==3.1.6",
#     "peft==0.21.2",
#     "pyarrow==26.0.1",
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
is generated (--mode generate does). A finished evaluation is answered from its files; one that was
stopped goes on where it was, on any machine and any number of GPUs. --text and --input classify
posts that have no labels.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import difflib
import hashlib
import io
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
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
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
# What makes an adapter: weights, and how its posts become tokens.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "*token*", "*.jinja")
# Written where the model was asked for answers; pushed only with --log_text.
ANSWERS = "answers.jsonl"
# Of a written answer: its label is read, has no label, or did not come to its end.
STATUSES = ("ok", "unparsed", "truncated")
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
    model.add_argument("--with_base", **switch, help="score the base without the adapter as well")
    model.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    unset: dict[str, Any] = switch | {"default": None}
    model.add_argument("--load_in_4bit", **unset, help="quantise the base (as it was trained)")
    model.add_argument("--keep_mxfp4", **switch, help="gpt-oss as stored, by the package kernels")
    model.add_argument("--tokens_per_batch", type=int, help="at once (by memory; CPU: 1024)")
    model.add_argument("--allow_cpu", **switch, help="run a large model without a GPU")
    data = parser.add_argument_group("posts")
    data.add_argument("--dataset_repo", help="Hub id[@revision] or folder (the adapter's own)")
    data.add_argument("--split", default="test")
    data.add_argument("--test_file", help="JSONL of text, label, optional id and target_groups")
    data.add_argument("--text", help="classify this one post; - reads it from stdin")
    data.add_argument("--input", help="classify posts: a .txt, .csv, .jsonl, or - (lines of stdin)")
    data.add_argument("--text_column", default="text", help="of --input")
    data.add_argument("--prompt", help="prompt strategy of the dataset (the trained one)")
    data.add_argument("--max_samples", type=int, help="the first N posts of a seeded shuffle")
    data.add_argument("--max_length", type=int, help="tokens; a longer post is cut (as trained)")
    data.add_argument("--threshold", type=float, default=0.5, help="of the positive label's p")
    data.add_argument("--seed", type=int, default=42)
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        *("--mode",),
        choices=["score", "generate"],
        default="score",
        help="decide by the labels' likelihood, or by what the model writes",
    )
    answers.add_argument("--max_new_tokens", type=int, default=256, help="of a written answer")
    answers.add_argument(
        *("--rationales",),
        type=int,
        default=0,
        help="let the model explain the first N errors and near ties",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--eval_name", help="folder below eval/ (the split, and what is not as usual)"
    )
    output.add_argument("--output_dir", help="(ADAPTER/eval/NAME or ./hsd-eval/REPO/NAME)")
    output.add_argument("--push", **unset, help="(if the adapter has a repo)")
    output.add_argument("--fresh", **switch, help="score again what is finished")
    output.add_argument(
        *("--save_minutes",), type=float, default=5, help="between saves of scores to the Hub"
    )
    output.add_argument("--allow_public", **switch, help="push to a public repo")
    output.add_argument("--log_text", **switch, help="write the posts into predictions.csv")
    output.add_argument("--config_file", help="JSON or YAML file of these flags")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    for flag in ("--text", "--input"):
        # An empty value unsets a flag, and without it the whole split would be evaluated.
        if has_empty_value(flag, sys.argv[1:] if argv is None else argv):
            fail(f"{flag} is empty. `{flag} -` reads from stdin, empty posts too.")
    args = resolve_arguments(build_parser(), argv)
    if not 0 <= args.threshold <= 1:
        fail(f"--threshold {args.threshold} is no probability.")
    for name in ("tokens_per_batch", "max_samples", "max_length", "max_new_tokens"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            fail(f"--{name} {vars(args)[name]} is not positive.")
    if args.rationales < 0 or not args.save_minutes >= 0:
        fail("--rationales and --save_minutes cannot be negative.")
    check_posts_source(args)
    if args.with_base and args.base_only:
        fail("--with_base compares an adapter with its base; --base_only uses none. Leave one out.")
    if args.keep_mxfp4 and find_spec("kernels") is None:
        fail(
            "--keep_mxfp4 needs the package kernels, which downloads and runs compiled code of "
            "kernels-community: `uv run --with kernels ...`, or leave it out to dequantise."
        )
    if args.eval_name and not re.fullmatch(r"\w[\w.-]*", args.eval_name, re.ASCII):
        fail(f"--eval_name {args.eval_name!r}: use letters, digits, dots, dashes, underscores.")
    return args


def has_empty_value(flag: str, words: list[str]) -> bool:
    return f"{flag}=" in words or any(
        word == flag and following == "" for word, following in itertools.pairwise(words)
    )


def check_posts_source(args: argparse.Namespace) -> None:
    """End where the flags name no posts, or several kinds."""
    kinds = {
        name: value
        for name in ("text", "input", "test_file")
        if (value := vars(args)[name]) is not None
    }
    if len(kinds) > 1:
        fail(f"--{' and --'.join(kinds)} both name the posts: give one of them.")
    named = args.dataset_repo or kinds
    if args.base_only and not args.adapter and not (args.model_name_or_path and named):
        fail(
            "--base_only without --adapter needs --model_name_or_path and the posts: "
            "--dataset_repo, --test_file, --input or --text."
        )
    if is_ad_hoc(args):
        for name in ("rationales", "with_base", "push", "max_samples"):
            if vars(args)[name]:
                fail(f"--{name} is for an evaluation with labels; --text and --input have none.")
        if args.mode == "generate":
            fail("--mode generate is for an evaluation with labels; leave it out.")


def is_ad_hoc(args: argparse.Namespace) -> bool:
    """Say whether posts without labels are to be classified, and nothing evaluated."""
    return args.text is not None or args.input is not None


def main(argv: list[str] | None = None) -> None:
    quiet_libraries()
    args = parse_args(argv)
    world = join_world()
    adapter, contract = open_subject(args)
    pushes = check_push(args, adapter)
    dataset = open_dataset(args, contract)
    base = pick_base(args, contract)
    name, target = name_output(args, contract, adapter)
    key = evaluation_key(args, contract, adapter, base, dataset)
    ad_hoc = is_ad_hoc(args)
    if not ad_hoc and answer_from_files(args, key, adapter, name, target, pushes):
        return
    task = build_task(args, contract, dataset)
    posts = read_ad_hoc_posts(args) if ad_hoc else read_posts(args, contract, task, dataset)
    training, no_training = [], ""
    if not ad_hoc:
        training, no_training = read_training_posts(args, task, dataset)
    config = read_base_config(base)
    device = check_device(count_parameters(config), args.allow_cpu, job_command(args, adapter))
    tokenizer = load_tokenizer(adapter or base)
    encoded, answers = encode_posts(tokenizer, task, contract, posts)
    if not ad_hoc:
        start_on_all_gpus(device)
    setup = choose_setup(args, contract, base, config, device)
    scored = None if args.base_only else adapter
    scores_key = hash_of([key_of_weights(scored, base), repr(setup), encoded, answers])
    repo = adapter.name if adapter and pushes else None
    journals = open_journals(args, scores_key, repo, name, target, world)
    model = load_model(args, task, base, config, adapter, tokenizer, setup, device)
    scorer = build_scorer(args, model, tokenizer, answers, encoded, setup, world)
    record = decide_posts(args, task, scorer, tokenizer, posts, encoded, journals, world)
    if world.rank:
        return
    if ad_hoc:
        show_posts(args, task, posts, target)
        return
    strategies = answer_strategies(args, task, posts, training, no_training)
    metrics = build_metrics(args, task, posts, strategies)
    record |= build_record(args, contract, [adapter, base, dataset], task, metrics)
    record |= {"name": name, "key": key, "device": device_name(device)}
    record |= {"dtype": setup.dtype, "world_size": world.size}
    with draft_folder(target) as draft:
        write_files(draft, args, task, posts, metrics, record)
        publish_draft(draft, target, output_files(args))
    scores, written = journals
    written.file.unlink(missing_ok=True)
    print_summary(metrics)
    print(f"report: {target / 'report.html'}", flush=True)
    if adapter and pushes:
        push_files(args, adapter, name, target, scores.file)


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
    def negative_label(self) -> str:
        """The first label that is not the positive one."""
        return next(label for label in self.labels if label != self.positive)

    @property
    def negative(self) -> str:
        """What a post is that does not have the positive label."""
        return self.negative_label if len(self.labels) == 2 else f"not {self.positive}"


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
    if contract["task"] == "classify" and (args.with_base or args.rationales):
        fail(
            "--with_base and --rationales need a language model; the adapter is a sequence "
            "classifier, whose base has no trained head and which writes nothing."
        )
    if contract["task"] == "classify" and args.mode == "generate":
        fail("--mode generate: the adapter is a sequence classifier, which writes no answers.")
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
    if not has_repo or args.push is False or is_ad_hoc(args):
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
    asked = (contract.get("prompt") or {}).get("name")
    if is_ad_hoc(args) and (not trained_on or args.prompt in (None, asked)):
        return None
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
    say_what_is_odd(posts)
    return posts


def read_ad_hoc_posts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The posts of --text or --input: `id`, `text` and no label. Their ids default to numbers."""
    if args.text is not None and args.text != "-":
        rows = [{"text": args.text}]
    elif args.text == "-":
        rows = [{"text": decode_posts(sys.stdin.buffer.read(), "stdin").removesuffix("\n")}]
    elif args.input == "-":
        rows = split_lines(decode_posts(sys.stdin.buffer.read(), "stdin"))
    else:
        rows = read_unlabelled(Path(args.input).expanduser(), args.text_column)
    posts = []
    for number, row in enumerate(rows, start=1):
        name = row.get("id")
        name = str(number) if name in (None, "") else name
        posts.append({"id": name, "text": row["text"], "label": None})
    if not posts:
        fail(f"{args.input} holds no posts.")
    check_posts(posts, "--text" if args.text is not None else f"--input {args.input}")
    print(f"{len(posts)} posts to classify", flush=True)
    say_what_is_odd(posts)
    return posts


def say_what_is_odd(posts: list[dict[str, Any]]) -> None:
    """Say how many posts are empty, and how many share their id with another one."""
    empty = sum(not post["text"].strip() for post in posts)
    repeated = len(posts) - len({post["id"] for post in posts})
    if empty:
        print(f"{empty} of them are empty; they are scored like the others", flush=True)
    if repeated:
        print(f"{repeated} of them repeat an earlier id; rows keep the posts' order", flush=True)


def read_unlabelled(file: Path, column: str) -> list[dict[str, Any]]:
    """Rows of `text` and perhaps `id`: lines of a .txt, rows of a .csv, objects of a .jsonl."""
    if not file.is_file():
        fail(f"--input {file} is not a file. Give a .txt, .csv or .jsonl, or - for stdin.")
    kind = file.suffix.lower()
    if kind not in (".txt", ".csv", ".jsonl"):
        fail(f"--input {file} is no .txt, .csv or .jsonl.")
    content = decode_posts(file.read_bytes(), f"--input {file}")
    if kind == ".txt":
        return split_lines(content)
    if kind == ".csv":
        csv.field_size_limit(2**31 - 1)
        rows: list[Any] = list(csv.DictReader(io.StringIO(content, newline="")))
        columns = list(rows[0]) if rows else []
    else:
        rows = []
        for number, line in enumerate(content.split("\n"), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                fail(f"--input {file} line {number} is not JSON: {error}")
        if not all(isinstance(row, dict) for row in rows):
            fail(f"--input {file}: every line is to be an object with `{column}`.")
        columns = sorted({key for row in rows for key in row})
    lacking = [number for number, row in enumerate(rows, start=1) if row.get(column) is None]
    if lacking:
        fail(
            f"--input {file}: row {lacking[0]} has no {column!r}. There are: "
            f"{', '.join(map(str, columns))}. Name the column with --text_column."
        )
    return [{"id": row.get("id"), "text": row[column]} for row in rows]


def decode_posts(content: bytes, origin: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{origin} is not UTF-8: {error}")


def split_lines(content: str) -> list[dict[str, Any]]:
    """A post for each line. Not splitlines: that also splits at U+2028, which stands in posts."""
    lines = content.replace("\r\n", "\n").removesuffix("\n").split("\n") if content else []
    return [{"text": line} for line in lines]


def show_posts(
    args: argparse.Namespace, task: Task, posts: list[dict[str, Any]], target: Path
) -> None:
    """Print what classified posts are, and keep all of a file's in predictions.csv."""
    rule = "the likeliest label" if len(task.labels) > 2 else f"threshold {args.threshold}"
    print(f"\np_{task.positive} (decided by {rule})")
    for post in posts[:20]:
        notes = [note for note in ("near_tie", "cut") if post[note]]
        p = post["probabilities"][task.positive]
        print(f"{p:.4f}  {post['prediction']}  {visible(post['id'])}  {' '.join(notes)}".rstrip())
    if args.input is None:
        return
    with draft_folder(target) as draft:
        write_predictions(draft / "predictions.csv", task, posts, args.log_text)
        (draft / "predictions.csv").replace(target / "predictions.csv")
    more = f"{len(posts) - 20} more in " if len(posts) > 20 else ""
    print(f"{more}{target / 'predictions.csv'}", flush=True)


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


@dataclass(frozen=True)
class Setup:
    """What the model computes in: the name of a torch dtype, how its weights are quantised, and
    whether the forward is under the bfloat16 autocast of the training."""

    dtype: str
    quantization: Any
    in_4bit: bool
    autocast: bool

    @property
    def rounded(self) -> bool:
        """Whether it is less than float32."""
        return self.dtype != "float32" or self.in_4bit


def choose_setup(
    args: argparse.Namespace, contract: dict[str, Any], base: Repo, config: Any, device: str
) -> Setup:
    """As asked, else as trained: a QLoRA adapter is at home on the base quantised the same way."""
    import torch
    import transformers

    dtype, trained = choose_dtype(args.dtype, device), contract.get("arguments", {})
    in_4bit, stored = args.load_in_4bit, stored_quantization(config)
    if in_4bit is None and (in_4bit := bool(trained.get("load_in_4bit"))):
        print("base model in 4 bits, as trained; --load_in_4bit false takes it whole", flush=True)
    if in_4bit and stored:
        fail(f"--load_in_4bit cannot quantise {base.name}: it is stored as {stored}.")
    quantization = None
    if in_4bit:
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=trained.get("bnb_4bit_quant_type") or "nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            llm_int8_skip_modules=["classifier", "score", "lm_head"],
        )
    if args.keep_mxfp4:
        if stored != "mxfp4" or device != "cuda":
            fail(
                f"--keep_mxfp4 needs a base stored as mxfp4 ({base.name} is stored as {stored}) "
                f"and a GPU (this is {device}). Leave it out."
            )
        quantization = transformers.Mxfp4Config(dequantize=False)
    # A mixture of experts picks other experts where its numbers are rounded elsewhere.
    autocast = dtype == contract.get("training", {}).get("precision") == "bfloat16"
    return Setup(dtype, quantization, in_4bit, autocast)


def stored_quantization(config: Any) -> str | None:
    """How a checkpoint's weights are quantised, such as mxfp4 or fp8; None where they are not."""
    return (getattr(config, "quantization_config", None) or {}).get("quant_method")


def load_model(
    args: argparse.Namespace,
    task: Task,
    base: Repo,
    config: Any,
    adapter: Repo | None,
    tokenizer: Any,
    setup: Setup,
    device: str,
) -> Any:
    """The base model with the adapter on it, ready to score."""
    import torch

    kind, dtype = "causal" if task.prompt else "classify", getattr(torch, setup.dtype)
    model = load_base(base, config, kind, task.labels, dtype, device, setup.quantization)
    # A decoder with a classification head finds a row's last token by this id.
    model.config.pad_token_id = tokenizer.pad_token_id
    keep_four_bit_layout(model)
    if adapter and not args.base_only:
        model = load_adapter(model, adapter, base)
    if args.keep_mxfp4 and can_widen(model):
        fail(
            f"{base.name} was dequantised all the same: its kernels need a newer GPU, triton or "
            "package kernels. Leave --keep_mxfp4 out."
        )
    four = ", base in 4 bits" if setup.in_4bit else ""
    print(f"scoring on {device_name(device)} in {setup.dtype}{four}", flush=True)
    return model.eval()


def choose_dtype(name: str, device: str) -> str:
    """`auto` is bfloat16 on a GPU that computes in it, else float32."""
    import torch

    if name != "auto":
        return name
    # Emulated bfloat16, as on a T4, is slower than float32.
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def device_name(device: str) -> str:
    """The name of the GPU, or "cpu"."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


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
        asked = [
            post.get("prompt") or prompt_messages(task.prompt, post["text"], post) for post in posts
        ]
        texts = [post["text"] for post in posts]
        encoded = encode_prompts(tokenizer, scaffold, asked, texts, room)
    for post, (_, cut) in zip(posts, encoded, strict=True):
        post["cut"] = cut
    return [ids for ids, _ in encoded], [answers[label] for label in task.labels if answers]


@dataclass(frozen=True)
class World:
    """The processes of a torchrun start; alone, this one."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, in the order of the ranks, in every process."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values = [None] * self.size
        distributed.all_gather_object(values, value)
        return values


def join_world() -> World:
    """Join the other processes of a torchrun start; only the first one prints."""
    world = World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if world.size > 1:
        from torch import distributed

        if not distributed.is_initialized():
            # Scores are few bytes, so gloo serves; a rank may wait long for another's last row.
            distributed.init_process_group("gloo", timeout=timedelta(hours=3))
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if world.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return world


def start_on_all_gpus(device: str) -> None:
    """Where several GPUs are visible, become torchrun with one process for each."""
    import torch

    gpus = torch.cuda.device_count() if device == "cuda" else 1
    if gpus < 2 or "LOCAL_RANK" in os.environ:
        return
    print(f"scoring on {gpus} GPUs", flush=True)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus))
    os.execv(sys.executable, [sys.executable, *launch, *sys.argv])


class Journal:
    """What is finished of an evaluation, kept in a file that outlives the process.

    The first line is the key of everything that decides the values, each further one a stage and
    some of its values by the index of their post. With `repo` the file also goes to the Hub every
    `minutes`, for another machine to go on from.
    """

    def __init__(
        self, file: Path, key: str, repo: tuple[str, str] | None = None, minutes: float = 5
    ) -> None:
        self.file, self.key, self.repo, self.minutes = file, key, repo, minutes
        self.found: dict[str, dict[int, Any]] = {}
        self.pushed = time.monotonic()

    def load(self, fresh: bool) -> None:
        """Read what an earlier start left here or on the Hub under the same key."""
        lines = [] if fresh else self.read(self.file)
        if self.repo and not fresh and (other := self.fetch()):
            lines += self.read(other)
        for stage, values in lines:
            known = self.found.setdefault(stage, {})
            known.update({int(index): value for index, value in values.items()})
        # Written anew: a torn last line must not swallow the next one.
        entries = [{"stage": stage, "values": values} for stage, values in self.found.items()]
        text = "".join(json.dumps(entry) + "\n" for entry in ({"key": self.key}, *entries))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole = self.file.with_suffix(".new")
        whole.write_text(text, encoding="utf-8")
        whole.replace(self.file)
        if count := sum(map(len, self.found.values())):
            print(f"going on with {count} finished scores of an earlier start", flush=True)

    def read(self, file: Path) -> list[tuple[str, dict[str, Any]]]:
        """The whole lines of a file of this key; of another key, or damaged: nothing."""
        lines: list[tuple[str, dict[str, Any]]] = []
        try:
            first, *rest = file.read_text(encoding="utf-8").split("\n")
            if json.loads(first) != {"key": self.key}:
                return []
            for line in rest:
                entry = json.loads(line)
                lines.append((str(entry["stage"]), dict(entry["values"])))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return lines

    def fetch(self) -> Path | None:
        """The file of another machine; None where there is none or the Hub does not answer."""
        from httpx2 import HTTPError
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.repo[0], self.repo[1]))
        except (HTTPError, OSError):
            return None

    def append(self, stage: str, values: dict[int, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"stage": stage, "values": values}) + "\n")

    def add(self, stage: str, values: dict[int, Any]) -> None:
        """Keep finished values; a Hub that fails costs a line of the log and no value."""
        self.found.setdefault(stage, {}).update(values)
        self.append(stage, values)
        if self.repo and time.monotonic() - self.pushed > 60 * self.minutes:
            self.push()
            self.pushed = time.monotonic()

    def push(self) -> None:
        from httpx2 import HTTPError
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(self.repo[1], path_or_fileobj=self.file)
        try:
            commit(self.repo[0], "model", [operation], f"Keep scores of {self.key[:8]}", tries=1)
        except (HTTPError, OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            print(f"the scores so far are not on the Hub, only here ({reason})", flush=True)


def open_journals(
    args: argparse.Namespace, key: str, repo: str | None, name: str, target: Path, world: World
) -> list[Journal]:
    """The first process's journals of scores and of answers; the others have none.

    Scores stay beside the evaluations when one ends: another threshold or --with_base needs the
    same. Answers can quote their post, so they go to the Hub only where the posts may.
    """
    if world.rank or is_ad_hoc(args):
        return []
    with draft_folder(target):
        pass  # Whether there is room to write is known before anything is scored.
    scores, answers = f"scores-{key[:8]}.jsonl", f"answers.partial-{key[:8]}.jsonl"
    beside = target if args.output_dir else target.parent
    places = (
        (beside / scores, (repo, f"eval/{scores}") if repo else None),
        (target / answers, (repo, f"eval/{name}/{answers}") if repo and args.log_text else None),
    )
    journals = [Journal(file, key, place, args.save_minutes) for file, place in places]
    for journal in journals:
        journal.load(args.fresh)
    return journals


def share_rows(rows: list[list[int]], sizes: list[int], parts: int) -> list[list[list[int]]]:
    """Give each process about the same number of tokens: the largest row to the least loaded."""
    shares: list[list[list[int]]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for index in sorted(range(len(rows)), key=lambda row: -sizes[row]):
        least = loads.index(min(loads))
        shares[least].append(rows[index])
        loads[least] += sizes[index]
    return shares


def run_rows(
    rows: list[list[int]],
    sizes: list[int],
    compute: Callable[[list[int]], list[Any]],
    stage: str,
    journal: Journal | None,
    world: World,
) -> dict[int, Any]:
    """Values of all posts of the rows, computed where the journal does not have them yet.

    Rows are the same for any number of processes and after any stop, so the values are too.
    """
    wanted = [index for row in rows for index in row]
    known = journal.found.get(stage, {}) if journal else {}
    values = world.gather({index: known[index] for index in wanted if index in known})[0]
    open_rows = [number for number, row in enumerate(rows) if not values.keys() >= set(row)]
    shares = share_rows(
        [rows[number] for number in open_rows], [sizes[number] for number in open_rows], world.size
    )
    begun = reported = time.monotonic()
    before = len(values)
    for turn in range(max(map(len, shares))):
        mine = shares[world.rank][turn : turn + 1]
        made = {
            index: value for row in mine for index, value in zip(row, compute(row), strict=True)
        }
        fresh = {index: value for part in world.gather(made) for index, value in part.items()}
        values |= fresh
        if journal:
            journal.add(stage, fresh)
        done = len(values) == len(wanted)
        if time.monotonic() - reported > 20 or (done and len(wanted) > 50):
            reported = time.monotonic()
            rate = (len(values) - before) / max(reported - begun, 1e-9)
            print(f"{stage}: {len(values)} of {len(wanted)} posts, {rate:.1f}/s", flush=True)
    return values


def score_stage(
    scorer: Scorer,
    posts: list[list[int]],
    indices: list[int],
    stage: str,
    journal: Journal | None,
    world: World,
) -> dict[int, list[float]]:
    """Scores of some posts by index; see run_rows."""
    rows = scorer.rows(posts, indices)
    sizes = [scorer.size([posts[index] for index in row]) for row in rows]

    def compute(row: list[int]) -> list[list[float]]:
        return scorer.score([posts[index] for index in row])

    return run_rows(rows, sizes, compute, stage, journal, world)


def decision_margin(scores: list[float], positive: int, threshold: float) -> float:
    """How far (nats) a post's scores are from another decision; see `decide`."""
    if len(scores) > 2:
        first, second = sorted(scores, reverse=True)[:2]
        return first - second
    if threshold in (0, 1):
        return math.inf
    return abs(scores[positive] - scores[1 - positive] - math.log(threshold / (1 - threshold)))


def settle_near_ties(
    scorer: Scorer,
    posts: list[list[int]],
    scores: list[list[float]],
    margin: Callable[[list[float]], float],
    stage: str,
    journal: Journal | None,
    world: World,
) -> dict[str, Any]:
    """Replace scores that rounding could have decided by those of a float32 pass; say how many.

    The posts nearest to another decision are scored again, which measures the error of the first
    pass; of a mixture of experts, where rounding can choose another expert and a few errors are
    large, also every eighth of the others. Posts within the larger of the largest error seen (of
    experts: twice that) and four times its root mean square follow, until none is left within it.
    """
    exact: dict[int, list[float]] = {}
    errors: list[float] = []
    margins = [margin(row) for row in scores]
    reach = 0.0
    nearest = sorted(range(len(scores)), key=lambda index: (margins[index], posts[index]))
    experts = has_experts(scorer.model)
    need = nearest[:16] + (nearest[16::8] if experts else [])
    with scorer.in_float32():
        while need:
            found = score_stage(scorer, posts, need, f"{stage}, float32", journal, world)
            errors += [largest_difference([found[index]], [scores[index]]) for index in need]
            exact |= found
            spread = math.sqrt(sum(error * error for error in errors) / len(errors))
            reach = max((1 + experts) * max(errors), 4 * spread)
            near = (index for index, distance in enumerate(margins) if distance < reach)
            need = [index for index in near if index not in exact]
    for index, row in exact.items():
        scores[index] = row
    return {"rescored": len(exact), "largest_error": max(errors), "reach": reach}


def score_posts(
    scorer: Scorer,
    encoded: list[list[int]],
    margin: Callable[[list[float]], float],
    rounded: bool,
    stage: str,
    journal: Journal | None,
    world: World,
) -> tuple[list[list[float]], list[bool], dict[str, Any]]:
    """Scores (nats) of each post, whether it is a near tie, and what was done about those.

    Posts of the same tokens are scored once. `rounded` says that the run's precision is less than
    float32.
    """
    posts = sorted(map(list, {tuple(ids) for ids in encoded}), key=lambda ids: (-len(ids), ids))
    indices = list(range(len(posts)))
    found = score_stage(scorer, posts, indices, stage, journal, world)
    scores = [found[index] for index in indices]
    check_numbers(scores)
    ties, record = TIE, {"rescored": 0, "largest_error": None, "reach": TIE}
    if rounded and scorer.widened:
        record = settle_near_ties(scorer, posts, scores, margin, stage, journal, world)
    elif rounded:
        ties = record["reach"] = UNMEASURED
    check_numbers(scores)
    place = {tuple(ids): index for index, ids in enumerate(posts)}
    where = [place[tuple(ids)] for ids in encoded]
    near = [margin(scores[index]) < ties for index in where]
    record |= {"posts": len(encoded), "distinct_prompts": len(posts), "near_ties": sum(near)}
    return [scores[index] for index in where], near, record


def check_numbers(scores: list[list[float]]) -> None:
    if not all(math.isfinite(score) for row in scores for score in row):
        fail("the model's scores are not numbers. Try --dtype float32.", code=1)


def encode_prompts(
    tokenizer: Any,
    scaffold: Scaffold,
    conversations: list[list[dict[str, str]]],
    texts: list[str],
    room: int,
) -> list[tuple[list[int], bool]]:
    """What `encode_prompt` gives for each post, the ordinary ones tokenised in one call.

    Ordinary are prompts that fit and hold no control token in a message.
    """
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    start = [] if tokenizer.chat_template else list(tokenizer("")["input_ids"])
    filled: dict[int, str] = {}
    for index, messages in enumerate(conversations):
        contents = [message["content"] for message in messages]
        if not any(control.search(content) for content in contents):
            pieces = zip(scaffold.pieces, contents, strict=False)
            text = "".join(piece + content for piece, content in pieces)
            filled[index] = text + scaffold.pieces[len(contents)]
    ids = tokenizer(list(filled.values()), add_special_tokens=False)["input_ids"] if filled else []
    quick = {
        index: start + one
        for index, one in zip(filled, ids, strict=True)
        if len(start) + len(one) <= room
    }
    return [
        (quick[index], False)
        if index in quick
        else encode_prompt(tokenizer, scaffold, conversations[index], text, room)
        for index, text in enumerate(texts)
    ]


def build_scorer(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    answers: list[list[int]],
    encoded: list[list[int]],
    setup: Setup,
    world: World,
) -> Scorer:
    """The scorer on its fastest exact path, checked on a few of the posts.

    All processes take the smallest budget and the plainest path of them, so that they agree on
    the rows.
    """
    budget = min(world.gather(args.tokens_per_batch or default_budget(model)))
    scorer = Scorer(model, answers, tokenizer.pad_token_id or 0, budget, setup)
    scorer.begin(encoded)
    scorer.check(encoded, scorer.path)
    record = scorer.record
    plainest = max(world.gather(scorer.path), key=PATHS.index)
    if plainest != scorer.path:
        scorer.use(plainest)
        record["path"] = plainest
    print(
        f"scoring path {record['path']}: {record['checked_posts']} posts differ from naive "
        f"scoring by at most {record['largest_difference']:.1e} nats in {record['checked_in']}",
        flush=True,
    )
    return scorer


def default_budget(model: Any) -> int:
    """Tokens of a row: on a CPU what keeps its caches warm, on a GPU what its free memory holds.

    A power of two, so that a little more or less free memory gives the same rows.
    """
    import torch

    if model.device.type != "cuda":
        return 1024
    config = bare_model(model).config.get_text_config(decoder=True)
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # About eight states of the body and four of the widest layer are alive at once, in float32.
    one = 4 * (8 * config.hidden_size + 4 * wide)
    free, _ = torch.cuda.mem_get_info()
    return min(16384, max(256, 2 ** int(math.log2(max(free // 2 // one, 1)))))


def decide_posts(
    args: argparse.Namespace,
    task: Task,
    scorer: Scorer,
    tokenizer: Any,
    posts: list[dict[str, Any]],
    encoded: list[list[int]],
    journals: list[Journal],
    world: World,
) -> dict[str, Any]:
    """Give each post its probabilities, prediction and near_tie; return how that was done."""
    begun = time.monotonic()
    rounded = scorer.setup.rounded
    positive = task.labels.index(task.positive)

    def margin(row: list[float]) -> float:
        return decision_margin(row, positive, args.threshold)

    scoring = dict(scorer.record)
    for stage, prefix in (("scores", ""), ("scores of the base", "base_"))[: 1 + args.with_base]:
        without = scorer.model.disable_adapter() if prefix else contextlib.nullcontext()
        with without:
            if prefix:
                scorer.use(scorer.path)
            scores, near, record = score_posts(
                scorer, encoded, margin, rounded, stage, journals[0] if journals else None, world
            )
        for post, row, tie in zip(posts, scores, near, strict=True):
            post[f"{prefix}probabilities"] = dict(zip(task.labels, softmax(row), strict=True))
            post[f"{prefix}near_tie"] = tie
            post[f"{prefix}prediction"] = decide(
                post[f"{prefix}probabilities"], task, args.threshold
            )
        scoring[f"{prefix}scores"] = record
        if record["rescored"]:
            print(
                f"{stage}: {record['rescored']} near ties scored again in float32 (error of the "
                f"first pass up to {record['largest_error']:.2g} nats); {record['near_ties']} left",
                flush=True,
            )
    scoring |= {"attention": scorer.attention(), "tokens_per_row": scorer.row_budget}
    scoring |= {"autocast": scorer.setup.autocast, "mode": args.mode}
    if args.mode == "generate" or args.rationales:
        scoring["answers"] = answer_posts(
            args, task, scorer, tokenizer, posts, encoded, journals, world
        )
    return {"scoring": scoring | {"seconds": round(time.monotonic() - begun, 3)}}


def softmax(scores: list[float]) -> list[float]:
    """Probabilities from log-likelihoods or logits."""
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def decide(probabilities: dict[str, float], task: Task, threshold: float) -> str:
    """The predicted label: with two labels by the threshold, with more the likeliest."""
    if len(task.labels) > 2:
        return max(task.labels, key=probabilities.__getitem__)
    return task.positive if probabilities[task.positive] >= threshold else task.negative


# --- engine ----------------------------------------------------------------------------------


# From the fastest to the plainest; each is exact where the model's code does what it seems to.
PATHS = ("packed", "padded_with_prefix", "padded_ends", "padded", "naive")
# Largest difference, in nats, between a path's margins and the naive ones in float32.
EXACT_WITHIN = 1e-3
# A kernel whose margins are off by more is broken, not rounded.
COARSE_TOLERANCE = 1.0
# What rounding may have decided where it cannot be measured: bfloat16 errors of dense models of up
# to 100M parameters stayed below 0.75 nats.
UNMEASURED = 0.75
# A float32 margin below this may be the other way round on another machine.
TIE = 1e-4
# Bytes of attention scores that are computed at once: the second-level cache of a CPU core.
CPU_TILE, GPU_TILE = 1 << 20, 1 << 28


@dataclass(frozen=True)
class LabelTree:
    """The labels' completions as one tree: a shared trunk, then what has to be computed once.

    A node is the beginning of at least one completion after the trunk, without its last token.
    `steps` says of each label where its tokens are predicted: (place, token), place 0 being the
    trunk's end and place n + 1 the node n.
    """

    trunk: list[int]
    tokens: list[int]
    depths: list[int]
    sees: list[list[bool]]
    steps: list[list[tuple[int, int]]]


def build_tree(completions: list[list[int]]) -> LabelTree:
    """Fold the completions of all labels, none of which begins another, into a tree."""
    trunk = common_prefix(completions)
    tails = [tuple(completion[len(trunk) :]) for completion in completions]
    inner = {tail[:end] for tail in tails for end in range(1, len(tail))}
    nodes = sorted(inner, key=lambda node: (len(node), node))
    places = {(): 0} | {node: place for place, node in enumerate(nodes, start=1)}
    return LabelTree(
        trunk,
        tokens=[node[-1] for node in nodes],
        depths=[len(node) for node in nodes],
        sees=[[node[: len(other)] == other for other in nodes] for node in nodes],
        steps=[[(places[tail[:at]], token) for at, token in enumerate(tail)] for tail in tails],
    )


class PackedRow:
    """Posts behind one another in a single row, each with the label tree after its last token.

    `posts` are the token ids after the `prefix` tokens that all posts share, longest post first.
    A slot is a place within a post, from 0 to the longest one's length L.
    """

    def __init__(self, posts: list[list[int]], prefix: int, tree: LabelTree, device: Any) -> None:
        import torch

        nodes = len(tree.tokens)
        self.prefix, self.sizes = prefix, [len(post) + nodes for post in posts]
        ids = [token for post in posts for token in (*post, *tree.tokens)]
        positions = [
            prefix + place
            for post in posts
            for place in (*range(len(post)), *(len(post) - 1 + depth for depth in tree.depths))
        ]
        ends = torch.tensor([len(post) for post in posts])
        sizes = ends + nodes
        starts = sizes.cumsum(0) - sizes
        slot = torch.arange(self.sizes[0])
        inside = slot < sizes[:, None]
        allowed = (slot <= slot[:, None])[None]
        if nodes:
            node = slot - ends[:, None]
            ancestor = torch.tensor(tree.sees)
            at = node.clamp(0, nodes - 1)
            related = (node < 0)[:, None, :] | ancestor[at[:, :, None], at[:, None, :]]
            allowed = allowed & related & inside[:, None, :]
        places = [ends[:, None] - 1, ends[:, None] + torch.arange(nodes)]
        self.has_tree = nodes > 0
        self.ids = torch.tensor([ids], device=device)
        self.positions = torch.tensor([positions], device=device)
        # Where the logits count, shape posts x (1 + nodes): the end of each post's trunk and its
        # nodes, as slots and as places in the row.
        self.end_slots = torch.cat([place.expand(len(posts), -1) for place in places], 1).to(device)
        self.ends = starts[:, None].to(device) + self.end_slots
        # Shape posts x L: the row's index of each slot (0 beyond a post's end), its position.
        self.slots = torch.where(inside, starts[:, None] + slot, 0).to(device)
        # Shape posts (or 1, where all are the same) x L x L: which slot sees which.
        self.allowed = allowed.to(device)
        self.tiles_made: dict[Any, list[Tile]] = {}

    def tiles(self, heads: int, dtype: Any, most_bytes: int) -> list[Tile]:
        """Divide the row into runs of posts whose attention scores fit into `most_bytes`."""
        import torch

        key = (heads, dtype, most_bytes)
        if key in self.tiles_made:
            return self.tiles_made[key]
        tiles, first, start = [], 0, 0
        while first < len(self.sizes):
            longest = self.sizes[first]
            one = heads * longest * (self.prefix + longest) * dtype.itemsize
            last = first + max(1, most_bytes // one)
            sizes = self.sizes[first:last]
            allowed = self.allowed[first:last] if len(self.allowed) > 1 else self.allowed
            # Softmax is a quarter faster on whole vectors: spare columns, which nobody sees.
            spare = -(self.prefix + longest) % 32
            seen = torch.nn.functional.pad(allowed[:, :longest, :longest], (0, spare))
            bias = torch.zeros_like(seen, dtype=dtype)
            bias.masked_fill_(~seen, torch.finfo(dtype).min)
            slots = inside = None
            if sizes[-1] < longest:
                slots = self.slots[first:last, :longest]
                lengths = torch.tensor(sizes, device=slots.device)
                inside = torch.arange(longest, device=slots.device) < lengths[:, None]
                inside = inside.flatten().nonzero()[:, 0]
            tokens = slice(start, start + sum(sizes))
            posts = slice(first, first + len(sizes))
            tiles.append(Tile(posts, tokens, len(sizes), longest, spare, slots, inside, bias))
            first, start = first + len(sizes), tokens.stop
        self.tiles_made[key] = tiles
        return tiles


@dataclass(frozen=True)
class Tile:
    """A run of posts of a row; where they differ in length, `slots` and `inside` pad them."""

    posts: slice
    tokens: slice
    count: int
    longest: int
    spare: int
    slots: Any
    inside: Any
    bias: Any

    @property
    def own(self) -> Any:
        """Where the posts' tokens stand in the row: a slice, or an index of posts x slots."""
        return self.tokens if self.slots is None else self.slots

    def columns(self, states: Any, prefix: int) -> Any:
        """Keys or values that each post can see, shape heads * posts x columns x size.

        They are the prefix, its own tokens, and spare columns.
        """
        import torch

        own = states[0, :, prefix:][:, self.own]
        own = own.reshape(states.shape[1], self.count, self.longest, -1)
        shared = states[0, :, None, :prefix].expand(-1, self.count, -1, -1)
        spare = own.new_zeros(1, 1, 1, 1).expand(*own.shape[:2], self.spare, own.shape[3])
        return torch.cat([shared, own, spare], 2).flatten(0, 1)


class PackedAttention:
    """Attention of a packed row: every token sees the shared prefix and its own post.

    transformers calls it under the name "packed". Scores exist only between a token and the
    prefix and within each post: nothing is computed for two posts together. Query heads that share
    a key head are rows of the same product. In the last layer only the places ask whose logits
    count.
    """

    def __init__(self) -> None:
        self.row: PackedRow | None = None
        self.kernels: set[str] = set()
        self.last_layer: int | None = None
        self.flash = True

    def register(self) -> None:
        """Make it known to transformers; registering again replaces the earlier one."""
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register("packed", self)
        AttentionMaskInterface.register("packed", self.mask)

    def mask(self, *, mask_function: Any, dtype: Any, device: Any, **_: Any) -> Any:
        """What a layer's type hides from the row's slots; None where that is the future alone.

        `mask_function` is transformers' rule of the layer type (causal, sliding, chunked), here
        asked about positions within a post. Returns a bias of shape posts x L x (prefix + L).
        """
        import torch

        row = self.row
        end = int(row.positions.max()) + 1
        query = torch.arange(row.prefix, end, device=device)[:, None]
        key = torch.arange(end, device=device)[None]
        zero = torch.zeros((), dtype=torch.long, device=device)
        rule = mask_function(zero, zero, query, key)
        if torch.equal(rule, key <= query):
            return None
        at = row.positions[0][row.slots]
        among = rule[(at - row.prefix)[:, :, None], at[:, None, :]] & row.allowed
        before = rule[at - row.prefix, : row.prefix]
        seen = torch.cat([before, among], -1)
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)

    def __call__(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Any = None,
        **_: Any,
    ) -> tuple[Any, None]:
        """Attend; `query` has the shape 1 x heads x tokens x size, the result tokens before heads.

        `s_aux` is a learned score per head that takes part in the softmax and has no value
        (attention sinks); `softcap` bounds the scores.
        """
        import torch

        scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
        half = value.dtype in (torch.bfloat16, torch.float16)
        plain = attention_mask is None and softcap is None and not self.row.has_tree
        if (
            self.flash
            and value.is_cuda
            and half
            and plain
            and query.shape[-1] == value.shape[-1] <= 256
        ):
            self.kernels.add("flash")
            return self.attend_flash(query, key, value, scaling, s_aux), None
        self.kernels.add("grouped")
        layer = getattr(module, "layer_idx", None)
        found = self.attend_grouped(
            layer, query, key, value, attention_mask, scaling, softcap, s_aux
        )
        return found, None

    def attend_grouped(
        self,
        layer: int | None,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scaling: float,
        softcap: float | None,
        sinks: Any,
    ) -> Any:
        """Matrix products over tiles that stay in the cache; any mask, any model."""
        import torch

        row, heads, tokens, size = self.row, query.shape[1], query.shape[2], query.shape[3]
        groups, prefix = key.shape[1], self.row.prefix
        share, ends_only = heads // groups, layer is not None and layer == self.last_layer
        query = (query[0] * scaling).view(groups, share, tokens, size).transpose(1, 2)
        mixed = value.new_zeros(tokens, heads, value.shape[-1])
        for tile in row.tiles(heads, query.dtype, GPU_TILE if query.is_cuda else CPU_TILE):
            n, asked, count = tile.count, tile.own, tile.longest
            hidden, first = tile.bias, prefix
            if mask is not None:
                seen = mask[tile.posts, :count, : prefix + count]
                lowest = torch.finfo(mask.dtype).min
                hidden, first = torch.nn.functional.pad(seen, (0, tile.spare), value=lowest), 0
            if ends_only:
                slots = row.end_slots[tile.posts]
                each = torch.arange(n, device=slots.device)[:, None]
                hidden = hidden.expand(n, -1, -1)[each, slots]
                asked, count = row.ends[tile.posts], slots.shape[1]
            lines = query[:, asked].reshape(groups * n, count * share, size)
            scores = torch.bmm(lines, tile.columns(key, prefix).transpose(1, 2))
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            shaped = scores.view(groups, n, count, share, -1)
            shaped[..., first:] += hidden[:, :, None].to(scores.dtype)
            if sinks is not None:
                sink = sinks.to(scores.dtype).view(groups, 1, 1, share, 1)
                sink = sink.expand(groups, n, count, share, 1).reshape(groups * n, -1, 1)
                scores = torch.cat([scores, sink], -1)
            weights = torch.softmax(scores, -1)
            if sinks is not None:
                weights = weights[..., :-1]
            found = torch.bmm(weights.to(value.dtype), tile.columns(value, prefix))
            found = found.view(groups, n * count, share, -1).transpose(0, 1).flatten(1, 2)
            if ends_only:
                mixed[asked.flatten()] = found
            else:
                mixed[tile.tokens] = found if tile.inside is None else found[tile.inside]
        return mixed[None]

    def attend_flash(self, query: Any, key: Any, value: Any, scaling: float, sinks: Any) -> Any:
        """FlashAttention of torch: to the prefix, within the posts, then joined by their weights.

        Each call also gives the logarithm of its softmax's denominator, so two softmaxes over
        parts make the one over all keys (Dao, FlashAttention-2, arXiv 2307.08691).
        """
        import torch
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        row, device = self.row, query.device
        query, key = (part[0].transpose(0, 1).to(value.dtype) for part in (query, key))
        value = value[0].transpose(0, 1)

        def attend(keys: Any, values: Any, *sizes: list[int], window: tuple[int, int]) -> Any:
            starts = [
                torch.tensor([0, *itertools.accumulate(one)], dtype=torch.int32, device=device)
                for one in sizes
            ]
            mixed, denominators = varlen_attn(
                *(query, keys.contiguous(), values.contiguous(), *starts, *map(max, sizes)),
                return_aux=AuxRequest(lse=True),
                scale=scaling,
                window_size=window,
                enable_gqa=query.shape[1] != keys.shape[1],
            )
            return mixed, denominators.float().transpose(0, 1)[..., None]

        prefix = row.prefix
        mixed, total = attend(key[prefix:], value[prefix:], row.sizes, row.sizes, window=(-1, 0))
        if prefix:
            whole = [len(query)], [prefix]
            other, logs = attend(key[:prefix], value[:prefix], *whole, window=(-1, -1))
            joint = torch.logaddexp(total, logs)
            mixed = mixed * (total - joint).exp() + other * (logs - joint).exp()
            total = joint
        if sinks is not None:
            mixed = mixed * torch.sigmoid(total - sinks.float()[None, :, None])
        return mixed[None].to(value.dtype)


@dataclass(frozen=True)
class Prefix:
    """The first `length` tokens of every prompt: each layer's keys and values of them."""

    length: int = 0
    layers: tuple[tuple[Any, Any], ...] = ()

    def cache(self, rows: int = 1) -> Any:
        """A cache of its own for one forward of `rows` rows, which that forward will lengthen."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.layers):
            shape = (rows, -1, -1, -1)
            cache.update(keys.expand(shape), values.expand(shape), index)
        return cache


class Scorer:
    """Scores labels for posts with one loaded model, by the fastest path that proves exact.

    `completions` are the labels' answers as token ids; a sequence classifier has none.
    """

    def __init__(
        self, model: Any, completions: list[list[int]], pad: int, budget: int, setup: Setup
    ) -> None:
        self.model, self.pad, self.setup = model, pad, setup
        # Rows are filled up to the first; the second shrinks where memory does not suffice.
        self.row_budget, self.budget = budget, budget
        self.completions = completions
        self.tree = build_tree(completions) if completions else LabelTree([], [], [], [], [])
        # A decoder's classifier reads a post's last token only, by a head of this name.
        ends = hasattr(bare_model(model), "score")
        self.path = PATHS[0] if completions else "padded_ends" if ends else "padded"
        # The places of a batch whose outputs count, for the last layer; see ask_ends_only.
        self.ends: Any = None
        self.own_attention = attention_of(model)
        self.packed = PackedAttention()
        self.packed.register()
        self.shared: list[int] = []
        self.prefixes: dict[bool, Prefix] = {}
        self.hooks: list[Any] = []
        self.exact = False
        self.widened = can_widen(model)
        self.record: dict[str, Any] = {}

    def begin(self, posts: list[list[int]]) -> None:
        """Find the beginning that all prompts share; at least one token of each stays its own."""
        shared = common_prefix([min(posts), max(posts)])
        self.shared = shared[: min(map(len, posts)) - 1] if self.completions else []
        self.use(self.path)

    def use(self, path: str) -> None:
        """Take a path, with the weights as they are now: prefixes are read anew."""
        self.path, self.prefixes = path, {}
        for hook in self.hooks:
            hook.remove()
        self.hooks = self.ask_ends_only() if path in ("packed", "padded_ends") else []
        if self.completions:
            name = "packed" if path == "packed" else self.own_attention
            if attention_of(self.model) != name:
                bare_model(self.model).set_attn_implementation(name)

    def ask_ends_only(self) -> list[Any]:
        """Let the last layer compute only the places whose logits count; return the hooks.

        Nothing reads its other places. A packed row's attention knows them, and the feed-forward
        block, where it has a common name, gets a shorter row.
        """
        model = bare_model(self.model)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.packed.last_layer = layers - 1
        lists = [
            part
            for part in model.modules()
            if type(part).__name__ == "ModuleList" and len(part) == layers
        ]
        names = ("mlp", "feed_forward", "block_sparse_moe")
        blocks = [vars(part[-1])["_modules"].get(name) for part in lists for name in names]
        blocks = [block for block in blocks if block is not None]
        if len(blocks) != 1:
            return []

        def shorten(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (inputs[0].flatten(0, 1)[self.ends][None], *inputs[1:])

        def lengthen(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            whole = first.new_zeros(*self.shape, first.shape[-1])
            whole.flatten(0, 1)[self.ends] = first.view(-1, first.shape[-1])
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        (block,) = blocks
        return [block.register_forward_pre_hook(shorten), block.register_forward_hook(lengthen)]

    def forward(self, **inputs: Any) -> Any:
        """The model's logits, computed as the scorer stands: autocast, or exactly in float32."""
        import torch

        kind, self.shape = self.model.device.type, inputs["input_ids"].shape
        autocast = self.setup.autocast and not self.exact
        # `full_precision` exchanges weights between calls, which inference mode does not allow.
        mode = torch.no_grad() if self.exact else torch.inference_mode()
        with mode, torch.autocast(kind, torch.bfloat16, enabled=autocast):
            return self.model(**inputs).logits

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32, whatever the weights are stored in."""
        self.exact = True
        try:
            with full_precision(self.model):
                yield
        finally:
            self.exact = False

    def size(self, posts: list[list[int]]) -> int:
        """Tokens that the posts take in one row or batch, without the shared prefix."""
        shared = len(self.shared) if self.path in PATHS[:2] else 0
        lengths = [len(post) - shared + len(self.tree.trunk) for post in posts]
        if self.path == "packed":
            return sum(lengths) + len(posts) * len(self.tree.tokens)
        return max(lengths) * len(posts) * (len(self.completions) if self.tree.tokens else 1)

    def rows(self, posts: list[list[int]], indices: list[int]) -> list[list[int]]:
        """Fill rows with posts, longest first, up to the budget of tokens.

        Posts of one length are in the order of their tokens, so the rows depend on which posts
        there are and on nothing else.
        """
        ordered = sorted(indices, key=lambda index: (-len(posts[index]), posts[index]))
        if self.path == "naive":
            return [[index] for index in ordered]
        rows: list[list[int]] = []
        used = 0
        for index in ordered:
            # The first post of a row is its longest, so a padded row grows by that length.
            grows = self.size([posts[rows[-1][0] if rows and self.path != "packed" else index]])
            if not rows or used + grows > self.row_budget:
                rows.append([])
                used, grows = 0, self.size([posts[index]])
            rows[-1].append(index)
            used += grows
        return rows

    def score(self, posts: list[list[int]]) -> list[list[float]]:
        """Scores of one row, shape posts x labels; halved as often as memory asks."""
        if len(posts) > 1 and self.size(posts) > self.budget:
            half = (len(posts) + 1) // 2
            return self.score(posts[:half]) + self.score(posts[half:])
        return self.within_memory(posts, self.score_row)

    def within_memory(
        self, posts: list[list[int]], compute: Callable[[list[list[int]]], list[Any]]
    ) -> list[Any]:
        """Compute for all posts at once, or for halves of them where memory does not suffice."""
        try:
            return compute(posts)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        size = self.size(posts)
        if len(posts) == 1:
            fail(
                f"one post of {size} tokens does not fit into memory ({reason}). Take a larger "
                "GPU, --load_in_4bit true, or a smaller --max_length.",
                code=1,
            )
        empty_cache()
        self.budget = min(self.budget, max(size // 2, 1))
        print(f"out of memory with {size} tokens: going on with {self.budget}", flush=True)
        half = (len(posts) + 1) // 2
        parts = (self.within_memory(part, compute) for part in (posts[:half], posts[half:]))
        return [value for part in parts for value in part]

    def score_row(self, posts: list[list[int]]) -> list[list[float]]:
        """Scores of one row by the scorer's path: log-likelihoods (nats), a classifier's logits."""
        if not self.completions:
            return self.score_classes(posts)
        if self.path == "naive":
            return [self.score_naive(post) for post in posts]
        trunk, shared = self.tree.trunk, self.prefix.length
        posts = [post[shared:] + trunk for post in posts]
        return self.score_packed(posts) if self.path == "packed" else self.score_padded(posts)

    @property
    def prefix(self) -> Prefix:
        """What all prompts share, in the precision of the moment; read when it is first needed."""
        if self.exact not in self.prefixes:
            self.prefixes[self.exact] = self.read_prefix()
        return self.prefixes[self.exact]

    def read_prefix(self) -> Prefix:
        """Run the model once over what all prompts share."""
        import torch

        if not self.shared or self.path in ("padded", "naive"):
            return Prefix()
        device, cache = self.model.device, Prefix().cache()
        ids = torch.tensor([self.shared], device=device)
        positions = torch.arange(len(self.shared), device=device)[None]
        row = PackedRow([self.shared], 0, LabelTree([], [], [], [], []), device)
        self.packed.row, self.ends = row, row.ends.flatten()
        self.forward(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        if any(keys.shape[-2] != len(self.shared) for keys, _ in layers):
            raise ValueError("a layer keeps something else than all keys")
        return Prefix(len(self.shared), layers)

    def score_packed(self, posts: list[list[int]]) -> list[list[float]]:
        """All posts in one row without padding; see PackedRow and PackedAttention."""
        import torch

        tree = self.tree
        row = PackedRow(posts, self.prefix.length, tree, self.model.device)
        self.packed.row, self.ends = row, row.ends.flatten()
        logits = self.forward(
            input_ids=row.ids,
            position_ids=row.positions,
            past_key_values=self.prefix.cache(),
            use_cache=True,
            logits_to_keep=row.ends.flatten(),
        )
        logits = logits[0].float().view(len(posts), len(tree.tokens) + 1, -1)
        normaliser = logits.logsumexp(-1)
        scores = [
            torch.stack([logits[:, at, token] - normaliser[:, at] for at, token in steps]).sum(0)
            for steps in tree.steps
        ]
        return torch.stack(scores, 1).tolist()

    def score_padded(self, posts: list[list[int]]) -> list[list[float]]:
        """A batch padded on the left, a row per label where a label has several tokens."""
        import torch

        cut = len(self.tree.trunk)
        tails = [completion[cut:] for completion in self.completions]
        branches = [tail[:-1] for tail in tails] if self.tree.tokens else [[]]
        rows = [post + branch for post in posts for branch in branches]
        keep, width = max(map(len, branches)) + 1, max(map(len, rows))
        shared, device = self.prefix.length, self.model.device
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros((len(rows), shared + width), dtype=torch.long)
        mask[:, :shared] = 1
        for line, row in enumerate(rows):
            ids[line, width - len(row) :] = torch.tensor(row)
            mask[line, shared + width - len(row) :] = 1
        cached = {"past_key_values": self.prefix.cache(len(rows))} if shared else {}
        logits = self.forward(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, shared:].to(device),
            use_cache=bool(shared),
            logits_to_keep=keep,
            **cached,
        )
        likelihood = torch.log_softmax(logits[:, -keep:].float(), -1).cpu()
        scores = []
        for post in range(len(posts)):
            lines = likelihood[post * len(branches) :]
            scores.append(
                [
                    sum(
                        lines[min(branch, len(branches) - 1), place - len(tail), token].item()
                        for place, token in enumerate(tail)
                    )
                    for branch, tail in enumerate(tails)
                ]
            )
        return scores

    def score_naive(self, post: list[int]) -> list[float]:
        """The definition: a forward per label, alone and without cache, softmax in float32.

        A classifier's post is alone too, and its logits are the scores.
        """
        import torch

        if not self.completions:
            return self.score_classes([post])[0]
        cut, seen, scores = len(self.tree.trunk), {}, []
        for completion in self.completions:
            # The last token of a label is predicted, not read: labels of one token share a row.
            ids = (*post, *completion[:-1])
            if ids not in seen:
                row = torch.tensor([ids], device=self.model.device)
                keep = len(completion)
                logits = self.forward(input_ids=row, use_cache=False, logits_to_keep=keep)
                seen[ids] = torch.log_softmax(logits[0, -keep:].float(), -1).cpu()
            steps = range(cut, len(completion))
            scores.append(sum(seen[ids][step, completion[step]].item() for step in steps))
        return scores

    def score_classes(self, posts: list[list[int]]) -> list[list[float]]:
        """Logits of a sequence classifier for a batch padded on the right."""
        import torch

        # A tokenizer that adds nothing leaves nothing of an empty post.
        posts = [post or [self.pad] for post in posts]
        width, device = max(map(len, posts)), self.model.device
        ids = torch.full((len(posts), width), self.pad)
        mask = torch.zeros((len(posts), width), dtype=torch.long)
        for line, post in enumerate(posts):
            ids[line, : len(post)] = torch.tensor(post)
            mask[line, : len(post)] = 1
        self.ends = (torch.arange(len(posts)) * width + mask.sum(1) - 1).to(device)
        logits = self.forward(input_ids=ids.to(device), attention_mask=mask.to(device))
        return logits.float().tolist()

    def generate(
        self, posts: list[list[int]], stops: list[int], most: int
    ) -> list[tuple[list[int], bool]]:
        """Greedy continuations of at most `most` tokens, and whether each came to a stop token."""
        import torch
        from transformers import GenerationConfig

        shared, width = self.prefix.length, max(map(len, posts))
        ids = torch.full((len(posts), width), self.pad)
        mask = torch.zeros((len(posts), width), dtype=torch.long)
        for line, post in enumerate(posts):
            # The padding stands behind the shared beginning, whose keys are in the cache.
            own = post[shared:]
            for target, values in ((ids, torch.tensor(post)), (mask, torch.ones(len(post)))):
                target[line, :shared] = values[:shared]
                target[line, width - len(own) :] = values[shared:]
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=most, eos_token_id=stops, pad_token_id=self.pad
        )
        cached = {"past_key_values": self.prefix.cache(len(posts))} if shared else {}
        kind, device = self.model.device.type, self.model.device
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=self.setup.autocast):
            made = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                **cached,
            )
        answers = []
        for line in made[:, width:].tolist():
            ends = [place for place, token in enumerate(line) if token in stops]
            answers.append((line[: ends[0]], True) if ends else (line, False))
        return answers

    def check(self, posts: list[list[int]], first: str) -> None:
        """Score a few posts naively and go from a first path down to one of the same margins.

        Compared in float32 even where the run is not, so that a wrong mask cannot hide behind
        rounding; a model that cannot be computed in it is scored naively altogether.
        """
        ordered = sorted(posts, key=lambda post: (-len(post), post))
        places = {0, len(posts) // 3, 2 * len(posts) // 3, len(posts) - 1}
        sample = [ordered[place] for place in sorted(places)]
        self.use("naive")
        expected = self.score_by_definition(sample)
        steps_down = []
        if not self.widened:
            reason = "there is no float32 to prove it in"
            steps_down.append({"path": first, "reason": reason})
            print(f"posts are scored one by one: {reason}", flush=True)
            first = "naive"
        with self.in_float32() if self.widened else contextlib.nullcontext():
            for path in PATHS[PATHS.index(first) :]:
                if path == "padded_ends" and self.completions:
                    continue
                self.use(path)
                largest, reason = self.compare(sample, expected)
                if largest <= EXACT_WITHIN:
                    break
                steps_down.append({"path": path, "reason": reason})
                print(f"scoring path {path} is not exact here ({reason})", flush=True)
        if not largest <= EXACT_WITHIN:
            fail("the model's scores are not numbers. Try --dtype float32.", code=1)
        self.record = {
            "path": path,
            "steps_down": steps_down,
            "checked_posts": len(sample),
            "checked_in": "float32" if self.widened else "the run's precision",
            "largest_difference": largest,
            "tolerance": EXACT_WITHIN,
        }
        if path == "packed" and self.setup.rounded:
            self.check_kernels(posts, sample, expected)

    def check_kernels(
        self, posts: list[list[int]], sample: list[list[int]], expected: list[list[float]]
    ) -> None:
        """Score the sample in the run's own precision, whose kernels are others than float32's.

        Flash attention that fails, or is off by more than rounding, is not used; where packed rows
        fail without it, the next path takes over.
        """
        error, reason = self.compare(sample, expected)
        if error > COARSE_TOLERANCE and "flash" in self.packed.kernels:
            print(f"flash attention is not used ({reason})", flush=True)
            self.packed.flash = False
            self.packed.kernels.clear()
            error, reason = self.compare(sample, expected)
        if error == math.inf:
            print(f"scoring path packed is not exact here ({reason})", flush=True)
            self.check(posts, PATHS[1])
            self.record["steps_down"].insert(0, {"path": "packed", "reason": reason})
        else:
            self.record["error_in_own_precision"] = error

    def score_by_definition(self, sample: list[list[int]]) -> list[list[float]]:
        """Naive scores, in float32 unless the model's code cannot compute in it."""

        def score() -> list[list[float]]:
            return [self.within_memory([post], self.score_row)[0] for post in sample]

        if self.widened:
            try:
                with self.in_float32():
                    return score()
            except RuntimeError as error:
                # Code that reads another module's weights meets two precisions.
                self.widened = False
                reason = visible(str(error).splitlines()[0], 200)
                print(f"this model cannot be computed in float32 ({reason})", flush=True)
        return score()

    def compare(self, sample: list[list[int]], expected: list[list[float]]) -> tuple[float, str]:
        """Largest difference of the path's margins, inf where it fails, and what is wrong."""
        try:
            largest = largest_difference(self.score(sample), expected)
        except Exception as error:
            # Foreign model code can raise anything where it is asked for something new.
            if is_out_of_memory(error):
                raise
            return math.inf, visible(f"{type(error).__name__}: {error}".splitlines()[0], 300)
        return largest, f"its margins differ by up to {largest:.2g}"

    def attention(self) -> str:
        """The attention that the path computes with."""
        if self.path == "packed":
            return "packed: " + ", ".join(sorted(self.packed.kernels))
        return self.own_attention


def largest_difference(scores: list[list[float]], expected: list[list[float]]) -> float:
    """Largest difference (nats) of a post's margins between any two labels; nan counts as inf."""
    gaps = [
        [one - other for one, other in zip(found, wanted, strict=True)]
        for found, wanted in zip(scores, expected, strict=True)
    ]
    spans = [max(gap) - min(gap) for gap in gaps]
    return math.inf if any(math.isnan(value) for gap in gaps for value in gap) else max(spans)


def bare_model(model: Any) -> Any:
    """The transformers model below an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attention_of(model: Any) -> str:
    """The name of the attention that a model computes with."""
    return bare_model(model).config._attn_implementation


def has_experts(model: Any) -> bool:
    """Say whether a model is a mixture of experts."""
    config = bare_model(model).config.get_text_config(decoder=True)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def has_window(model: Any) -> bool:
    """Say whether a model's layers see only a window or a chunk of what stands before."""
    config = bare_model(model).config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) and not kinds
    return bool(window or kinds & {"sliding_attention", "chunked_attention"})


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory, of a GPU or of the machine, is exhausted."""
    import torch

    text = str(error)
    exhausted = ("DefaultCPUAllocator" in text and "allocate" in text) or "ALLOC_FAILED" in text
    return exhausted or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def empty_cache() -> None:
    """Give back what torch holds of a GPU's memory without using it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def can_widen(model: Any) -> bool:
    """Say whether `full_precision` reaches every weight: not those of kernels of their own."""
    return not any(type(module).__name__.startswith("Mxfp4") for module in model.modules())


@contextlib.contextmanager
def full_precision(model: Any) -> Iterator[None]:
    """Let a model compute in float32 without a second copy of it in memory.

    Each module's own weights are widened when it is called and put back when it returns, so one
    layer at a time takes more room. Weights of four bits are dequantised for each product.
    """
    import torch

    kept: dict[tuple[Any, str], Any] = {}
    replaced, handles = [], []

    def widen(module: Any, *_: Any) -> None:
        for name, weight in module._parameters.items():
            if weight is not None and weight.dtype in (torch.bfloat16, torch.float16):
                kept[module, name] = weight.data
                weight.data = weight.data.float()

    def put_back(module: Any, *_: Any) -> None:
        for name in module._parameters:
            if (module, name) in kept:
                module._parameters[name].data = kept.pop((module, name))

    for module in model.modules():
        # An adapter's layer of the same name is a wrapper around this one.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            replaced.append(module)
            module.forward = dequantised(module)
        elif any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(put_back))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.forward
        # An error inside a forward leaves weights widened.
        for (module, name), weight in kept.items():
            module._parameters[name].data = weight


def dequantised(module: Any) -> Callable[[Any], Any]:
    """The forward of a 4-bit layer in float32: its stored weight, multiplied without rounding."""

    def forward(inputs: Any) -> Any:
        import torch
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        bias = None if module.bias is None else module.bias.float()
        return torch.nn.functional.linear(inputs.float(), weight, bias)

    return forward


# --- answers ---------------------------------------------------------------------------------


def generate_answers(
    scorer: Scorer,
    tokenizer: Any,
    encoded: list[list[int]],
    wanted: list[int],
    most: int,
    stops: list[int],
    journal: Journal | None,
    world: World,
) -> dict[int, tuple[str, bool]]:
    """The model's own answers to some posts, greedily: (text, whether it came to its end)."""
    from transformers import GenerationConfig

    # A model's own settings may sample or punish repetition; what is asked for is the likeliest.
    bare_model(scorer.model).generation_config = GenerationConfig()
    lengths = [len(encoded[index]) + most for index in wanted]
    batches = token_batches(lengths, 4 * scorer.row_budget)
    if scorer.path == "naive":
        batches = iter([[place] for place in range(len(wanted))])
    elif has_window(scorer.model):
        # Padding would use up the window: only posts of one length go together.
        alike = (
            (length, [place for place, other in enumerate(lengths) if other == length])
            for length in sorted(set(lengths), reverse=True)
        )
        batches = (
            places[start : start + size]
            for length, places in alike
            for size in [max(1, 4 * scorer.row_budget // length)]
            for start in range(0, len(places), size)
        )
    rows = [[wanted[place] for place in batch] for batch in batches]

    def compute(row: list[int]) -> list[list[Any]]:
        made = scorer.within_memory(
            [encoded[index] for index in row], lambda part: scorer.generate(part, stops, most)
        )
        return [[tokenizer.decode(ids, skip_special_tokens=True), ended] for ids, ended in made]

    sizes = [sum(len(encoded[index]) + most for index in row) for row in rows]
    found = run_rows(rows, sizes, compute, f"answers of {most} tokens", journal, world)
    return {index: (text, ended) for index, (text, ended) in found.items()}


def stop_tokens(tokenizer: Any, task: Task) -> list[int]:
    """What ends an answer: the tokenizer's end token and the template's end of a turn."""
    roles = [message["role"] for message in prompt_messages(task.prompt, "")]
    scaffold = build_scaffold(tokenizer, roles, task.date, task.effort)
    closing = tokenizer(scaffold.pieces[-1], add_special_tokens=False)["input_ids"]
    control = [token for token in closing if token in tokenizer.added_tokens_decoder]
    stops = {tokenizer.eos_token_id, *control[:1]} - {None}
    if not stops:
        fail("the tokenizer names no end token, so no answer could end. Leave --mode score.")
    return sorted(stops)


def read_answer(template: str, text: str, ended: bool, labels: list[str]) -> tuple[str, str | None]:
    """Status and label of an answer: `ok`, `unparsed`, or `truncated` where it did not end.

    A truncated answer has a label where its beginning already says it whole.
    """
    if ended:
        label = parse_answer(template, text.strip(), labels)
        return ("ok" if label else "unparsed"), label
    head, _, tail = template.partition("{label}")
    names = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    follows = re.escape(tail.partition("{rationale}")[0])
    match = re.match(f"{re.escape(head)}({names}){follows}", text.strip()) if tail else None
    return "truncated", match[1] if match else None


def answer_posts(
    args: argparse.Namespace,
    task: Task,
    scorer: Scorer,
    tokenizer: Any,
    posts: list[dict[str, Any]],
    encoded: list[list[int]],
    journals: list[Journal],
    world: World,
) -> dict[str, Any]:
    """Let the model write its answers: to all posts, or to the first errors and near ties.

    Each answered post gets `answer`, its raw text, and `status`; with --mode generate the answer's
    label becomes its prediction and the label scores' one its `scored_prediction`.
    """
    wanted = list(range(len(posts)))
    if args.mode == "score":
        doubtful = (
            index
            for index, post in enumerate(posts)
            if post["near_tie"] or post["prediction"] != post["label"]
        )
        wanted = list(itertools.islice(doubtful, args.rationales))
    # Packed rows generate nothing, and the next path is not proven yet.
    first = "padded_with_prefix" if scorer.path == "packed" else scorer.path
    scorer.check(encoded, "padded" if has_window(scorer.model) and first != "naive" else first)
    scorer.use(max(world.gather(scorer.path), key=PATHS.index))
    stops, journal = stop_tokens(tokenizer, task), journals[-1] if journals else None
    written = generate_answers(
        scorer, tokenizer, encoded, wanted, args.max_new_tokens, stops, journal, world
    )
    counts: Counter[str] = Counter()
    agreed = parsed = 0
    for index, (text, ended) in written.items():
        post = posts[index]
        status, label = read_answer(task.prompt["answer"], text, ended, task.labels)
        post |= {"answer": text, "status": status, "answer_label": label}
        counts[status] += 1
        parsed += label is not None
        agreed += label == post["prediction"]
        if args.mode == "generate":
            post |= {"scored_prediction": post["prediction"], "prediction": label}
    listed = ", ".join(f"{counts[status]} {status}" for status in STATUSES)
    print(
        f"{len(written)} written answers: {listed}; {agreed} of {parsed} labels agree with label "
        "scoring",
        flush=True,
    )
    return {
        "path": scorer.path,
        "written": len(written),
        **counts,
        "labelled": parsed,
        "agree_with_scores": agreed,
    }


# --- statistics ------------------------------------------------------------------------------

RESAMPLES = 10_000
# With fewer posts than this below the line a rate is counted, but nothing is concluded from it.
MIN_DENOMINATOR = 20
# Up to so many posts each is resampled by itself; of more, those alike are drawn together.
MOST_CELLS = 2000
SCORE_LEVELS = 64
# The two-sided 95 % point of the normal distribution.
NORMAL_95 = 1.959963984540054


def wilson(part: int, whole: int) -> tuple[float, float]:
    """The 95 % score interval of a rate (Wilson 1927); `whole` is at least 1."""
    z = NORMAL_95
    middle = (part + z * z / 2) / (whole + z * z)
    half = z * math.sqrt(part * (whole - part) / whole + z * z / 4) / (whole + z * z)
    return (0.0 if part == 0 else middle - half, 1.0 if part == whole else middle + half)


def share(part: int, whole: int, empty: str) -> dict[str, Any]:
    """A rate with its count and 95 % Wilson interval; null with the reason `empty` for 0 of 0."""
    if whole == 0:
        return {"value": None, "n": 0, "low": None, "high": None, "reason": empty}
    low, high = wilson(int(part), int(whole))
    return {"value": part / whole, "n": int(whole), "low": low, "high": high, "reason": None}


def number(value: float | None, n: int, reason: str) -> dict[str, Any]:
    """A figure without interval as yet; null with a reason where undefined."""
    undefined = value is None or math.isnan(value)
    return {
        "value": None if undefined else float(value),
        "n": n,
        "low": None,
        "high": None,
        "reason": reason if undefined else None,
    }


def dice(hits: int, misses: int, empty: str, n: int) -> dict[str, Any]:
    """F1 = 2 TP / (2 TP + FP + FN) from TP and FP + FN, with a 95 % interval.

    TP / (TP + FP + FN) is a rate, and F1 a rising function of it: 2 r / (1 + r). So its Wilson
    interval gives that of F1, also where every post is decided rightly.
    """
    rate = share(hits, hits + misses, empty)
    for key in ("value", "low", "high"):
        if rate[key] is not None:
            rate[key] = 2 * rate[key] / (1 + rate[key])
    return rate | {"n": n}


def count_figures(tables: Any, positive: int) -> dict[str, Any]:
    """Figures of confusion tables, the positive label against the rest; nan where undefined.

    `tables` has the shape (..., labels, labels), true label first; a figure has the shape (...).
    A figure over labels is undefined where a label has no post. Matthews' coefficient is that of
    several labels (Gorodkin 2004).
    """
    import numpy as np

    tables = np.asarray(tables, dtype=np.float64)
    total = tables.sum((-2, -1))
    support, flagged = tables.sum(-1), tables.sum(-2)
    hits = np.diagonal(tables, axis1=-2, axis2=-1)
    tp = hits[..., positive]
    fn, fp = support[..., positive] - tp, flagged[..., positive] - tp
    tn = total - tp - fn - fp
    with np.errstate(divide="ignore", invalid="ignore"):
        recalls = hits / support
        # A label without posts and without answers has no F1, and no weight either.
        f1 = 2 * hits / (support + flagged)
        spread = np.sqrt(total**2 - (flagged**2).sum(-1)) * np.sqrt(total**2 - (support**2).sum(-1))
        return {
            "accuracy": hits.sum(-1) / total,
            "balanced_accuracy": recalls.mean(-1),
            "precision": tp / (tp + fp),
            "recall": tp / (tp + fn),
            "false_positive_rate": fp / (fp + tn),
            "false_negative_rate": fn / (fn + tp),
            "flag_rate": (tp + fp) / total,
            "f1": 2 * tp / (2 * tp + fp + fn),
            "f1_macro": np.where((support > 0).all(-1), f1.mean(-1), np.nan),
            "f1_weighted": np.where(support > 0, f1 * support, 0).sum(-1) / total,
            "mcc": (hits.sum(-1) * total - (support * flagged).sum(-1)) / spread,
        }


@dataclass(frozen=True)
class Cells:
    """Posts that are alike, counted: what is resampled.

    `of` (n,) is each post's cell, `first` (cells,) a post of each, `counts` (cells,) their posts.
    """

    of: Any
    first: Any
    counts: Any


def build_cells(*columns: Any) -> Cells:
    """Count posts that are equal in all columns, each of shape (n,) or (n, k)."""
    import numpy as np

    rows = np.column_stack([np.asarray(column, dtype=np.int64) for column in columns])
    _, first, of, counts = np.unique(
        rows, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    return Cells(of.reshape(-1), first, counts)


def single_cells(n: int) -> Cells:
    """Every post by itself."""
    import numpy as np

    return Cells(np.arange(n), np.arange(n), np.ones(n, dtype=np.int64))


def intervals(
    statistic: Callable[[Any], dict[Any, Any]], counts: Any, seed: int, resamples: int = RESAMPLES
) -> dict[Any, dict[str, Any]]:
    """BCa bootstrap intervals (Efron 1987) of everything that `statistic` computes.

    `statistic` takes cell counts of shape (r, cells) and returns figures of shape (r,) by name.
    Posts are drawn with replacement, which makes the cells' counts multinomial; all figures come
    from the same draws, so a difference of two is a paired one. Returns for each name `value`,
    `low` and `high`, None where undefined; an interval is None where less than nine tenths of the
    draws have the figure, or where they all agree and say nothing of how far it could move.
    """
    import numpy as np

    counts = np.asarray(counts)
    n = int(counts.sum())
    if n == 0:
        return {}
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    without_one = counts - np.eye(len(counts), dtype=np.int64)

    def compute(rows: Any) -> dict[Any, Any]:
        parts = [
            statistic(rows[start : start + 1000].astype(np.float32))
            for start in range(0, len(rows), 1000)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    point = compute(counts[None])
    if not point:
        return {}
    names = list(point)
    drawn, left = compute(draws), compute(without_one)
    low, high = bca(
        np.array([point[name][0] for name in names]),
        np.stack([drawn[name] for name in names], axis=1),
        np.stack([left[name] for name in names], axis=1),
        counts,
    )
    found = {}
    for index, name in enumerate(names):
        values = (point[name][0], low[index], high[index])
        found[name] = {
            key: None if math.isnan(value) else float(value)
            for key, value in zip(("value", "low", "high"), values, strict=True)
        }
    return found


def bca(point: Any, drawn: Any, without_one: Any, counts: Any) -> tuple[Any, Any]:
    """The ends of 95 % BCa intervals; nan where there is none.

    Shapes: `point` (k,), `drawn` (resamples, k), `without_one` (cells, k): the figure without one
    post of that cell, of which there are `counts`.
    """
    import numpy as np
    from scipy.special import ndtr, ndtri

    drawn = np.sort(drawn, axis=0)  # nan goes last
    valid = np.isfinite(drawn).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = ((drawn < point).sum(0) + (drawn == point).sum(0) / 2) / valid
        edge = 1 / (2 * len(drawn))
        bias = ndtri(np.clip(below, edge, 1 - edge))
        weights = np.where(np.isfinite(without_one), counts[:, None], 0)
        values = np.nan_to_num(without_one)
        away = np.where(weights > 0, (weights * values).sum(0) / weights.sum(0) - values, 0)
        size = (weights * away**2).sum(0)
        skew = np.where(size > 0, (weights * away**3).sum(0) / (6 * size**1.5), 0)
        ends = []
        for z in (-NORMAL_95, NORMAL_95):
            place = ndtr(bias + (bias + z) / (1 - skew * (bias + z))) * (valid - 1)
            place = np.nan_to_num(np.clip(place, 0, valid - 1))
            under = np.floor(place).astype(np.int64)
            over = np.minimum(under + 1, np.maximum(valid - 1, 0))
            columns = np.arange(drawn.shape[1])
            step = place - under
            ends.append((1 - step) * drawn[under, columns] + step * drawn[over, columns])
        last = drawn[np.maximum(valid - 1, 0), np.arange(drawn.shape[1])]
        usable = (valid >= 0.9 * len(drawn)) & (last > drawn[0]) & np.isfinite(point)
    return tuple(np.where(usable, end, np.nan) for end in ends)


def holm(p_values: dict[Any, float]) -> dict[Any, float]:
    """Holm's (1979) adjusted p-values: a claim at 5 % keeps all of them at 5 % together."""
    adjusted, worst = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = worst
    return adjusted


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two models are right equally often (McNemar 1947)."""
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def permute_groups(
    wrong: Any, members: Any, compared: list[int], seed: int, resamples: int = RESAMPLES
) -> tuple[float, list[float]]:
    """Permutation p-values of one error rate: of its gap, and of each group against the rest.

    `wrong` (n,) says which posts of one true label are decided wrongly, `members` (n, groups) who
    is in which group. The errors are dealt anew among the posts, so that who is in which group,
    overlaps too, stays as it is. `compared` are the groups whose largest difference is the gap.
    The observed deal counts as one of the draws (Phipson and Smyth 2010).
    """
    import numpy as np

    cells = build_cells(members)
    kinds = members[cells.first].astype(np.float64)  # (cells, groups)
    sizes = cells.counts @ kinds
    rest = len(wrong) - sizes
    draws = np.random.default_rng(seed).multivariate_hypergeometric(
        cells.counts, int(wrong.sum()), size=resamples, method="marginals"
    )
    observed = np.bincount(cells.of, weights=wrong, minlength=len(cells.counts))
    errors = np.vstack([observed, draws]) @ kinds  # (1 + resamples, groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = errors / sizes
        away = np.abs(rates - (wrong.sum() - errors) / rest)

    def p_of(values: Any) -> float:
        # Equal rates can differ in their last bit.
        return float((values >= values[0] - 1e-9).mean())

    gap = 1.0
    if len(compared) > 1:
        gap = p_of(rates[:, compared].max(1) - rates[:, compared].min(1))
    return gap, [p_of(away[:, group]) for group in range(members.shape[1])]


# --- ranking ---------------------------------------------------------------------------------


def pair_order(high: Any, low: Any) -> Any:
    """(len(high), len(low)): 1 where the first score is above the second, 1/2 where equal."""
    import numpy as np

    return ((high[:, None] > low) + (high[:, None] == low) / 2).astype(np.float32)


def auc(counts: Any, scores: Any, positives: Any, negatives: Any) -> Any:
    """Area under the ROC curve for each row of cell counts (r, cells); nan where a side is empty.

    `scores` (cells,), `positives` and `negatives` are the cells of the two sides.
    """
    import numpy as np

    first, second = counts[:, positives], counts[:, negatives]
    order = pair_order(scores[positives], scores[negatives])
    pairs = first.sum(1, dtype=np.float64) * second.sum(1, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return ((first @ order) * second).sum(1, dtype=np.float64) / pairs


def average_precision(counts: Any, scores: Any, positive: Any) -> Any:
    """Mean precision over the positive posts, by falling score; nan without any. Shape (r,)."""
    import numpy as np

    order = np.argsort(-scores, kind="stable")
    ranked = counts[:, order].astype(np.float64)
    hits = np.cumsum(ranked * positive[order], axis=1)
    taken = np.cumsum(ranked, axis=1)
    # Equal scores are taken together.
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    hits, taken = hits[:, last], taken[:, last]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(taken > 0, hits / taken, 0)
        return (np.diff(hits, axis=1, prepend=0) * precision).sum(1) / hits[:, -1]


def equal_mass_bins(scores: Any, most: int = 10) -> Any:
    """The bin (n,) of each score: equally many posts in each, equal scores together.

    There are at most 10 bins, and on average at least 15 posts in one.
    """
    import numpy as np

    bins = max(1, min(most, len(scores) // 15))
    edges = np.quantile(scores, np.arange(1, bins) / bins) if len(scores) else []
    return np.searchsorted(edges, scores, side="left")


def calibration_error(counts: Any, scores: Any, positive: Any, bins: Any) -> Any:
    """Expected calibration error: |share of positive posts - mean score| over the bins. (r,)"""
    import numpy as np

    if not len(bins):
        return np.full(len(counts), np.nan)
    inside = np.eye(bins.max() + 1)[bins] * (positive - scores)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.abs(counts @ inside).sum(1) / counts.sum(1, dtype=np.float64)


def power_mean(values: list[Any], power: float = -5) -> Any:
    """The generalised mean of several groups' figures, near the worst one (Borkan et al. 2019)."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        return np.mean(np.stack(values) ** power, axis=0) ** (1 / power)


# --- figures ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """One strategy's answers to all posts; without `predicted`, the reason why there are none.

    In `predicted` None is an answer without label. `scores` are p of the positive label; None
    where the strategy gives labels only.
    """

    strategy: str
    kind: str
    predicted: list[str | None] | None
    scores: list[float] | None
    reason: str | None = None


@dataclass(frozen=True)
class Sample:
    """Labelled posts as arrays, and what strategies answered to them.

    `truth` (n,) and each of `predicted` (n,) are numbers of `labels`, -1 an answer without label;
    each of `scores` (n,) is p of the positive label or None. `members` (n,) are the posts of each
    group; a post that is aimed at several stands in each. `varied` are the strategies that do not
    give every post the same answer.
    """

    labels: list[str]
    positive: int
    truth: Any
    members: dict[str, Any]
    predicted: dict[str, Any]
    scores: dict[str, Any]

    @property
    def positives(self) -> Any:
        """(n,): whether a post has the positive label."""
        return self.truth == self.positive

    @property
    def groups(self) -> list[str]:
        """The groups that posts are aimed at, without the row of those aimed at none."""
        return [name for name in self.members if name != NO_TARGET]

    @property
    def varied(self) -> list[str]:
        return [name for name, answers in self.predicted.items() if len({*answers.tolist()}) > 1]

    def decided(self, strategy: str) -> Any:
        """(n,): its answers, where one without label counts as a wrong label."""
        import numpy as np

        answers = self.predicted[strategy]
        other = 0 if self.positive else 1
        wrong = np.where(self.positives, other, self.positive)
        return np.where(answers < 0, wrong, answers)


def build_sample(
    labels: list[str],
    positive: str,
    truth: list[str],
    members: dict[str, list[int]],
    strategies: list[Answers],
) -> Sample:
    """The arrays of posts and of every strategy that answered."""
    import numpy as np

    numbers: dict[str | None, int] = {label: index for index, label in enumerate(labels)}
    masks = {name: np.zeros(len(truth), dtype=bool) for name in members}
    for name, posts in members.items():
        masks[name][posts] = True
    answered = [one for one in strategies if one.predicted is not None]
    return Sample(
        labels,
        labels.index(positive),
        np.array([numbers[label] for label in truth]),
        masks,
        {
            one.strategy: np.array([numbers.get(label, -1) for label in one.predicted])
            for one in answered
        },
        {one.strategy: None if one.scores is None else np.array(one.scores) for one in answered},
    )


def build_figures(sample: Sample, strategy: str, posts: Any, decided: Any = None) -> dict[str, Any]:
    """Counts and figures of one strategy over some posts (n,), the positive label against the rest.

    Answers without label are left out of the rates and counted, unless `decided` (n,) gives
    labels for them. F1 is 2 TP / (2 TP + FP + FN); a figure over labels is undefined where a
    label has no post.
    """
    import numpy as np

    answers = sample.predicted[strategy] if decided is None else decided
    parsed = posts & (answers >= 0)
    size = len(sample.labels)
    kinds = sample.truth[parsed] * size + answers[parsed]
    table = np.bincount(kinds, minlength=size * size).reshape(size, size)
    figures = {name: float(value) for name, value in count_figures(table, sample.positive).items()}
    tp = int(table[sample.positive, sample.positive])
    fn = int(table[sample.positive].sum()) - tp
    fp = int(table[:, sample.positive].sum()) - tp
    n = int(table.sum())
    tn = n - tp - fn - fp
    positive = sample.labels[sample.positive]
    negative = name_of_negative(sample.labels, positive)
    labels = dict(zip(sample.labels, map(int, table.sum(1)), strict=True))
    absent = [label for label, count in labels.items() if count == 0]
    no_positive, no_negative = f"no {positive} posts", f"no {negative} posts"
    over_labels = f"no {', '.join(absent)} posts" if absent else "all posts and answers are alike"
    return {
        "n": n,
        "n_total": int(posts.sum()),
        "n_unparsed": int(posts.sum()) - n,
        "labels": labels,
        **dict(zip(CONFUSION, (tp, tn, fp, fn), strict=True)),
        "accuracy": share(int(np.trace(table)), n, "no posts"),
        "precision": share(tp, tp + fp, "none predicted"),
        "recall": share(tp, tp + fn, no_positive),
        "false_positive_rate": share(fp, fp + tn, no_negative),
        "false_negative_rate": share(fn, fn + tp, no_positive),
        "flag_rate": share(tp + fp, n, "no posts"),
        f"f1_{positive}": dice(tp, fp + fn, f"no {positive} posts and none predicted", n),
        "balanced_accuracy": number(figures["balanced_accuracy"], n, over_labels),
        "f1_macro": number(figures["f1_macro"], n, over_labels),
        "f1_weighted": number(figures["f1_weighted"], n, "no posts"),
        "mcc": number(figures["mcc"], n, f"{over_labels}, or one label only is predicted"),
        **score_figures(sample, sample.scores[strategy], parsed),
    }


def name_of_negative(labels: list[str], positive: str) -> str:
    """What a post is that does not have the positive label."""
    others = [label for label in labels if label != positive]
    return others[0] if len(others) == 1 else f"not {positive}"


def score_figures(sample: Sample, scores: Any, posts: Any) -> dict[str, Any]:
    """AUROC, average precision, Brier score and calibration error of p over some posts (n,)."""
    import numpy as np
    from sklearn.metrics import average_precision_score, roc_auc_score

    n = int(posts.sum())
    positive = sample.labels[sample.positive]
    reason = ""
    if scores is None:
        reason = "answers without probability"
    elif n == 0:
        reason = "no posts"
    if reason:
        names = ("roc_auc", "average_precision", "brier", "ece")
        return {name: number(None, n, reason) for name in names}
    truth, p = sample.positives[posts], scores[posts]
    hits = int(truth.sum())
    error = calibration_error(np.ones((1, n)), p, truth, equal_mass_bins(p))[0]
    reason = f"no {positive} posts"
    if hits == n:
        reason = f"no {name_of_negative(sample.labels, positive)} posts"
    return {
        "roc_auc": number(roc_auc_score(truth, p) if 0 < hits < n else None, n, reason),
        "average_precision": number(average_precision_score(truth, p) if hits else None, n, reason),
        "brier": number(float(((p - truth) ** 2).mean()), n, ""),
        "ece": number(error, n, ""),
    }


def group_auc(sample: Sample, strategy: str, group: str) -> dict[str, Any]:
    """BPSN and BNSP AUC of a group (Borkan et al. 2019); its subgroup AUC is its `roc_auc`.

    BPSN: posts of the rest that are positive against posts of the group that are not; low where
    harmless posts about the group score like hate. BNSP: the other way round.
    """
    inside, positive = sample.members[group], sample.positives
    name = sample.labels[sample.positive]
    other = name_of_negative(sample.labels, name)
    figures = {}
    for key, high, low, words in (
        ("bpsn_auc", positive & ~inside, ~positive & inside, (f"no other {name}", f"no {other}")),
        ("bnsp_auc", positive & inside, ~positive & ~inside, (f"no {name}", f"no other {other}")),
    ):
        posts = high | low
        reason = f"{words[0] if not high.any() else words[1]} posts"
        figure = score_figures(sample, sample.scores[strategy], posts)["roc_auc"]
        if figure["value"] is None and sample.scores[strategy] is not None:
            figure["reason"] = reason
        figures[key] = figure
    return figures


def build_strategy(
    sample: Sample, one: Answers, ranked: dict[Any, Any], counted: dict[Any, Any], seed: int
) -> dict[str, Any]:
    """A strategy's entry in metrics.json; null figures where it gave no answers.

    `ranked` and `counted` are the intervals of `rank_intervals` and `count_intervals`.
    """
    import numpy as np

    name = one.strategy
    entry: dict[str, Any] = {"name": name, "kind": one.kind, "reason": one.reason}
    if one.predicted is None:
        return entry | {"overall": None, "groups": dict.fromkeys(sample.members), "bias": None}
    everything = np.ones(len(sample.truth), dtype=bool)
    overall = build_figures(sample, name, everything)
    groups = {
        group: build_figures(sample, name, posts)
        | (group_auc(sample, name, group) if group != NO_TARGET else {})
        for group, posts in sample.members.items()
    }
    for place, figures in (("overall", overall), *groups.items()):
        for key, figure in figures.items():
            found = ranked.get((name, place, key)) or counted.get((name, place, key))
            if found and isinstance(figure, dict) and "reason" in figure and figure["low"] is None:
                add_interval(figure, found)
    unparsed = {}
    if overall["n_unparsed"]:
        answers, wrong = sample.predicted[name], sample.decided(name)
        other = 0 if sample.positive else 1
        for rule, labels in (
            ("as_errors", wrong),
            (
                f"as_{sample.labels[sample.positive]}",
                np.where(answers < 0, sample.positive, answers),
            ),
            (f"as_{sample.labels[other]}", np.where(answers < 0, other, answers)),
        ):
            unparsed[rule] = {
                place: build_figures(sample, name, posts, labels)
                for place, posts in {"overall": everything, **sample.members}.items()
            }
    return entry | {
        "coverage": share(overall["n"], overall["n_total"], "no posts"),
        "overall": overall,
        "groups": groups,
        "unparsed": unparsed or None,
        "bias": build_bias(sample, name, overall, groups, ranked, counted, seed)
        if name in sample.varied
        else None,
    }


def add_interval(figure: dict[str, Any], found: dict[str, Any]) -> None:
    """Put a resampled interval around a figure, moved by what its cells' value is off."""
    if figure["value"] is None or found["low"] is None:
        return
    moved = figure["value"] - found["value"]
    figure["low"], figure["high"] = found["low"] + moved, found["high"] + moved


def comparable(groups: dict[str, Any], rate: str) -> tuple[list[str], list[str]]:
    """The groups whose rate counts in a gap, and those left out for want of posts."""
    named = [group for group in groups if group != NO_TARGET]
    enough = [group for group in named if groups[group][rate]["n"] >= MIN_DENOMINATOR]
    return enough, [group for group in named if group not in enough]


def build_bias(
    sample: Sample,
    name: str,
    overall: dict[str, Any],
    groups: dict[str, Any],
    ranked: dict[Any, Any],
    counted: dict[Any, Any],
    seed: int,
) -> dict[str, Any]:
    """Gaps of error rates between groups, with intervals and permutation p-values.

    A gap is significant where its p-value, corrected for the rates (Holm), is below 5 %; a group
    stands out only where the gap does and its own p-value, corrected for all groups and rates, is
    below 5 %. Without any bias both happen in at most 5 % of evaluations.
    """
    entry: dict[str, Any] = {"gaps": {}, "power_means": {}}
    gap_p: dict[str, float] = {}
    group_p: dict[tuple[str, str], float] = {}
    for rate, (error, posts) in error_posts(sample, name).items():
        enough, left_out = comparable(groups, rate)
        names = list(sample.members)
        members = stack_members(sample, names)[posts]
        gap, each = permute_groups(
            error[posts], members, [names.index(group) for group in enough], seed
        )
        if len(enough) > 1:
            gap_p[rate] = gap
        for group, p in zip(names, each, strict=True):
            if group in enough and groups[group][rate]["n"] < posts.sum():
                group_p[rate, group] = p
        entry["gaps"][rate] = build_gap(name, rate, overall, groups, enough, left_out, counted)
    adjusted, group_adjusted = holm(gap_p), holm(group_p)
    for rate, gap in entry["gaps"].items():
        gap["max_min"] |= {"p": gap_p.get(rate), "p_holm": adjusted.get(rate)}
        found = rate in gap_p and adjusted[rate] < 0.05
        gap["significant"] = found if rate in gap_p else None
        if gap["max_min"]["low"] is not None:
            # Its draws never reach 0; the permutations say whether they should.
            low = gap["max_min"]["low"] if gap_p[rate] < 0.05 else 0
            gap["max_min"]["low"] = max(0.0, low)
        for group, one in gap["groups"].items():
            p, p_holm = group_p.get((rate, group)), group_adjusted.get((rate, group))
            allowed = found or rate not in gap_p
            one["vs_rest"] |= {"p": p, "p_holm": p_holm}
            one["significant"] = None if p is None else bool(allowed and p_holm < 0.05)
    pairs = (
        ("equalized_odds_difference", ("false_positive_rate", "false_negative_rate")),
        ("demographic_parity_difference", ("flag_rate",)),
    )
    for key, rates in pairs:
        enough, left_out = comparable(groups, rates[0])
        enough = [
            group for group in enough if all(group in comparable(groups, r)[0] for r in rates)
        ]
        values = [[groups[group][rate]["value"] for group in enough] for rate in rates]
        value = max(max(row) - min(row) for row in values) if len(enough) > 1 else None
        entry[key] = number(value, len(enough), TOO_FEW_GROUPS)
        add_interval(entry[key], counted.get((name, key), {"low": None}))
        entry[key]["left_out"] = [group for group in sample.groups if group not in enough]
    for key in ("roc_auc", "bpsn_auc", "bnsp_auc"):
        values = [groups[group][key]["value"] for group in sample.groups]
        known = [value for value in values if value is not None]
        value = float(power_mean(known)) if known else None
        entry["power_means"][key] = number(value, len(known), "no group has this AUC") | {
            "left_out": [
                group for group, value in zip(sample.groups, values, strict=True) if value is None
            ]
        }
        add_interval(entry["power_means"][key], ranked.get((name, "mean", key), {"low": None}))
    return entry


TOO_FEW_GROUPS = f"fewer than two groups have {MIN_DENOMINATOR} posts to count"


def stack_members(sample: Sample, names: list[str]) -> Any:
    """(n, groups): who is in which group."""
    import numpy as np

    return np.column_stack([sample.members[name] for name in names])


def error_posts(sample: Sample, name: str) -> dict[str, tuple[Any, Any]]:
    """For each error rate the posts (n,) that are decided wrongly, and those that could be."""
    answers = sample.predicted[name]
    flagged, parsed = answers == sample.positive, answers >= 0
    return {
        "false_positive_rate": (flagged, parsed & ~sample.positives),
        "false_negative_rate": (~flagged, parsed & sample.positives),
    }


def build_gap(
    name: str,
    rate: str,
    overall: dict[str, Any],
    groups: dict[str, Any],
    enough: list[str],
    left_out: list[str],
    counted: dict[Any, Any],
) -> dict[str, Any]:
    """One rate's gap: largest difference, and each group against all posts and the others."""
    values = {group: groups[group][rate]["value"] for group in enough}
    value = max(values.values()) - min(values.values()) if len(enough) > 1 else None
    widest = number(value, len(enough), TOO_FEW_GROUPS)
    add_interval(widest, counted.get((name, "gap", rate), {"low": None}))
    ratio = None
    if len(enough) > 1 and max(values.values()) > 0:
        ratio = min(values.values()) / max(values.values())
    lowest_ratio = number(
        ratio, len(enough), TOO_FEW_GROUPS if len(enough) < 2 else "no group has such an error"
    )
    add_interval(lowest_ratio, counted.get((name, "ratio", rate), {"low": None}))
    each: dict[str, Any] = {}
    for group in groups:
        if group in left_out or not groups[group][rate]["n"]:
            continue
        n = groups[group][rate]["n"]
        own = groups[group][rate]["value"]
        whole = overall[rate]
        others = whole["n"] - n
        inside = round(own * n)
        each[group] = against_rest(inside, n, round(whole["value"] * whole["n"]) - inside, others)
    return {"max_min": widest, "min_max_ratio": lowest_ratio, "groups": each, "left_out": left_out}


def against_rest(errors: int, n: int, others: int, rest: int) -> dict[str, Any]:
    """A group's rate less that of the posts outside it, and less that of all posts.

    The two sides share no post, so the interval is Newcombe's (1998, method 10) of two Wilson
    intervals; the difference from all posts is the other one times the share of the rest.
    """
    if not rest:
        away = number(None, n, "no other posts")
        return {"vs_overall": away, "vs_rest": dict(away)}
    rate, other = errors / n, others / rest
    (low, high), (other_low, other_high) = wilson(errors, n), wilson(others, rest)
    away = number(rate - other, n, "")
    away["low"] = rate - other - math.hypot(rate - low, other_high - other)
    away["high"] = rate - other + math.hypot(high - rate, other - other_low)
    part = rest / (n + rest)
    whole = {key: part * away[key] for key in ("value", "low", "high")}
    return {"vs_overall": away | whole, "vs_rest": away}


# Of the figures over all posts, those without a formula for their interval.
RESAMPLED = ("balanced_accuracy", "f1_macro", "f1_weighted", "mcc")
# What two strategies are compared by.
COMPARED = ("accuracy", "balanced_accuracy", "f1", "precision", "recall", "mcc")
COMPARED_IN_GROUPS = ("accuracy", "f1", "false_positive_rate", "false_negative_rate")


def count_intervals(sample: Sample, pairs: list[tuple[str, str]], seed: int) -> dict[Any, Any]:
    """Intervals of everything that is counted, from one set of resamples of the posts.

    Names: (strategy, "overall", figure); (strategy, "gap" | "ratio", rate); (strategy,
    "equalized_odds_difference" | "demographic_parity_difference"); and for each of `pairs` (first,
    second, place, figure), the first's figure less the second's.
    """
    import numpy as np

    forms = {(name, False): answers for name, answers in sample.predicted.items()}
    forms |= {(name, True): sample.decided(name) for pair in pairs for name in pair}
    places = {"overall": np.ones(len(sample.truth), dtype=bool), **sample.members}
    cells = build_cells(sample.truth, stack_members(sample, list(sample.members)), *forms.values())
    size = len(sample.labels)
    shape = (len(forms), len(places), size, size)
    design = np.zeros((len(cells.counts), *shape), dtype=np.float32)
    rows = np.arange(len(cells.counts))
    truth = sample.truth[cells.first]
    for form, answers in enumerate(forms.values()):
        found = answers[cells.first]
        for place, posts in enumerate(places.values()):
            some = posts[cells.first] & (found >= 0)
            design[rows[some], form, place, truth[some], found[some]] = 1
    design = design.reshape(len(rows), -1)
    place_of = {name: index for index, name in enumerate(places)}
    form_of = {form: index for index, form in enumerate(forms)}
    rates = ("false_positive_rate", "false_negative_rate", "flag_rate")
    tables = (cells.counts @ design).reshape(shape)
    below = {
        "false_positive_rate": tables.sum((-2, -1)) - tables[..., sample.positive, :].sum(-1),
        "false_negative_rate": tables[..., sample.positive, :].sum(-1),
        "flag_rate": tables.sum((-2, -1)),
    }

    def statistic(counts: Any) -> dict[Any, Any]:
        tables = (counts @ design).reshape(len(counts), *shape)
        figures = count_figures(tables, sample.positive)
        found: dict[Any, Any] = {}
        for name in sample.predicted:
            form = form_of[name, False]
            for key in RESAMPLED:
                found[name, "overall", key] = figures[key][:, form, 0]
            if name not in sample.varied:
                continue
            spread = {}
            for rate in rates:
                values = figures[rate][:, form]
                enough = [
                    place_of[group]
                    for group in sample.groups
                    if below[rate][form, place_of[group]] >= MIN_DENOMINATOR
                ]
                if len(enough) < 2:
                    continue
                highest, lowest = values[:, enough].max(1), values[:, enough].min(1)
                spread[rate] = found[name, "gap", rate] = highest - lowest
                with np.errstate(divide="ignore", invalid="ignore"):
                    found[name, "ratio", rate] = lowest / highest
            if len(spread) == 3:
                found[name, "equalized_odds_difference"] = np.maximum(
                    spread["false_positive_rate"], spread["false_negative_rate"]
                )
                found[name, "demographic_parity_difference"] = spread["flag_rate"]
        for first, second in pairs:
            one, other = form_of[first, True], form_of[second, True]
            for place in ("overall", *sample.members):
                at = place_of[place]
                keys = COMPARED_IN_GROUPS if at else (*COMPARED, *COMPARED_IN_GROUPS[2:])
                for key in keys:
                    values = figures[key]
                    found[first, second, place, key] = values[:, one, at] - values[:, other, at]
        return {
            key: values
            for key, values in found.items()
            if len(values) > 1 or np.isfinite(values).all()
        }

    return intervals(statistic, cells.counts, seed)


def rank_intervals(
    sample: Sample, pairs: list[tuple[str, str]], seed: int
) -> dict[Any, dict[str, Any]]:
    """Intervals of everything that comes from scores.

    Names: (strategy, place, figure) with a place of "overall" or a group; (strategy, "mean",
    figure); and for each of `pairs` (first, second, place, figure), the first's less the second's.
    Up to `MOST_CELLS` posts are drawn one by one. Of more, scores are drawn as levels of equally
    many posts: `SCORE_LEVELS` of one strategy, fewer of a pair.
    """
    scored = [name for name in sample.varied if sample.scores[name] is not None]
    pairs = [pair for pair in pairs if pair[0] in scored and pair[1] in scored]
    if len(sample.truth) <= MOST_CELLS:
        return rank_some(sample, scored, pairs, None, seed)
    found: dict[Any, dict[str, Any]] = {}
    for name in scored:
        found |= rank_some(sample, [name], [], SCORE_LEVELS, seed)
    for pair in pairs:
        levels = max(4, int(math.sqrt(MOST_CELLS / 2 / 2 ** min(len(sample.groups), 3))))
        both = rank_some(sample, [*pair], [pair], levels, seed)
        found |= {key: value for key, value in both.items() if len(key) == 4}
    return found


def rank_some(
    sample: Sample,
    strategies: list[str],
    pairs: list[tuple[str, str]],
    levels: int | None,
    seed: int,
) -> dict[Any, dict[str, Any]]:
    """`rank_intervals` of some strategies, drawn together; without `levels` post by post."""
    import numpy as np

    if not strategies:
        return {}
    n, members = len(sample.truth), stack_members(sample, list(sample.members))
    if levels is None:
        cells = single_cells(n)
        scores = {name: sample.scores[name] for name in strategies}
    else:
        ranks = {name: equal_mass_bins(sample.scores[name], levels) for name in strategies}
        cells = build_cells(sample.positives, members, *ranks.values())
        scores = {
            name: np.bincount(rank, weights=sample.scores[name]) / np.maximum(np.bincount(rank), 1)
            for name, rank in ranks.items()
        }
        scores = {name: scores[name][ranks[name]] for name in strategies}

    def mean_of(values: Any) -> Any:
        return np.bincount(cells.of, weights=values) / cells.counts

    positive = sample.positives[cells.first]
    inside = dict(zip(sample.members, members[cells.first].T, strict=True))
    everything = np.ones(len(positive), dtype=bool)
    level = {name: scores[name][cells.first] for name in strategies}
    mean = {name: mean_of(sample.scores[name]) for name in strategies}
    squared = {name: mean_of((sample.scores[name] - sample.positives) ** 2) for name in strategies}
    sides: dict[tuple[str, str], tuple[Any, Any]] = {("overall", "roc_auc"): (positive, ~positive)}
    for group, posts in inside.items():
        sides[group, "roc_auc"] = (positive & posts, ~positive & posts)
        if group != NO_TARGET:
            sides[group, "bpsn_auc"] = (positive & ~posts, ~positive & posts)
            sides[group, "bnsp_auc"] = (positive & posts, ~positive & ~posts)
    bins = {
        (name, place): equal_mass_bins(level[name][posts])
        for name in strategies
        for place, posts in (("overall", everything), *inside.items())
    }

    def statistic(counts: Any) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        total = counts.sum(1, dtype=np.float64)
        for name in strategies:
            for (place, key), (high, low) in sides.items():
                if high.any() and low.any():
                    found[name, place, key] = auc(counts, level[name], high, low)
            if positive.any():
                found[name, "overall", "average_precision"] = average_precision(
                    counts, level[name], positive
                )
            found[name, "overall", "brier"] = counts @ squared[name] / total
            for place, posts in (("overall", everything), *inside.items()):
                if posts.any():
                    found[name, place, "ece"] = calibration_error(
                        counts[:, posts], mean[name][posts], positive[posts], bins[name, place]
                    )
            for key in ("roc_auc", "bpsn_auc", "bnsp_auc"):
                each = [
                    (name, group, key) for group in sample.groups if (name, group, key) in found
                ]
                if each:
                    found[name, "mean", key] = power_mean([found[group] for group in each])
        for first, second in pairs:
            for place, key in (*sides, ("overall", "average_precision"), ("overall", "brier")):
                if (first, place, key) in found:
                    away = found[first, place, key] - found[second, place, key]
                    found[first, second, place, key] = away
        return found

    return intervals(statistic, cells.counts, seed)


def build_comparison(
    sample: Sample,
    first: str,
    second: str,
    counted: dict[Any, dict[str, Any]],
    ranked: dict[Any, dict[str, Any]],
) -> dict[str, Any]:
    """The first strategy's figures less the second's on the same posts, overall and per group.

    An answer without label counts as wrong. `p` is of the exact McNemar test: of all posts for
    the accuracy, of one label's posts in a group for its error rates; `p_holm` corrects it for
    all groups and both rates.
    """
    n, positive = len(sample.truth), sample.positives
    one, other = sample.decided(first), sample.decided(second)
    # Among posts of one label, being right or wrong is what its error rate counts.
    right, also = one == sample.truth, other == sample.truth
    flags = {
        "false_positive_rate": (~positive, one != sample.positive, other != sample.positive),
        "false_negative_rate": (positive, one == sample.positive, other == sample.positive),
    }

    def difference(place: str, key: str, size: int) -> dict[str, Any]:
        found = counted.get((first, second, place, key)) or ranked.get((first, second, place, key))
        if not found:
            return number(None, size, "undefined for one of the two")
        figure = number(found["value"], size, "")
        return figure | {"low": found["low"], "high": found["high"]}

    overall = {
        key: difference("overall", key, n)
        for key in (
            *(*COMPARED, "false_positive_rate", "false_negative_rate"),
            *("roc_auc", "average_precision", "brier"),
        )
    }
    only_first, only_second = int((right & ~also).sum()), int((also & ~right).sum())
    overall["accuracy"]["p"] = mcnemar(only_first, only_second)
    groups: dict[str, Any] = {}
    p_values: dict[tuple[str, str], float] = {}
    for group, posts in sample.members.items():
        size = int(posts.sum())
        keys = (*COMPARED_IN_GROUPS, "roc_auc", "bpsn_auc", "bnsp_auc")
        groups[group] = {key: difference(group, key, size) for key in keys}
        for rate, (counts_for, fine, also_fine) in flags.items():
            some = posts & counts_for
            groups[group][rate]["n"] = int(some.sum())
            if some.sum() >= MIN_DENOMINATOR:
                p_values[group, rate] = mcnemar(
                    int((some & fine & ~also_fine).sum()), int((some & also_fine & ~fine).sum())
                )
    adjusted = holm(p_values)
    for (group, rate), p in p_values.items():
        groups[group][rate] |= {"p": p, "p_holm": adjusted[group, rate]}
    return {
        "first": first,
        "second": second,
        "n": n,
        "changed": int((one != other).sum()),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "overall": overall,
        "groups": groups,
    }


def answer_strategies(
    args: argparse.Namespace,
    task: Task,
    posts: list[dict[str, Any]],
    training: list[dict[str, Any]],
    no_training: str,
) -> list[Answers]:
    """The model's answers and, after it, those of what it is compared with."""

    def answers(name: str, kind: str, prediction: str, probabilities: str | None) -> Answers:
        return Answers(
            name,
            kind,
            [post[prediction] for post in posts],
            probabilities and [post[probabilities][task.positive] for post in posts],
        )

    if args.mode == "generate":
        strategies = [
            answers(f"{task.name}_generate", "model", "prediction", None),
            answers(task.name, "compared", "scored_prediction", "probabilities"),
        ]
    else:
        strategies = [answers(task.name, "model", "prediction", "probabilities")]
    if args.with_base:
        strategies.append(answers("base_model", "base", "base_prediction", "base_probabilities"))
    return [*strategies, *answer_baselines(task, posts, training, no_training)]


def build_metrics(
    args: argparse.Namespace, task: Task, posts: list[dict[str, Any]], strategies: list[Answers]
) -> dict[str, Any]:
    """Everything that metrics.json holds: figures of each strategy over all and per group, gaps
    between groups, and the differences of the first one, the model, from all others."""
    truth = [post["label"] for post in posts]
    members = group_members(posts, task.groups)
    sample = build_sample(task.labels, task.positive, truth, members, strategies)
    answered = [*sample.predicted]
    pairs = [(answered[0], other) for other in answered[1:]]
    counted = count_intervals(sample, pairs, args.seed)
    ranked = rank_intervals(sample, pairs, args.seed)
    return {
        "schema": SCHEMA,
        "labels": task.labels,
        "positive_label": task.positive,
        "negative": task.negative,
        "threshold": args.threshold if len(task.labels) == 2 else None,
        "n": len(posts),
        "cut_posts": sum(post["cut"] for post in posts),
        "near_ties": sum(post["near_tie"] for post in posts),
        "resamples": RESAMPLES,
        "min_denominator": MIN_DENOMINATOR,
        "answers": count_answers(posts, members) if args.mode == "generate" else None,
        "strategies": [
            build_strategy(sample, one, ranked, counted, args.seed) for one in strategies
        ],
        "comparisons": [build_comparison(sample, *pair, counted, ranked) for pair in pairs],
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


def count_answers(
    posts: list[dict[str, Any]], members: dict[str, list[int]]
) -> dict[str, dict[str, int]]:
    """How many written answers have which status: over all posts and per target group.

    `labelled` are those whose label could be read, truncated ones included.
    """

    def count(some: list[dict[str, Any]]) -> dict[str, int]:
        statuses = Counter(post["status"] for post in some)
        labelled = sum(post["prediction"] is not None for post in some)
        return {status: statuses[status] for status in STATUSES} | {"labelled": labelled}

    groups = {name: count([posts[index] for index in some]) for name, some in members.items()}
    return {"overall": count(posts), **groups}


# --- predictions -----------------------------------------------------------------------------

PREDICTIONS = ("predictions.parquet", "predictions.csv")
# The names under which files of predictions hold what is needed; the first that is there counts.
COLUMNS = {
    "id": ("id", "sample_id", "post_id"),
    "text": ("text", "input_text"),
    "label": ("label", "true_label"),
    "prediction": ("prediction", "predicted_label"),
    "score": ("p_{positive}", "score", "probability"),
    "group": ("target_groups", "target_group_norm", "persona_tag"),
    "strategy": ("strategy",),
}


@dataclass(frozen=True)
class Run:
    """Answers to labelled posts, as a file holds them; every list has an entry per post.

    In `predicted` None is an answer without label. `scores` are p of the positive label, or None;
    `texts` are None where the file has none. `columns` are further ones, `record` the evaluation's
    contract.json or empty.
    """

    name: str
    origin: str
    labels: list[str]
    positive: str
    ids: list[str]
    truth: list[str]
    predicted: list[str | None]
    scores: list[float] | None
    groups: list[list[str]]
    texts: list[str] | None
    columns: dict[str, list[Any]]
    record: dict[str, Any]


def read_runs(argument: str, eval_name: str, options: dict[str, Any]) -> list[Run]:
    """The runs of a file, of an evaluation's folder, or of an adapter repo; one per strategy.

    A repo is `user/name[@revision]`, its evaluation `eval_name` or `user/name/EVALUATION`.
    `options`: `labels`, `positive`, `label_map`, `threshold`, and by the keys of `COLUMNS` the
    name of a column.
    """
    place = Path(argument).expanduser()
    if place.suffix.lower() in (".csv", ".parquet", ".jsonl") and (
        is_folder(argument) or place.is_file()
    ):
        return runs_of_rows(read_table(place), argument, place.stem, {}, options)
    folder, name = find_evaluation(argument, eval_name)
    record = read_record(folder, name)
    file = next((folder / file for file in PREDICTIONS if (folder / file).is_file()), None)
    if file is None:
        fail(f"{name} holds no {PREDICTIONS[0]}. Evaluate it again with {EVALUATE}.")
    known = {"labels": record.get("labels"), "positive": record.get("positive_label")}
    options = options | {key: value for key, value in known.items() if value}
    return runs_of_rows(read_table(file), argument, name, record, options)


EVALUATE = "eval/eval.py"


def find_evaluation(argument: str, eval_name: str) -> tuple[Path, str]:
    """The local folder of an evaluation's files, fetched where it is on the Hub, and its name."""
    wanted = (*PREDICTIONS, "contract.json", "metrics.json")
    if is_folder(argument):
        place = Path(argument).expanduser()
        for folder in (place, place / "eval" / eval_name):
            if any((folder / file).is_file() for file in PREDICTIONS):
                return folder, argument
        there = sorted(path.parent.name for path in place.glob("eval/*/contract.json"))
        fail(
            f"{argument} holds no evaluation {eval_name!r}. There are: "
            f"{', '.join(there) or 'none'}."
        )
    repo_name, _, revision = argument.partition("@")
    parts = repo_name.split("/")
    if len(parts) == 3:
        repo_name, eval_name = "/".join(parts[:2]), parts[2]
    repo = open_repo(f"{repo_name}@{revision}" if revision else repo_name, "model")
    folder = repo.fetch(*(f"eval/{eval_name}/{file}" for file in wanted)) / "eval" / eval_name
    if not any((folder / file).is_file() for file in PREDICTIONS):
        from huggingface_hub import HfApi

        with hub_errors(f"list the evaluations of {repo_name}"):
            files = HfApi().list_repo_files(repo_name, revision=repo.revision)
        there = sorted({file.split("/")[1] for file in files if re.match("eval/[^/]+/", file)})
        fail(
            f"{repo_name} holds no evaluation {eval_name!r}. There are: "
            f"{', '.join(there) or 'none'}. Name it as {repo_name}/NAME, or run {EVALUATE}."
        )
    return folder, f"{repo_name}/{eval_name}"


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """contract.json of an evaluation; empty where there is none."""
    file = folder / "contract.json"
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"contract.json of {name} is not JSON: {error}")
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        fail(f"contract.json of {name} has an unknown schema; this script reads {SCHEMA}.")
    return record


def read_table(file: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, JSONL or parquet file."""
    if not file.is_file():
        fail(f"the file {file} does not exist.")
    kind = file.suffix.lower()
    if kind == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            rows = parquet.read_table(file).to_pylist()
        except (ArrowException, OSError) as error:
            fail(f"{file} is no parquet file that can be read: {str(error).splitlines()[0]}")
        return rows
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{file} is not UTF-8: {error}")
    if kind == ".csv":
        csv.field_size_limit(2**31 - 1)
        try:
            return list(csv.DictReader(io.StringIO(content, newline=""), strict=True))
        except csv.Error as error:
            fail(f"{file} is no CSV file that can be read: {error}")
    rows = []
    for number_, line in enumerate(content.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            fail(f"{file} line {number_} is not JSON: {error}")
    if not all(isinstance(row, dict) for row in rows):
        fail(f"{file}: every line is to be an object.")
    return rows


def runs_of_rows(
    rows: list[dict[str, Any]],
    origin: str,
    name: str,
    record: dict[str, Any],
    options: dict[str, Any],
) -> list[Run]:
    """Rows as runs, one for each value of the strategy column, in the order of their first row."""
    if not rows:
        fail(f"{origin} holds no rows.")
    found = list(dict.fromkeys(column for row in rows for column in row))
    column = {key: pick_column(key, found, origin, options) for key in COLUMNS}
    if not column["label"] or not (column["prediction"] or column["score"]):
        lacking = "true label" if not column["label"] else "predicted label or score"
        fail(
            f"{origin} has no column for the {lacking}. It has: {', '.join(map(str, found))}. "
            "Name it with --label_column, --prediction_column or --score_column."
        )
    if not column["group"]:
        print(f"{origin}: no column of groups; every post is of no target group", flush=True)
    by_strategy: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        key = str(row.get(column["strategy"]) or "") if column["strategy"] else ""
        by_strategy.setdefault(key or name, []).append(row)
    return [
        run_of_rows(some, strategy, origin, column, record, options)
        for strategy, some in by_strategy.items()
    ]


def pick_column(key: str, found: list[str], origin: str, options: dict[str, Any]) -> str | None:
    """The column that holds a thing: the one that is named, or the first of the known names."""
    named = options.get(key)
    if named:
        if named not in found:
            fail(f"{origin} has no column {named!r}. It has: {', '.join(map(str, found))}.")
        return named
    names = (candidate.format(positive=options["positive"]) for candidate in COLUMNS[key])
    return next((candidate for candidate in names if candidate in found), None)


def run_of_rows(
    rows: list[dict[str, Any]],
    strategy: str,
    origin: str,
    column: dict[str, str | None],
    record: dict[str, Any],
    options: dict[str, Any],
) -> Run:
    """One strategy's rows as a run. Without an id the row's number is it."""
    labels, positive = options["labels"], options["positive"]
    truth, predicted, scores = [], [], []
    for number_, row in enumerate(rows, start=1):
        label = label_of(row.get(column["label"]), labels, options)
        if label is None:
            fail(
                f"{origin}: row {number_} of {strategy} has the true label "
                f"{visible(repr(row.get(column['label'])))}. The labels are {', '.join(labels)}: "
                'name others with --label_map \'{"theirs": "hate"}\'.'
            )
        truth.append(label)
        score = score_of(row.get(column["score"]), origin, number_) if column["score"] else None
        scores.append(score)
        if column["prediction"]:
            predicted.append(label_of(row.get(column["prediction"]), labels, options))
        elif score is None:
            predicted.append(None)
        else:
            negative = next(one for one in labels if one != positive)
            predicted.append(positive if score >= options["threshold"] else negative)
    if column["prediction"] and not any(predicted):
        seen = sorted({visible(repr(row.get(column["prediction"]))) for row in rows})
        fail(f"{origin}: no prediction is one of {', '.join(labels)}; there are {seen[:5]}.")
    used = {name for name in column.values() if name}
    further = [name for name in dict.fromkeys(key for row in rows for key in row)]
    ids = [str(row.get(column["id"])) if column["id"] else str(n) for n, row in enumerate(rows, 1)]
    return Run(
        name=strategy,
        origin=origin,
        labels=labels,
        positive=positive,
        ids=[plain_cell(name) for name in ids],
        truth=truth,
        predicted=predicted,
        scores=None if None in scores else scores,
        groups=[groups_of(row.get(column["group"])) if column["group"] else [] for row in rows],
        texts=[str(row.get(column["text"]) or "") for row in rows] if column["text"] else None,
        columns={
            name: [row.get(name) for row in rows]
            for name in further
            if name not in used and isinstance(name, str)
        },
        record=record,
    )


def label_of(value: Any, labels: list[str], options: dict[str, Any]) -> str | None:
    """A label's name from a name, a number, or what --label_map says; None for anything else."""
    text = str(int(value) if isinstance(value, (bool, float)) and value in (0, 1) else value)
    text = plain_cell(text).strip()
    text = (options.get("label_map") or {}).get(text, text)
    by_name = {label.casefold(): label for label in labels}
    by_number = {str(index): label for index, label in enumerate(labels)}
    return by_name.get(text.casefold()) or by_number.get(text)


def score_of(value: Any, origin: str, number_: int) -> float | None:
    """A probability, or None for an empty cell."""
    if value is None or value == "":
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= 1:
        fail(f"{origin}: row {number_} has the score {visible(repr(value))}; it must be 0 to 1.")
    return score


def groups_of(value: Any) -> list[str]:
    """The groups of a cell: a list, or names parted by `|`; a list as text is read as one."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = [value]
    words = value if isinstance(value, list) else str(value or "").split("|")
    names = [plain_cell(str(word)).strip() for word in words]
    absent = {"", "none", "nan", "null", NO_TARGET}
    return list(dict.fromkeys(name for name in names if name.casefold() not in absent))


def plain_cell(text: str) -> str:
    """A cell of ours without the apostrophe that keeps spreadsheets from computing it."""
    if text.startswith("'") and text[1:].lstrip(" ").startswith(FORMULA_SIGNS):
        return text[1:]
    return text


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
    """One row a post: its labels, its probabilities, its groups, what was special about it."""
    others = [label for label in task.labels if label != task.positive]
    listed = [task.positive, *(others if len(others) > 1 else [])]
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "id": lambda post: post["id"],
        "label": lambda post: post["label"],
        "prediction": lambda post: post["prediction"],
    }
    for label in listed:
        columns[f"p_{label}"] = lambda post, label=label: post["probabilities"][label]
    columns |= {
        "target_groups": lambda post: "|".join(post["target_groups"]),
        "cut": lambda post: str(post["cut"]).lower(),
        "near_tie": lambda post: str(post["near_tie"]).lower(),
    }
    if "base_prediction" in posts[0]:
        columns["base_prediction"] = lambda post: post["base_prediction"]
        columns[f"base_p_{task.positive}"] = lambda post: post["base_probabilities"][task.positive]
    if "scored_prediction" in posts[0]:
        columns["scored_prediction"] = lambda post: post["scored_prediction"]
    if any("status" in post for post in posts):
        columns["answer_status"] = lambda post: post.get("status")
    if with_text:
        columns["text"] = lambda post: post["text"]
    rows = [[read(post) for read in columns.values()] for post in posts]
    write_csv(file, list(columns), rows)


def write_answers(file: Path, posts: list[dict[str, Any]]) -> None:
    """A line per written answer: id, status, the label that was read, the raw text."""
    lines = [
        {
            "id": post["id"],
            "status": post["status"],
            "label": post["answer_label"],
            "answer": post["answer"],
        }
        for post in posts
        if "status" in post
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8")


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
        "labels": task.labels,
        "positive_label": task.positive,
        "groups": task.groups,
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
        "near_ties": metrics["near_ties"],
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
    if ANSWERS in output_files(args):
        write_answers(folder / ANSWERS, posts)
    write_metric_tables(folder, metrics)
    write_json(folder / "metrics.json", metrics)
    page = build_page(metrics, record)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    (folder / "report.html").write_text(template.render(page), encoding="utf-8")
    (folder / "report.md").write_text(build_markdown(page), encoding="utf-8")
    write_json(folder / CONTRACT, record)


def name_output(
    args: argparse.Namespace, contract: dict[str, Any], adapter: Repo | None
) -> tuple[str, Path]:
    """The evaluation's name and its folder here.

    The default name says what is not as usual, so that a variant never takes another one's place.
    """
    name = args.eval_name
    if not name:
        words = [*name_posts(args, contract), *name_variant(args, contract)]
        name = re.sub(r"[^\w.-]+", "-", "-".join(words), flags=re.ASCII).strip(".-") or "posts"
    if args.output_dir:
        return name, Path(args.output_dir).expanduser().resolve()
    if adapter and adapter.folder:
        return name, adapter.folder / "eval" / name
    subject = adapter.name if adapter else args.model_name_or_path
    return name, Path("hsd-eval", Path(subject.partition("@")[0]).name, name).resolve()


def name_posts(args: argparse.Namespace, contract: dict[str, Any]) -> list[str]:
    """What is scored, as words of a name: the split, a file, or another dataset's split."""
    if args.test_file:
        return ["file", Path(args.test_file).stem]
    if args.input:
        return ["input", "stdin" if args.input == "-" else Path(args.input).name]
    trained = (contract.get("dataset") or {}).get("repo")
    other = args.dataset_repo and Path(args.dataset_repo.partition("@")[0]).name
    if other and other != (trained and Path(trained).name):
        return [other, args.split]
    return [args.split]


def name_variant(args: argparse.Namespace, contract: dict[str, Any]) -> list[str]:
    """How it is scored, where that is not as usual."""
    asked = (contract.get("prompt") or {}).get("name")
    four = {None: "", True: "4bit", False: "not_4bit"}[args.load_in_4bit]
    words = {
        "base": args.base_only,
        "generate": args.mode == "generate",
        "with_base": args.with_base,
        f"rationales{args.rationales}": args.rationales,
        str(args.prompt): args.prompt not in (None, asked),
        f"first{args.max_samples}": args.max_samples,
        f"seed{args.seed}": args.max_samples and args.seed != 42,
        f"threshold{args.threshold}": args.threshold != 0.5,
        f"length{args.max_length}": args.max_length,
        args.dtype: args.dtype != "auto",
        four: four,
    }
    return [word for word, said in words.items() if said]


def fingerprint(repo: Repo) -> Any:
    """What tells a repo's content: its commit, or of a folder every file's size and time."""
    if repo.folder is None:
        return [repo.name, repo.revision]
    files = sorted(path for path in repo.folder.rglob("*") if path.is_file())
    parts = [(path.relative_to(repo.folder), path.stat()) for path in files]
    return [
        [name.as_posix(), found.st_size, found.st_mtime_ns]
        for name, found in parts
        if name.parts[0] not in ("eval", ".cache", ".git")
    ]


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def key_of_weights(adapter: Repo | None, base: Repo) -> list[Any]:
    """What tells the model that is scored, and the script that scores it.

    An adapter is known by its files, because each report is one more commit of its repo.
    """
    script = Path(__file__).read_text(encoding="utf-8")
    if adapter is None:
        return [script, fingerprint(base)]
    folder = adapter.fetch(*ADAPTER_FILES)
    files = [path for name in ADAPTER_FILES for path in sorted(folder.glob(name))]
    hashes = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
    return [script, fingerprint(base), hashes]


def evaluation_key(
    args: argparse.Namespace,
    contract: dict[str, Any],
    adapter: Repo | None,
    base: Repo,
    dataset: Repo | None,
) -> str:
    """A hash of everything that decides an evaluation's scores and report."""
    loose = ("output_dir", "push", "allow_public", "fresh", "config_file", "save_minutes")
    # Known by their content, so that @revision, a branch or a moved folder make no difference.
    loose += ("adapter", "model_name_or_path", "model_revision", "dataset_repo")
    fixed = {name: value for name, value in vars(args).items() if name not in loose}
    today = None if contract else datetime.now(UTC).date().isoformat()
    parts: list[Any] = [without_paths(fixed), contract, today, key_of_weights(adapter, base)]
    parts.append(dataset and fingerprint(dataset))
    if args.test_file and (file := Path(args.test_file).expanduser()).is_file():
        parts.append(hashlib.sha256(file.read_bytes()).hexdigest())
    return hash_of(parts)


def answer_from_files(
    args: argparse.Namespace,
    key: str,
    adapter: Repo | None,
    name: str,
    target: Path,
    pushes: bool,
) -> bool:
    """Answer from the files of the same evaluation, here or on the Hub, where it is finished."""
    if args.fresh:
        return False
    names = output_files(args)
    pushed = pushed_files(args)
    here, there = is_whole(target, names, key), False
    if adapter and adapter.folder is None:
        from huggingface_hub import HfApi

        # A report is a later commit than the adapter that it is of.
        newest, folder = open_repo(adapter.name, "model"), f"eval/{name}"
        with hub_errors(f"look for an earlier report in {adapter.name}"):
            if HfApi().file_exists(newest.name, f"{folder}/{CONTRACT}", revision=newest.revision):
                found = newest.fetch(*(f"{folder}/{file}" for file in pushed)) / folder
                there = is_whole(found, pushed, key)
        if there and not here:
            with draft_folder(target) as draft:
                for file in pushed:
                    (draft / file).write_bytes((found / file).read_bytes())
                publish_draft(draft, target, pushed)
    if not here and not there:
        if (target / CONTRACT).is_file():
            print(f"replaces an earlier evaluation in {target}", flush=True)
        return False
    print(f"finished already, from {target if here else 'the Hub'}; --fresh scores again")
    print_summary(json.loads((target / "metrics.json").read_text(encoding="utf-8")))
    print(f"report: {target / 'report.html'}", flush=True)
    if pushes and not there:
        push_files(args, adapter, name, target, None)
    return True


def is_whole(folder: Path, names: tuple[str, ...] | list[str], key: str) -> bool:
    """Say whether a folder holds all files of the evaluation of this key."""
    try:
        record = json.loads((folder / CONTRACT).read_text(encoding="utf-8"))
        return record["key"] == key and all((folder / file).is_file() for file in names)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def output_files(args: argparse.Namespace) -> tuple[str, ...]:
    """The files that an evaluation with these arguments writes, the contract last."""
    asks = args.mode == "generate" or args.rationales
    return (*FILES[:-1], *([ANSWERS] if asks else []), CONTRACT)


def pushed_files(args: argparse.Namespace) -> tuple[str, ...]:
    """Those of them that go to the Hub: answers can quote their post."""
    return tuple(file for file in output_files(args) if file != ANSWERS or args.log_text)


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


def publish_draft(draft: Path, target: Path, names: tuple[str, ...]) -> None:
    """Move the files into the target; one with a contract.json holds a whole report."""
    for name in {CONTRACT, ANSWERS} - ({ANSWERS} & {*names}):
        (target / name).unlink(missing_ok=True)
    for name in names:
        (draft / name).replace(target / name)


def push_files(
    args: argparse.Namespace, adapter: Repo, name: str, folder: Path, scores: Path | None
) -> None:
    """Commit the evaluation's files to eval/NAME/ of the adapter repo, and its scores beside it.

    The same commit removes the answers of an earlier or unfinished evaluation of the same name.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    names = {f"eval/{name}/{file}": folder / file for file in pushed_files(args)}
    if scores:
        names[f"eval/{scores.name}"] = scores
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in names.items()
    ]
    with hub_errors(f"push the report in {folder} to {adapter.name}"):
        stale = [
            file
            for file in HfApi().list_repo_files(adapter.name)
            if file.startswith(f"eval/{name}/answers.") and file not in names
        ]
        operations += [CommitOperationDelete(path_in_repo=file) for file in stale]
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


def answer_table(metrics: dict[str, Any]) -> list[list[str]]:
    """How many written answers have which status, per target group, header first; or no rows."""
    if not metrics["answers"]:
        return []
    names = (*STATUSES, "labelled")
    rows = [["target group", *STATUSES, "label read"]]
    for group, counts in metrics["answers"].items():
        name = "all posts" if group == "overall" else visible(group)
        rows.append([name, *(str(counts[status]) for status in names)])
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
    if metrics["answers"]:
        lost = metrics["n"] - metrics["answers"]["overall"]["labelled"]
        sentences.append(f"{lost} written answers have no label; they count as wrong.")
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
                "height": 12 + 17 * max(2, len(drawn)),
                "names": [(one["kind"], visible(one["name"])) for one in drawn],
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
        "answers": answer_table(metrics),
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
        ("Scores", describe_scoring(record["scoring"])),
        ("Script", f"{SCRIPT}, SHA-256 {record['script_sha256']}"),
        ("Packages", ", ".join(f"{name} {number}" for name, number in record["packages"].items())),
        ("Made", record["created"]),
        ("Command", repeat_command(record)),
    ]
    return [(name, visible(value, 400)) for name, value in made]


def describe_scoring(scoring: dict[str, Any]) -> str:
    """By which path the scores were computed, how exact it proved, what became of near ties."""
    scores = scoring["scores"]
    parts = [
        f"path {scoring['path']} ({scoring['attention']}); {scoring['checked_posts']} posts differ "
        f"from naive scoring by at most {scoring['largest_difference']:.1e} nats"
    ]
    parts += [f"not {one['path']}: {one['reason']}" for one in scoring["steps_down"]]
    if scores["rescored"]:
        parts.append(f"{scores['rescored']} near ties scored again in float32")
    parts.append(f"{scores['near_ties']} near ties left")
    return "; ".join(parts)


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
    left_out = {"config_file", "output_dir", "push", "fresh", "save_minutes", *named}
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
            *(["Written answers:", "", *table(page["answers"])] if page["answers"] else []),
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
  --band: #f4f6f8; --model: #0a5bb0; --other: #8a5a00;
  --compared: #6b3fa0; --base: #00655a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e8ec; --soft: #a0abb6;
  --line: #343c45; --band: #1c2229; --model: #74b3ff; --other: #dca94f;
  --compared: #c9a3ff; --base: #5fd3c0; } }
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
svg .compared { stroke: var(--compared); fill: var(--paper); stroke-width: 2; }
svg .base { stroke: var(--base); fill: var(--paper); stroke-width: 2; }
.key { margin-right: 1rem; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: .65em; height: .65em;
  margin-right: .35em; border: 2px solid; border-radius: 50%; }
.key.model { color: var(--model); }
.key.baseline { color: var(--other); }
.key.compared { color: var(--compared); }
.key.base { color: var(--base); }
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
stand what it was asked to be compared with (its own label scores, its base without adapter),
answer-all baselines, and logistic regression on words fitted to the train split.</p>

<h2>By target group</h2>
<p class="soft">Dots are rates, whiskers their 95 % intervals; the dashed line is the model's rate
over all posts.
{% for kind, name in plots[0].names %}<span class="key {{ kind }}">
{{- name }}</span>{% endfor %}</p>
<div class="plots">
{% for plot in plots %}
<figure>
<h3>{{ plot.title }}</h3><p class="soft">{{ plot.meaning }}</p>
{% set bottom = 30 + plot.height * plot.rows | length %}
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
{% set top = 18 + plot.height * loop.index0 %}
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

{% if answers %}
<h2>Written answers</h2>
<div class="scroll"><table class="figures">
<thead><tr>{% for cell in answers[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in answers[1:] %}
<tr><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="soft">ok: a label in the prompt's form. unparsed: none. truncated: no end within the
allowed tokens; a label that already stands there is read. An answer without label counts as
wrong.</p>
{% endif %}

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


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def parse_answer(template: str, answer: str, labels: list[str]) -> str | None:
    """The label of an answer in the form of its template, else None."""
    if is_json(template):
        try:
            parsed = json.loads(answer)
        except ValueError:
            return None
        keys = [key for key, value in json.loads(template).items() if value == "{label}"]
        label = parsed.get(keys[0]) if isinstance(parsed, dict) and keys else None
        return label if label in labels else None
    pattern = re.escape(template)
    names = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    pattern = pattern.replace(re.escape("{label}"), f"({names})")
    pattern = pattern.replace(re.escape("{rationale}"), ".*")
    match = re.fullmatch(pattern, answer, re.DOTALL)
    return match[1] if match else None


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


def keep_four_bit_layout(model: Any) -> None:
    """Keep a base in four bits as it was loaded; called before the trainer is built.

    On a CPU with AVX512-BF16 bitsandbytes repacks each layer at the first evaluation, in place and
    with loss. From then on no gradient flows through the layer, and a resumed run, which starts
    from the loaded layout, differs.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


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
