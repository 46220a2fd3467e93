# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate==1.15.0",
#     "bitsandbytes==0.50.2",
#     "datasets==5.2.0",
#     "huggingface-hub==2.4.0",
#     "jinja2==3.1.6",
#     "matplotlib==3.11.2",
#     "peft==0.21.2",
#     "pyarrow==26.0.1",
#     "scikit-learn==1.9.1",
#     "scipy==1.17.1",
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "wandb==0.31.0",
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
Writes: --output_dir and eval/NAME/ of the adapter repo: predictions.csv and .parquet (ids and
        scores, no text), errors.csv, performance_metrics.csv, bias_metrics.csv, metrics.json,
        report.html, report.md, evaluation_report.txt and contract.json; a section of the
        adapter's model card.

    hf jobs uv run --flavor a100-large eval/eval.py --adapter user/hsd-lora
    uv run eval/eval.py --adapter user/hsd-lora

A post's score is the likelihood of each label as the answer, normalised over the labels; no text
is generated (--mode generate does). A finished evaluation is answered from its files; one that was
stopped goes on where it was, on any machine and any number of GPUs. --text and --input classify
posts that have no labels; --predictions reports the answers of any classifier without a model.
Exit 3: a --require does not hold.
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
import operator
import os
import random
import re
import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

SCRIPT = "eval/eval.py"
SCHEMA = 1
CONTRACT = "contract.json"
DECISIONS = "decisions.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Variables with these names are read as they stand; every other flag is HSD_<FLAG>, because an
# unprefixed SEED or TASK in somebody's shell must not change an audited run.
PLAIN_VARIABLES = ("DATASET_REPO", "HUB_MODEL_ID", "MAX_STEPS")
# What a run shows its tokenizer and template to prove that they are those of another run.
PROBE_POST = "My neighbours moved in last week, said <|endoftext|> nobody. 42 % é \u4f60\u597d"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
LABELS, POSITIVE_LABEL = ["normal", "hate"], "hate"
DATA_FORMS = (
    "A row is one of: `messages` that end with the user's and the assistant's; `prompt` and "
    "`completion`, each text or a list of messages; `text` and `label`. Other columns: "
    "datasets/build_custom.py makes a dataset of them."
)
# What a base in four bits keeps whole: heads, of which a new one is trained, and the parts of a
# vision-language model that no post passes through. The library wants beginnings or ends of names.
WHOLE_MODULES = ["classifier", "score", "lm_head", "model.vision_tower"]
WHOLE_MODULES += ["model.multi_modal_projector"]
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
    *("predictions.csv", "predictions.parquet", "errors.csv", "performance_metrics.csv"),
    *("bias_metrics.csv", "metrics.json", "evaluation_report.txt", "report.html", "report.md"),
    CONTRACT,
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
# Of an evaluation's contract, beside F1 of the positive label.
HEADLINE = ("accuracy", "precision", "recall", "f1_macro", "roc_auc")
CONFUSION = ("true_positive", "true_negative", "false_positive", "false_negative")
LIMITS = (
    "An interval (95 %) says how far a figure could move if other posts of the same kind "
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


class Collect(argparse.Action):
    """Repeatable: the values of all its occurrences, as they stand, in a tuple."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(earlier if isinstance(earlier, tuple) else ()), *values))


def json_mapping(text: str) -> dict[str, str]:
    """A JSON object of texts, as a flag's value."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return {str(key): str(value) for key, value in found.items()}


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
    data.add_argument(
        *("--predictions",), help="report these: a .csv, .parquet or .jsonl of labels and answers"
    )
    data.add_argument("--label_map", type=json_mapping, help='of --predictions: {"theirs": "hate"}')
    for name in COLUMNS:
        known = ", ".join(COLUMNS[name]).format(positive="hate")
        data.add_argument(f"--{name}_column", help=f"of --predictions ({known})")
    data.add_argument("--labels", nargs="+", help="of --predictions (normal hate)")
    data.add_argument("--positive_label", help="of --predictions (the last label)")
    data.add_argument(
        *("--dataset_config",),
        help="config to score (the prompt's); hatecheck: {you}/hsd-hatecheck",
    )
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
    report = parser.add_argument_group("report")
    report.add_argument(
        *("--against",),
        nargs="+",
        action=Collect,
        help="runs to stand beside the model: adapter repos, folders, files of predictions",
    )
    report.add_argument(
        *("--require",),
        nargs="+",
        action=Collect,
        help="end with exit code 3 unless: f1>=0.62, lgbtq.fpr<=0.4, gap.fpr<=0.1, vs_base.f1>=0, "
        "beats_baselines, published",
    )
    report.add_argument("--strict", **switch, help="test the interval's bad end, not the figure")
    report.add_argument("--profile", help="decide by this profile of the adapter's decisions.json")
    report.add_argument(
        *("--prevalence",),
        nargs="+",
        help="shares of positive posts to compute precision and flags at, such as 0.01",
    )
    report.add_argument("--slice_by", nargs="+", help="further columns")
    report.add_argument("--evasion", **switch, help="score perturbed positive posts as well")
    report.add_argument("--identity_swap", **switch, help="swap identity terms, and score that")
    report.add_argument("--identity_terms", help="JSON file of identity terms by group")
    report.add_argument("--card_fields", help="JSON or YAML file of the model card's open fields")
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
    output.add_argument("--card", **unset, help="update the model card (the usual test split does)")
    output.add_argument("--space", help="publish the report as this private static Space")
    output.add_argument("--report_to", choices=["wandb", "none"], help="(wandb with WANDB_API_KEY)")
    output.add_argument("--log_text", **switch, help="write the posts into the report's files")
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
    check_report_flags(args)
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


def check_report_flags(args: argparse.Namespace) -> None:
    """End where a flag of the report cannot be read, before anything is scored."""
    for text in args.require or []:
        if text not in ("published", "beats_baselines"):
            parse_requirement(text)
    try:
        shares = [float(text) for text in args.prevalence or []]
    except ValueError:
        shares = [math.nan]
    if not all(0 < share < 1 for share in shares):
        fail(f"--prevalence {' '.join(args.prevalence)}: give shares between 0 and 1, as in 0.01.")
    args.prevalence = shares
    if args.strict and not args.require:
        fail("--strict makes --require stricter; there is none.")
    if args.space and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.space, re.ASCII):
        fail(f"--space {args.space} is no Hub id; write USER/NAME.")
    if args.profile and args.threshold != 0.5:
        fail("--profile and --threshold both decide: leave one out.")
    if args.profile and args.mode == "generate":
        fail("--profile is of scores; --mode generate decides by written answers. Leave one out.")
    if args.profile and (args.predictions or args.base_only):
        fail("--profile is of an adapter; leave it out.")
    if args.identity_terms and not args.identity_swap:
        fail("--identity_terms is for --identity_swap, which is not given.")
    if args.identity_terms:
        read_identity_terms(args.identity_terms)
    read_card_fields(args.card_fields)
    if args.report_to is None:
        args.report_to = "wandb" if os.environ.get("WANDB_API_KEY") else "none"


def has_empty_value(flag: str, words: list[str]) -> bool:
    return f"{flag}=" in words or any(
        word == flag and following == "" for word, following in itertools.pairwise(words)
    )


def check_posts_source(args: argparse.Namespace) -> None:
    """End where the flags name no posts, or several kinds."""
    kinds = {
        name: value
        for name in ("text", "input", "test_file", "predictions")
        if (value := vars(args)[name]) is not None
    }
    if len(kinds) > 1:
        fail(f"--{' and --'.join(kinds)} both name the posts: give one of them.")
    if args.predictions:
        check_predictions_flags(args)
        return
    for name in (*(f"{key}_column" for key in COLUMNS if key != "text"), "labels", "label_map"):
        if vars(args)[name] and not args.against:
            fail(f"--{name} says how to read --predictions or --against; neither is given.")
    if args.dataset_config == "hatecheck" and not args.dataset_repo:
        args.dataset_repo = f"{own_namespace()}/hsd-hatecheck"
    named = args.dataset_repo or kinds
    if args.base_only and not args.adapter and not (args.model_name_or_path and named):
        fail(
            "--base_only without --adapter needs --model_name_or_path and the posts: "
            "--dataset_repo, --test_file, --input or --text."
        )
    if is_ad_hoc(args):
        for name in (
            *("rationales", "with_base", "push", "max_samples", "against", "require", "evasion"),
            *("identity_swap", "prevalence", "slice_by", "space"),
        ):
            if vars(args)[name]:
                fail(f"--{name} is for an evaluation with labels; --text and --input have none.")
        if args.mode == "generate":
            fail("--mode generate is for an evaluation with labels; leave it out.")


def check_predictions_flags(args: argparse.Namespace) -> None:
    """End where a flag asks a file of predictions for what only a model can give."""
    for name in (
        *("adapter", "model_name_or_path", "base_only", "with_base", "rationales", "push"),
        *("evasion", "identity_swap", "max_samples", "prompt", "load_in_4bit", "text"),
    ):
        if vars(args)[name]:
            fail(f"--{name} needs a model; --predictions reports answers that are given already.")
    if args.mode == "generate":
        fail("--mode generate needs a model; --predictions reports answers that are there already.")
    args.labels = args.labels or LABELS
    args.positive_label = args.positive_label or args.labels[-1]
    if len(set(args.labels)) < 2 or args.positive_label not in args.labels:
        fail(f"--labels {' '.join(args.labels)} need the --positive_label and another one.")


def is_ad_hoc(args: argparse.Namespace) -> bool:
    """Say whether posts without labels are to be classified, and nothing evaluated."""
    return args.text is not None or args.input is not None


def main(argv: list[str] | None = None) -> None:
    quiet_libraries()
    args = parse_args(argv)
    if args.predictions:
        end_with_gates(report_predictions(args))
        return
    world = join_world()
    adapter, contract = open_subject(args)
    pushes = check_push(args, adapter)
    if args.space and not is_ad_hoc(args):
        check_space(args)
    profile = use_profile(args, adapter)
    dataset = open_dataset(args, contract)
    base = pick_base(args, contract)
    name, target = name_output(args, contract, adapter)
    against = read_against(args, contract)
    key = evaluation_key(args, contract, adapter, base, dataset, against, profile)
    ad_hoc = is_ad_hoc(args)
    if not ad_hoc and (metrics := answer_from_files(args, key, adapter, name, target, pushes)):
        end_with_gates(metrics)
        return
    task = build_task(args, contract, dataset)
    posts = read_ad_hoc_posts(args) if ad_hoc else read_posts(args, contract, task, dataset)
    training, no_training, rivals = [], "", []
    if not ad_hoc:
        training, no_training = read_training_posts(args, task, dataset, contract)
        rivals = [align_run(run, posts) for run in against]
        check_columns_there(posts, args.slice_by or [])
        try_requirements(args, task, posts, against)
    config = read_base_config(base)
    device = check_device(count_parameters(config), args.allow_cpu, job_command(args, adapter))
    tokenizer = load_tokenizer(adapter or base)
    encoded, answers = encode_posts(tokenizer, task, contract, posts)
    probes = build_probes(args, task, posts)
    probed: list[list[int]] = []
    if probes.texts:
        probed, _ = encode_posts(tokenizer, task, contract, [*probes.texts.values()])
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
    probes.scores = score_probes(args, task, scorer, probed, journals, world)
    if world.rank:
        return
    calibrate_posts(args, profile, task, posts, probes)
    if ad_hoc:
        show_posts(args, task, posts, target)
        return
    strategies = answer_strategies(args, task, posts, training, no_training)
    strategies[1:1] = rivals
    metrics, sample = build_metrics(args, task, posts, strategies, probes, profile)
    record |= build_record(args, contract, [adapter, base, dataset], task, metrics)
    record |= {"name": name, "key": key, "device": device_name(device), "profile": profile}
    record |= {"dtype": setup.dtype, "world_size": world.size}
    record["weights_sha256"] = weights_sha256(adapter) if scored else None
    with draft_folder(target) as draft:
        write_files(draft, args, task, posts, metrics, sample, record)
        publish_draft(draft, target, output_files(args))
    scores, written = journals
    written.file.unlink(missing_ok=True)
    print_summary(metrics)
    print(f"report: {target / 'report.html'}", flush=True)
    if args.report_to == "wandb":
        log_to_wandb(args, target, metrics, record, posts)
    send_report(args, adapter, name, target, scores.file, pushes)
    end_with_gates(metrics)


def use_profile(args: argparse.Namespace, adapter: Repo | None) -> dict[str, Any] | None:
    """The profile of --profile, with its threshold as --threshold until the posts are scored."""
    if not args.profile:
        return None
    # Calibration is a later commit than the adapter that it is of.
    newest = open_repo(adapter.name, "model") if adapter.folder is None else adapter
    profile = read_profile(newest, args.profile)
    # Raising the scores to the profile's scale moves no post over its threshold.
    args.threshold = float(apply_temperature(profile["threshold"], 1 / profile["temperature"]))
    print(
        f"profile {args.profile}: p at temperature {profile['temperature']:.4g}, "
        f"threshold {profile['threshold']:.4g}",
        flush=True,
    )
    cuts = ("created", "temperature", "threshold", "review", "act")
    return {"name": args.profile, **{key: profile.get(key) for key in cuts}}


def calibrate_posts(
    args: argparse.Namespace,
    profile: dict[str, Any] | None,
    task: Task,
    posts: list[dict[str, Any]],
    probes: Probes,
) -> None:
    """Bring the model's scores to the profile's scale, on which its threshold is."""
    if profile is None:
        return
    args.threshold = profile["threshold"]
    for post in posts:
        p = float(apply_temperature(post["probabilities"][task.positive], profile["temperature"]))
        post["probabilities"] = {task.positive: p, task.negative_label: 1 - p}
    probes.scores = [float(apply_temperature(p, profile["temperature"])) for p in probes.scores]


def try_requirements(
    args: argparse.Namespace, task: Task, posts: list[dict[str, Any]], against: list[Answered]
) -> None:
    """End on a requirement that names no figure of the report, before a model is paid for.

    The report is built of the true labels in the place of every answer.
    """
    if not args.require:
        return
    truth = [post["label"] for post in posts]
    scores = [float(label == task.positive) for label in truth]
    names = [task.name, *(against_name(run) for run in against)]
    names += ["base_model"] if args.with_base else []
    if args.mode == "generate":
        names.insert(0, f"{task.name}_generate")
    strategies = [Answers(name, "compared", truth, scores) for name in names]
    strategies += answer_baselines(task, posts, [], "not fitted yet")[:-1]
    strategies.append(Answers("tfidf_lr", "baseline", truth, scores))
    strategies = with_own_names(strategies)
    members = group_members(posts, task.groups)
    sample = build_sample(task.labels, task.positive, truth, members, strategies)
    metrics = {
        "positive_label": task.positive,
        "strategies": [build_strategy(sample, one, {}, {}, args.seed) for one in strategies],
        "comparisons": [
            build_comparison(sample, strategies[0].strategy, one.strategy, {}, {})
            for one in strategies[1:]
        ],
    }
    judge(metrics, expand_requirements(args.require, metrics), False)


def end_with_gates(metrics: dict[str, Any]) -> None:
    """End with exit code 3 where a requirement does not hold; all files are written by then."""
    failed = [one["requirement"] for one in metrics["gates"] if not one["holds"]]
    if failed:
        fail(
            f"{len(failed)} of {len(metrics['gates'])} requirements fail: {', '.join(failed)}. "
            "The table above has their figures.",
            code=3,
        )


def report_predictions(args: argparse.Namespace) -> dict[str, Any]:
    """Report a file's answers like those of a model; return metrics.json."""
    options = reading_options(args)
    runs = read_runs(args.predictions, "test", options)
    against = read_against(args, {})
    if args.space:
        check_space(args)
    first = runs[0]
    follows = follows_threshold(first, args.threshold)
    if not follows and args.threshold != 0.5:
        fail("--threshold has no effect: the file brings its own decisions. Leave it out.")
    name, target = name_output(args, {}, None)
    task = Task(first.name, first.labels, first.positive, [], None, 0, "", "")
    posts = posts_of_run(first)
    dataset = open_repo(args.dataset_repo, "dataset") if args.dataset_repo else None
    training, no_training = read_training_posts(args, task, dataset)
    if training and first.texts is None:
        training, no_training = [], "the predictions have no text"
    counts = Counter(first.truth)
    listed = ", ".join(f"{counts[label]} {label}" for label in task.labels)
    print(f"{len(posts)} posts of {args.predictions}: {listed}", flush=True)
    if first.texts:
        say_what_is_odd(posts)
    strategies = [
        Answers(first.name, "model", first.predicted, first.scores),
        *(align_run(run, posts, "compared") for run in runs[1:]),
        *(align_run(run, posts) for run in against),
        *answer_baselines(task, posts, training, no_training),
    ]
    check_columns_there(posts, args.slice_by or [])
    metrics, sample = build_metrics(args, task, posts, strategies, None)
    if not follows:
        metrics["threshold"] = None
    place = Path(args.predictions).expanduser()
    file = {"file": place.name, "sha256": None}
    if place.is_file():
        file["sha256"] = hashlib.sha256(place.read_bytes()).hexdigest()
    record = build_record(args, {}, [None, None, dataset], task, metrics)
    record |= {"name": name, "predictions": file, "rendering": None}
    if (target / CONTRACT).is_file():
        print(f"replaces an earlier report in {target}", flush=True)
    with draft_folder(target) as draft:
        write_files(draft, args, task, posts, metrics, sample, record)
        publish_draft(draft, target, output_files(args))
    print_summary(metrics)
    print(f"report: {target / 'report.html'}", flush=True)
    if args.report_to == "wandb":
        log_to_wandb(args, target, metrics, record, posts)
    send_report(args, None, name, target, None, False)
    return metrics


def follows_threshold(run: Answered, threshold: float) -> bool:
    """Whether a run's decisions are those that the threshold makes of its scores."""
    if run.scores is None or len(run.labels) > 2:
        return False
    return all(
        (label == run.positive) == (score >= threshold) and label is not None
        for label, score in zip(run.predicted, run.scores, strict=True)
    )


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """How `read_runs` is to read a file of predictions."""
    labels = args.labels or LABELS
    return {
        "labels": labels,
        "positive": args.positive_label or labels[-1],
        "label_map": args.label_map,
        "threshold": args.threshold,
        **{key: vars(args)[f"{key}_column"] for key in COLUMNS},
    }


def read_against(args: argparse.Namespace, contract: dict[str, Any]) -> list[Answered]:
    """The runs that --against names; their labels are the adapter's where no flag says others."""
    options = reading_options(args) | {"threshold": 0.5}
    options["labels"] = args.labels or contract.get("labels") or LABELS
    known = contract.get("positive_label")
    options["positive"] = args.positive_label or (
        known if known in options["labels"] else options["labels"][-1]
    )
    if args.predictions:
        # The flags name the columns of that file.
        options |= dict.fromkeys(COLUMNS)
    return [run for place in args.against or [] for run in read_runs(place, "test", options)]


def posts_of_run(run: Answered) -> list[dict[str, Any]]:
    """A run's posts as those that a model was asked."""
    other = next(label for label in run.labels if label != run.positive)
    posts = []
    for index, name in enumerate(run.ids):
        p = run.scores[index] if run.scores else None
        posts.append(
            {
                "id": name,
                "text": run.texts[index] if run.texts else None,
                "label": run.truth[index],
                "target_groups": run.groups[index],
                "prediction": run.predicted[index],
                "probabilities": None if p is None else {run.positive: p, other: 1 - p},
                "cut": False,
                "near_tie": False,
            }
        )
    names = [name for name in run.columns if name not in ("cut", "near_tie")]
    describe_posts(
        posts,
        [{name: run.columns[name][index] for name in names} for index in range(len(posts))],
    )
    return posts


def align_run(run: Answered, posts: list[dict[str, Any]], kind: str = "against") -> Answers:
    """A run's answers in the order of the posts, by id, else by text; without them the reason.

    Ends where the run has another true label for a post: then its answers are to another question.
    """
    name = run.name if kind == "compared" else against_name(run)

    def places(keys: list[Any]) -> dict[Any, int]:
        seen: Counter[Any] = Counter()
        found = {}
        for index, key in enumerate(keys):
            found[key, seen[key]] = index
            seen[key] += 1
        return found

    wanted, there = places([post["id"] for post in posts]), places(run.ids)
    texts = [post["text"] for post in posts]
    if run.texts and None not in texts:
        # Row numbers serve as ids where a file has none: the texts say whether they are the same.
        known = [plain_cell(text) for text in run.texts]
        same = [
            known[there[key]] == plain_cell(text)
            for key, text in zip(wanted, texts, strict=True)
            if key in there
        ]
        if not same or not all(same):
            wanted, there = places([plain_cell(text) for text in texts]), places(known)
    missing = len(wanted.keys() - there.keys())
    if missing == len(wanted):
        fail(f"--against {run.origin} has none of these posts: name a run on the same ones.")
    if missing:
        reason = f"it has no answer to {missing} of the {len(posts)} posts"
        return Answers(name, kind, None, None, reason)
    order = [there[key] for key in wanted]
    for post, index in zip(posts, order, strict=True):
        if run.truth[index] != post["label"]:
            fail(
                f"{run.origin} labels the post {visible(post['id'])} {run.truth[index]}, and it is "
                f"{post['label']} here: the two were made from different data."
            )
    scores = run.scores and [run.scores[index] for index in order]
    return Answers(name, kind, [run.predicted[index] for index in order], scores)


def against_name(run: Answered) -> str:
    """What a run of --against is called: its adapter and evaluation, or its file and strategy."""
    adapter = run.record.get("adapter") or run.record.get("base_model")
    if adapter:
        return f"{adapter['repo'].split('/')[-1]}/{run.record['name']}"
    stem = Path(run.origin.rstrip("/")).stem
    return stem if stem == run.name else f"{stem}:{run.name}"


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
    if args.test_file or not has_contract(dataset):
        columns = ("id", "text", "label", "target_groups")
        rows, origin = read_own_rows(args, contract, task, dataset, args.split)
        posts = [{column: row.get(column) for column in columns} for row in rows]
        if task.prompt and contract:
            # Questions of their own are asked as they stand; another prompt asks with the post.
            own = args.prompt in (None, (contract.get("prompt") or {}).get("name"))
            for post, row in zip(posts, rows, strict=True):
                post |= {"prompt": row["prompt"]} if own and "prompt" in row else {}
        described = rows
    else:
        config = choose_config(args, contract, task)
        origin = f"{dataset.name} ({config}/{args.split})"
        posts = read_rows(dataset, config, args.split)
        described = posts if config == "unified" else read_columns(dataset, args.split, posts)
    check_posts(posts, origin)
    describe_posts(posts, described)
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


def read_own_rows(
    args: argparse.Namespace,
    contract: dict[str, Any],
    task: Task,
    dataset: Repo | None,
    split: str,
) -> tuple[list[dict[str, Any]], str]:
    """Rows of the test file, or of a dataset repo without contract.json, and where they are."""
    if args.test_file:
        rows, origin = read_jsonl(args.test_file, task.labels), args.test_file
    else:
        config = args.dataset_config or (contract.get("dataset") or {}).get("config")
        rows, config = read_plain_rows(dataset, config, split, task.labels)
        origin = f"{dataset.name} ({config}/{split})"
    fill_from_prompts(rows, task.prompt, task.labels, origin)
    return rows, origin


def choose_config(args: argparse.Namespace, contract: dict[str, Any], task: Task) -> str:
    """The dataset's config to score: the prompt's, where its questions are those of the prompt."""
    if args.dataset_config not in (None, "hatecheck"):
        return args.dataset_config
    # A dataset other than the trained one may ask another question by the same name.
    another = contract and args.dataset_repo and not args.prompt
    return task.name if task.prompt and not another else "unified"


def read_columns(dataset: Repo, split: str, posts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `unified` for the posts of another config; empty where there are none."""
    from datasets import get_dataset_config_names

    place = str(dataset.folder) if dataset.folder else dataset.name
    with hub_errors(f"list the configs of {dataset.name}"):
        if "unified" not in get_dataset_config_names(place, revision=dataset.revision):
            return [{} for _ in posts]
    rows = {str(row["id"]): row for row in read_rows(dataset, "unified", split)}
    return [rows.get(str(post["id"]), {}) for post in posts]


def read_ad_hoc_posts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The posts of --text or --input: `id`, `text` and no label. Their ids default to numbers."""
    if args.text is not None and args.text != "-":
        rows = [{"text": args.text}]
    elif args.text == "-":
        rows = [{"text": decode_posts(sys.stdin.buffer.read(), "stdin").removesuffix("\n")}]
    elif args.input == "-":
        rows = split_lines(decode_posts(sys.stdin.buffer.read(), "stdin"))
    else:
        rows = read_unlabelled(Path(args.input).expanduser(), args.text_column or "text")
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
        write_predictions(draft, task, posts, args.log_text)
        for name in ("predictions.csv", "predictions.parquet"):
            (draft / name).replace(target / name)
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
    args: argparse.Namespace,
    task: Task,
    dataset: Repo | None,
    contract: dict[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], str]:
    """The train split for the TF-IDF baseline, or no posts and the reason."""
    if dataset is None:
        return [], "there is no dataset with a train split"
    if args.split == "train" and not args.test_file:
        return [], "the scored split is the train split"
    if not has_contract(dataset):
        if args.test_file:
            return [], "the dataset has no contract.json"
        posts, origin = read_own_rows(args, contract or {}, task, dataset, "train")
        check_posts(posts, origin)
        check_labels(posts, task.labels, origin)
        return posts, ""
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
    if in_4bit and stored not in (None, "fp8"):
        fail(f"--load_in_4bit cannot quantise {base.name}: it is stored as {stored}.")
    quantization = None
    if in_4bit:
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=trained.get("bnb_4bit_quant_type") or "nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            llm_int8_skip_modules=WHOLE_MODULES,
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
    experts = has_experts(bare_model(scorer.model).config)
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


def has_experts(config: Any) -> bool:
    """Whether a model sends each token to some of several experts."""
    text = config.get_text_config(decoder=True)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(text, name, None) or 0) > 1 for name in names)


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
    # Sorting numbers is many times faster than sorting rows. A key is a cell so far and the next
    # column's value, so it stays below n times the number of values.
    of = np.zeros(len(rows), dtype=np.int64)
    for column in rows.T:
        values, kinds = np.unique(column, return_inverse=True)
        of = np.unique(of * max(1, len(values)) + kinds, return_inverse=True)[1]
    _, first, counts = np.unique(of, return_index=True, return_counts=True)
    return Cells(of, first, counts)


def intervals(
    statistic: Callable[[Any], dict[Any, Any]], counts: Any, seed: int, resamples: int = RESAMPLES
) -> dict[Any, dict[str, Any]]:
    """BCa bootstrap intervals (Efron 1987) of everything that `statistic` computes.

    `statistic` takes cell counts of shape (r, cells) and returns figures of shape (r,) by name.
    Posts are drawn with replacement; of more than `MOST_CELLS` each is drawn a Poisson number of
    times, which differs only in how many there are (Chamandy et al. 2012). All figures come from
    the same draws, so a difference of two is a paired one. Returns `value`, `low` and `high` for
    each name that has a value; both ends are None where less than nine tenths of the draws have
    the figure, or where they all agree and say nothing of how far it could move. Names that end
    in "ece" get the interval of `bias_corrected`.
    """
    import numpy as np

    counts = np.asarray(counts)
    n, size = int(counts.sum()), len(counts)
    if n == 0:
        return {}
    figures = statistic(counts[None].astype(np.float64))
    point = {name: values[0] for name, values in figures.items() if np.isfinite(values[0])}
    if not point:
        return {}
    chance, cell_of = np.random.default_rng(seed), np.repeat(np.arange(size), counts)

    def draw(rows: Any) -> Any:
        if n > MOST_CELLS:
            return chance.poisson(counts, (len(rows), size))
        drawn = cell_of[chance.integers(0, n, (len(rows), n))]
        drawn += size * np.arange(len(rows))[:, None]
        return np.bincount(drawn.ravel(), minlength=len(rows) * size).reshape(-1, size)

    def leave_one_out(rows: Any) -> Any:
        return counts - (rows[:, None] == np.arange(size))

    def compute(make: Callable[[Any], Any], rows: int) -> Any:
        """(figures, rows); a thousand rows at a time, for the memory."""
        parts = []
        for some in np.split(np.arange(rows), range(1000, rows, 1000)):
            figures = statistic(make(some).astype(np.float32))
            parts.append(np.stack([figures[name] for name in point]))
        return np.concatenate(parts, axis=1)

    values = np.array([*point.values()])
    drawn, left = compute(draw, resamples), compute(leave_one_out, size)
    biased = np.array([name[-1] == "ece" for name in point])
    ends = zip(
        bca(values, drawn, left, counts), bias_corrected(values, drawn, left, counts), strict=True
    )
    ends = [np.where(biased, corrected, end) for end, corrected in ends]
    return {
        name: {"value": float(point[name])}
        | {
            key: None if math.isnan(end) else float(end)
            for key, end in zip(("low", "high"), both, strict=True)
        }
        for name, *both in zip(point, *ends, strict=True)
    }


def jackknife(without_one: Any, counts: Any) -> tuple[Any, Any, Any]:
    """How far each post moves a figure, (k, cells); their sum of squares and its z, each (k,).

    `without_one` (k, cells) is the figure without one post of that cell, of which there are
    `counts`. z is the two-sided 95 % point of Student's t, with the degrees of freedom that the
    posts' influences have: where few posts make a figure's variance, it is itself uncertain
    (Satterthwaite 1946). For normal influences they are the number of posts.
    """
    import numpy as np
    from scipy.special import stdtrit

    weights = np.where(np.isfinite(without_one), counts, 0)
    values = np.nan_to_num(without_one)
    with np.errstate(divide="ignore", invalid="ignore"):
        n = weights.sum(1)
        mean = (weights * values).sum(1) / n
        away = np.where(weights > 0, mean[:, None] - values, 0)
        size = (weights * away**2).sum(1)
        freedom = 2 / ((weights * away**4).sum(1) / size**2 - 1 / n)
        freedom = np.where(freedom > 0, np.maximum(freedom, 2), np.inf)
    return away, size, np.where(np.isinf(freedom), NORMAL_95, stdtrit(freedom, 0.975))


def moves(point: Any, drawn: Any) -> Any:
    """(k,): whether enough of the draws have a figure, and say how far it could move."""
    import numpy as np

    known = np.isfinite(drawn)
    differ = np.where(known, drawn, -np.inf).max(1) > np.where(known, drawn, np.inf).min(1)
    return (known.sum(1) >= 0.9 * drawn.shape[1]) & differ & np.isfinite(point)


def bca(point: Any, drawn: Any, without_one: Any, counts: Any) -> tuple[Any, Any]:
    """The ends of 95 % BCa intervals, with Student's t for the normal point; nan without any.

    Shapes: `point` (k,), `drawn` (k, resamples), `without_one` and `counts` as in `jackknife`. The
    wider point makes up for small samples, where the bootstrap's intervals are too short
    (Hesterberg 2015).
    """
    import numpy as np
    from scipy.special import ndtr, ndtri

    usable = moves(point, drawn)
    drawn, value = np.sort(drawn, axis=1), point[:, None]  # nan goes last
    valid = np.isfinite(drawn).sum(1)
    away, size, reach = jackknife(without_one, counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = ((drawn < value).sum(1) + (drawn == value).sum(1) / 2) / valid
        edge = 1 / (2 * drawn.shape[1])
        bias = ndtri(np.clip(below, edge, 1 - edge))
        cubes = (np.where(np.isfinite(without_one), counts, 0) * away**3).sum(1)
        skew = np.where(size > 0, cubes / (6 * size**1.5), 0)
        rows = np.arange(len(drawn))
        ends = []
        for z in (-reach, reach):
            place = ndtr(bias + (bias + z) / (1 - skew * (bias + z))) * (valid - 1)
            place = np.nan_to_num(np.clip(place, 0, valid - 1))
            under = np.floor(place).astype(np.int64)
            over = np.minimum(under + 1, np.maximum(valid - 1, 0))
            step = place - under
            ends.append((1 - step) * drawn[rows, under] + step * drawn[rows, over])
    return tuple(np.where(usable, end, np.nan) for end in ends)


def bias_corrected(point: Any, drawn: Any, without_one: Any, counts: Any) -> tuple[Any, Any]:
    """The ends of 95 % intervals of figures that noise makes larger, such as a calibration error.

    The draws have the noise twice and so show how much there is: the middle is the figure less
    that, and the width the jackknife's. Never below 0. Shapes are those of `bca`.
    """
    import numpy as np

    _, size, reach = jackknife(without_one, counts)
    known = np.isfinite(drawn)
    mean = np.where(known, drawn, 0).sum(1) / np.maximum(known.sum(1), 1)
    half, middle = reach * np.sqrt(size), 2 * point - mean
    usable = moves(point, drawn)
    return tuple(
        np.where(usable, np.maximum(end, 0), np.nan) for end in (middle - half, middle + half)
    )


def difference_ends(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """The 95 % ends of a difference of independent rates from those of each.

    Newcombe (1998), method 10.
    """
    away = one["value"] - other["value"]
    low = away - math.hypot(one["value"] - one["low"], other["high"] - other["value"])
    return low, away + math.hypot(one["high"] - one["value"], other["value"] - other["low"])


def ratio_ends(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """The 95 % ends of a ratio of independent rates from those of each (Donner and Zou 2012)."""
    product = one["value"] * other["value"]

    def parts(mine: str, theirs: str) -> tuple[float, float, float]:
        above, below = (
            figure[end] * (2 * figure["value"] - figure[end])
            for figure, end in ((one, mine), (other, theirs))
        )
        return above, below, product + math.sqrt(max(0.0, product**2 - above * below))

    above, _, root = parts("low", "high")
    low = above / root if root else 0.0
    _, below, root = parts("high", "low")
    return low, root / below if below else math.inf


def paired_difference(both: int, only_first: int, only_second: int, neither: int) -> dict[str, Any]:
    """The first rate less the second, both over the same posts, with a 95 % interval.

    Newcombe's (1998) method 10 for paired proportions: two Wilson intervals, joined by the
    correlation phi, whose numerator is corrected for continuity where it is positive.
    """
    n = both + only_first + only_second + neither
    if n == 0:
        return number(None, 0, "no posts")
    first, second = (both + only_first) / n, (both + only_second) / n
    low, high = wilson(both + only_first, n)
    other_low, other_high = wilson(both + only_second, n)
    cross = both * neither - only_first * only_second
    if cross > 0:
        cross = max(cross - n / 2, 0)
    margins = (both + only_first) * (only_second + neither)
    margins *= (both + only_second) * (only_first + neither)
    phi = cross / math.sqrt(margins) if margins else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    difference = (only_first - only_second) / n
    return number(difference, n, "") | {
        "low": max(-1.0, difference - reach(first - low, other_high - second)),
        "high": min(1.0, difference + reach(high - first, second - other_low)),
    }


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


def auc(high: Any, low: Any, order: Any) -> Any:
    """Area under the ROC curve, (r,), of two sides' counts (r, h) and (r, l); nan if one is empty.

    `order` (h, l) is the `pair_order` of the two sides' scores.
    """
    import numpy as np

    pairs = high.sum(1, dtype=np.float64) * low.sum(1, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return ((high @ order) * low).sum(1, dtype=np.float64) / pairs


def average_precision(high: Any, low: Any, scores: Any, low_scores: Any) -> Any:
    """Mean precision over the positive posts by falling score, (r,); nan without any.

    `high` (r, h) and `low` (r, l) count the posts with the positive label and the others; the
    scores are (h,) and (l,). Equal scores are taken together.
    """
    import numpy as np

    hits = high @ (scores[:, None] >= scores).astype(high.dtype)
    wrong = low @ (low_scores[:, None] >= scores).astype(low.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(high > 0, hits / (hits + wrong), 0)
        return (high * precision).sum(1, dtype=np.float64) / high.sum(1, dtype=np.float64)


def rank_posts(truth: Any, scores: Any) -> tuple[float, float]:
    """Area under the ROC curve and average precision of posts (n,); nan where undefined.

    What scikit-learn's functions return, with one sort for both.
    """
    import numpy as np

    order = np.argsort(-scores, kind="stable")
    # Equal scores are taken together.
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) if len(order) else order
    hits = np.cumsum(truth[order], dtype=np.float64)[last]
    wrong = last + 1 - hits
    gained = np.diff(hits, prepend=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        area = (np.diff(wrong, prepend=0) * (hits - gained / 2)).sum() / (
            truth.sum() * (len(truth) - truth.sum(dtype=np.float64))
        )
        return float(area), float((gained * hits / (last + 1)).sum() / np.float64(truth.sum()))


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
    give every post the same answer and score.
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
        return [
            name
            for name, answers in self.predicted.items()
            if any(
                len(values) and (values != values[0]).any()
                for values in (answers, self.scores[name])
                if values is not None
            )
        ]

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
        np.array([numbers[label] for label in truth], dtype=np.int64),
        masks,
        {
            one.strategy: np.array([numbers.get(label, -1) for label in one.predicted], dtype=int)
            for one in answered
        },
        {one.strategy: None if one.scores is None else np.array(one.scores) for one in answered},
    )


def build_figures(sample: Sample, strategy: str, posts: Any, decided: Any = None) -> dict[str, Any]:
    """Counts and figures of one strategy over some posts (n,), the positive label against the rest.

    Answers without label are left out of the rates and counted, unless `decided` (n,) gives
    labels for them; figures of scores are over all posts, which have one each. F1 is
    2 TP / (2 TP + FP + FN); a figure over labels is undefined where a label has no post.
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
        f"f1_{positive}": dice(tp, fp + fn, f"no {positive} posts and none predicted", n)
        | {"least": tp + fn},
        "balanced_accuracy": number(figures["balanced_accuracy"], n, over_labels),
        "f1_macro": number(figures["f1_macro"], n, over_labels),
        "f1_weighted": number(figures["f1_weighted"], n, "no posts"),
        "mcc": number(figures["mcc"], n, f"{over_labels}, or one label only is predicted"),
        **score_figures(sample, sample.scores[strategy], posts),
    }


def build_per_label(sample: Sample, strategy: str) -> dict[str, Any]:
    """Precision, recall and F1 of each label against all others, over the parsed answers."""
    import numpy as np

    answers = sample.predicted[strategy]
    found = {}
    for index, label in enumerate(sample.labels):
        truth, said = sample.truth[answers >= 0] == index, answers[answers >= 0] == index
        hits = int(np.sum(truth & said))
        found[label] = {
            "n": int(truth.sum()),
            "precision": share(hits, int(said.sum()), "none predicted"),
            "recall": share(hits, int(truth.sum()), f"no {label} posts"),
            "f1": dice(
                hits,
                int(truth.sum() + said.sum()) - 2 * hits,
                f"no {label} posts and none predicted",
                len(truth),
            ),
        }
    return found


def name_of_negative(labels: list[str], positive: str) -> str:
    """What a post is that does not have the positive label."""
    others = [label for label in labels if label != positive]
    return others[0] if len(others) == 1 else f"not {positive}"


def score_figures(sample: Sample, scores: Any, posts: Any) -> dict[str, Any]:
    """AUROC, average precision, Brier score and calibration error of p over some posts (n,)."""
    import numpy as np

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
    area, precision = rank_posts(truth, p)
    error = calibration_error(np.ones((1, n)), p, truth, equal_mass_bins(p))[0]
    reason = f"no {positive} posts"
    if hits == n:
        reason = f"no {name_of_negative(sample.labels, positive)} posts"
    return {
        "roc_auc": number(area, n, reason) | {"least": min(hits, n - hits)},
        "average_precision": number(precision, n, reason),
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


def has_enough(sample: Sample, group: str, key: str) -> bool:
    """Whether both sides of a group's AUC have the least number of posts."""
    inside, positive = sample.members[group], sample.positives
    high, low = {
        "roc_auc": (positive & inside, ~positive & inside),
        "bpsn_auc": (positive & ~inside, ~positive & inside),
        "bnsp_auc": (positive & inside, ~positive & ~inside),
    }[key]
    return min(high.sum(), low.sum()) >= MIN_DENOMINATOR


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
    overall["per_label"] = build_per_label(sample, name)
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
                if figure["low"] is not None and key != "mcc":
                    figure["low"], figure["high"] = (
                        max(0.0, figure["low"]),
                        min(1.0, figure["high"]),
                    )
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
        "bias": build_bias(sample, name, overall, groups, ranked, seed)
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
        entry["gaps"][rate] = build_gap(rate, overall, groups, enough, left_out)
    adjusted, group_adjusted = holm(gap_p), holm(group_p)
    for rate, gap in entry["gaps"].items():
        gap["max_min"] |= {"p": gap_p.get(rate), "p_holm": adjusted.get(rate)}
        found = rate in gap_p and adjusted[rate] < 0.05
        gap["significant"] = found if rate in gap_p else None
        if rate in gap_p and not found:
            gap["max_min"]["low"] = 0.0
            if gap["min_max_ratio"]["value"] is not None:
                gap["min_max_ratio"]["high"] = 1.0
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
        entry[key] = widest_gap([[groups[group][rate] for group in enough] for rate in rates])
        if len(enough) > 1:
            entry[key]["p"] = difference_p(sample, name, rates, enough, seed)
            if entry[key]["p"] >= 0.05:
                entry[key]["low"] = 0.0
        entry[key]["left_out"] = [group for group in sample.groups if group not in enough]
    for key in ("roc_auc", "bpsn_auc", "bnsp_auc"):
        values = [
            groups[group][key]["value"] if has_enough(sample, group, key) else None
            for group in sample.groups
        ]
        known = [value for value in values if value is not None]
        value = float(power_mean(known)) if known else None
        entry["power_means"][key] = number(value, len(known), NO_AUC) | {
            "left_out": [
                group for group, value in zip(sample.groups, values, strict=True) if value is None
            ]
        }
        add_interval(entry["power_means"][key], ranked.get((name, "mean", key), {"low": None}))
    return entry


def difference_p(
    sample: Sample, name: str, rates: tuple[str, ...], enough: list[str], seed: int
) -> float:
    """Permutation p-value of the largest difference of some rates, corrected for their number."""
    answers = sample.predicted[name]
    flagged, parsed = answers == sample.positive, answers >= 0
    tested = error_posts(sample, name) | {"flag_rate": (flagged, parsed)}
    members, compared = stack_members(sample, enough), [*range(len(enough))]
    p_values = []
    for rate in rates:
        error, posts = tested[rate]
        p_values.append(permute_groups(error[posts], members[posts], compared, seed)[0])
    return min(1.0, len(rates) * min(p_values))


NO_ERROR = "no group has such an error"
NO_AUC = f"no group has {MIN_DENOMINATOR} posts on both sides"
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


def widest_gap(rates: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The largest difference between groups in any of some rates, each given for every group.

    One pair of groups truly differs most, so the largest upper end of the pairs' intervals bounds
    the true difference; the largest lower end does once a test says that there is a difference,
    and is 0 otherwise. A post of two groups counts in both, which widens the interval.
    """
    pairs = [pair for some in rates for pair in itertools.permutations(some, 2)]
    if not pairs:
        return number(None, len(rates[0]), TOO_FEW_GROUPS)
    figure = number(max(one["value"] - other["value"] for one, other in pairs), len(rates[0]), "")
    ends = [difference_ends(*pair) for pair in pairs]
    lows, highs = zip(*ends, strict=True)
    return figure | {"low": max(0.0, *lows), "high": min(1.0, max(highs))}


def build_gap(
    rate: str,
    overall: dict[str, Any],
    groups: dict[str, Any],
    enough: list[str],
    left_out: list[str],
) -> dict[str, Any]:
    """One rate's gap: largest difference, and each group against all posts and the others."""
    widest = widest_gap([[groups[group][rate] for group in enough]])
    some = {group: groups[group][rate] for group in enough}
    values = [figure["value"] for figure in some.values()]
    ratio, reason = None, TOO_FEW_GROUPS
    if len(enough) > 1:
        ratio, reason = (min(values) / max(values) if max(values) else None), NO_ERROR
    lowest_ratio = number(ratio, len(enough), reason)
    if ratio is not None:
        ends = [ratio_ends(*pair) for pair in itertools.permutations(some.values(), 2)]
        for key, side in zip(("low", "high"), zip(*ends, strict=True), strict=True):
            lowest_ratio[key] = min(1.0, *side)
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
    away = number(errors / n - others / rest, n, "")
    away["low"], away["high"] = difference_ends(share(errors, n, ""), share(others, rest, ""))
    part = rest / (n + rest)
    whole = {key: part * away[key] for key in ("value", "low", "high")}
    return {"vs_overall": away | whole, "vs_rest": away}


# Of the figures over all posts, those without a formula for their interval.
RESAMPLED = ("balanced_accuracy", "f1_macro", "f1_weighted", "mcc")
# Of the differences of two strategies, those that are no differences of rates of the same posts.
RESAMPLED_DIFFERENCES = ("balanced_accuracy", "f1", "precision", "mcc")
# What two strategies are compared by.
COMPARED = ("accuracy", "balanced_accuracy", "f1", "precision", "recall", "mcc")
COMPARED_IN_GROUPS = ("accuracy", "f1", "false_positive_rate", "false_negative_rate")


def count_intervals(sample: Sample, pairs: list[tuple[str, str]], seed: int) -> dict[Any, Any]:
    """Intervals of everything that is counted, from one set of resamples of the posts.

    Names: (strategy, "overall", figure); and for each of `pairs` (first, second, place, figure),
    the first's figure less the second's.
    """
    import numpy as np

    forms = {(name, False): answers for name, answers in sample.predicted.items()}
    unparsed = {name for pair in pairs for name in pair if (sample.predicted[name] < 0).any()}
    forms |= {(name, True): sample.decided(name) for name in sorted(unparsed)}
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
    form_of = {(name, True): form_of[name, False] for name in sample.predicted} | form_of

    def statistic(counts: Any) -> dict[Any, Any]:
        tables = (counts @ design).reshape(len(counts), *shape)
        figures = count_figures(tables, sample.positive)
        found: dict[Any, Any] = {}
        for name in sample.predicted:
            form = form_of[name, False]
            for key in RESAMPLED:
                found[name, "overall", key] = figures[key][:, form, 0]
        for first, second in pairs:
            one, other = form_of[first, True], form_of[second, True]
            for place in ("overall", *sample.members):
                at = place_of[place]
                for key in ("f1",) if at else RESAMPLED_DIFFERENCES:
                    values = figures[key]
                    found[first, second, place, key] = values[:, one, at] - values[:, other, at]
        return found

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
    exact = {name: score_values(sample, name) for pair in pairs for name in pair}
    for first, second in pairs:
        levels = max(4, int(math.sqrt(MOST_CELLS / 2 / 2 ** min(len(sample.groups), 3))))
        both = rank_some(sample, [first, second], [(first, second)], levels, seed)
        for key, figure in both.items():
            if len(key) == 4:
                away = exact[first][key[2:]] - exact[second][key[2:]]
                found[key] = number(away, 0, "")
                add_interval(found[key], figure)
    return found


def score_values(sample: Sample, name: str) -> dict[tuple[str, str], Any]:
    """A strategy's figures of scores that differences are made of, by place and figure."""
    import numpy as np

    scores = sample.scores[name]
    overall = score_figures(sample, scores, np.ones(len(scores), dtype=bool))
    found = {("overall", key): figure["value"] for key, figure in overall.items()}
    for group, posts in sample.members.items():
        found[group, "roc_auc"] = score_figures(sample, scores, posts)["roc_auc"]["value"]
        for key, figure in group_auc(sample, name, group).items():
            found[group, key] = figure["value"]
    return found


def rank_some(
    sample: Sample,
    strategies: list[str],
    pairs: list[tuple[str, str]],
    levels: int | None,
    seed: int,
) -> dict[Any, dict[str, Any]]:
    """`rank_intervals` of some strategies, drawn together; without `levels` score by score."""
    import numpy as np

    if not strategies:
        return {}
    ranks, scores = {}, {}
    for name in strategies:
        own = sample.scores[name]
        rank = equal_mass_bins(own, levels) if levels else np.unique(own, return_inverse=True)[1]
        ranks[name] = rank
        scores[name] = (np.bincount(rank, own) / np.maximum(np.bincount(rank), 1))[rank]
    members = stack_members(sample, list(sample.members))
    cells = build_cells(sample.positives, members, *ranks.values())
    positive = sample.positives[cells.first]
    everything = np.ones(len(positive), dtype=bool)
    places = {"overall": everything}
    places |= dict(zip(sample.members, members[cells.first].T, strict=True))
    # Of each place the posts inside (True) and outside, with the positive label (True) and without.
    masks = {
        (place, within, label): (posts == within) & (positive == label)
        for place, posts in places.items()
        for within in (True, False)
        for label in (True, False)
    }
    sides: dict[tuple[str, str], tuple[Any, Any]] = {}
    for place in places:
        sides[place, "roc_auc"] = (place, True, True), (place, True, False)
        if place in sample.groups:
            sides[place, "bpsn_auc"] = (place, False, True), (place, True, False)
            sides[place, "bnsp_auc"] = (place, True, True), (place, False, False)
    sides = {key: side for key, side in sides.items() if all(masks[one].any() for one in side)}
    used = dict.fromkeys(one for side in sides.values() for one in side)
    used |= dict.fromkeys((("overall", True, True), ("overall", True, False)))
    inside = np.stack([*places.values()], axis=1).astype(np.float64)
    calibration = {name: calibration_design(sample, cells, scores[name]) for name in strategies}
    # What the sides are counted by: without levels the cells themselves, else the levels. Posts
    # of one label and the same groups are on the same sides.
    alike = build_cells(positive, members[cells.first])
    side_of = np.stack([masks[mask][alike.first] for mask in used]).astype(np.float32)
    rank_of: dict[Any, Any] = {}
    in_grid: dict[str, tuple[Any, Any, Any, int]] = {}
    for name in strategies:
        own = ranks[name][cells.first]
        size = int(own.max()) + 1
        for mask in used:
            rank_of[name, mask] = np.arange(size) if levels else own[masks[mask]]
        place = alike.of * size + own
        sorted_ = np.argsort(place, kind="stable")
        starts = np.flatnonzero(np.diff(place[sorted_], prepend=-1))
        in_grid[name] = sorted_, starts, place[sorted_][starts], size
    order = {
        (name, side): pair_order(rank_of[name, side[0]], rank_of[name, side[1]])
        for name in strategies
        for side in sides.values()
    }
    at = {mask: np.flatnonzero(masks[mask]) for mask in used}

    def statistic(counts: Any) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        sizes = counts @ inside
        split = {mask: np.take(counts, posts, axis=1) for mask, posts in at.items() if not levels}
        for name in strategies:
            if levels:
                sorted_, starts, at_place, size = in_grid[name]
                grid = np.zeros((len(counts), len(alike.counts) * size), dtype=counts.dtype)
                grid[:, at_place] = np.add.reduceat(counts[:, sorted_], starts, axis=1)
                counted = side_of @ grid.reshape(len(counts), -1, size)
                split = {mask: counted[:, index] for index, mask in enumerate(used)}
            for (place, key), side in sides.items():
                pair = split[side[0]], split[side[1]]
                found[name, place, key] = auc(*pair, order[name, side])
            both = ("overall", True, True), ("overall", True, False)
            found[name, "overall", "average_precision"] = average_precision(
                *(split[mask] for mask in both), *(rank_of[name, mask] for mask in both)
            )
            inner, squared = calibration[name]
            found[name, "overall", "brier"] = counts @ squared / sizes[:, 0]
            away = np.abs(counts @ inner).reshape(len(counts), len(places), -1).sum(-1)
            with np.errstate(divide="ignore", invalid="ignore"):
                away /= sizes
            for index, place in enumerate(places):
                found[name, place, "ece"] = away[:, index]
            for key in ("roc_auc", "bpsn_auc", "bnsp_auc"):
                each = [
                    found[name, group, key]
                    for group in sample.groups
                    if (group, key) in sides and has_enough(sample, group, key)
                ]
                if each:
                    found[name, "mean", key] = power_mean(each)
        for first, second in pairs:
            for place, key in (*sides, ("overall", "average_precision"), ("overall", "brier")):
                away = found[first, place, key] - found[second, place, key]
                found[first, second, place, key] = away
        return found

    return intervals(statistic, cells.counts, seed)


def calibration_design(sample: Sample, cells: Cells, scores: Any) -> tuple[Any, Any]:
    """What cell counts are multiplied by for calibration and Brier score; `scores` are (n,).

    (cells, places * bins): a cell's label less its score, in its bin of each place that it is in;
    and (cells,): its mean squared error.
    """
    import numpy as np

    positives = sample.positives.astype(np.float64)
    bins = []
    for posts in (np.ones(len(scores), dtype=bool), *sample.members.values()):
        bin_of = np.full(len(scores), -1)
        bin_of[posts] = equal_mass_bins(scores[posts])
        bins.append(bin_of[cells.first])
    width = max(1, max(int(one.max()) for one in bins) + 1)
    chosen = np.concatenate([one[:, None] == np.arange(width) for one in bins], axis=1)
    away = np.bincount(cells.of, positives - scores) / cells.counts
    squared = np.bincount(cells.of, (positives - scores) ** 2) / cells.counts
    return chosen * away[:, None], squared


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
    import numpy as np

    n, positive = len(sample.truth), sample.positives
    one, other = sample.decided(first), sample.decided(second)
    # Among posts of one label, being right or wrong is what its error rate counts.
    right, also = one == sample.truth, other == sample.truth
    flags = {
        "false_positive_rate": (~positive, one != sample.positive, other != sample.positive),
        "false_negative_rate": (positive, one == sample.positive, other == sample.positive),
    }

    everything = np.ones(n, dtype=bool)
    paired = {
        "accuracy": (everything, right, also),
        "recall": (positive, one == sample.positive, other == sample.positive),
        **{rate: (posts, ~fine, ~also_fine) for rate, (posts, fine, also_fine) in flags.items()},
    }

    def difference(place: str, key: str, size: int) -> dict[str, Any]:
        if key in paired:
            counts_for, first_side, second_side = paired[key]
            some = counts_for & sample.members.get(place, everything)
            kinds = np.bincount(2 * ~first_side[some] + ~second_side[some], minlength=4)
            return paired_difference(*map(int, kinds))
        found = counted.get((first, second, place, key)) or ranked.get((first, second, place, key))
        if not found:
            outside = place == NO_TARGET and key in ("bpsn_auc", "bnsp_auc")
            reason = "not a target group" if outside else "one of the two has none"
            if not outside and {first, second} - {*sample.varied}:
                reason = "one of the two gives every post the same answer"
            return number(None, size, reason)
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
    args: argparse.Namespace,
    task: Task,
    posts: list[dict[str, Any]],
    strategies: list[Answers],
    probes: Probes | None = None,
    profile: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], Sample]:
    """Everything that metrics.json holds, and the arrays that it was computed from.

    Figures of each strategy over all posts and per group, gaps between groups, the differences of
    the first strategy, the model, from all others, and what else was asked of the model.
    """
    strategies = with_own_names(strategies)
    truth = [post["label"] for post in posts]
    members = group_members(posts, task.groups)
    sample = build_sample(task.labels, task.positive, truth, members, strategies)
    model, *others = sample.predicted
    pairs = [(model, other) for other in others]
    counted = count_intervals(sample, pairs, args.seed)
    ranked = rank_intervals(sample, pairs, args.seed)
    columns = [*dict.fromkeys(["source", "length", "agreement", *(args.slice_by or [])])]
    check_columns_there(posts, args.slice_by or [])
    binary = len(task.labels) == 2
    metrics = {
        "schema": SCHEMA,
        "labels": task.labels,
        "positive_label": task.positive,
        "negative": task.negative,
        "threshold": args.threshold if binary else None,
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
        "slices": build_slices(sample, posts, columns),
        "prevalence": build_prevalence(sample, model, args.prevalence),
        "offensive_rules": build_offensive_rules(sample, posts),
        "people": build_people(sample, posts, args.seed),
        "sweep": None if sample.scores[model] is None or not binary else build_sweep(sample, model),
    }
    metrics["profile"] = profile and build_loads(sample, model, profile)
    metrics |= report_probes(args, task, posts, members, probes)
    correct_for_rivals(metrics["comparisons"])
    metrics["gates"] = judge(metrics, expand_requirements(args.require or [], metrics), args.strict)
    return metrics, sample


def build_loads(sample: Sample, strategy: str, profile: dict[str, Any]) -> dict[str, Any]:
    """How many posts the profile allows, gives to people, and acts on: of all and per group."""
    import numpy as np

    scores = sample.scores[strategy]
    act = math.inf if profile["act"] is None else profile["act"]
    review = act if profile["review"] is None else profile["review"]
    parts = {"allow": scores < review, "review": (scores >= review) & (scores < act)}
    parts["act"] = scores >= act
    places = {"overall": np.ones(len(scores), dtype=bool), **sample.members}
    cuts = {key: profile[key] for key in ("name", "temperature", "threshold", "review", "act")}
    return cuts | {
        "places": {
            place: {
                part: share(int((some & posts).sum()), int(posts.sum()), "no posts")
                for part, some in parts.items()
            }
            for place, posts in places.items()
            if posts.any()
        }
    }


def correct_for_rivals(comparisons: list[dict[str, Any]]) -> None:
    """Correct the p-values of the differences over all posts for the number of rivals (Holm).

    That of F1 comes from its interval, as if it were a normal one.
    """
    from scipy.special import ndtr

    for one in comparisons:
        away = one["overall"]["f1"]
        if away["low"] is not None and away["high"] > away["low"]:
            z = abs(away["value"]) * 2 * NORMAL_95 / (away["high"] - away["low"])
            away["p"] = float(2 * ndtr(-z))
    for key in ("accuracy", "f1"):
        figures = [one["overall"][key] for one in comparisons]
        known = {index: figure["p"] for index, figure in enumerate(figures) if "p" in figure}
        for index, p in holm(known).items():
            figures[index]["p_holm"] = p


def with_own_names(strategies: list[Answers]) -> list[Answers]:
    """The strategies, where two have the same name the later one with a number."""
    seen: Counter[str] = Counter()
    named = []
    for one in strategies:
        seen[one.strategy] += 1
        count = seen[one.strategy]
        named.append(one if count == 1 else replace(one, strategy=f"{one.strategy} {count}"))
    return named


def check_columns_there(posts: list[dict[str, Any]], names: list[str]) -> None:
    """End on a --slice_by column that no post has."""
    there = sorted({name for post in posts for name in post["columns"]})
    for name in names:
        if name not in there:
            fail(
                f"--slice_by {name}: the posts have no such column. There are: {', '.join(there)}."
            )
        values = {str(post["columns"].get(name, "")) for post in posts}
        if len(values) > MOST_SLICES:
            fail(
                f"--slice_by {name}: it has {len(values)} values, and {MOST_SLICES} at most make "
                "slices. Name a column of kinds."
            )


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
class Answered:
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


def read_runs(argument: str, eval_name: str, options: dict[str, Any]) -> list[Answered]:
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
        except (ArrowException, OSError, UnicodeDecodeError) as error:
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
    # Half of a surrogate pair can be escaped in JSON, and written nowhere.
    if re.search(r"\\u[dD][89a-fA-F]", content):
        try:
            json.dumps(rows, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            fail(f"{file} is no valid Unicode: {error}")
    return rows


def runs_of_rows(
    rows: list[dict[str, Any]],
    origin: str,
    name: str,
    record: dict[str, Any],
    options: dict[str, Any],
) -> list[Answered]:
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
) -> Answered:
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
    lacking = scores.count(None)
    if 0 < lacking < len(scores):
        print(
            f"{origin}: {lacking} of {len(scores)} rows of {strategy} have no score; figures of "
            "scores are left out",
            flush=True,
        )
    if column["prediction"] and not any(predicted):
        seen = sorted({visible(repr(row.get(column["prediction"]))) for row in rows})
        fail(f"{origin}: no prediction is one of {', '.join(labels)}; there are {seen[:5]}.")
    used = {name for name in column.values() if name}
    further = [name for name in dict.fromkeys(key for row in rows for key in row)]
    ids = [str(row.get(column["id"])) if column["id"] else str(n) for n, row in enumerate(rows, 1)]
    return Answered(
        name=strategy,
        origin=origin,
        labels=labels,
        positive=positive,
        ids=[plain_cell(name) for name in ids],
        truth=truth,
        predicted=predicted,
        scores=None if None in scores else scores,
        groups=[
            groups_in_cell(row.get(column["group"])) if column["group"] else [] for row in rows
        ],
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
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= 1:
        fail(f"{origin}: row {number_} has the score {visible(repr(value))}; it must be 0 to 1.")
    return score


def groups_in_cell(value: Any) -> list[str]:
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


# --- behaviour -------------------------------------------------------------------------------

EVASIONS = ("leet", "spacing", "homoglyphs", "zero_width", "elongation")
# Of the words that a perturbation can change it changes this share, rounded up: the post stays
# readable, as it must for those who evade a filter to be understood.
EVASION_SHARE = 0.5
LEET = str.maketrans("aeiostAEIOST", "431057431057")
# Cyrillic letters that look like the Latin ones.
HOMOGLYPHS = str.maketrans(
    "aceiopxyABCEHKMOPTX",
    "\u0430\u0441\u0435\u0456\u043e\u0440\u0445\u0443"
    "\u0410\u0412\u0421\u0415\u041d\u041a\u041c\u041e\u0420\u0422\u0425",
)
ZERO_WIDTH = "\u200b"
# Links, e-mail addresses, mentions, hashtags, placeholders such as <user> and [URL], HTML entities.
PROTECTED = (
    r"(?<![\w+.-])\w[\w+.-]*://\S+|https?://\S+|www\.\S+|(?<![\w.-])[\w-]+(?:\.[\w-]+)+/\S*|"
    r"(?<![\w.+-])[\w.+-]*@\w[\w.-]*|[@#]\w+|<[^<>\s]{1,40}>|\[\w{2,20}\]|&\#?\w+;"
)
WORDS = re.compile(rf"{PROTECTED}|(?P<word>[^\W\d_]{{3,}})")


def evade_word(word: str, kind: str) -> str:
    """One word as somebody writes it who evades a filter; the same where the kind cannot act."""
    if kind == "leet":
        return word.translate(LEET)
    if kind == "homoglyphs":
        return word.translate(HOMOGLYPHS)
    if kind == "elongation":
        return re.sub("[aeiouAEIOU]", lambda vowel: vowel[0] * 3, word, count=1)
    return (" " if kind == "spacing" else ZERO_WIDTH).join(word)


def perturb(text: str, kind: str, seed: int) -> str | None:
    """The text with half of its words changed in one of the ways of EVASIONS; None without any.

    Words are runs of three letters or more. Leet writes digits for a e i o s t, spacing and
    zero_width put a space or U+200B between all letters, homoglyphs put Cyrillic for Latin
    letters, elongation writes the first vowel three times. Links, mentions, hashtags and
    placeholders stay. The words are drawn from seed, kind and text: a post's result does not
    depend on the posts beside it.
    """
    changed = {}
    for match in WORDS.finditer(text):
        word = match["word"]
        if word and (other := evade_word(word, kind)) != word:
            changed[match.start()] = (match.end(), other)
    if not changed:
        return None
    # In ASCII: a lone surrogate has no UTF-8, and a seed is hashed as bytes.
    draw = random.Random(f"{seed} {kind} {text!a}")
    chosen = draw.sample(sorted(changed), math.ceil(EVASION_SHARE * len(changed)))
    parts, place = [], 0
    for start in sorted(chosen):
        end, other = changed[start]
        parts += [text[place:start], other]
        place = end
    return "".join([*parts, text[place:]])


def build_perturbed(
    posts: list[dict[str, Any]], positive: str, seed: int
) -> list[tuple[str, int, str]]:
    """(kind, index of the post, text) of each positive post in each way that changes it."""
    found = []
    for kind in EVASIONS:
        for index, post in enumerate(posts):
            if post["label"] == positive:
                text = perturb(post["text"], kind, seed)
                if text is not None:
                    found.append((kind, index, text))
    return found


def mean_change(changes: list[float], empty: str) -> dict[str, Any]:
    """The mean of paired changes of p with its 95 % t interval; without one where all agree."""
    from scipy.special import stdtrit

    n = len(changes)
    if n == 0:
        return number(None, 0, empty)
    mean = math.fsum(changes) / n
    figure = number(mean, n, "")
    if max(changes) > min(changes):
        variance = math.fsum((change - mean) ** 2 for change in changes) / (n - 1)
        half = float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n)
        figure |= {"low": max(-1.0, mean - half), "high": min(1.0, mean + half)}
    return figure


def evasion_figures(pairs: list[tuple[float, float]], threshold: float) -> dict[str, Any]:
    """Recall before and after of positive posts, given as (p before, p after)."""
    counts = Counter((before >= threshold, after >= threshold) for before, after in pairs)
    both, lost, won = counts[True, True], counts[True, False], counts[False, True]
    n = len(pairs)
    return {
        "n": n,
        "recall_before": share(both + lost, n, "no posts that can be changed"),
        "recall_after": share(both + won, n, "no posts that can be changed"),
        "recall_lost": paired_difference(both, lost, won, n - both - lost - won),
        "p": mcnemar(lost, won) if n else None,
        "mean_change": mean_change([after - before for before, after in pairs], "no posts"),
    }


def build_evasion(
    posts: list[dict[str, Any]],
    members: dict[str, list[int]],
    positive: str,
    p: list[float],
    perturbed: list[tuple[str, int, str]],
    p_perturbed: list[float],
    threshold: float,
) -> dict[str, Any]:
    """What each way of evading costs in recall, overall and per group.

    `p` belongs to `posts`, `p_perturbed` to `perturbed` (see `build_perturbed`); a post counts as
    found where p reaches the threshold. Recall before and after is that of the same posts: those
    of the positive label that the kind can change; `n_unchanged` are the others. `p_holm` is
    McNemar's exact p-value, corrected for the kinds, and in groups for kinds and groups.
    """
    n_positive = sum(post["label"] == positive for post in posts)
    result: dict[str, Any] = {
        "reason": None if n_positive else f"no {positive} posts",
        "share": EVASION_SHARE,
        "threshold": threshold,
        "n_positive": n_positive,
        "kinds": {},
    }
    if not n_positive:
        return result
    pairs: dict[str, dict[int, tuple[float, float]]] = {kind: {} for kind in EVASIONS}
    for (kind, index, _), after in zip(perturbed, p_perturbed, strict=True):
        pairs[kind][index] = (p[index], after)
    in_groups = {}
    for kind, found in pairs.items():
        groups, left_out = {}, {}
        for group, indices in members.items():
            inside = [found[index] for index in indices if index in found]
            if len(inside) < MIN_DENOMINATOR:
                left_out[group] = len(inside)
            else:
                groups[group] = evasion_figures(inside, threshold)
                in_groups[kind, group] = groups[group]
        result["kinds"][kind] = evasion_figures([*found.values()], threshold) | {
            "n_unchanged": n_positive - len(found),
            "groups": groups,
            "left_out": left_out,
        }
    for family in (result["kinds"], in_groups):
        p_values = {name: one["p"] for name, one in family.items() if one["p"] is not None}
        adjusted = holm(p_values)
        for name, one in family.items():
            one["p_holm"] = adjusted.get(name)
    return result


# The columns that make a post a functional test (Röttger et al. 2021, HateCheck).
FUNCTIONAL_COLUMNS = ("functionality", "target_ident")


def build_functional(
    posts: list[dict[str, Any]],
    positive: str,
    negative: str,
    predicted: list[str | None],
    p: list[float] | None,
) -> dict[str, Any]:
    """Accuracy per functionality and target identity, positive and other cases apart.

    Rows stand in the order of the suite (their first case_id), cells only where there is a case;
    a case aimed at nobody stands under NO_TARGET. A case is right where positive is answered to a
    positive one, or anything else to another; an answer without label is wrong.
    """
    result: dict[str, Any] = {"reason": None, "identities": [], "sides": [], "contrasts": None}
    missing = [column for column in FUNCTIONAL_COLUMNS if not any(column in one for one in posts)]
    if missing:
        return result | {"reason": f"the posts have no column {', '.join(missing)}"}
    cases = [index for index, post in enumerate(posts) if post.get("functionality")]
    if not cases:
        return result | {"reason": "no post names a functionality"}
    right = [
        answer is not None and (answer == positive) == (post["label"] == positive)
        for post, answer in zip(posts, predicted, strict=True)
    ]
    identity = [post.get("target_ident") or NO_TARGET for post in posts]
    known = {identity[index] for index in cases}
    names = sorted(known - {NO_TARGET}) + [NO_TARGET] * (NO_TARGET in known)

    def rate(indices: list[int]) -> dict[str, Any]:
        return share(sum(right[index] for index in indices), len(indices), "no cases")

    def by_identity(indices: list[int]) -> dict[str, Any]:
        parts: dict[str, list[int]] = {name: [] for name in names}
        for index in indices:
            parts[identity[index]].append(index)
        return {name: rate(part) for name, part in parts.items() if part}

    for side, label, wanted in (("hateful", positive, True), ("non_hateful", negative, False)):
        own = [index for index in cases if (posts[index]["label"] == positive) == wanted]
        rows: dict[str, list[int]] = {}
        for index in sorted(own, key=lambda index: case_order(posts[index])):
            rows.setdefault(posts[index]["functionality"], []).append(index)
        result["sides"].append(
            {
                "side": side,
                "label": label,
                "accuracy": rate(own),
                "identities": by_identity(own),
                "rows": [
                    {"functionality": name, "accuracy": rate(part), "cells": by_identity(part)}
                    for name, part in rows.items()
                ],
            }
        )
    return result | {
        "identities": names,
        "n": len(cases),
        "n_left_out": len(posts) - len(cases),
        "n_unparsed": sum(predicted[index] is None for index in cases),
        "contrasts": build_contrasts(posts, positive, right, p),
    }


def case_order(post: dict[str, Any]) -> tuple[int, int, str]:
    """Where a case stands in its suite: by number, else by functionality."""
    case = str(post.get("case_id") or "")
    number_ = int(case) if case.isdecimal() else None
    return (number_ is None, number_ or 0, post["functionality"])


def find_contrasts(
    posts: list[dict[str, Any]], positive: str
) -> tuple[list[tuple[int, int]], list[int]]:
    """Pairs (positive, other) of cases that differ little, and the other cases without a twin.

    A case names its twin in ref_case_id; where that is absent, the twin is the case of the
    template ref_templ_id about the same identity. A link to a case of the same label is no
    contrast.
    """
    by_case, by_template = {}, {}
    for index, post in enumerate(posts):
        side = post["label"] == positive
        if post.get("case_id"):
            by_case[post["case_id"]] = index
        if post.get("templ_id"):
            key = (post["templ_id"], post.get("target_ident") or "", side)
            by_template.setdefault(key, index)
    pairs: dict[tuple[int, int], None] = {}
    alone = []
    for index, post in enumerate(posts):
        side = post["label"] == positive
        twin = by_case.get(post.get("ref_case_id") or None)
        template = post.get("ref_templ_id")
        if twin is None and template:
            twin = by_template.get((template, post.get("target_ident") or "", not side))
        if twin is not None and (posts[twin]["label"] == positive) != side:
            pairs[(index, twin) if side else (twin, index)] = None
        elif not side and (post.get("ref_case_id") or template):
            alone.append(index)
    return [*pairs], alone


def build_contrasts(
    posts: list[dict[str, Any]], positive: str, right: list[bool], p: list[float] | None
) -> dict[str, Any]:
    """How often a case and its minimal opposite are both right, and told apart by p.

    `told_apart` is the share of pairs whose positive case has the higher p, whatever the
    threshold; equal ones are not told apart. Several cases may share one twin (`n_twins` are
    different), so the pairs are a little less than independent and the intervals a little narrow.
    """
    pairs, alone = find_contrasts(posts, positive)
    reason = None if pairs else "no case names a case of the other label that is here"

    def figures(chosen: list[tuple[int, int]]) -> dict[str, Any]:
        outcomes = Counter((right[hate], right[other]) for hate, other in chosen)
        apart = share(0, 0, "answers without probability")
        if p is not None:
            apart = share(
                sum(p[hate] > p[other] for hate, other in chosen), len(chosen), "no pairs"
            )
        return {
            "n": len(chosen),
            "both_right": share(outcomes[True, True], len(chosen), "no pairs"),
            "told_apart": apart,
            "n_both_flagged": outcomes[True, False],
            "n_neither_flagged": outcomes[False, True],
            "n_reversed": outcomes[False, False],
            "n_equal": None if p is None else sum(p[hate] == p[other] for hate, other in chosen),
        }

    parts: dict[str, dict[str, list[tuple[int, int]]]] = {"identities": {}, "functionalities": {}}
    for pair in sorted(pairs, key=lambda pair: case_order({"functionality": "", **posts[pair[1]]})):
        other = posts[pair[1]]
        for part, name in (
            ("identities", other.get("target_ident") or NO_TARGET),
            ("functionalities", other.get("functionality") or ""),
        ):
            parts[part].setdefault(name, []).append(pair)
    return figures(pairs) | {
        "reason": reason,
        "n_twins": len({hate for hate, _ in pairs}),
        "n_without_twin": len(alone),
        **{
            part: {name: figures(chosen) for name, chosen in names.items()}
            for part, names in parts.items()
        },
    }


FORMS = ("singular", "plural", "adjective")
# Neutral terms by group; --identity_terms puts a file in their place. The n-th term of a form is
# swapped for the n-th of the other group, counted round. A group of the contract is swapped where
# it stands here; those marked as comparison always are, so that a group's change can be set
# against that of people who are seldom attacked.
IDENTITY_TERMS: dict[str, dict[str, Any]] = {
    "lgbtq": {
        "singular": ["gay person", "lesbian", "transgender person", "bisexual person"],
        "plural": [
            *("gay people", "lesbians", "transgender people", "bisexual people"),
            *("trans people", "homosexuals", "gays", "gay men"),
        ],
        "adjective": ["gay", "lesbian", "transgender", "bisexual", "homosexual"],
    },
    "mexican": {
        "singular": ["Mexican", "Latina", "Hispanic person", "Latino"],
        "plural": [
            *("Mexicans", "Latinas", "Hispanic people", "Latinos"),
            *("Mexican people", "Hispanics", "Latino people", "Mexican men"),
        ],
        "adjective": ["Mexican", "Latina", "Hispanic", "Latino", "Chicano"],
    },
    "middle_east": {
        "singular": ["Arab", "Iraqi", "Middle Eastern person", "Syrian"],
        "plural": [
            *("Arabs", "Iraqis", "Middle Eastern people", "Syrians"),
            *("Arab people", "Iranians", "Lebanese people", "Arab men"),
        ],
        "adjective": ["Arab", "Iraqi", "Middle Eastern", "Syrian", "Lebanese"],
    },
    "women": {"singular": ["woman"], "plural": ["women"], "adjective": ["female"]},
    "trans_people": {
        "singular": ["trans person", "transgender person"],
        "plural": ["trans people", "transgender people"],
        "adjective": ["transgender"],
    },
    "gay_people": {"singular": ["gay person"], "plural": ["gay people"], "adjective": ["gay"]},
    # "black" and "white" alone are colours more often than people.
    "black_people": {
        "singular": ["Black person", "African American"],
        "plural": ["Black people", "African Americans"],
        "adjective": ["African American"],
    },
    "disabled_people": {
        "singular": ["disabled person", "person with a disability"],
        "plural": ["disabled people", "people with disabilities"],
        "adjective": ["disabled"],
    },
    "muslims": {"singular": ["Muslim"], "plural": ["Muslims"], "adjective": ["Muslim"]},
    "immigrants": {
        "singular": ["immigrant"],
        "plural": ["immigrants"],
        "adjective": ["immigrant"],
    },
    "canadian": {
        "singular": ["Canadian"],
        "plural": ["Canadians"],
        "adjective": ["Canadian"],
        "comparison": True,
    },
    "christian": {
        "singular": ["Christian"],
        "plural": ["Christians"],
        "adjective": ["Christian"],
        "comparison": True,
    },
    "heterosexual": {
        "singular": ["heterosexual person"],
        "plural": ["heterosexual people"],
        "adjective": ["heterosexual"],
        "comparison": True,
    },
}
SWAP_TEMPLATES = {
    True: (
        "I do not want any {plural} in my town.",
        "{plural} should not be allowed to vote.",
        "Nobody should hire a {singular}.",
        "{plural} are worth less than the rest of us.",
        "Keep {adjective} children out of our schools.",
        "I would never trust a {singular}, they all lie.",
        "We should send all {plural} away.",
        "A {singular} does not deserve the same rights as I do.",
        "This street was fine before the {plural} came.",
        "I refuse to sit next to a {singular} on the bus.",
        "No {adjective} doctor should be allowed to treat our children.",
        "{plural} ruin every place they come to.",
    ),
    False: (
        "My {adjective} neighbour brought soup when I was ill.",
        "{plural} from our street organised the food drive.",
        "A {singular} is on the school board this year.",
        "The choir has two {plural} and they sing well.",
        "I had lunch with a {singular} and we talked about football.",
        "The museum shows photographs by {adjective} artists.",
        "Many {plural} work at this hospital.",
        "Our new teacher is a {singular}.",
        "It is wrong to say that {plural} are not welcome here.",
        "The film follows a {adjective} doctor through one year.",
        "I asked a {adjective} colleague about the train times.",
        "Nobody may refuse a flat to a {singular}.",
    ),
}
SWAP_ASSUMPTION = (
    "A swap assumes that the label stays the same with another group in its place. That holds for "
    "these templates; in posts it can fail, where a post speaks of something true of one group "
    "only, or names the group by other words too (slurs, places), which are not swapped. The "
    "intervals are of one pair of groups each, not of all of them together."
)
# After these a word that can be noun or adjective is a noun ("the Mexican"), ...
DETERMINERS = "a|an|the|this|that|one|every|each|no|any|another|some|my|your|our|his|her|their"
# ... unless a word follows that is none of these ("the Mexican family").
FUNCTION_WORDS = (
    "is|was|are|were|be|been|has|had|have|will|would|can|could|should|must|may|might|do|does|did|"
    "who|that|which|and|or|but|in|on|at|from|to|of|for|with|by|as|than|not|never|if|so|because|"
    "when|while|where|said|says|i|you|he|she|it|we|they|the|a|an|my|your|our"
)


def term_pattern(forms: dict[str, Any]) -> re.Pattern[str]:
    """Finds a group's terms as whole words in any case, with an a or an before them.

    Hyphenated words (Mexican-American) are other words; what PROTECTED finds is passed over, then
    the match has no `term`.
    """
    terms = sorted({term for form in FORMS for term in forms[form]}, key=lambda term: -len(term))
    listed = "|".join(r"\s+".join(map(re.escape, term.split())) for term in terms)
    return re.compile(
        rf"{PROTECTED}|(?<![\w@#])(?<!\w-)(?:(?P<article>an?)(?P<gap>\s+))?"
        rf"(?<!\w)(?P<term>{listed})(?!\w|-\w)",
        re.IGNORECASE,
    )


def has_term(text: str, pattern: re.Pattern[str]) -> bool:
    return any(match["term"] for match in pattern.finditer(text))


def article_of(word: str) -> str:
    """a or an, by the first letters."""
    return "an" if re.match("(?!eu|uni|ukr)[aeiou]", word, re.IGNORECASE) else "a"


def choose_form(found: dict[str, int], before: str, after: str) -> str:
    """Which of its forms a term has between two texts: one word can be noun and adjective.

    An adjective has a word after it that is no function word, or no determiner before it.
    """
    if len(found) == 1:
        return next(iter(found))
    determined = re.search(rf"(?<!\w)(?:{DETERMINERS})\s+$", before, re.IGNORECASE)
    described = re.match(rf"\s+(?!(?:{FUNCTION_WORDS})\b)[^\W\d_]", after, re.IGNORECASE)
    order = ("adjective", "plural", "singular")
    if determined and not described:
        order = ("singular", "plural", "adjective")
    return next(form for form in order if form in found)


def in_case_of(found: str, term: str, other: str, before: str, text: str) -> str:
    """`other` in the case in which `found` writes `term`: capitals, sentence start, lower case."""
    if found.isupper() and len(found) > 1:
        return other.upper()
    if text == text.lower() or (term[0].isupper() and found[0].islower()):
        return other.lower()
    start = before.rstrip(" \t\"'(\u201c\u2018")
    starts = not start or start[-1] in ".!?\n"
    if found[0].isupper() and (starts or not term[0].isupper()):
        return other[0].upper() + other[1:]
    return other


def swap_identity(
    text: str, source: str, target: str, terms: dict[str, dict[str, Any]] | None = None
) -> str | None:
    """The text with all terms of one group in another group's terms of the same form.

    None where it has no such term, and where it already speaks of the other group: then the swap
    would say something else. Case is kept, and a or an follows the term. Swapping back gives the
    text where the terms are one to one.
    """
    table = IDENTITY_TERMS if terms is None else terms
    if has_term(text, term_pattern(table[target])):
        return None
    places: dict[str, dict[str, int]] = {}
    for form in FORMS:
        for index, term in enumerate(table[source][form]):
            places.setdefault(" ".join(term.lower().split()), {})[form] = index

    def replace(match: re.Match[str]) -> str:
        # Without case i also matches signs that have another lower case, such as the dotless i.
        found = places.get(" ".join((match["term"] or "").lower().split()))
        if not found:
            return match[0]
        start, end = match.span("term")
        form = choose_form(found, text[:start], text[end:])
        term = table[source][form][found[form]]
        other = table[target][form][found[form] % len(table[target][form])]
        written = in_case_of(match["term"], term, other, text[:start], text)
        article = match["article"] or ""
        if article and article.lower() == article_of(term):
            new = article_of(other)
            capital = new.upper() if match["term"].isupper() else new.capitalize()
            article = capital if article[0].isupper() else new
        return f"{article}{match['gap'] or ''}{written}"

    swapped = term_pattern(table[source]).sub(replace, text)
    return None if swapped == text else swapped


def fill_template(template: str, word: str) -> str:
    """A template about one term, with the article that the term asks for."""
    text = re.sub(r"\ba \{\w+\}", f"{article_of(word)} {word}", template, flags=re.IGNORECASE)
    text = re.sub(r"\{\w+\}", word, text)
    return text[0].upper() + text[1:]


def read_identity_terms(path: str) -> dict[str, dict[str, Any]]:
    """Read a JSON file of the form of IDENTITY_TERMS: {group: {"singular": [...], ...}}."""
    file = Path(path).expanduser()
    form = '{group: {"singular": [...], "plural": [...], "adjective": [...]}}'
    if not file.is_file():
        fail(f"--identity_terms {path} is not a file. Give a JSON file {form}.")
    try:
        table = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        fail(f"--identity_terms {path} is not JSON: {error}. It is to be {form}.")
    if not isinstance(table, dict) or len(table) < 2:
        fail(f"--identity_terms {path} is to hold two groups or more: {form}.")
    for group, forms in table.items():
        place = f"--identity_terms {path}, group {group!r}"
        if not isinstance(forms, dict):
            fail(f"{place}: it is to be an object with the lists {', '.join(FORMS)}.")
        unknown = sorted(forms.keys() - {*FORMS, "comparison"})
        if unknown:
            fail(f"{place}: unknown key {unknown[0]!r}. There are: {', '.join(FORMS)}, comparison.")
        if not isinstance(forms.get("comparison", False), bool):
            fail(f"{place}: comparison is to be true or false.")
        for name in FORMS:
            words = forms.get(name)
            if not isinstance(words, list) or not words:
                fail(f"{place}: {name} is to be a list of one term or more.")
            for word in words:
                if not isinstance(word, str) or not re.fullmatch(r"\w(.*\w)?", word.strip()):
                    fail(f"{place}: {word!r} of {name} is no term. Begin and end it in a letter.")
            forms[name] = [" ".join(word.split()) for word in words]
            if len({word.lower() for word in words}) < len(words):
                fail(f"{place}: a term stands twice in {name}.")
    return table


@dataclass(frozen=True)
class Swap:
    """One text with a group's terms, and with another's; `post` is None for a template."""

    source: str
    target: str
    positive: bool
    original: str
    swapped: str
    post: int | None = None


def build_swaps(
    posts: list[dict[str, Any]],
    positive: str,
    groups: list[str],
    terms: dict[str, dict[str, Any]],
    most: int,
    seed: int,
) -> tuple[list[Swap], list[dict[str, str]]]:
    """Swaps for every ordered pair of groups, and what is left out with the reason.

    Of each pair and label these are all templates, one term in each, and up to `most` posts,
    drawn with the seed; a source's posts are the same for all targets where they can be swapped.
    """
    names = [group for group in groups if group in terms]
    names += [group for group in terms if group not in groups and terms[group].get("comparison")]
    left_out = [
        {"group": group, "reason": "the table has no terms for it"}
        for group in groups
        if group not in terms and group != NO_TARGET
    ]
    words = {name: {term.lower() for form in FORMS for term in terms[name][form]} for name in names}
    swaps: list[Swap] = []
    for source in names:
        pattern = term_pattern(terms[source])
        candidates = [index for index, post in enumerate(posts) if has_term(post["text"], pattern)]
        random.Random(f"{seed} {source}").shuffle(candidates)
        for target in names:
            if target == source:
                continue
            if words[source] & words[target]:
                if names.index(source) < names.index(target):
                    reason = f"it shares terms with {target} and is not swapped for it"
                    left_out.append({"group": source, "reason": reason})
                continue
            for side, templates in SWAP_TEMPLATES.items():
                for index, template in enumerate(templates):
                    form = re.search(r"\{(\w+)\}", template)[1]
                    place = index % len(terms[source][form])
                    other = terms[target][form][place % len(terms[target][form])]
                    texts = (terms[source][form][place], other)
                    filled = [fill_template(template, word) for word in texts]
                    swaps.append(Swap(source, target, side, *filled))
            taken: Counter[bool] = Counter()
            for index in candidates:
                side = posts[index]["label"] == positive
                if taken[side] < most:
                    text = posts[index]["text"]
                    swapped = swap_identity(text, source, target, terms)
                    if swapped is not None:
                        swaps.append(Swap(source, target, side, text, swapped, index))
                        taken[side] += 1
    return swaps, left_out


def swap_figures(rows: list[tuple[float, float]], threshold: float) -> dict[str, Any]:
    """Flips of the decision and change of p over pairs (p of the original, p of the swap)."""
    up = sum(before < threshold <= after for before, after in rows)
    down = sum(after < threshold <= before for before, after in rows)
    changes = [after - before for before, after in rows]
    size = math.fsum(map(abs, changes)) / len(rows) if rows else None
    return {
        "n": len(rows),
        "insufficient": len(rows) < MIN_DENOMINATOR,
        "flip_rate": share(up + down, len(rows), "no texts"),
        "n_to_positive": up,
        "n_to_negative": down,
        "mean_change": mean_change(changes, "no texts"),
        "mean_absolute_change": number(size, len(rows), "no texts"),
    }


def build_swap_report(
    swaps: list[Swap],
    left_out: list[dict[str, str]],
    positive: str,
    negative: str,
    p_original: list[float],
    p_swapped: list[float],
    threshold: float,
) -> dict[str, Any]:
    """Flip rate and mean change of p for every ordered pair of groups, and for parts of it.

    The change is p with the target's terms less p with the source's. `parts` holds the figures by
    kind (all, post, template) and label. Every text stands in a pair once.
    """
    cells: dict[tuple[str, str], dict[tuple[str, str], list[tuple[float, float]]]] = {}
    for swap, *scores in zip(swaps, p_original, p_swapped, strict=True):
        parts = cells.setdefault((swap.source, swap.target), {})
        for kind in ("all", "template" if swap.post is None else "post"):
            for label in ("all", positive if swap.positive else negative):
                parts.setdefault((kind, label), []).append(tuple(scores))
    pairs = []
    for (source, target), parts in cells.items():
        figures = {
            kind: {
                label: swap_figures(parts.get((kind, label), []), threshold)
                for label in ("all", positive, negative)
            }
            for kind in ("all", "post", "template")
        }
        pairs.append(
            {"source": source, "target": target, **figures["all"]["all"], "parts": figures}
        )
    return {
        "reason": None if pairs else "fewer than two groups have terms in the table",
        "assumption": SWAP_ASSUMPTION,
        "threshold": threshold,
        "groups": [*dict.fromkeys(name for pair in cells for name in pair)],
        "left_out": left_out,
        "pairs": pairs,
    }


# The report's page puts its own colours, light and dark, in the place of these.
PLOT_INK, PLOT_SOFT, PLOT_LINE = "#1c2127", "#57606a", "#d5dae0"
PLOT_MODEL, PLOT_OTHER = "#0a5bb0", "#8a5a00"
# Strengths of a cell's colour; under the strongest, text keeps a contrast of 4.5 and more.
PLOT_STEPS = (0.0, 0.1, 0.2, 0.3, 0.4)


def plot_cells(axis: Any, cells: dict[tuple[int, int], tuple[float, str]]) -> None:
    """Fill the squares (row, column) with (strength 0 to 1, colour), in steps; others stay blank.

    All squares of one step are one path, which keeps the SVG small.
    """
    from matplotlib.colors import to_rgba
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    steps: dict[tuple[str, float], list[tuple[int, int]]] = {}
    for place, (strength, colour) in cells.items():
        step = min(int(strength * len(PLOT_STEPS)), len(PLOT_STEPS) - 1)
        steps.setdefault((colour, PLOT_STEPS[step]), []).append(place)
    for (colour, alpha), places in steps.items():
        points = [
            (column + x * 0.47, row + y * 0.47)
            for row, column in places
            for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))
        ]
        codes = [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY] * len(places)
        fill = to_rgba(colour, alpha)
        outline = Outline(points, codes)
        axis.add_patch(PathPatch(outline, facecolor=fill, edgecolor=PLOT_LINE, linewidth=0.6))


def plot_grid(axis: Any, rows: list[str], columns: list[str], title: str) -> None:
    """An empty table with named rows and columns, the first row on top."""
    axis.set_facecolor("none")
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axis.xaxis.tick_top()
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="left", color=PLOT_INK)
    axis.set_yticks(range(len(rows)), rows, color=PLOT_INK)
    axis.tick_params(length=0, labelsize=8.5)
    axis.set_title(title, loc="left", color=PLOT_INK, fontsize=10)
    axis.spines[:].set_visible(False)


def plot_functional(axes: Any, functional: dict[str, Any]) -> None:
    """Two heat maps on two axes: accuracy in % of positive and of other cases, n beside it.

    The stronger the colour, the more cases are right; a square without a case is blank.
    """
    columns = ["all", *functional["identities"]]
    for axis, side in zip(axes, functional["sides"], strict=True):
        rows = [visible(row["functionality"], 32) for row in side["rows"]]
        names = [visible(column, 24) for column in columns]
        plot_grid(axis, rows, names, f"{visible(side['label'], 24)} cases: accuracy in %, (n)")
        cells = {}
        for place, row in enumerate(side["rows"]):
            for column, name in enumerate(columns):
                cell = row["accuracy"] if name == "all" else row["cells"].get(name)
                if cell is None or cell["value"] is None:
                    continue
                cells[place, column] = (cell["value"], PLOT_MODEL)
                axis.text(
                    column - 0.03,
                    place,
                    f"{100 * cell['value']:.0f}",
                    ha="right",
                    va="center",
                    color=PLOT_INK,
                    fontsize=8.5,
                )
                axis.text(
                    column + 0.03,
                    place,
                    f"({cell['n']})",
                    ha="left",
                    va="center",
                    color=PLOT_INK,
                    fontsize=6.5,
                )
        plot_cells(axis, cells)


def plot_swaps(axis: Any, report: dict[str, Any]) -> None:
    """Mean change of p for every swap of a row's group for a column's, with the flip rate below.

    Blue is a higher p after the swap, brown a lower one; full strength is a change of 0.25.
    """
    names = report["groups"]
    listed = [visible(name, 24) for name in names]
    plot_grid(axis, listed, listed, "mean change of p, and share of decisions that flip")
    axis.set_ylabel("a text about this group \u2026", color=PLOT_SOFT, fontsize=8.5)
    axis.set_xlabel("\u2026 names that group instead", color=PLOT_SOFT, fontsize=8.5)
    axis.xaxis.set_label_position("top")
    cells = {}
    for pair in report["pairs"]:
        row, column = names.index(pair["source"]), names.index(pair["target"])
        change, flips = pair["mean_change"]["value"], pair["flip_rate"]["value"]
        if change is None:
            continue
        colour = PLOT_MODEL if change >= 0 else PLOT_OTHER
        cells[row, column] = (min(1.0, abs(change) / 0.25), colour)
        for height, words, size in ((-0.15, f"{change:+.3f}", 8.5), (0.2, f"{flips:.0%} flip", 7)):
            axis.text(
                column, row + height, words, ha="center", va="center", color=PLOT_INK, fontsize=size
            )
    plot_cells(axis, cells)


# --- probes ----------------------------------------------------------------------------------

# Of each pair of groups and label so many posts are swapped.
MOST_SWAPS = 200


@dataclass
class Probes:
    """Texts that are scored beside the posts, to see how the model behaves.

    `texts` are all of them as posts, each once; `perturbed` are (kind, index of the post, text),
    `swaps` pairs of texts, `left_out` groups without terms. `scores` are p of the positive label
    of `texts`.
    """

    perturbed: list[tuple[str, int, str]]
    swaps: list[Swap]
    left_out: list[dict[str, str]]
    texts: dict[tuple[str, int | None], dict[str, Any]]
    scores: list[float]

    @property
    def by_text(self) -> dict[tuple[str, int | None], float]:
        return dict(zip(self.texts, self.scores, strict=True))


def build_probes(args: argparse.Namespace, task: Task, posts: list[dict[str, Any]]) -> Probes:
    """The texts that --evasion and --identity_swap ask for; none without them."""
    probes = Probes([], [], [], {}, [])
    if (args.evasion or args.identity_swap) and len(task.labels) > 2:
        fail("--evasion and --identity_swap are for two labels; leave them out.")
    if args.evasion:
        probes.perturbed = build_perturbed(posts, task.positive, args.seed)
    if args.identity_swap:
        terms = read_identity_terms(args.identity_terms) if args.identity_terms else IDENTITY_TERMS
        probes.swaps, probes.left_out = build_swaps(
            posts, task.positive, task.groups, terms, MOST_SWAPS, args.seed
        )
    wanted = [(text, index) for _, index, text in probes.perturbed]
    for swap in probes.swaps:
        wanted += [(swap.original, swap.post), (swap.swapped, swap.post)]
    for text, index in wanted:
        post = posts[index] if index is not None else {"text": "", "target_groups": []}
        probes.texts[text, index] = post_with_text(post, text)
    return probes


def post_with_text(post: dict[str, Any], text: str) -> dict[str, Any]:
    """A post with another text; its question is written anew from the prompt."""
    persona = post.get("columns", {}).get("persona")
    return {**post, "text": text, "prompt": None, "persona": persona}


def score_probes(
    args: argparse.Namespace,
    task: Task,
    scorer: Scorer,
    encoded: list[list[int]],
    journals: list[Journal],
    world: World,
) -> list[float]:
    """p of the positive label of each probe."""
    if not encoded:
        return []
    positive = task.labels.index(task.positive)
    scores, _, _ = score_posts(
        scorer,
        encoded,
        lambda row: decision_margin(row, positive, args.threshold),
        scorer.setup.rounded,
        f"probes {hash_of(encoded)[:8]}",
        journals[0] if journals else None,
        world,
    )
    return [softmax(row)[positive] for row in scores]


def report_probes(
    args: argparse.Namespace,
    task: Task,
    posts: list[dict[str, Any]],
    members: dict[str, list[int]],
    probes: Probes | None,
) -> dict[str, Any]:
    """What the probes show, and the suite of functional tests where the posts are one."""
    cases = [post["columns"] | {"label": post["label"]} for post in posts]
    scores = None
    if all(post["probabilities"] for post in posts):
        scores = [post["probabilities"][task.positive] for post in posts]
    predicted = [post["prediction"] for post in posts]
    functional = build_functional(cases, task.positive, task.negative, predicted, scores)
    found: dict[str, Any] = {"evasion": None, "identity_swap": None}
    found["functional"] = None if functional["reason"] else functional
    if probes is None:
        return found
    known = probes.by_text
    if args.evasion:
        perturbed = [known[text, index] for _, index, text in probes.perturbed]
        found["evasion"] = build_evasion(
            posts, members, task.positive, scores, probes.perturbed, perturbed, args.threshold
        )
    if args.identity_swap:
        before = [known[swap.original, swap.post] for swap in probes.swaps]
        after = [known[swap.swapped, swap.post] for swap in probes.swaps]
        found["identity_swap"] = build_swap_report(
            *(probes.swaps, probes.left_out, task.positive, task.negative),
            *(before, after, args.threshold),
        )
    return found


# --- slices ----------------------------------------------------------------------------------

# Characters, from and below.
LENGTHS = {"under 50": (0, 50), "50 to 150": (50, 151), "over 150": (151, math.inf)}
# What holds posts, or names one: never a slice, because slices' names are pushed.
TEXT_COLUMNS = ("id", "text", "prompt", "completion", "rationale", "messages", "case_templ")
# With more values than this a column tells posts apart rather than kinds of posts.
MOST_SLICES = 30


def describe_posts(posts: list[dict[str, Any]], columns: list[dict[str, Any]]) -> None:
    """Give each post its `columns`: those of the dataset, its length and its annotators' agreement.

    `columns` are the dataset's rows or empty mappings, one per post.
    """
    for post, row in zip(posts, columns, strict=True):
        length = ""
        if post["text"] is not None:
            size = len(post["text"])
            length = next(name for name, (low, high) in LENGTHS.items() if low <= size < high)
        votes = votes_of(row.get("annotator_labels"))
        agreement = ""
        if len(votes) > 1:
            most = Counter(votes).most_common(1)[0][1]
            agreement = "unanimous" if most == len(votes) else f"{most} of {len(votes)}"
        post["columns"] = {
            name: value
            for name, value in row.items()
            if isinstance(value, (str, int, float)) and name not in TEXT_COLUMNS
        }
        known = post["columns"]
        # An evaluation's own file has these without text or votes.
        known["length"] = length or str(known.get("length", ""))
        known["agreement"] = agreement or str(known.get("agreement", ""))
        post["votes"] = votes


def votes_of(value: Any) -> list[str]:
    """The votes of a cell: a list, text that holds one, or classes parted by `|`."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    votes = value.split("|") if isinstance(value, str) else list(value or [])
    return [str(vote) for vote in votes if vote not in (None, "")]


def build_slices(
    sample: Sample, posts: list[dict[str, Any]], names: list[str]
) -> dict[str, dict[str, Any]]:
    """The model's figures by each column's values, and by the groups that posts have together.

    A value with no post of its own, an empty one and a column of one value give no slice.
    """
    import numpy as np

    model = next(iter(sample.predicted))
    slices = {}
    for name in names:
        values = [str(post["columns"].get(name, "")) for post in posts]
        counts = Counter(value for value in values if value)
        if not counts or len({*values}) < 2:
            continue
        kept = [value for value, _ in counts.most_common(MOST_SLICES)]
        slices[name] = {
            value: slice_figures(sample, model, np.array([one == value for one in values]))
            for value in sorted(kept, key=lambda value: ([*LENGTHS, value].index(value), value))
        }
    together = {}
    for first, second in itertools.combinations(sample.groups, 2):
        both = sample.members[first] & sample.members[second]
        if both.sum() >= MIN_DENOMINATOR:
            together[f"{first} and {second}"] = slice_figures(sample, model, both)
    if together:
        slices["groups together"] = together
    return slices


def slice_figures(sample: Sample, strategy: str, posts: Any) -> dict[str, Any]:
    """Those of `build_figures` that have an interval without resampling."""
    figures = build_figures(sample, strategy, posts)
    positive = sample.labels[sample.positive]
    rates = ("accuracy", "precision", "recall", "false_positive_rate", "false_negative_rate")
    kept = ("n", "n_total", "n_unparsed", "labels", *CONFUSION, *rates, f"f1_{positive}")
    return {key: figures[key] for key in kept}


def build_prevalence(
    sample: Sample, strategy: str, prevalences: list[float], per: int = 10_000
) -> list[dict[str, Any]]:
    """What the model's error rates mean where a share of `prevalence` of the posts is positive.

    For all posts and each group: the precision, and per 10,000 posts the flags and the wrong
    ones. The intervals take the worse and the better ends of both rates' 95 % intervals together
    and so hold at least that often. Rates of too few posts give nulls.
    """
    import numpy as np

    name = sample.labels[sample.positive]
    places = {"overall": np.ones(len(sample.truth), dtype=bool), **sample.members}
    found = []
    for prevalence in prevalences:
        entry: dict[str, Any] = {"prevalence": prevalence, "places": {}}
        for place, posts in places.items():
            if place == NO_TARGET:
                continue
            figures = build_figures(sample, strategy, posts)
            hit, false = figures["recall"], figures["false_positive_rate"]
            n = min(hit["n"], false["n"])
            if n < MIN_DENOMINATOR:
                reason = f"fewer than {MIN_DENOMINATOR} {name} or other posts"
                cells = ("precision", "flags", "wrong_flags")
                entry["places"][place] = {key: number(None, n, reason) for key in cells}
                continue
            ends = {
                "value": (hit["value"], false["value"]),
                "low": (hit["low"], false["high"]),
                "high": (hit["high"], false["low"]),
            }
            precision, flags, wrong = (number(None, n, "nothing is flagged") for _ in range(3))
            for end, (recall, rate) in ends.items():
                right_flags, wrong_flags = prevalence * recall, (1 - prevalence) * rate
                if right_flags + wrong_flags > 0:
                    precision[end] = right_flags / (right_flags + wrong_flags)
                    precision["reason"] = None
            for end in ends:
                wrong[end] = per * (1 - prevalence) * false[end]
                flags[end] = per * prevalence * hit[end] + wrong[end]
            wrong["reason"] = flags["reason"] = None
            if precision["value"] is None:
                precision["low"] = precision["high"] = None
                precision["reason"] = "nothing is flagged"
            entry["places"][place] = {"precision": precision, "flags": flags, "wrong_flags": wrong}
        found.append(entry)
    return found


def build_offensive_rules(
    sample: Sample, posts: list[dict[str, Any]]
) -> dict[str, dict[str, Any]] | None:
    """The model's figures with offensive posts as negative, as positive, and left out.

    From one set of predictions; None where no post has the class `offensive`, or with more labels
    than two.
    """
    import numpy as np

    classes = np.array([str(post["columns"].get("label_multiclass", "")) for post in posts])
    offensive = classes == "offensive"
    if not offensive.any() or len(sample.labels) != 2:
        return None
    model = next(iter(sample.predicted))
    places = {"overall": np.ones(len(posts), dtype=bool)}
    places |= {group: some for group, some in sample.members.items() if some.any()}
    positive, negative = sample.positive, 1 - sample.positive
    rules = {}
    for rule, label in ((sample.labels[negative], negative), (sample.labels[positive], positive)):
        one = replace(sample, truth=np.where(offensive, label, sample.truth))
        rules[rule] = {place: slice_figures(one, model, some) for place, some in places.items()}
    rules["dropped"] = {
        place: slice_figures(sample, model, some & ~offensive) for place, some in places.items()
    }
    return rules


def build_people(sample: Sample, posts: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """How far one annotator agrees with the others, and the model with the same others.

    Leave one out: each vote is judged by the majority of the post's other votes, ties left out.
    A class is read as the label that the posts of that class have. The intervals resample posts,
    because the votes on one post belong together.
    """
    import numpy as np

    labels_of: dict[str, set[str]] = {}
    for post, number_ in zip(posts, sample.truth, strict=True):
        if kind := str(post["columns"].get("label_multiclass", "")):
            labels_of.setdefault(kind, set()).add(sample.labels[number_])
    voted = {vote for post in posts for vote in post["votes"]}
    unclear = sorted(voted - {kind for kind, labels in labels_of.items() if len(labels) == 1})
    if not voted:
        return {"reason": "no annotator's votes"}
    if unclear:
        return {"reason": f"the label of {', '.join(map(visible, unclear[:3]))} is not known"}
    positive = sample.labels[sample.positive]
    says = {kind: positive in labels for kind, labels in labels_of.items()}
    model = (sample.decided(next(iter(sample.predicted))) == sample.positive).tolist()
    rows = []
    for index, post in enumerate(posts):
        votes = [says[vote] for vote in post["votes"]]
        row = [[[0, 0], [0, 0]], [[0, 0], [0, 0]]]  # who, the others, the answer
        for place, vote in enumerate(votes):
            others = votes[:place] + votes[place + 1 :]
            if 2 * sum(others) != len(others):
                reference = 2 * sum(others) > len(others)
                row[0][reference][vote] += 1
                row[1][reference][model[index]] += 1
        if len(votes) > 1:
            rows.append(np.ravel(row))
    if not rows or not np.sum(rows):
        return {"reason": "no post has votes that others can judge"}
    cells = build_cells(np.array(rows))
    kinds = np.array(rows)[cells.first]
    keys = ("accuracy", "f1", "false_positive_rate", "false_negative_rate")

    def statistic(counts: Any) -> dict[Any, Any]:
        tables = (counts @ kinds).reshape(len(counts), 2, 2, 2)
        figures = count_figures(tables, 1)
        found = {}
        for key in keys:
            if len(counts) > 1 or np.isfinite(figures[key]).all():
                found["annotator", key], found["model", key] = figures[key].T
                found["away", key] = figures[key][:, 1] - figures[key][:, 0]
        return found

    found = intervals(statistic, cells.counts, seed)
    votes = int(np.sum(rows) // 2)
    entry: dict[str, Any] = {"reason": None, "posts": len(rows), "votes": votes}
    for who in ("annotator", "model", "away"):
        entry[who] = {
            key: number(None, votes, "no such votes") | {"reason": None} | found[who, key]
            if (who, key) in found
            else number(None, votes, "no such votes")
            for key in keys
        }
    return entry


def build_sweep(sample: Sample, strategy: str) -> dict[str, list[float | None]]:
    """Error rates, F1 and the largest gaps at thresholds from 0 to 1, for the threshold plot."""
    import numpy as np

    thresholds = np.linspace(0, 1, 101)
    scores, positive = sample.scores[strategy], sample.positives

    def at_least(posts: Any) -> Any:
        """How many of the posts each threshold flags."""
        return posts.sum() - np.searchsorted(np.sort(scores[posts]), thresholds, side="left")

    with np.errstate(divide="ignore", invalid="ignore"):
        rates = {}
        for group, inside in {"overall": positive | True, **sample.members}.items():
            yes, no = inside & positive, inside & ~positive
            rates[group] = (at_least(no) / no.sum(), 1 - at_least(yes) / yes.sum())
        hits, false = at_least(positive), at_least(~positive)
        sweep = {
            "threshold": thresholds,
            "false_positive_rate": rates["overall"][0],
            "false_negative_rate": rates["overall"][1],
            "f1": 2 * hits / (hits + false + positive.sum()),
        }
        for place, (key, posts) in enumerate(
            (("gap_false_positive_rate", ~positive), ("gap_false_negative_rate", positive))
        ):
            enough = [
                group
                for group in sample.groups
                if (sample.members[group] & posts).sum() >= MIN_DENOMINATOR
            ]
            if len(enough) > 1:
                each = np.stack([rates[group][place] for group in enough])
                sweep[key] = each.max(0) - each.min(0)
    return {
        key: [None if math.isnan(value) else float(value) for value in values]
        for key, values in sweep.items()
    }


# --- decisions ------------------------------------------------------------------------------


def read_profile(repo: Repo, name: str) -> dict[str, Any]:
    """A named profile of the adapter's decisions.json; ends where it is of other weights.

    `temperature` is for `apply_temperature`; `threshold`, `review` and `act` are on the scale
    that it gives. A post is positive from `threshold` on. Below `review` it is allowed, from
    there on a person decides, from `act` on (None: never) the detector does.
    """
    profiles = read_decisions(repo)["profiles"]
    if name not in profiles:
        fail(
            f"{repo.name} has no profile {visible(repr(name))}. There are: "
            f"{', '.join(map(visible, profiles)) or 'none'}. eval/calibrate.py makes one."
        )
    profile = profiles[name]
    if profile["weights"]["sha256"] != weights_sha256(repo):
        fail(
            f"the profile {name!r} of {repo.name} was fitted to other weights than are there now. "
            "Evaluate the adapter again and run eval/calibrate.py."
        )
    return profile


def apply_temperature(p: Any, temperature: float) -> Any:
    """sigmoid(logit(p) / temperature), of a number or an array (Guo et al. 2017).

    0 and 1 are moved by one rounding error, because their logits are infinite.
    """
    import numpy as np
    from scipy.special import expit, logit

    if temperature == 1:
        return p
    edge = np.finfo(np.float64).eps
    return expit(logit(np.clip(p, edge, 1 - edge)) / temperature)


def read_decisions(repo: Repo) -> dict[str, Any]:
    """decisions.json of an adapter; without profiles where there is none yet."""
    file = repo.fetch(DECISIONS) / DECISIONS
    if not file.is_file():
        return {"schema": SCHEMA, "script": "eval/calibrate.py", "profiles": {}}
    try:
        decisions = json.loads(file.read_text(encoding="utf-8"))
        schema, profiles = decisions["schema"], decisions["profiles"]
        whole = all(
            {"temperature", "threshold", "review", "act", "weights"} <= profile.keys()
            for profile in profiles.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{DECISIONS} of {repo.name} is damaged ({error}). Restore it, or remove the file.")
    if schema != SCHEMA or not whole:
        fail(f"{DECISIONS} of {repo.name} is of schema {schema} or not whole; this reads {SCHEMA}.")
    return decisions


def weights_sha256(repo: Repo) -> str:
    """The hash of an adapter's weights; the Hub says it without a download."""
    if repo.folder is None:
        from huggingface_hub import HfApi

        with hub_errors(f"look at the weights of {repo.name}"):
            found = HfApi().get_paths_info(repo.name, ADAPTER_WEIGHTS, revision=repo.revision)
        if found and found[0].lfs:
            return found[0].lfs.sha256
    file = repo.fetch(ADAPTER_WEIGHTS) / ADAPTER_WEIGHTS
    if not file.is_file():
        fail(f"{repo.name} holds no {ADAPTER_WEIGHTS}: finish its training first.")
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- requirements ----------------------------------------------------------------------------

# The criteria that the public predecessor of this project published for its models. Always
# answering hate passes the first.
PUBLISHED_CRITERIA = ("f1>=0.62", "lgbtq.fpr<=0.40", "mexican.fpr<=0.10", "middle_east.fpr<=0.25")
# What may be written in a requirement instead of a figure's name.
SHORT_NAMES = {
    "fpr": "false_positive_rate",
    "fnr": "false_negative_rate",
    "auc": "roc_auc",
    "ap": "average_precision",
}


def parse_requirement(text: str) -> tuple[str, str, float]:
    """`PATH(>=|<=|>|<)NUMBER` as its three parts; a rate is a number from 0 to 1.

    PATH: `f1`, `lgbtq.fpr`, `gap.fpr`, `ratio.fnr`, `vs_base.f1`, `vs_base.lgbtq.fpr`.
    """
    found = re.fullmatch(r"\s*([^<>=]*[^<>=\s])\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:e-?\d+)?)\s*", text)
    try:
        bound = float(found[3])
        if abs(bound) > 1:
            raise ValueError
        return found[1], found[2], bound
    except (TypeError, ValueError):
        fail(
            f"--require {visible(repr(text))} is no requirement. Write a figure, one of >=, <=, >, "
            "<, and a number from -1 to 1, such as 'f1>=0.62', 'lgbtq.fpr<=0.4' or 'gap.fpr<=0.1'."
        )


def find_comparison(metrics: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The comparison that a path `vs_NAME.…` names, and the rest of the path."""
    others: dict[str, dict[str, Any]] = {}
    for number_, one in enumerate(metrics["comparisons"], start=1):
        others |= {str(number_): one, one["second"]: one}
    for one in metrics["strategies"][1:]:
        if one["overall"] is None:
            others[one["name"]] = one
    if "base_model" in others:
        others.setdefault("base", others["base_model"])
    # A name may hold dots, and one may begin like another.
    name = max((one for one in others if path.startswith(f"vs_{one}.")), key=len, default=None)
    if name is None:
        fail(
            f"--require {visible(path)}: there is no such comparison. There are: "
            f"{', '.join(visible(f'vs_{one}') for one in others) or 'none'}."
        )
    return others[name], path.removeprefix(f"vs_{name}.")


def find_figure(metrics: dict[str, Any], path: str) -> dict[str, Any]:
    """The figure of a requirement's path: of the first strategy, or of its difference from another.

    `metrics` is of the form of metrics.json. A path with `vs_` names the other strategy, `vs_1`
    the first that it is compared with, `vs_base` the base model. A figure that counts fewer than
    `MIN_DENOMINATOR` posts is returned as undefined: too few to conclude anything from.
    """
    one, rest, bias = metrics["strategies"][0], path, metrics["strategies"][0]["bias"]
    if path.startswith("vs_"):
        one, rest = find_comparison(metrics, path)
        bias = {}
        if one["overall"] is None:
            return number(None, 0, f"{one['name']}: {one['reason']}")
    place, _, key = rest.rpartition(".")
    key = SHORT_NAMES.get(key, key)
    form = {"gap": "max_min", "ratio": "min_max_ratio"}.get(place)
    if (form or key.endswith("_difference")) and bias is None:
        return number(None, 0, "all posts have the same answer")
    if form and bias:
        figures = {rate: gap_of(one, rate, gap, form) for rate, gap in bias["gaps"].items()}
    elif place in ("", "overall"):
        figures = worst_of(one, "overall", one["overall"]) | (bias or {})
    elif place in one["groups"]:
        figures = worst_of(one, place, one["groups"][place])
    else:
        fail(
            f"--require {visible(path)}: there is no group {visible(place)!r}. There are: "
            f"{', '.join(map(visible, one['groups']))}; gap and ratio are of a rate between groups."
        )
    if key == "f1" and "f1" not in figures:
        key = f"f1_{metrics['positive_label']}"
    there = [name for name, item in figures.items() if isinstance(item, dict) and "value" in item]
    if key not in there:
        fail(
            f"--require {visible(path)}: there is no figure {visible(key)!r}. There are: "
            f"{', '.join(there)}."
        )
    figure, counts_posts = figures[key], not form and not key.endswith("_difference")
    if counts_posts and figure["value"] is not None and figure["n"] < MIN_DENOMINATOR:
        reason = f"insufficient: {figure['n']} posts, and {MIN_DENOMINATOR} are needed"
        return figure | {"value": None, "low": None, "high": None, "reason": reason}
    return figure


def gap_of(one: dict[str, Any], rate: str, gap: dict[str, Any], form: str) -> dict[str, Any]:
    """A gap with the groups that it leaves out; answers without label count as wrong in it."""
    figure = gap[form]
    if one.get("unparsed") and form == "max_min" and figure["value"] is not None:
        places = one["unparsed"]["as_errors"]
        figure = widest_gap([[places[name][rate] for name in gap["groups"] if name != NO_TARGET]])
    return figure | {"left_out": gap["left_out"]}


def worst_of(one: dict[str, Any], place: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A strategy's figures of a place, where answers without label count as wrong."""
    unparsed = one.get("unparsed")
    return figures | unparsed["as_errors"][place] if unparsed else figures


def judge(metrics: dict[str, Any], requirements: list[str], strict: bool) -> list[dict[str, Any]]:
    """Whether each requirement holds, for the figure or, if `strict`, for its interval's bad end.

    What is undefined does not hold, nor, if `strict`, what has no interval or leaves a group out.
    """
    tests = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
    verdicts = []
    for text in requirements:
        path, sign, bound = parse_requirement(text)
        figure = find_figure(metrics, path)
        end = ("low" if sign.startswith(">") else "high") if strict else "value"
        tested, reason = figure[end], figure["reason"]
        if tested is None and reason is None:
            reason = "no interval"
        # The last bits of a difference are rounding.
        holds = tested is not None and tests[sign](round(tested, 12), bound)
        if figure.get("left_out"):
            # Too few posts of a group are no proof of its treatment.
            reason = (
                reason or f"without {', '.join(map(visible, figure['left_out']))}: too few posts"
            )
            holds = holds and not strict
        verdicts.append(
            {
                "requirement": text,
                **{key: figure[key] for key in ("value", "low", "high", "n")},
                "tested": tested,
                "holds": bool(holds),
                "reason": reason,
            }
        )
    return verdicts


def requirement_table(verdicts: list[dict[str, Any]]) -> list[list[str]]:
    """A row per requirement, header first."""
    rows = [["requirement", "value", "95 % interval", "n", "verdict"]]
    for one in verdicts:
        value = "undefined" if one["value"] is None else f"{one['value']:.4f}"
        interval = "none" if one["low"] is None else f"[{one['low']:.4f}, {one['high']:.4f}]"
        verdict = "holds" if one["holds"] else "FAILS"
        verdict += f" ({visible(one['reason'], 100)})" if one["reason"] else ""
        rows.append([visible(one["requirement"]), value, interval, str(one["n"]), verdict])
    return rows


def expand_requirements(requirements: list[str], metrics: dict[str, Any]) -> list[str]:
    """The requirements with `published` and `beats_baselines` written out."""
    expanded: list[str] = []
    for text in requirements:
        if text == "published":
            expanded += PUBLISHED_CRITERIA
        elif text == "beats_baselines":
            names = [one["name"] for one in metrics["strategies"] if one["kind"] == "baseline"]
            expanded += [f"vs_{name}.{key}>0" for name in names for key in ("f1", "accuracy")]
        else:
            expanded.append(text)
    return expanded


def gate_table(metrics: dict[str, Any]) -> list[list[str]]:
    """The verdicts on --require, header first; no rows without any."""
    return requirement_table(metrics["gates"]) if metrics["gates"] else []


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
    text = re.sub(r"([\\|`\[\]!*~$])", r"\\\1", visible(text, 5000))
    for sign, entity in (("<", "&lt;"), (">", "&gt;"), ("://", "&#58;//"), ("www.", "www&#46;")):
        text = text.replace(sign, entity)
    return text


def write_csv(file: Path, header: list[str], rows: list[list[Any]]) -> None:
    """Write a CSV file in UTF-8; None is an empty cell, text is made safe for spreadsheets."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        for row in [header, *rows]:
            writer.writerow([csv_text(cell) if isinstance(cell, str) else cell for cell in row])


def write_predictions(
    folder: Path, task: Task, posts: list[dict[str, Any]], with_text: bool
) -> None:
    """predictions.csv and predictions.parquet: a row per post, with its labels, probabilities,
    groups and columns. Text stands in them only where it is asked for; the parquet file holds it
    as it is, the CSV made safe for spreadsheets."""
    import pyarrow as pa
    from pyarrow import parquet

    others = [label for label in task.labels if label != task.positive]
    listed = [task.positive, *(others if len(others) > 1 else [])]
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "id": lambda post: post["id"],
        "label": lambda post: post["label"],
        "prediction": lambda post: post["prediction"],
    }
    for label in listed:
        columns[f"p_{label}"] = lambda post, label=label: (post["probabilities"] or {}).get(label)
    columns |= {
        "target_groups": lambda post: post["target_groups"],
        "cut": lambda post: post["cut"],
        "near_tie": lambda post: post["near_tie"],
    }
    if "base_prediction" in posts[0]:
        columns["base_prediction"] = lambda post: post["base_prediction"]
        columns[f"base_p_{task.positive}"] = lambda post: post["base_probabilities"][task.positive]
    if "scored_prediction" in posts[0]:
        columns["scored_prediction"] = lambda post: post["scored_prediction"]
    if any("status" in post for post in posts):
        columns["answer_status"] = lambda post: post.get("status")
    for name in kept_columns(posts):
        columns[name] = lambda post, name=name: str(post["columns"].get(name, ""))
    if with_text:
        columns["text"] = lambda post: post["text"]
    values = {name: [read(post) for post in posts] for name, read in columns.items()}

    def cell(value: Any) -> Any:
        if isinstance(value, bool):
            return str(value).lower()
        return "|".join(value) if isinstance(value, list) else value

    rows = [[cell(value) for value in row] for row in zip(*values.values(), strict=True)]
    write_csv(folder / "predictions.csv", list(columns), rows)
    types = {"target_groups": pa.list_(pa.string()), "cut": pa.bool_(), "near_tie": pa.bool_()}
    types |= {name: pa.float64() for name in columns if re.match("(base_)?p_", name)}
    table = pa.table(
        {
            name: pa.array(column, type=types.get(name, pa.string()))
            for name, column in values.items()
        }
    )
    parquet.write_table(table, folder / "predictions.parquet")


# Of a dataset's columns, those that say what kind of post it is; they hold no text of the post.
KIND_COLUMNS = (
    *("source", "label_multiclass", "length", "agreement", "functionality", "target_ident"),
    *("direction", "case_id", "ref_case_id", "templ_id", "ref_templ_id"),
)


def kept_columns(posts: list[dict[str, Any]]) -> list[str]:
    """The columns of KIND_COLUMNS that say something of some post."""
    return [
        name
        for name in KIND_COLUMNS
        if any(post.get("columns", {}).get(name) not in (None, "") for post in posts)
    ]


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
    """performance_metrics.csv (a row per strategy) and bias_metrics.csv (per strategy, group).

    Rates are over the answers that have a label: `coverage` of all.
    """
    overall = ("accuracy", "precision", "recall", f1_name(metrics))
    rates = ("false_positive_rate", "false_negative_rate")
    answered = ("n_total", "n_unparsed")
    performance, bias = [], []
    for strategy in metrics["strategies"]:
        name, figures = strategy["name"], strategy["overall"]
        if figures is None:
            performance.append([name, *[None] * (len(overall) + len(CONFUSION) + 3)])
            bias += [[name, group, *[None] * 10] for group in strategy["groups"]]
            continue
        values = [figures[key]["value"] for key in overall]
        counts = [figures[key] for key in (*CONFUSION, *answered)]
        performance.append([name, *values, *counts, strategy["coverage"]["value"]])
        for group, figures in strategy["groups"].items():
            values = [figures[key]["value"] for key in rates]
            counts = [figures[key] for key in (*CONFUSION, *answered)]
            coverage = figures["n"] / figures["n_total"] if figures["n_total"] else None
            bias.append([name, group, figures["n"], *values, *counts, coverage])
    further = (*answered, "coverage")
    header = ["strategy", "accuracy", "precision", "recall", "f1_score", *CONFUSION, *further]
    write_csv(folder / "performance_metrics.csv", header, performance)
    header = ["strategy", "persona_tag", "sample_count", *rates, *CONFUSION, *further]
    write_csv(folder / "bias_metrics.csv", header, bias)


def write_errors(file: Path, errors: list[dict[str, Any]], positive: str, with_text: bool) -> None:
    """errors.csv: the rows of `list_errors`."""
    header = ["id", "error", "label", "prediction", f"p_{positive}", "confidence"]
    header += ["target_groups", "near_tie", *(["text"] if with_text else [])]
    write_csv(file, header, [[row[name] for name in header] for row in errors])


def read_descriptions(dataset: Repo | None) -> dict[str, Any]:
    """What the dataset's contract says its labels and groups mean; empty without one."""
    if dataset is None or not has_contract(dataset):
        return {}
    contract = read_contract(dataset, "dataset")
    known = (contract.get(f"{kind}_descriptions") or {} for kind in ("label", "group"))
    labels, groups = known
    return {"labels": labels, "groups": groups}


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
        "descriptions": read_descriptions(repos[2]),
        "split": None if args.test_file else args.split,
        "test_file": test_file,
        "prompt": task.prompt,
        "rendering": {
            "date": task.date,
            "reasoning_effort": task.effort,
            "max_length": task.max_length,
        },
        "threshold": metrics["threshold"],
        "weights_sha256": None,
        "posts": metrics["n"],
        "cut_posts": metrics["cut_posts"],
        "near_ties": metrics["near_ties"],
        "headline": {name: figures[name]["value"] for name in (*HEADLINE, f1_name(metrics))},
        "profile": None,
        "predictions": None,
    }


def write_files(
    folder: Path,
    args: argparse.Namespace,
    task: Task,
    posts: list[dict[str, Any]],
    metrics: dict[str, Any],
    sample: Sample,
    record: dict[str, Any],
) -> None:
    """Write everything that an evaluation leaves behind."""
    from jinja2 import Environment

    write_predictions(folder, task, posts, args.log_text)
    errors = list_errors(posts, task, args.log_text)
    write_errors(folder / "errors.csv", errors, task.positive, args.log_text)
    if ANSWERS in output_files(args):
        write_answers(folder / ANSWERS, posts)
    write_metric_tables(folder, metrics)
    write_json(folder / "metrics.json", metrics)
    (folder / "evaluation_report.txt").write_text(build_text(metrics), encoding="utf-8")
    page = build_page(metrics, record, sample, errors[:MOST_ERRORS]) | {"all_errors": len(errors)}
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    (folder / "report.html").write_text(template.render(page), encoding="utf-8")
    (folder / "report.md").write_text(build_markdown(page), encoding="utf-8")
    written = [folder / name for name in output_files(args) if name != CONTRACT]
    record["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written}
    write_json(folder / CONTRACT, record)


# The page lists so many errors; errors.csv has all.
MOST_ERRORS = 100


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
    if args.predictions:
        return name, Path("hsd-eval", name).resolve()
    subject = adapter.name if adapter else args.model_name_or_path
    return name, Path("hsd-eval", Path(subject.partition("@")[0]).name, name).resolve()


def name_posts(args: argparse.Namespace, contract: dict[str, Any]) -> list[str]:
    """What is scored, as words of a name: the split, a file, or another dataset's split."""
    if args.predictions:
        return ["predictions", Path(args.predictions).stem]
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
        f"threshold{args.threshold}": args.threshold != 0.5 and not args.profile,
        f"length{args.max_length}": args.max_length,
        args.dtype: args.dtype != "auto",
        four: four,
        str(args.dataset_config): args.dataset_config,
        f"profile-{args.profile}": args.profile,
        "evasion": args.evasion,
        "identity_swap": args.identity_swap,
        "with_text": args.log_text,
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
    against: list[Answered],
    profile: dict[str, Any] | None,
) -> str:
    """A hash of everything that decides an evaluation's scores and report."""
    loose = ("output_dir", "push", "allow_public", "fresh", "config_file", "save_minutes")
    # Where else the report goes.
    loose += ("space", "report_to", "card")
    # Known by their content, so that @revision, a branch or a moved folder make no difference.
    loose += ("adapter", "model_name_or_path", "model_revision", "dataset_repo")
    fixed = {name: value for name, value in vars(args).items() if name not in loose}
    today = None if contract else datetime.now(UTC).date().isoformat()
    parts: list[Any] = [without_paths(fixed), contract, today, key_of_weights(adapter, base)]
    parts.append(dataset and fingerprint(dataset))
    parts.append(profile and {name: value for name, value in profile.items() if name != "created"})
    parts += [[run.name, run.ids, run.predicted, run.scores] for run in against]
    for path in (args.identity_terms, args.card_fields):
        if path and (file := Path(path).expanduser()).is_file():
            parts.append(file.read_text(encoding="utf-8"))
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
) -> dict[str, Any] | None:
    """Answer from the files of the same evaluation, here or on the Hub, where it is finished.

    Returns its metrics.json.
    """
    if args.fresh:
        return None
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
        return None
    print(f"finished already, from {target if here else 'the Hub'}; --fresh scores again")
    metrics = json.loads((target / "metrics.json").read_text(encoding="utf-8"))
    print_summary(metrics)
    print(f"report: {target / 'report.html'}", flush=True)
    if args.report_to == "wandb":
        record = json.loads((target / CONTRACT).read_text(encoding="utf-8"))
        log_to_wandb(args, target, metrics, record, [])
    send_report(args, adapter, name, target, None, pushes and (not there or args.card is True))
    return metrics


def is_whole(folder: Path, names: tuple[str, ...] | list[str], key: str) -> bool:
    """Say whether a folder holds all files of the evaluation of this key."""
    try:
        record = json.loads((folder / CONTRACT).read_text(encoding="utf-8"))
        if record["key"] != key or not all((folder / file).is_file() for file in names):
            return False
        return all(
            hashlib.sha256((folder / file).read_bytes()).hexdigest() == record["files"][file]
            for file in names
            if file != CONTRACT
        )
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


def send_report(
    args: argparse.Namespace,
    adapter: Repo | None,
    name: str,
    folder: Path,
    scores: Path | None,
    pushes: bool,
) -> None:
    """Bring a finished report where it is asked for: adapter repo, model card, Space."""
    if adapter and pushes:
        push_files(args, adapter, name, folder, scores)
    elif adapter and adapter.folder and updates_card(args):
        card = adapter.folder / "README.md"
        if card.is_file():
            card.write_bytes(new_card(args, card.read_bytes(), folder))
    if args.space:
        push_space(args.space, folder, f"{SPACE_TITLE}: {adapter.name if adapter else name}")


def updates_card(args: argparse.Namespace) -> bool:
    """Whether the evaluation is the one that the model card is to show."""
    if args.card is not None:
        return args.card
    variants = (args.load_in_4bit, args.dataset_config, args.model_name_or_path, args.keep_mxfp4)
    variants += (args.test_file, args.dataset_repo, args.base_only, args.max_samples, args.prompt)
    usual = args.mode == "score" and args.split == "test" and args.dtype == "auto"
    return usual and not any(variants) and args.threshold == 0.5 and args.max_length is None


def keep_card_fields(section: str, card: str) -> str:
    """A section in which fields that are not stated now read as in the card's earlier section."""
    earlier = card[card.find(CARD_BEGIN) :] if CARD_BEGIN in card else ""
    for title in CARD_FIELDS.values():
        row = re.compile(rf"(?m)^\| {re.escape(title)}\s*\| (.*?)\s*\|$")
        now, before = row.search(section), row.search(earlier)
        if now and before and now[1] == "not stated":
            section = section[: now.start()] + before[0] + section[now.end() :]
    return section


def new_card(args: argparse.Namespace, card: bytes, folder: Path) -> bytes:
    """A model card with the evaluation in a folder as its section; the rest keeps its bytes."""
    metrics, record = (
        json.loads((folder / file).read_text(encoding="utf-8"))
        for file in ("metrics.json", CONTRACT)
    )
    section = build_card_section(metrics, record, read_card_fields(args.card_fields))
    text = card.decode("utf-8", "surrogateescape")
    section = keep_card_fields(section, text)
    return update_card(text, section, metrics, record).encode("utf-8", "surrogateescape")


def commit_again(name: str, operations: list[Any], message: str) -> str:
    """`commit`, once more where another commit came first (412)."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return commit(name, "model", operations, message)
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
        print(f"another commit to {name} came first; once more", flush=True)
        return commit(name, "model", operations, message)


def push_files(
    args: argparse.Namespace, adapter: Repo, name: str, folder: Path, scores: Path | None
) -> None:
    """Commit the evaluation's files to eval/NAME/ of the adapter repo, its scores beside it, and
    its section of the model card.

    The same commit removes the answers of an earlier or unfinished evaluation of the same name.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

    names: dict[str, Any] = {f"eval/{name}/{file}": folder / file for file in pushed_files(args)}
    if scores:
        names[f"eval/{scores.name}"] = scores
    with hub_errors(f"push the report in {folder} to {adapter.name}"):
        head = HfApi().repo_info(adapter.name)
        files = [file.rfilename for file in head.siblings or []]
        if updates_card(args):
            text = f"# {adapter.name}\n".encode()
            if "README.md" in files:
                card = hf_hub_download(adapter.name, "README.md", revision=head.sha)
                text = Path(card).read_bytes()
            names["README.md"] = new_card(args, text, folder)
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=file)
            for path, file in names.items()
        ]
        stale = [
            file for file in files if file.startswith(f"eval/{name}/answers.") and file not in names
        ]
        operations += [CommitOperationDelete(path_in_repo=file) for file in stale]
        made = commit_again(adapter.name, operations, f"Evaluate: {name}")
    print(f"pushed: {adapter.name}@{made} eval/{name}/", flush=True)


# --- plots -----------------------------------------------------------------------------------


def draw(plots: list[tuple[str, str, Any, tuple[float, float]]]) -> list[dict[str, Any]]:
    """Each plot as SVG text that takes the page's colours, with its title and description.

    A plot is its title, what it shows in words, a function that draws on matplotlib axes, and its
    size in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    drawn = []
    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9.5}
    style |= {"axes.edgecolor": "#57606a", "axes.labelcolor": "#1c2127", "text.color": "#1c2127"}
    style |= {"xtick.color": "#57606a", "ytick.color": "#57606a", "axes.spines.top": "False"}
    style |= {"axes.spines.right": "False", "grid.color": "#d5dae0", "legend.frameon": "False"}
    style |= {"font.family": "sans-serif", "axes.axisbelow": "True", "text.parse_math": "False"}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The reader's fonts show the text, not those that matplotlib measures it with.
        warnings.filterwarnings("ignore", message="Glyph")
        for number_, (title, words, paint, size) in enumerate(plots):
            figure = Figure(figsize=size, layout="constrained")
            paint(figure.subplots())
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
            svg = page_svg(buffer.getvalue(), f"p{number_}-", f"{title}: {words}")
            drawn.append({"title": title, "words": words, "svg": svg, "wide": size[0] > 6})
    return drawn


def page_svg(text: str, prefix: str, label: str) -> str:
    """matplotlib's SVG as part of a page: names of its own, the page's colours and fonts.

    Only tags are changed, never the text between them; what a page does not need is left out.
    """
    from html import escape

    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)
    used = {*re.findall(r'(?:href="|url\()#([^")]+)', text)}

    def page_tag(found: re.Match[str]) -> str:
        tag = re.sub(r'(href="|url\()#', rf"\1#{prefix}", found[0])
        tag = re.sub(
            r' id="([^"]*)"', lambda name: f' id="{prefix}{name[1]}"' * (name[1] in used), tag
        )
        tag = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", tag)
        tag = re.sub(r"font-family: [^;\"]*;? ?|; stroke-linejoin: miter", "", tag)
        tag = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", tag)
        tag = re.sub(r"(\d+\.\d\d)\d+", r"\1", tag)
        tag = re.sub(
            r' (d|x|y)="[^"]*"', lambda points: re.sub(r"(\.\d)\d+", r"\1", points[0]), tag
        )
        for colour, name in PAGE_COLOURS.items():
            tag = tag.replace(colour, f"var({name})")
        tag = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', "", tag)
        tag = re.sub(
            r' style="([^"]*)"',
            lambda style: f' class="{prefix}{styles.setdefault(style[1], len(styles))}"',
            tag,
        )
        # A group that says nothing goes, its end too.
        if re.match("<g[ >]", tag):
            kept.append(tag != "<g>")
        says = tag != "<g/>" and (kept.pop() if tag == "</g>" else tag != "<g>")
        return re.sub(r"\s*\n\s*", "\n", tag) if says else ""

    kept: list[bool] = []
    styles: dict[str, int] = {}
    text = re.sub(r"<[^>]*>", page_tag, text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    head = f'<svg role="img" aria-label="{escape(label)}" '
    rules = "".join(f".{prefix}{place} {{{style}}}\n" for style, place in styles.items())
    start = r'^<svg width="[^"]*" height="[^"]*"([^>]*>)'
    # A function, because a label may hold what a template takes for an escape.
    return re.sub(start, lambda found: f"{head}{found[1]}<style>{rules}</style>", text, count=1)


def build_plots(
    metrics: dict[str, Any], sample: Sample
) -> list[tuple[str, str, Any, tuple[float, float]]]:
    """The report's plots, those whose figures there are."""
    positive, negative = visible(metrics["positive_label"]), visible(metrics["negative"])
    groups, varied = filled_groups(metrics), sample.varied
    drawn = [one for one in metrics["strategies"] if one["name"] in varied]
    height = 1.1 + len(groups) * (0.12 + 0.16 * max(2, len(drawn)))
    plots: list[tuple[str, str, Any, tuple[float, float]]] = []
    for key, title, words in (
        ("false_positive_rate", "False positive rate", f"{negative} posts taken for {positive}"),
        ("false_negative_rate", "False negative rate", f"{positive} posts missed"),
    ):
        if drawn:
            plots.append((title, words, whiskers(metrics, drawn, key), (5.6, height)))
    scored = [one for one in drawn if sample.scores[one["name"]] is not None]
    both = 0 < sample.positives.sum() < len(sample.truth)
    if scored and both:
        words = f"recall of {positive} against the false positive rate, at every threshold"
        plots.append(("ROC", words, curve(sample, scored, "roc"), (5.6, 3.6)))
        words = f"precision of {positive} against its recall, at every threshold"
        plots.append(("Precision and recall", words, curve(sample, scored, "pr"), (5.6, 3.6)))
    model = metrics["strategies"][0]["name"]
    if sample.scores.get(model) is not None and both and model in varied:
        words = f"share of {positive} posts where the model says p, all posts and each group"
        plots.append(("Reliability", words, reliability(sample, model), (5.6, 3.8)))
    if metrics["sweep"]:
        words = "what another threshold would change, on these posts; choose one on others"
        plots.append(("Thresholds", words, sweep(metrics), (5.6, 3.6)))
    if metrics["functional"]:
        sides = metrics["functional"]["sides"]
        width = 3.2 + 0.62 * (len(metrics["functional"]["identities"]) + 1)
        for place, side in enumerate(sides):
            size = (width, 1.2 + 0.27 * len(side["rows"]))
            words = "accuracy per functionality and target identity, in brackets the cases"
            paint = heat_map(metrics["functional"], place)
            plots.append((f"Functional tests: {visible(side['label'])} cases", words, paint, size))
    swaps = metrics["identity_swap"]
    if swaps and swaps["pairs"]:
        size = (2.4 + 0.9 * len(swaps["groups"]), 1.2 + 0.55 * len(swaps["groups"]))
        words = "mean change of p when a row's identity term becomes the column's, and flips"
        plots.append(("Identity swaps", words, lambda axis: plot_swaps(axis, swaps), size))
    return plots


def heat_map(functional: dict[str, Any], place: int) -> Callable[[Any], None]:
    """One side of the functional tests."""
    one = functional | {"sides": [functional["sides"][place]]}
    return lambda axis: plot_functional([axis], one)


# Strategies and groups differ by mark and line, too, because colours repeat and not all tell them
# apart.
PLOT_MARKS, PLOT_LINES = "os^DvP*X", ("-", "--", "-.", ":")


def filled_groups(metrics: dict[str, Any]) -> list[str]:
    """The groups, and the row of the posts aimed at none where there are such."""
    groups = metrics["strategies"][0]["groups"]
    return [name for name, one in groups.items() if name != NO_TARGET or one["n_total"]]


def whiskers(
    metrics: dict[str, Any], drawn: list[dict[str, Any]], key: str
) -> Callable[[Any], None]:
    """Dots with 95 % whiskers: a row per group, in it a mark per strategy."""

    def paint(axis: Any) -> None:
        groups, least = filled_groups(metrics), metrics["min_denominator"]
        for place, one in enumerate(drawn):
            colour = MODEL_COLOURS[one["kind"]]
            for row, group in enumerate(groups):
                figure = one["groups"][group][key]
                y = row + (place - (len(drawn) - 1) / 2) * 0.2
                if figure["value"] is None or figure["n"] < least:
                    words = "undefined" if figure["value"] is None else "insufficient"
                    axis.text(0.01, y, words, va="center", color="#57606a", size=8)
                    continue
                axis.plot([figure["low"], figure["high"]], [y, y], color=colour, lw=1.8)
                fill = colour if place == 0 else "#ffffff"
                mark = PLOT_MARKS[place % len(PLOT_MARKS)]
                axis.plot(figure["value"], y, mark, ms=5, mfc=fill, mec=colour, mew=1.6)
        value = drawn[0]["overall"][key]["value"]
        if value is not None:
            axis.axvline(value, color=MODEL_COLOURS["model"], lw=1, ls="--", alpha=0.7)
        names = [
            f"{visible(group, 20)}\n{metrics['strategies'][0]['groups'][group][key]['n']} posts"
            for group in groups
        ]
        axis.set_yticks(range(len(groups)), names)
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.set_xlim(0, 1)
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axis.grid(axis="x")
        marks = []
        for place, one in enumerate(drawn):
            colour = MODEL_COLOURS[one["kind"]]
            mark, fill = PLOT_MARKS[place % len(PLOT_MARKS)], colour if place == 0 else "#ffffff"
            marks += axis.plot([], [], mark, ms=5, mfc=fill, mec=colour, mew=1.6)
        names = [visible(one["name"], 24) for one in drawn]
        axis.legend(marks, names, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3, fontsize=8)

    return paint


def thinned(*columns: Any, most: int = 200) -> list[Any]:
    """At most so many points of a curve, its ends among them."""
    import numpy as np

    size = len(columns[0])
    kept = np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(int))
    return [np.asarray(column)[kept] for column in columns]


def curve(sample: Sample, drawn: list[dict[str, Any]], kind: str) -> Callable[[Any], None]:
    """ROC or precision-recall curves of strategies with scores."""

    def paint(axis: Any) -> None:
        from sklearn.metrics import precision_recall_curve, roc_curve

        truth, lines, names = sample.positives, [], []
        for place, one in enumerate(drawn):
            scores = sample.scores[one["name"]]
            if kind == "roc":
                x, y, _ = roc_curve(truth, scores)
                area = one["overall"]["roc_auc"]["value"]
            else:
                y, x, _ = precision_recall_curve(truth, scores)
                area = one["overall"]["average_precision"]["value"]
            names.append(f"{visible(one['name'], 24)} {area:.3f}")
            style = PLOT_LINES[place % len(PLOT_LINES)]
            lines += axis.plot(*thinned(x, y), style, color=MODEL_COLOURS[one["kind"]], lw=1.6)
        if kind == "roc":
            axis.plot([0, 1], [0, 1], color="#57606a", lw=0.8, ls=":")
            axis.set_xlabel("false positive rate")
            axis.set_ylabel("recall")
        else:
            axis.axhline(truth.mean(), color="#57606a", lw=0.8, ls=":")
            axis.set_xlabel("recall")
            axis.set_ylabel("precision")
        axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
        axis.grid()
        axis.legend(lines, names, loc=f"lower {'right' if kind == 'roc' else 'left'}", fontsize=8)

    return paint


def reliability(sample: Sample, model: str) -> Callable[[Any], None]:
    """Share of positive posts against the mean score, in bins of equally many posts."""

    def paint(axis: Any) -> None:
        import numpy as np

        scores, positive = sample.scores[model], sample.positives
        places = {"all posts": np.ones(len(scores), dtype=bool)}
        places |= {
            group: sample.members[group]
            for group in sample.groups
            if sample.members[group].sum() >= MIN_DENOMINATOR
        }
        axis.plot([0, 1], [0, 1], color="#57606a", lw=0.8, ls=":")
        lines, names = [], []
        colours = [MODEL_COLOURS["model"], *[c for k, c in MODEL_COLOURS.items() if k != "model"]]
        for number_, (place, posts) in enumerate(places.items()):
            bins = equal_mass_bins(scores[posts], 10 if number_ == 0 else 5)
            counts = np.bincount(bins)
            kept = counts > 0
            x = np.bincount(bins, weights=scores[posts])[kept] / counts[kept]
            hits = np.bincount(bins, weights=positive[posts])[kept].astype(int)
            y, colour = hits / counts[kept], colours[number_ % len(colours)]
            names.append(f"{visible(place, 20)} ({posts.sum()})")
            style = PLOT_MARKS[number_ % len(PLOT_MARKS)] + PLOT_LINES[number_ % len(PLOT_LINES)]
            lines += axis.plot(x, y, style, ms=4, lw=2 if number_ == 0 else 1.1, color=colour)
            if number_ == 0:
                pairs = zip(hits, counts[kept], strict=True)
                ends = np.array([wilson(int(hit), int(n)) for hit, n in pairs])
                axis.vlines(x, ends[:, 0], ends[:, 1], color=colour, lw=1, alpha=0.6)
        axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), xlabel="mean p", ylabel="share positive")
        axis.grid()
        axis.legend(lines, names, loc="upper left", fontsize=8, handlelength=3)

    return paint


def sweep(metrics: dict[str, Any]) -> Callable[[Any], None]:
    """Error rates, F1 and gaps over the threshold."""
    lines = {
        "false_positive_rate": ("false positive rate", "#8a5a00", "-"),
        "false_negative_rate": ("false negative rate", "#6b3fa0", "-"),
        "f1": (f"F1 {visible(metrics['positive_label'])}", "#0a5bb0", "-"),
        "gap_false_positive_rate": ("gap of the FPR", "#8a5a00", "--"),
        "gap_false_negative_rate": ("gap of the FNR", "#6b3fa0", "--"),
    }

    def paint(axis: Any) -> None:
        found = metrics["sweep"]
        for key, (name, colour, style) in lines.items():
            if key in found:
                values = [math.nan if value is None else value for value in found[key]]
                axis.plot(found["threshold"], values, style, color=colour, lw=1.5, label=name)
        if metrics["threshold"] is not None:
            axis.axvline(metrics["threshold"], color="#57606a", lw=1, ls=":")
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="threshold of p")
        axis.grid()
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8)

    return paint


# --- report ----------------------------------------------------------------------------------

# Rates, shown in per cent and their differences in points; all else is a number from 0 or -1 to 1.
RATES = (
    *("accuracy", "balanced_accuracy", "precision", "recall", "false_positive_rate"),
    *("false_negative_rate", "flag_rate"),
)
TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "precision": "precision",
    "recall": "recall",
    "false_positive_rate": "false positive rate",
    "false_negative_rate": "false negative rate",
    "flag_rate": "flagged",
    "f1": "F1",
    "f1_macro": "macro F1",
    "f1_weighted": "weighted F1",
    "mcc": "MCC",
    "roc_auc": "AUROC",
    "bpsn_auc": "BPSN AUC",
    "bnsp_auc": "BNSP AUC",
    "average_precision": "average precision",
    "brier": "Brier score",
    "ece": "ECE",
}
MODEL_COLOURS = {
    "model": "#0a5bb0",
    "baseline": "#8a5a00",
    "compared": "#6b3fa0",
    "base": "#00655a",
    "against": "#a3195b",
}
# Colours that the page replaces by its own, which differ in the dark.
PAGE_COLOURS = {
    "#1c2127": "--ink",
    "#57606a": "--soft",
    "#d5dae0": "--line",
    "#ffffff": "--paper",
} | {colour: f"--{kind}" for kind, colour in MODEL_COLOURS.items()}


def f1_name(metrics: dict[str, Any]) -> str:
    return f"f1_{metrics['positive_label']}"


def title_of(key: str) -> str:
    """A figure's name for people; `f1_hate` is `F1 hate`."""
    return TITLES.get(key) or f"F1 {visible(key.removeprefix('f1_'))}"


def shown(key: str, figure: dict[str, Any], least: int = 0) -> str:
    """A figure as people read it: `8.5 % [6.1, 11.6]`, `0.812 [0.790, 0.833]`.

    Undefined ones say why; a rate of fewer than `least` posts is `insufficient (7 posts)`.
    """
    if figure["value"] is None:
        return f"undefined ({visible(figure['reason'], 100)})"
    counted = figure.get("least", figure["n"])
    if counted < least:
        return f"insufficient ({counted} posts)"
    scale, digits, unit = (100, 1, " %") if key in RATES else (1, 3, "")
    text = f"{scale * figure['value']:.{digits}f}{unit}"
    if figure["low"] is None:
        return text
    return f"{text} [{scale * figure['low']:.{digits}f}, {scale * figure['high']:.{digits}f}]"


def shown_difference(key: str, figure: dict[str, Any], p: str = "p") -> str:
    """A difference with its sign: `+6.1 points [1.2, 11.0], p 0.012`."""
    if figure["value"] is None:
        return f"undefined ({visible(figure['reason'], 100)})"
    scale, digits, unit = (100, 1, " points") if key in RATES else (1, 3, "")
    text = f"{scale * figure['value']:+.{digits}f}{unit}"
    if figure["low"] is not None:
        text += f" [{scale * figure['low']:.{digits}f}, {scale * figure['high']:.{digits}f}]"
    if figure.get(p) is not None:
        text += f", {shown_p(figure[p])}"
    return text


def shown_p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def overall_table(metrics: dict[str, Any]) -> list[list[str]]:
    """The strategies over all posts, header first."""
    keys = ("accuracy", "precision", "recall", f1_name(metrics), "f1_macro", "roc_auc")
    return figure_table(metrics, keys)


def label_table(metrics: dict[str, Any]) -> list[list[str]]:
    """Each label of the model against all others, header first; of two labels nothing more."""
    figures = metrics["strategies"][0]["overall"]
    rows = [["label", "posts", "precision", "recall", "F1"]]
    if figures is None or len(figures["labels"]) == 2:
        return []
    for label, one in figures["per_label"].items():
        cells = [shown(key, one[key]) for key in ("precision", "recall", "f1")]
        rows.append([visible(label), str(one["n"]), *cells])
    return rows


def further_table(metrics: dict[str, Any]) -> list[list[str]]:
    """The rest of the figures over all posts, header first."""
    keys = ("balanced_accuracy", "mcc", "f1_weighted", "average_precision", "brier", "ece")
    return figure_table(metrics, keys)


def figure_table(metrics: dict[str, Any], keys: tuple[str, ...]) -> list[list[str]]:
    rows = [["strategy", *(title_of(key) for key in keys)]]
    for strategy in metrics["strategies"]:
        figures = strategy["overall"]
        if figures is None:
            cells = [f"undefined ({visible(strategy['reason'], 100)})", *[""] * (len(keys) - 1)]
        else:
            cells = [shown(key, figures[key]) for key in keys]
        rows.append([visible(strategy["name"]), *cells])
    return rows


def group_table(metrics: dict[str, Any], strategies: list[dict[str, Any]]) -> list[list[str]]:
    """A row per target group and strategy that gave answers, header first."""
    positive = metrics["positive_label"]
    keys = ("false_positive_rate", "false_negative_rate", "precision", f1_name(metrics), "roc_auc")
    rows = [["target group", "posts", visible(positive), "strategy", *map(title_of, keys)]]
    for group in filled_groups(metrics):
        for strategy in strategies:
            figures = strategy["groups"][group]
            if figures is None or (figures["n"] == 0 and strategy["kind"] == "baseline"):
                continue
            counts = [str(figures["n"]), str(figures["labels"][positive])]
            cells = [shown(key, figures[key], metrics["min_denominator"]) for key in keys]
            rows.append([visible(group), *counts, visible(strategy["name"]), *cells])
    return rows


def gap_table(metrics: dict[str, Any]) -> list[list[str]]:
    """How far each group's error rates are from those of all other posts, header first."""
    rows = [["error rate", "group", "posts", "against all others", "stands out"]]
    bias = metrics["strategies"][0]["bias"]
    for rate, gap in (bias or {"gaps": {}})["gaps"].items():
        title = title_of(rate)
        words = "cannot be tested"
        if gap["significant"] is not None:
            words = "more than chance" if gap["significant"] else "not shown"
        widest = shown_gap(gap["max_min"], rate)
        n = gap["max_min"]["n"]
        rows.append([title, "largest gap", f"{n} group{'s' * (n != 1)}", widest, words])
        for group, one in gap["groups"].items():
            if group == NO_TARGET:
                continue
            away = shown_difference(rate, one["vs_rest"], "p_holm")
            away += f" ({shown_difference(rate, one['vs_overall'])} against all posts)"
            said = {None: "cannot be tested", True: "yes", False: "no"}[one["significant"]]
            rows.append([title, visible(group), str(one["vs_rest"]["n"]), away, said])
        for group in gap["left_out"]:
            n = metrics["strategies"][0]["groups"][group][rate]["n"]
            few = "insufficient" if n else "undefined"
            rows.append([title, visible(group), str(n), few, "cannot be tested"])
        ratio = shown("ratio", gap["min_max_ratio"])
        rows.append([title, "smallest / largest", f"{gap['max_min']['n']} groups", ratio, ""])
    for key in ("equalized_odds_difference", "demographic_parity_difference"):
        if bias:
            figure, title = bias[key], key.replace("_", " ")
            said = shown_gap(figure, "flag_rate")
            rows.append([title, "largest gap", f"{figure['n']} groups", said, ""])
    return rows if len(rows) > 1 else []


def shown_gap(figure: dict[str, Any], key: str) -> str:
    """A largest gap, which has no sign."""
    return shown_difference(key, figure, "p_holm").removeprefix("+")


def bias_auc_table(metrics: dict[str, Any]) -> list[list[str]]:
    """Threshold-free bias of the model: AUCs of each group and their power mean, header first."""
    model, keys = metrics["strategies"][0], ("roc_auc", "bpsn_auc", "bnsp_auc", "ece")
    if not model["bias"] or model["overall"]["roc_auc"]["value"] is None:
        return []
    rows = [["target group", "subgroup AUC", "BPSN AUC", "BNSP AUC", "ECE"]]
    for group, figures in model["groups"].items():
        if group != NO_TARGET:
            cells = [shown(key, figures[key], metrics["min_denominator"]) for key in keys]
            rows.append([visible(group), *cells])
    means = model["bias"]["power_means"]
    return [*rows, ["power mean (p = -5)", *(shown(key, means[key]) for key in keys[:3]), ""]]


def comparison_table(metrics: dict[str, Any]) -> list[list[str]]:
    """The model's figures less those of each other strategy, header first."""
    keys = ("accuracy", "f1", "false_positive_rate", "false_negative_rate", "roc_auc")
    rows = [["model less", *map(title_of, keys)]]
    for one in metrics["comparisons"]:
        cells = [shown_difference(key, one["overall"][key]) for key in keys]
        rows.append([visible(one["second"]), *cells])
    return rows if len(rows) > 1 else []


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


def unparsed_table(metrics: dict[str, Any]) -> list[list[str]]:
    """What answers without label would change, header first; or no rows."""
    keys = ("accuracy", f1_name(metrics), "false_positive_rate", "false_negative_rate")
    rows = [["strategy", "answers without label", *map(title_of, keys)]]
    for strategy in metrics["strategies"]:
        if not strategy.get("unparsed"):
            continue
        cases = {"left out": strategy["overall"]}
        cases |= {
            rule.replace("_", " "): one["overall"] for rule, one in strategy["unparsed"].items()
        }
        for rule, figures in cases.items():
            cells = [shown(key, figures[key]) for key in keys]
            rows.append([visible(strategy["name"]), visible(rule), *cells])
    return rows if len(rows) > 1 else []


def slice_tables(metrics: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """The model's figures by each column that posts were sliced by: its name and its table."""
    keys = ("accuracy", "false_positive_rate", "false_negative_rate", f1_name(metrics))
    tables = []
    for column, parts in metrics["slices"].items():
        rows = [[visible(column), "posts", *map(title_of, keys)]]
        for value, figures in parts.items():
            cells = [shown(key, figures[key], metrics["min_denominator"]) for key in keys]
            rows.append([visible(value), str(figures["n"]), *cells])
        tables.append((visible(column), rows))
    return tables


def prevalence_table(metrics: dict[str, Any]) -> list[list[str]]:
    """What the error rates mean where few posts are positive, header first; or no rows."""
    rows = [["prevalence", "posts of", "precision", "flags per 10,000", "of them wrong"]]
    for one in metrics["prevalence"]:
        for place, figures in one["places"].items():
            name = "all" if place == "overall" else visible(place)
            cells = [shown("precision", figures["precision"])]
            for key in ("flags", "wrong_flags"):
                figure = figures[key]
                text = shown(key, figure)
                if figure["value"] is not None:
                    text = f"{figure['value']:.0f} [{figure['low']:.0f}, {figure['high']:.0f}]"
                cells.append(text)
            rows.append([f"{one['prevalence']:g}", name, *cells])
    return rows if len(rows) > 1 else []


def offensive_table(metrics: dict[str, Any]) -> list[list[str]]:
    """The same predictions under three rules for offensive posts, header first; or no rows."""
    keys = ("false_positive_rate", "false_negative_rate", f1_name(metrics))
    rows = [["offensive posts", "posts of", "posts", *map(title_of, keys)]]
    for rule, places in (metrics["offensive_rules"] or {}).items():
        for place, figures in places.items():
            name = "all" if place == "overall" else visible(place)
            cells = [shown(key, figures[key], metrics["min_denominator"]) for key in keys]
            rows.append(
                [f"as {rule}" if rule != "dropped" else rule, name, str(figures["n"]), *cells]
            )
    return rows if len(rows) > 1 else []


def human_table(metrics: dict[str, Any]) -> list[list[str]]:
    """One annotator against the others, and the model against the same others; or no rows."""
    people = metrics["people"]
    if not people or people.get("reason"):
        return []
    keys = ("accuracy", "f1", "false_positive_rate", "false_negative_rate")
    rows = [["judged by the other annotators", "votes", *map(title_of, keys)]]
    for name, words in (("annotator", "one annotator"), ("model", "the model")):
        cells = [shown(key, people[name][key]) for key in keys]
        rows.append([words, str(people["votes"]), *cells])
    return rows


def load_table(metrics: dict[str, Any]) -> list[list[str]]:
    """What the profile leaves to people, header first; or no rows."""
    rows = [["posts of", "posts", "allowed", "for review", "acted on"]]
    for place, parts in (metrics["profile"] or {"places": {}})["places"].items():
        cells = [shown("flag_rate", parts[part]) for part in ("allow", "review", "act")]
        name = "all" if place == "overall" else visible(place)
        rows.append([name, str(parts["allow"]["n"]), *cells])
    return rows if len(rows) > 1 else []


def evasion_table(metrics: dict[str, Any]) -> list[list[str]]:
    """Recall before and after each way of evading, header first; or no rows."""
    rows = [["change", "posts of", "posts", "recall before", "recall after", "recall lost"]]
    for kind, figures in ((metrics["evasion"] or {}).get("kinds") or {}).items():
        places = {"all": figures, **figures["groups"]}
        for place, one in places.items():
            cells = [shown("recall", one[key]) for key in ("recall_before", "recall_after")]
            away = one["recall_lost"] | {"p_holm": one.get("p_holm")}
            lost = shown_difference("recall", away, "p_holm")
            n = str(one["recall_before"]["n"])
            rows.append([visible(kind), visible(place), n, *cells, lost])
    return rows if len(rows) > 1 else []


def swap_words(metrics: dict[str, Any]) -> str:
    swaps = metrics["identity_swap"]
    if not swaps:
        return ""
    left_out = [f"{visible(one['group'])}: {one['reason']}" for one in swaps["left_out"]]
    return " ".join([swaps["assumption"], *(f"Left out: {text}." for text in left_out)])


def swap_table(metrics: dict[str, Any]) -> list[list[str]]:
    """Flip rate and mean change of p per pair of groups, header first; or no rows."""
    positive, negative = metrics["positive_label"], metrics["negative"]
    rows = [["from", "to", "texts", "flipped", "mean change of p"]]
    rows[0] += [f"flipped, {visible(label)}" for label in (negative, positive)]
    for pair in (metrics["identity_swap"] or {"pairs": []})["pairs"]:
        cells = [
            shown("flag_rate", pair["flip_rate"], metrics["min_denominator"]),
            shown_difference("brier", pair["mean_change"]),
        ]
        cells += [
            shown("flag_rate", pair["parts"]["all"][label]["flip_rate"], metrics["min_denominator"])
            for label in (negative, positive)
        ]
        names = [visible(pair["source"]), visible(pair["target"])]
        rows.append([*names, str(pair["flip_rate"]["n"]), *cells])
    return rows if len(rows) > 1 else []


def contrast_table(metrics: dict[str, Any]) -> list[list[str]]:
    """How often contrasts are told apart, per target identity, header first; or no rows."""
    contrasts = (metrics["functional"] or {}).get("contrasts")
    if not contrasts or contrasts["reason"]:
        return []
    rows = [["target identity", "pairs", "both right", "told apart by p"]]
    for name, one in {"all": contrasts, **contrasts["identities"]}.items():
        cells = [
            shown("recall", one[key], metrics["min_denominator"])
            for key in ("both_right", "told_apart")
        ]
        rows.append([visible(name), str(one["n"]), *cells])
    return rows


def build_verdict(metrics: dict[str, Any]) -> list[str]:
    """What the figures say, a sentence each, every figure with its interval."""
    model = metrics["strategies"][0]
    return [
        describe_errors(metrics, model),
        *describe_comparisons(metrics),
        *describe_gaps(metrics, model),
        *describe_behaviour(metrics),
        *describe_undefined(metrics, model),
    ]


def describe_errors(metrics: dict[str, Any], model: dict[str, Any]) -> str:
    """The model's two error rates in words."""
    positive, negative = visible(metrics["positive_label"]), visible(metrics["negative"])
    figures, name = model["overall"], visible(model["name"])
    flagged, missed = figures["false_positive_rate"], figures["false_negative_rate"]
    return (
        f"{name} takes {figures['false_positive']} of {flagged['n']} {negative} posts for "
        f"{positive} (false positive rate {shown('false_positive_rate', flagged)}) and misses "
        f"{figures['false_negative']} of {missed['n']} {positive} posts (false negative rate "
        f"{shown('false_negative_rate', missed)}); F1 of {positive} "
        f"{shown('f1', figures[f1_name(metrics)])}."
    )


def describe_comparisons(metrics: dict[str, Any]) -> list[str]:
    """Against what it is better or worse in F1, and where there is no evidence of either."""
    words: dict[str, list[str]] = {"better": [], "worse": [], "even": []}
    for one in metrics["comparisons"]:
        away, name = one["overall"]["f1"], visible(one["second"])
        # Where all resamples agree F1 has no interval; right and wrong decisions still have a test.
        p = away.get("p_holm", one["overall"]["accuracy"].get("p_holm"))
        kind = "even"
        if away["value"] and p is not None and p < 0.05:
            kind = "better" if away["value"] > 0 else "worse"
        words[kind].append(f"{name} ({shown_difference('f1', away, 'p_holm')})")
    sentences = []
    if words["better"]:
        sentences.append(f"Its F1 is higher than that of {', '.join(words['better'])}.")
    if words["worse"]:
        sentences.append(f"Its F1 is lower than that of {', '.join(words['worse'])}.")
    if words["even"]:
        sentences.append(f"No evidence of a difference in F1 from {', '.join(words['even'])}.")
    return sentences


def describe_gaps(metrics: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Whether groups' error rates differ by more than chance, and which group stands out."""
    sentences = []
    for rate, gap in (model["bias"] or {"gaps": {}})["gaps"].items():
        title, widest = title_of(rate), gap["max_min"]
        if widest["value"] is None:
            sentences.append(f"Gap of the {title}: undefined ({visible(widest['reason'])}).")
            continue
        size = shown_gap(widest, rate)
        if not gap["significant"]:
            sentences.append(
                f"Gap of the {title} between groups: {size}; not shown to be more than chance"
                + (
                    f", and up to {100 * widest['high']:.1f} points are not excluded."
                    if widest["high"] is not None
                    else "."
                )
            )
            continue
        out = [
            f"{visible(group)} ({shown_difference(rate, one['vs_rest'], 'p_holm')} to the rest)"
            for group, one in gap["groups"].items()
            if one["significant"]
        ]
        who = "; no single group stands out"
        if out:
            who = f"; {' and '.join(out)} {'stands' if len(out) == 1 else 'stand'} out"
        sentences.append(f"Gap of the {title} between groups: {size}, more than chance gives{who}.")
    return sentences


def describe_undefined(metrics: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """What the report cannot say: empty and small cells, answers without label."""
    sentences, least = [], metrics["min_denominator"]
    for words, is_such in (
        ("Undefined for want of posts", lambda n: n == 0),
        (f"Fewer than {least} posts, too few to conclude from", lambda n: 0 < n < least),
    ):
        parts = []
        for rate in ("false_positive_rate", "false_negative_rate"):
            groups = [
                f"{visible(group)} ({figures[rate]['n']})"
                for group, figures in model["groups"].items()
                if group != NO_TARGET and is_such(figures[rate]["n"])
            ]
            parts += [f"{title_of(rate)} of {', '.join(groups)}"] if groups else []
        sentences += [f"{words}: {'; '.join(parts)}."] if parts else []
    lost = model["overall"]["n_unparsed"]
    if lost:
        sentences.append(
            f"{lost} of {metrics['n']} answers have no label; rates leave them out, and the table "
            "of answers without label shows what they would change."
        )
    return sentences


def describe_behaviour(metrics: dict[str, Any]) -> list[str]:
    """The worst of what the functional tests, evasion and identity swaps show."""
    sentences = []
    if metrics["functional"]:
        rows = [row for side in metrics["functional"]["sides"] for row in side["rows"]]
        enough = [row for row in rows if row["accuracy"]["n"] >= metrics["min_denominator"]]
        weakest = sorted(enough, key=lambda row: row["accuracy"]["value"])[:3]
        named = [
            f"{visible(row['functionality'])} ({shown('accuracy', row['accuracy'])})"
            for row in weakest
        ]
        named = named or ["none has enough cases"]
        sentences.append(f"Weakest of {len(rows)} functional tests: {', '.join(named)}.")
    kinds = (metrics["evasion"] or {}).get("kinds") or {}
    lost = {kind: one["recall_lost"] for kind, one in kinds.items()}
    known = {kind: figure for kind, figure in lost.items() if figure["value"] is not None}
    if known:
        kind = max(known, key=lambda name: known[name]["value"])
        cost = shown_difference("recall", known[kind])
        sentence = f"Of {len(known)} ways to evade, {visible(kind)} costs most recall: {cost}."
        if known[kind]["low"] is None or known[kind]["low"] <= 0:
            sentence = (
                f"None of {len(known)} ways to evade is shown to cost recall (most: "
                f"{visible(kind)}, {cost}); a model that flags whatever looks odd seems robust."
            )
        sentences.append(sentence)
    pairs = [
        pair
        for pair in (metrics["identity_swap"] or {}).get("pairs") or []
        if pair["flip_rate"]["n"] >= metrics["min_denominator"]
    ]
    if pairs:
        pair = max(pairs, key=lambda one: abs(one["mean_change"]["value"] or 0))
        sentences.append(
            f"Of {len(pairs)} identity swaps, {visible(pair['source'])} to "
            f"{visible(pair['target'])} moves p most: "
            f"{shown_difference('brier', pair['mean_change'])}, "
            f"{shown('flag_rate', pair['flip_rate'])} of the decisions flip."
        )
    return sentences


def describe_run(metrics: dict[str, Any], record: dict[str, Any]) -> list[tuple[str, str]]:
    """How the figures were made: commits, settings, packages and the command."""

    def pinned(repo: dict[str, Any] | None) -> str:
        if repo is None:
            return "none"
        return (
            f"{repo['repo']}@{repo['revision']}" if repo["revision"] else f"{repo['repo']} (folder)"
        )

    threshold = metrics["threshold"]
    rule = "as the file decides" if record["predictions"] else "the likeliest label"
    if threshold is not None:
        rule = f"{metrics['positive_label']} from p = {threshold:.6g} on"
    if record["profile"]:
        rule += f" (profile {record['profile']['name']} of decisions.json)"
    made: list[tuple[str, str]] = []
    file = record["test_file"]
    scored = f"{file['file']}, SHA-256 {file['sha256']}" if file else f"split {record['split']}"
    if record["predictions"]:
        file = record["predictions"]
        made.append(("Predictions", f"{file['file']}, SHA-256 {file['sha256']}"))
    else:
        prompt, rendering = record["prompt"], record["rendering"]
        made += [
            ("Adapter", pinned(record["adapter"]) + (" (not used)" if record["base_only"] else "")),
            ("Base model", pinned(record["base_model"])),
            ("Dataset", pinned(record["dataset"])),
            ("Posts", scored),
            (
                "Prompt",
                f"{prompt['name']}, dated {rendering['date']}" if prompt else "none (classifier)",
            ),
            ("Length", f"{rendering['max_length']} tokens; {metrics['cut_posts']} posts cut to it"),
            ("Computed on", f"{record['device']}, {record['dtype']}"),
            ("Scores", describe_scoring(record["scoring"])),
        ]
    made += [
        ("Decision", rule),
        (
            "Intervals",
            f"95 %; Wilson for rates and F1, Newcombe for differences of rates, Donner and Zou for "
            f"ratios, BCa bootstrap with {metrics['resamples']:,} resamples for all else; seed "
            f"{record['arguments']['seed']}",
        ),
        ("Script", f"{SCRIPT}, SHA-256 {record['script_sha256']}"),
        ("Packages", ", ".join(f"{name} {number}" for name, number in record["packages"].items())),
        ("Made", record["created"]),
        ("Command", repeat_command(record)),
    ]
    return [(name, visible(value, 600)) for name, value in made]


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
    left_out |= {"space", "report_to", "card", *(["threshold"] if arguments["profile"] else [])}
    if "model_name_or_path" in named:
        left_out.add("model_revision")
    for name, value in arguments.items():
        if name in left_out or value in (parser.get_default(name), []):
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        listed = value if isinstance(value, (list, tuple)) else [value]
        words += [
            f"--{name}",
            *(str(one).lower() if one in (True, False) else str(one) for one in listed),
        ]
    return shlex.join(words)


def build_page(
    metrics: dict[str, Any],
    record: dict[str, Any],
    sample: Sample,
    errors: list[dict[str, Any]],
) -> dict[str, Any]:
    """Everything that report.html and report.md say, as text that is safe to escape."""
    if record["predictions"]:
        subject = record["predictions"]["file"]
    else:
        subject = (record["adapter"] or record["base_model"])["repo"]
        if record["base_only"]:
            subject = f"{subject} without adapter"
    learned = [one for one in metrics["strategies"] if not one["name"].startswith("always_")]
    plots = draw(build_plots(metrics, sample))
    return {
        "title": f"Bias report: {visible(subject)}",
        "subtitle": f"{visible(record['name'])} · {metrics['n']} posts · {record['created'][:10]}",
        "verdict": build_verdict(metrics),
        "gates": gate_table(metrics),
        "overall": overall_table(metrics),
        "comparison": comparison_table(metrics),
        "groups": group_table(metrics, learned),
        "gaps": gap_table(metrics),
        "bias_auc": bias_auc_table(metrics),
        "sections": build_sections(metrics),
        "plots": plots,
        "errors": [describe_error(one, metrics["positive_label"]) for one in errors],
        "positive": visible(metrics["positive_label"]),
        "negative": visible(metrics["negative"]),
        "min_denominator": metrics["min_denominator"],
        "limits": LIMITS,
        "made": describe_run(metrics, record),
    }


def build_sections(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The further tables, each with a title and what it says; those without rows are left out."""
    people = metrics["people"] or {}
    away = people.get("away", {}).get("accuracy")
    sections = [
        (
            "Answers without label",
            "Rates leave them out; here each row counts them in another way. Whatever the labels "
            "were, error rates lie between the last two rows, and accuracy is no lower than as "
            "errors.",
            unparsed_table(metrics),
        ),
        (
            "Written answers",
            "ok: a label in the prompt's form. unparsed: none. truncated: no end within the "
            "allowed tokens; a label that already stands there is read.",
            answer_table(metrics),
        ),
        (
            "Each label against all others",
            "Of the model; weighted F1 below is the mean of the labels' F1, by their posts.",
            label_table(metrics),
        ),
        (
            "Further figures over all posts",
            "ECE in bins of equally many posts; it is biased upwards where posts are few.",
            further_table(metrics),
        ),
        *(
            (f"By {name}", "Kinds of posts differ in more than this one column.", rows)
            for name, rows in slice_tables(metrics)
        ),
        (
            "Review load of the profile",
            "Posts below the review cut-off are allowed, from the act cut-off on the detector "
            "acts, and people see those between.",
            load_table(metrics),
        ),
        (
            "Evasion",
            "Posts of the positive label, changed as people change them to pass a filter; recall "
            "of the same posts before and after.",
            evasion_table(metrics),
        ),
        (
            "Identity swaps",
            swap_words(metrics),
            swap_table(metrics),
        ),
        (
            "Contrast pairs of the functional tests",
            "A case and its minimal opposite: both decided rightly, and p higher for the "
            f"{visible(metrics['positive_label'])} one.",
            contrast_table(metrics),
        ),
        (
            "At the prevalence of real life",
            "What the same error rates mean where few posts are positive. Intervals put both "
            "rates at their unfavourable ends together.",
            prevalence_table(metrics),
        ),
        (
            "Offensive posts under three rules",
            "The same predictions; only the label of offensive posts changes.",
            offensive_table(metrics),
        ),
        (
            "Against people",
            "Each annotator's vote against the majority of the post's others, and the model "
            "against the same majorities."
            + (
                f" Model less annotator, accuracy: {shown_difference('accuracy', away)}."
                if away
                else ""
            ),
            human_table(metrics),
        ),
    ]
    return [
        {"title": title, "words": words, "rows": rows} for title, words, rows in sections if rows
    ]


def list_errors(posts: list[dict[str, Any]], task: Task, with_text: bool) -> list[dict[str, Any]]:
    """The wrongly decided posts, the most confident first; with their text only where asked for.

    Confidence is the probability of the given answer; answers without probability come last, in
    the posts' order.
    """
    errors = []
    for post in posts:
        if post["prediction"] == post["label"] or post["prediction"] is None:
            continue
        p = (post["probabilities"] or {}).get(task.positive)
        confidence = (post["probabilities"] or {}).get(post["prediction"])
        kind = "other"
        if task.positive in (post["label"], post["prediction"]):
            kind = "false negative" if post["label"] == task.positive else "false positive"
        errors.append(
            {
                "id": post["id"],
                "error": kind,
                "label": post["label"],
                "prediction": post["prediction"],
                f"p_{task.positive}": p,
                "confidence": confidence,
                "target_groups": "|".join(post["target_groups"]),
                "near_tie": str(post["near_tie"]).lower(),
            }
            | ({"text": post["text"] or ""} if with_text else {})
        )
    return sorted(
        errors, key=lambda row: -1 if row["confidence"] is None else row["confidence"], reverse=True
    )


def describe_error(error: dict[str, Any], positive: str) -> dict[str, str]:
    """An error as the page lists it, with its text where there is one."""
    p = error[f"p_{positive}"]
    cells = {
        "id": visible(error["id"]),
        "error": error["error"],
        "label": visible(error["label"]),
        "p": "" if p is None else f"{p:.3f}",
        "groups": visible(error["target_groups"].replace("|", ", ")),
    }
    return cells | ({"text": visible(error["text"], 5000)} if "text" in error else {})


def text_table(rows: list[list[str]]) -> list[str]:
    """Rows as lines whose columns stand below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def build_text(metrics: dict[str, Any]) -> str:
    """evaluation_report.txt, and what is printed at the end: the verdict and the main tables.

    Reasons of undefined figures are in the other reports; here the columns stay narrow.
    """
    learned = [one for one in metrics["strategies"] if not one["name"].startswith("always_")]
    parts = [
        ("", overall_table(metrics)),
        ("Each label against all others", label_table(metrics)),
        ("", group_table(metrics, learned)),
        ("Against the rest of the posts", gap_table(metrics)),
        ("At the prevalence of real life", prevalence_table(metrics)),
        ("Gates", gate_table(metrics)),
    ]
    reasons = [
        f"{visible(one['name'])}: undefined ({visible(one['reason'], 200)})"
        for one in metrics["strategies"]
        if one["overall"] is None
    ]
    lines: list[str] = []
    for title, rows in parts:
        short = [[re.sub(r"^undefined \(.*", "undefined", cell) for cell in row] for row in rows]
        if rows:
            lines += ["", *([title] if title else []), *text_table(short)]
    lines += ["", *(f"* {sentence}" for sentence in build_verdict(metrics))]
    lines += [f"* {reason}" for reason in reasons]
    lines += [
        "",
        "[low, high]: 95 % interval. p, corrected (Holm): of gaps for both rates, of groups for "
        "all groups and rates.",
    ]
    return "\n".join(lines) + "\n"


def print_summary(metrics: dict[str, Any]) -> None:
    """Print the figures over all posts and per target group, and what they say."""
    print(build_text(metrics), flush=True)


def build_markdown(page: dict[str, Any]) -> str:
    """report.md: the same as report.html without the plots and without the list of errors."""
    lines = [f"# {markdown_cell(page['title'])}", "", markdown_cell(page["subtitle"]), ""]
    lines += [*(f"- {markdown_cell(sentence)}" for sentence in page["verdict"]), ""]
    parts = [
        ("Gates", "", page["gates"]),
        ("By target group", "", page["groups"]),
        ("Against the rest of the posts", "", page["gaps"]),
        ("All posts", "", page["overall"]),
        ("Compared on the same posts", "", page["comparison"]),
        ("Ranking within and between groups", "", page["bias_auc"]),
        *((one["title"], one["words"], one["rows"]) for one in page["sections"]),
    ]
    for title, words, rows in parts:
        if rows:
            lines += [
                f"## {markdown_cell(title)}",
                "",
                *([markdown_cell(words), ""] if words else []),
            ]
            lines += [markdown_table(rows[0], rows[1:]), ""]
    lines += ["Brackets hold 95 % intervals.", "", "## What these figures do not say", ""]
    lines += [f"- {limit}" for limit in page["limits"]]
    lines += ["", "## How they were made", ""]
    return "\n".join([*lines, markdown_table(["", ""], [*map(list, page["made"])]), ""])


def markdown_table(header: list[str], lines: list[list[Any]]) -> str:
    """A Markdown table whose columns also line up on a terminal."""
    cells = [[markdown_cell(str(cell)) for cell in line] for line in [header, *lines]]
    widths = [max(len(line[place]) for line in cells) for place in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))} |"
        for line in cells
    )


PAGE = """{% macro figure(cell) -%}
{% set dim = cell.startswith("undefined") or cell.startswith("insufficient") %}
<td{% if dim %} class="undefined"{% endif %}>{{ cell }}</td>
{%- endmacro %}
{% macro table(rows, first_is_model=false) %}
<div class="scroll" tabindex="0" role="group" aria-label="table"><table class="figures">
<thead><tr>{% for cell in rows[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows[1:] %}
<tr{% if first_is_model and loop.first %} class="model"{% endif %}><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}{{ figure(cell) }}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2127; --soft: #57606a; --line: #d5dae0;
  --band: #f4f6f8; --model: #0a5bb0; --baseline: #8a5a00; --compared: #6b3fa0; --base: #00655a;
  --against: #a3195b; --bad: #a1260d; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e8ec;
  --soft: #a0abb6; --line: #343c45; --band: #1c2229; --model: #74b3ff; --baseline: #dca94f;
  --compared: #c9a3ff; --base: #5fd3c0; --against: #ff9ac6; --bad: #ff9b85; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 0; font-size: 1rem; }
.scroll + h3 { margin-top: 1.5rem; }
p { max-width: 46rem; margin: .5rem 0; }
a { color: var(--model); }
.soft { color: var(--soft); font-size: .9rem; }
.verdict { margin: 1.25rem 0 0; padding: .9rem 1.1rem; border: 1px solid var(--line);
  border-left: 4px solid var(--model); background: var(--band); }
.verdict ul { margin: 0; padding-left: 1.1rem; }
.verdict li { max-width: 60rem; }
.scroll { overflow-x: auto; }
:focus-visible { outline: 2px solid var(--model); outline-offset: 2px; }
table { width: 100%; border-collapse: collapse; font-size: .86rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .65rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: baseline; }
.figures thead th { color: var(--soft); font-weight: 600; white-space: normal; }
tbody th { font-weight: 600; }
.figures td, .figures th { white-space: nowrap; }
.figures .undefined { color: var(--soft); white-space: normal; min-width: 8rem; }
.model td, .model th { color: var(--model); }
tr.first td, tr.first th { border-top: 2px solid var(--line); }
.made th { width: 9rem; color: var(--soft); }
.made td { overflow-wrap: anywhere; }
.fails { color: var(--bad); font-weight: 600; }
.plots { display: grid; gap: 2rem 2.5rem; margin: 1.25rem 0 1.75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; overflow-x: auto; }
figure.wide { grid-column: 1 / -1; }
svg { display: block; width: 100%; min-width: 17rem; max-width: 46rem; height: auto; }
.wide svg { min-width: 40rem; max-width: 56rem; }
svg text { font-family: system-ui, "Segoe UI", Roboto, sans-serif; }
details { margin: .25rem 0; font-weight: 400; }
.errors th, .errors td { vertical-align: top; }
.errors th { white-space: normal; }
summary { cursor: pointer; }
details p { margin: .4rem 0 .4rem 1rem; overflow-wrap: anywhere; white-space: pre-wrap; }
li { max-width: 46rem; margin: .35rem 0; }
@page { size: landscape; margin: 1cm; }
@media print { main { padding: 0; max-width: none; } figure, tr { break-inside: avoid; }
  .scroll, figure { overflow: visible; } table { font-size: .72rem; }
  .figures td, .figures th, .figures .undefined { white-space: normal; min-width: 0;
    overflow-wrap: anywhere; padding-right: .4rem; } }
@media (max-width: 34rem) { h1 { font-size: 1.35rem; } main { padding: 1.5rem 1rem 3rem; } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
<div class="verdict"><ul>
{% for sentence in verdict %}
<li>{{ sentence }}</li>
{% endfor %}
</ul></div>
{% if gates %}
<h2>Gates</h2>
<div class="scroll" tabindex="0" role="group" aria-label="gates"><table class="figures">
<thead><tr>{% for cell in gates[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in gates[1:] %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}
<td{% if cell.startswith("FAILS") %} class="fails"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}

<h2>By target group</h2>
<div class="scroll" tabindex="0" role="group" aria-label="figures by target group">
<table class="figures">
<thead><tr>{% for cell in groups[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in groups[1:] %}
{% set model = row[3] == groups[1][3] or row[0] != loop.previtem[0] %}
<tr{% if model %} class="model first"{% endif %}><th scope="row">{{ row[0] if model }}</th>
{%- for cell in row[1:3] %}<td>{{ cell if model }}</td>{% endfor %}
{%- for cell in row[3:] %}{{ figure(cell) }}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="soft">False positive rate: share of the {{ negative }} posts that are taken for
{{ positive }}. False negative rate: share of the {{ positive }} posts that are missed. Precision:
share of the posts taken for {{ positive }} that are. In brackets: 95 % interval. The first row of a
group is the evaluated model. A rate of fewer than {{ min_denominator }} posts is called
insufficient.</p>

{% if gaps %}
<h2>Are the groups treated alike?</h2>
{{ table(gaps) }}
<p class="soft">Each group against all posts outside it, and the largest difference between two
groups; p is the share of random deals of the same errors that give as much (10,000 permutations
within a true label), corrected (Holm) for both rates, of single groups for all groups and
rates. A group stands out only where the largest
gap is more than chance, too. The gap's interval begins at 0 where the
test does not show that it is.</p>
{% endif %}

{% if plots %}
<h2>Plots</h2>
<div class="plots">
{% for plot in plots %}
<figure{% if plot.wide %} class="wide" tabindex="0" aria-label="{{ plot.title }}"{% endif %}>
<h3>{{ plot.title }}</h3><p class="soft">{{ plot.words }}</p>
{{ plot.svg | safe }}
</figure>
{% endfor %}
</div>
{% endif %}

<h2>All posts</h2>
{{ table(overall, true) }}
{% if comparison %}
<h3>Compared on the same posts</h3>
{{ table(comparison) }}
<p class="soft">The model's figure less the other's, from the same resamples of the posts; p of the
accuracy: exact McNemar test. An answer without label counts as wrong.</p>
{% endif %}
{% if bias_auc %}
<h2>Ranking within and between groups</h2>
{{ table(bias_auc) }}
<p class="soft">BPSN: {{ positive }} posts of the rest against {{ negative }} posts of the group;
low where harmless posts about the group score high. BNSP: the other way round (Borkan et al.
2019).</p>
{% endif %}

{% for section in sections %}
<h2>{{ section.title }}</h2>
{{ table(section.rows) }}
<p class="soft">{{ section.words }}</p>
{% endfor %}

{% if errors %}
<h2>Errors</h2>
<p class="soft">The {{ errors | length }} most confident of {{ all_errors }}; errors.csv has all.
{% if errors[0].text is defined %}Posts are offensive; each is shown when it is opened.{% else %}
Posts are named by id only.{% endif %}</p>
<div class="scroll" tabindex="0" role="group" aria-label="errors"><table class="figures errors">
<thead><tr><th scope="col">post</th><th scope="col">error</th><th scope="col">labelled</th>
<th scope="col">p</th><th scope="col">target groups</th></tr></thead>
<tbody>
{% for error in errors %}
<tr><th scope="row">{{ error.id }}
{%- if error.text is defined %}<details><summary>text</summary><p>{{ error.text }}</p></details>
{%- endif %}</th><td>{{ error.error }}</td><td>{{ error.label }}</td><td>{{ error.p }}</td>
<td>{{ error.groups }}</td></tr>
{% endfor %}
</tbody></table></div>
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


# --- model card ------------------------------------------------------------------------------

CARD_BEGIN, CARD_END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
# What only people can say of a detector; --card_fields fills it in.
CARD_FIELDS = {
    "intended_use": "Intended use",
    "out_of_scope_use": "Out-of-scope use",
    "label_definition": "What the positive label means",
    "languages": "Languages",
    "annotators": "Who annotated the posts",
    "contact": "Contact",
}


def read_card_fields(path: str | None) -> dict[str, str]:
    """The fields of the model card that people fill in, from a JSON or YAML file."""
    if path is None:
        return {}
    fields = read_settings(path)
    unknown = [name for name in fields if name not in CARD_FIELDS]
    if unknown:
        fail(
            f"--card_fields {path} has the unknown field {unknown[0]!r}. The fields are: "
            f"{', '.join(CARD_FIELDS)}."
        )
    listed = {name: value if isinstance(value, list) else [value] for name, value in fields.items()}
    texts = {name: ", ".join(str(one) for one in some) for name, some in listed.items()}
    return {
        name: " ".join(text.split())
        for name, text in texts.items()
        if fields[name] not in (None, [], "")
    }


def build_card_section(
    metrics: dict[str, Any], record: dict[str, Any], fields: dict[str, str]
) -> str:
    """The model card's section on this evaluation, between its markers, without any post."""
    told = record.get("descriptions") or {}
    meaning = (told.get("labels") or {}).get(metrics["positive_label"])
    fields = ({"label_definition": str(meaning)} if meaning else {}) | fields
    learned = [one for one in metrics["strategies"] if not one["name"].startswith("always_")]
    data = record["dataset"] or record["test_file"]
    source = "not stated"
    if data:
        source = data.get("repo") or data["file"]
        source += f"@{data['revision']}" if data.get("revision") else ""
    lines = [CARD_BEGIN, "## Evaluation", ""]
    lines += [
        markdown_cell(
            f"{metrics['n']} posts of {source}, {record['name']}, {record['created'][:10]}; files "
            f"in eval/{record['name']}/."
        ),
        "",
    ]
    lines += [*(f"- {markdown_cell(sentence)}" for sentence in build_verdict(metrics)), ""]
    rows = overall_table(metrics)
    lines += [markdown_table(rows[0], rows[1:]), ""]
    rows = group_table(metrics, learned)
    lines += [markdown_table(rows[0], rows[1:]), ""]
    least = metrics["min_denominator"]
    lines += [
        "Brackets hold 95 % intervals. False positive rate: share of the "
        f"{markdown_cell(metrics['negative'])} posts taken for "
        f"{markdown_cell(metrics['positive_label'])}. A rate of fewer than {least} posts is called "
        "insufficient. A post aimed at several groups counts in each; no_target are the posts "
        "aimed at none.",
        "",
        "| | |",
        "| --- | --- |",
    ]
    lines += [
        f"| {title} | {markdown_cell(fields.get(name, 'not stated'))} |"
        for name, title in CARD_FIELDS.items()
    ]
    notes = (told.get("groups") or {}).items()
    lines += ["", *(f"- {markdown_cell(name)}: {markdown_cell(str(text))}" for name, text in notes)]
    lines += ["", "Limits:", "", *(f"- {limit}" for limit in LIMITS), CARD_END]
    return "\n".join(lines)


def update_card(text: str, section: str, metrics: dict[str, Any], record: dict[str, Any]) -> str:
    """A model card with this evaluation's section and results in place of an earlier one's.

    Everything else of the card stays as it is, results of others in its model-index too. Where
    the front matter is no mapping with a model-index in the Hub's form, it stays without results.
    """
    from huggingface_hub.repocard import RepoCard
    from yaml import YAMLError

    # A marker without its other half is text like any other.
    begin, end = re.escape(CARD_BEGIN), re.escape(CARD_END)
    found = re.search(f"{begin}((?!{begin}).)*?{end}", text, re.DOTALL)
    if found:
        text = text[: found.start()] + section + text[found.end() :]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    own = model_index(metrics, record)
    if not own:
        return text
    name = own[0]["results"][0]["dataset"]["name"]
    try:
        card = RepoCard(text)
        kept = card.data.get("model-index") or []
        for model in kept:
            model["results"] = [one for one in model["results"] if one["dataset"]["name"] != name]
        if kept:
            kept[0]["results"] += own[0]["results"]
        card.data["model-index"] = kept or own
        return str(card)
    except (YAMLError, ValueError, TypeError, LookupError) as error:
        reason = visible(str(error).split("\n")[0], 200)
        print(f"the model card's metadata stay without results: {reason}", flush=True)
        return text


def model_index(metrics: dict[str, Any], record: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluation's figures in the form of a model card's model-index; empty without any."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    data = record["dataset"] or {}
    name = data.get("repo") or (record["test_file"] or {}).get("file") or record["name"]
    figures = metrics["strategies"][0]["overall"]
    kinds = {"accuracy": "accuracy", f1_name(metrics): "f1", "f1_macro": "f1", "roc_auc": "roc_auc"}
    kinds |= {"false_positive_rate": "fpr", "false_negative_rate": "fnr"}
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=name,
            dataset_name=f"{name} ({record['name']})",
            dataset_split=record["split"],
            dataset_revision=data.get("revision"),
            metric_type=kind,
            metric_name=title_of(key),
            metric_value=round(figures[key]["value"], 4),
        )
        for key, kind in kinds.items()
        if figures[key]["value"] is not None
    ]
    model = (record["adapter"] or {"repo": "detector"})["repo"].split("/")[-1]
    return eval_results_to_model_index(model, results) if results else []


# --- loggers and Space -----------------------------------------------------------------------


def plots_of_page(page: str) -> dict[str, str]:
    """The plots of report.html by their titles, each a page of its own in the same style."""
    style = re.search(r"<style>.*?</style>", page, re.DOTALL)[0]
    figures = re.findall(r"<figure.*?<h3>(.*?)</h3>(.*?)</figure>", page, re.DOTALL)
    return {title: f"<!doctype html>{style}<figure>{figure}</figure>" for title, figure in figures}


def log_to_wandb(
    args: argparse.Namespace,
    folder: Path,
    metrics: dict[str, Any],
    record: dict[str, Any],
    posts: list[dict[str, Any]],
) -> None:
    """Log figures, group table, plots and report to W&B, in the training's run where it is known.

    No failure here ends the evaluation. Posts go there only with --log_text.
    """
    for name, value in {
        "WANDB_PROJECT": "hate-speech-detector",
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_GIT": "true",
        "WANDB__DISABLE_META": "true",
        "WANDB_PROGRAM": SCRIPT,
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_INIT_TIMEOUT": "30",
    }.items():
        os.environ.setdefault(name, value)
    known = (record["training"] or {}).get("wandb_run_id")
    options = {"id": known, "resume": "allow"} if known else {"name": f"eval-{record['name']}"}
    prefix = f"eval/{record['name']}"
    values: dict[str, Any] = {
        f"{prefix}/{key}": figure["value"]
        for key, figure in metrics["strategies"][0]["overall"].items()
        if isinstance(figure, dict) and figure.get("value") is not None
    }
    for group, figures in metrics["strategies"][0]["groups"].items():
        for key in ("false_positive_rate", "false_negative_rate", "roc_auc"):
            if figures[key]["value"] is not None:
                values[f"{prefix}/{group}/{key}"] = figures[key]["value"]
    try:
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            options["mode"] = "offline"
        run = wandb.init(config={"evaluation": record["arguments"]}, **options)
        rows = group_table(metrics, metrics["strategies"])
        values[f"{prefix}/groups"] = wandb.Table(columns=rows[0], data=rows[1:])
        page = (folder / "report.html").read_text(encoding="utf-8")
        values[f"{prefix}/report"] = wandb.Html(page, inject=False)
        for title, plot in plots_of_page(page).items():
            values[f"{prefix}/plots/{title}"] = wandb.Html(plot, inject=False)
        if args.log_text and posts:
            names = ("id", "label", "prediction", "text")
            table = [[post[name] for name in names] for post in posts]
            values[f"{prefix}/predictions"] = wandb.Table(columns=list(names), data=table)
        run.log(values)
        run.finish()
    except Exception as error:
        print(f"W&B has no log of this evaluation: {error}".splitlines()[0], flush=True)
        return
    print(f"W&B: logged to run {run.id}", flush=True)


SPACE_TITLE = "Bias report"


def check_space(args: argparse.Namespace) -> None:
    """Create the private Space where it is missing; end on one that holds other things."""
    from huggingface_hub import HfApi

    api, name = HfApi(), args.space
    with hub_errors(f"write to the Space {name}"):
        new = not api.repo_exists(name, repo_type="space")
        api.create_repo(name, repo_type="space", space_sdk="static", private=True, exist_ok=True)
        info = api.repo_info(name, repo_type="space")
        files, front = {file.rfilename for file in info.siblings or []}, ""
        if "README.md" in files:
            card = api.hf_hub_download(name, "README.md", repo_type="space", revision=info.sha)
            front = Path(card).read_text(encoding="utf-8", errors="replace")
    if not info.private and not args.allow_public:
        fail(f"the Space {name} is public. Make it private, or say --allow_public true.")
    # The Hub starts a Space with the page and the style of a template.
    ours = {".gitattributes", "README.md", "style.css"}
    ours |= {"index.html"} if new or SPACE_TITLE in front else set()
    if files - ours:
        listed = ", ".join(sorted(map(visible, files - ours))[:3])
        fail(f"the Space {name} holds other things ({listed}). Name another one.")


def push_space(name: str, folder: Path, title: str) -> None:
    """Publish the report as the Space's only page."""
    from huggingface_hub import CommitOperationAdd

    front = f"---\ntitle: {json.dumps(title)}\nsdk: static\npinned: false\n---\n"
    operations = [
        CommitOperationAdd("index.html", path_or_fileobj=folder / "report.html"),
        CommitOperationAdd("README.md", path_or_fileobj=front.encode()),
    ]
    with hub_errors(f"publish the report in {name}"):
        made = commit(name, "space", operations, title)
    print(f"published: Space {name}@{made}", flush=True)


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
            arguments[name] = list_of_words(name, value) if isinstance(value, list) else value
            origins[name] = origin
    for name, origin in origins.items():
        if arguments[name] != parser.get_default(name):
            print(f"{name} = {arguments[name]} ({origin})", flush=True)
    return argparse.Namespace(**arguments)


def list_of_words(name: str, values: list[Any]) -> list[Any]:
    """Split list values at commas and spaces: `q_proj,v_proj` is `q_proj v_proj`.

    Labels may hold both: several stand as they are, and a single text is parted at its commas.
    """
    separator = r"[,\s]+"
    if name == "labels":
        if len(values) > 1:
            return [value.strip(", ") for value in values]
        separator = r"\s*,\s*" if "," in values[0].strip(", ") else separator
    words: list[Any] = []
    for value in values:
        words += re.split(separator, value.strip(", ")) if isinstance(value, str) else [value]
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
    rows, columns = load_split(repo, config, split)
    missing = {"id", "text", "label", "target_groups"} - set(columns)
    if missing:
        fail(
            f"{repo.name} ({config}/{split}) lacks the columns {', '.join(sorted(missing))}. "
            f"It has: {', '.join(columns)}."
        )
    return rows


def load_split(repo: Repo, config: str, split: str) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of a dataset repo's split, a label by its name, and the names of the columns."""
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
    if not len(table):
        fail(f"{repo.name} ({config}/{split}) is empty.")
    rows = table.to_pylist()
    if isinstance(features.get("label"), ClassLabel):
        names = features["label"].names
        for row in rows:
            # A post without a label has none, or -1.
            known = row["label"] in range(len(names))
            row["label"] = names[row["label"]] if known else None
    return rows, table.column_names


def read_plain_rows(
    repo: Repo, config: str | None, split: str, labels: list[str]
) -> tuple[list[dict[str, Any]], str]:
    """Rows of a dataset repo that has no contract.json, as read_jsonl's, and their config."""
    from datasets import get_dataset_config_names

    place = str(repo.folder) if repo.folder else repo.name
    with hub_errors(f"list the configs of {repo.name}"):
        try:
            configs = get_dataset_config_names(place, revision=repo.revision)
        except FileNotFoundError:
            fail(f"{repo.name} holds no {CONTRACT} and no data that can be read. {DATA_FORMS}")
    if config is None and len(configs) > 1 and "default" not in configs:
        fail(f"{repo.name} has several configs: {', '.join(configs)}. Say --dataset_config.")
    config = config or ("default" if "default" in configs else configs[0])
    rows, _ = load_split(repo, config, split)
    for number, row in enumerate(rows, start=1):
        rows[number - 1] = unify_row(
            row, labels, f"{split}-{number}", f"{repo.name} ({config}/{split}) row {number}"
        )
    return rows, config


def has_contract(repo: Repo) -> bool:
    """Whether a repo was written by a stage of this project."""
    return (repo.fetch(CONTRACT) / CONTRACT).is_file()


def read_jsonl(path: str, labels: list[str]) -> list[dict[str, Any]]:
    """Read a local JSONL file of posts (`text`, `label`, optional `id`, `target_groups`).

    A label is a name of `labels` or its index. Rows of the other forms get `prompt` and
    `completion` as lists of messages, and text and label only where they have them.
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
            fail(f"{path} line {number} is not JSON: {error}. {DATA_FORMS}")
        rows.append(unify_row(row, labels, f"{file.stem}-{number}", f"{path} line {number}"))
    if not rows:
        fail(f"{path} is empty.")
    return rows


def unify_row(row: Any, labels: list[str], name: str, origin: str) -> dict[str, Any]:
    """A row of any form: prompt and completion as messages, label by name, groups as a list.

    `name` is the id of a row without one. A completion that is text is the assistant's answer,
    a prompt that is text the user's message.
    """
    if isinstance(row, dict):
        # A column that is empty in a row is null in a table.
        row = {key: value for key, value in row.items() if value is not None}
    check_line(row, origin)
    if "messages" in row:
        *row["prompt"], answer = row.pop("messages")
        row["completion"] = [answer]
    if not {"prompt", "completion"} <= set(row):
        # A column of that name beside a text and its label means something else.
        row = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.get(key), str):
            row[key] = [{"role": role, "content": row[key]}]
    if "completion" in row:
        row["completion"] = [
            message | {"content": message["content"].strip()} for message in row["completion"]
        ]
    if "label" in row:
        row["label"] = label_name(row["label"], labels)
    groups = row.get("target_groups") or []
    row["target_groups"] = [groups] if isinstance(groups, str) else groups
    row.setdefault("id", name)
    return row


def label_name(value: Any, labels: list[str]) -> str:
    """The label that a row's value means: the one of that name, else the one at that place.

    1.0 and true are 1 too. Labels that are numbers themselves have no places: beside 1 and 2 a 0
    is a third label, not the first one.
    """
    forms = [str(value)]
    if isinstance(value, bool):
        forms.append(str(value).lower())
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        forms.append(str(int(value)))
    for form in forms:
        if form in labels:
            return form
    numbered = any(re.fullmatch(r"-?\d+", label) for label in labels)
    places = {} if numbered else {str(place): label for place, label in enumerate(labels)}
    return places.get(forms[-1], forms[-1])


def check_line(row: Any, origin: str) -> None:
    """End on a row of no form: neither a post with its label nor a prompt with its answer."""
    columns = set(row) if isinstance(row, dict) else set()
    asked = "messages" in columns or {"prompt", "completion"} <= columns
    if not asked and not {"text", "label"} <= columns:
        found = f"it has {', '.join(sorted(columns))}" if columns else "it is no object"
        fail(
            f"{origin} needs `text` and `label`, or a prompt with its answer; {found}. {DATA_FORMS}"
        )
    turns = [row[key] for key in ("messages", "prompt", "completion") if key in row]
    if not asked:
        turns = [row["text"]]
    texts = [turn for turn in turns if not isinstance(turn, list)]
    for message in (message for turn in turns if isinstance(turn, list) for message in turn):
        known = message if isinstance(message, dict) else {}
        texts += [known.get("role"), known.get("content")]
    texts += [row["text"]] if "text" in row else []
    if not all(isinstance(text, str) for text in texts) or isinstance(row.get("messages"), str):
        fail(f"{origin}: a `text`, and each message's `role` and `content`, must be a string.")
    if asked:
        said = row.get("messages") or [*as_turns(row, "prompt"), *as_turns(row, "completion")]
        roles = [message["role"] for message in said]
        if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
            fail(
                f"{origin}: a conversation must end with one message of the user and the "
                "assistant's answer, with nothing before them but perhaps a system message; its "
                f"roles are {roles}. {DATA_FORMS}"
            )
    groups = row.get("target_groups") or []
    if not isinstance(groups, (str, list)) or not all(isinstance(group, str) for group in groups):
        fail(f"{origin}: `target_groups` must be a list of names.")
    try:
        "".join([str(row.get("id")), str(row.get("label")), *texts, *groups]).encode()
    except UnicodeEncodeError as error:
        fail(
            f"{origin} is no valid Unicode: {error.object[error.start]!a} is half a character. "
            "Leave it out, or put another in its place, as datasets/build_custom.py does."
        )


def as_turns(row: dict[str, Any], key: str) -> list[dict[str, str]]:
    """A row's prompt or completion as messages."""
    role = "user" if key == "prompt" else "assistant"
    value = row.get(key) or []
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def fill_from_prompts(
    rows: list[dict[str, Any]], strategy: dict[str, str] | None, labels: list[str], origin: str
) -> None:
    """Give rows with prompts of their own the `text` and `label` that their prompt speaks of.

    The text is what stands in the place of {text}, or the whole message where the user's does not
    read like the strategy; the label is the one that the answer names.
    """
    template = strategy["user"] if strategy else "{text}"
    head, _, tail = template.partition("{text}")
    unread = []
    for row in rows:
        if "prompt" not in row:
            continue
        said = row["prompt"][-1]["content"]
        framed = (
            len(said) >= len(head) + len(tail) and said.startswith(head) and said.endswith(tail)
        )
        if not isinstance(row.get("text"), str) or row["text"] not in said:
            row["text"] = said[len(head) : len(said) - len(tail)] if framed else said
        answer = strategy["answer"] if strategy else "{label}"
        named = parse_answer(answer, row["completion"][0]["content"], labels)
        label = row.setdefault("label", named)
        if label is None:
            unread.append(row)
        elif named is not None and named != label:
            fail(
                f"{origin}: the row {row['id']} is labelled {label}, and its answer says {named}. "
                "Correct one of the two."
            )
    if unread:
        fail(
            f"{origin}: the answers of {len(unread)} rows, such as the one with the id "
            f"{unread[0]['id']}, name no label. The labels are: {', '.join(labels)}. Correct these "
            "answers, or train with the labels that they name: train/train.py --labels NAME NAME "
            "--positive_label NAME."
        )


def check_labels(rows: list[dict[str, Any]], labels: list[str], origin: str) -> None:
    """End on a label that the contract does not name."""
    others = [row for row in rows if row.get("label") not in labels]
    if others:
        unknown = sorted({str(row.get("label")) for row in others})
        fail(
            f"{origin} has unknown labels {unknown[:5]}, first in the row {others[0]['id']}. The "
            f"labels are: {', '.join(labels)}."
        )


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
        try:
            text = render([{"role": "user", "content": joined}, messages[-1]])
        except TemplateError as error:
            fail(f"the chat template refuses the prompt (reasoning effort {effort}): {error}")
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

    Its `drawn` names the weights that the checkpoint lacks: those of a classifier's head and
    pooler, drawn at random here, and otherwise in every process. The adapter must bring them. (Of
    a copy in bfloat16 it names none: the copy holds what was drawn.)
    MXFP4 (gpt-oss) and FP8 (Ministral) checkpoints are dequantised, because neither can be
    trained or merged as stored. Four bits of an FP8 checkpoint come from a copy in bfloat16.
    """
    import transformers

    stored = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if quantization is not None and stored == "fp8":
        with TemporaryDirectory(prefix="bfloat16-") as scratch:
            copy = write_whole_copy(base, config, task, labels, Path(scratch))
            whole = read_base_config(copy)
            return load_base(copy, whole, task, labels, dtype, device, quantization)
    dequantised = quantization is None and stored in ("mxfp4", "fp8")
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
            # The library's list of all classes that it could load instead has 10,000 characters.
            reason = str(error).partition("Model type should be one of")[0]
            fail(f"{base.name} cannot be loaded for the task {task}: {reason}")
    transformers.logging.set_verbosity_warning()
    body = f"{model.base_model_prefix}."
    lost = [
        name
        for name in report["missing_keys"]
        if task == "causal" or (name.startswith(body) and ".pooler." not in name)
    ]
    if lost:
        fail(f"{base.name} lacks {len(lost)} of its weights, for example {sorted(lost)[0]}.")
    model.drawn = sorted(report["missing_keys"])
    # What the checkpoint does not hold quantised keeps its own dtype otherwise.
    return model.to(dtype) if dequantised else model


def write_whole_copy(base: Repo, config: Any, task: str, labels: list[str], folder: Path) -> Repo:
    """Save a quantised base dequantised to bfloat16, two bytes a weight; four bits start there."""
    import torch

    print(f"{base.name} is stored quantised: four bits are made from a bfloat16 copy", flush=True)
    model = load_base(base, config, task, labels, torch.bfloat16, "cpu")
    model.save_pretrained(folder, save_original_format=False)
    return Repo(base.name, "model", None, folder)


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
            loaded = peft.PeftModel.from_pretrained(model, folder).eval()
        except (SafetensorError, UserWarning, RuntimeError, ValueError) as error:
            fail(f"the adapter {adapter.name} does not fit the base {base.name}: {error}")
    whole = (name for name in loaded.state_dict() if ".modules_to_save." in name)
    brought = {name.replace(".modules_to_save.default", "") for name in whole}
    lacking = [name for name in model.drawn if f"base_model.model.{name}" not in brought]
    if lacking:
        fail(
            f"neither the base {base.name} nor the adapter {adapter.name} holds {lacking[0]}: it "
            "would be drawn at random, and the scores with it. Train the adapter anew."
        )
    return loaded


def trained_scaffold(tokenizer: Any, contract: dict[str, Any]) -> Scaffold | None:
    """The scaffold of the adapter's prompt, rendered anew with its date; None for a classifier."""
    rendering = contract["rendering"]
    if contract["prompt"] is None:
        return None
    roles = rendering["roles"][:-1]
    return build_scaffold(tokenizer, roles, rendering["date"], rendering["reasoning_effort"])


if __name__ == "__main__":
    main()
