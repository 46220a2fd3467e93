# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "huggingface-hub==2.4.0",
#     "pyarrow==26.0.1",
#     "pyyaml==6.0.3",
#     "scikit-learn==1.9.1",
#     "scipy==1.17.1",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-20T00:00:00Z"
#
# [tool.hf-jobs]
# flavor = "cpu-upgrade"
# timeout = "30m"
# name = "hsd-compare"
# secrets = ["HF_TOKEN"]
# ///
"""Compare runs on the same posts: what differs by more than chance, overall and per group.

Reads:  two or more runs: adapter repos (user/hsd-lora[@revision], user/hsd-lora/EVALUATION) or
        folders with predictions of eval/eval.py, or files of predictions (.csv, .parquet, .jsonl:
        id, true label, predicted label or score, groups).
Writes: --output_dir: compare.md, compare.json and changed.csv (the posts that are decided
        otherwise, without text). Nothing is pushed.

    uv run eval/compare.py user/hsd-lora user/hsd-lora-r64
    uv run eval/compare.py ./a.csv ./b.csv --require 'vs_1.f1>=0' --strict

The first run is compared with every other, by exact McNemar tests and a paired bootstrap. Runs
that differ only in their seed are pooled; --pool says so of files. Exit 3: a --require fails.
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
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

SCRIPT = "eval/compare.py"
SCHEMA = 1
CONTRACT = "contract.json"
# Variables with these names are read as they stand; every other flag is HSD_<FLAG>, because an
# unprefixed SEED or TASK in somebody's shell must not change an audited run.
PLAIN_VARIABLES = ("DATASET_REPO", "HUB_MODEL_ID", "MAX_STEPS")
LABELS, POSITIVE_LABEL = ["normal", "hate"], "hate"
# The row of the posts that are aimed at no group.
NO_TARGET = "no_target"
# The last four are the wide forms, which some spreadsheets also read.
FORMULA_SIGNS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
CONFUSION = ("true_positive", "true_negative", "false_positive", "false_negative")
# The differences of more pairs than this are left to compare.md.
MOST_PRINTED_PAIRS = 2
# Better when lower.
ERRORS = ("false_positive_rate", "false_negative_rate", "brier", "ece")
# Arguments of a training that its result does not depend on, or that stand in the contract as the
# commit that they led to.
LOOSE_ARGUMENTS = {
    *("hub_model_id", "run_name", "output_dir", "save_minutes", "keep_checkpoints", "report_to"),
    *("stop_after", "hub_patience", "fresh", "relay", "budget", "reclaim_storage"),
    *("squash_history", "config_file", "preset", "allow_public", "allow_cpu", "log_level"),
    *("disable_tqdm", "logging_first_step", "logging_steps", "dataloader_num_workers"),
    *("dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
    *("model_name_or_path", "model_revision", "dataset_repo", "train_file", "validation_file"),
}
SEEDS = {"seed", "data_seed"}
# How posts are scored: runs of one recipe have these in common, too.
EVALUATION_SETTINGS = (
    *("base_only", "mode", "threshold", "prompt", "max_length", "dtype", "load_in_4bit"),
    *("keep_mxfp4", "max_samples", "profile"),
)
# What recipes are compared by, and its words.
POOLED = {
    "f1": "F1",
    "false_positive_rate": "false positive rate",
    "false_negative_rate": "false negative rate",
    "roc_auc": "AUROC",
}
LIMITS_OF_COMPARISON = (
    "Intervals of a difference (95 %, paired bootstrap) and p-values (exact McNemar) say how far "
    "it could move if other posts of the same kind were drawn. They know nothing of another seed: "
    "of two checkpoints they tell which makes fewer errors, not which recipe trains better.",
    "Recipes are compared over their seeds on these same posts (Welch's t interval). With few "
    "seeds it is wide, and it knows nothing of other posts.",
    "p-values are corrected (Holm) in two families: accuracies over all pairs of runs; error rates "
    "over all posts and all groups, both rates and all pairs. Each family errs in at most 5 % of "
    "comparisons without any difference. Other figures have intervals only and are never claimed.",
    "What is not named as different is not shown to be equal; the intervals say what can be "
    "excluded.",
    "An answer without label counts as wrong. A post that is aimed at several groups counts in "
    "each of them.",
    "Whoever picks the best of several runs by this table overrates it: choose on validation "
    "posts, and read the test split once.",
)


def build_comparison_parser() -> Parser:
    """The flags; the runs themselves are `args.runs`."""
    switch: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "default": False}
    parser = Parser(prog=SCRIPT, description=__doc__)
    parser.usage = "%(prog)s RUN RUN [RUN ...] [flags]"
    runs = parser.add_argument_group("runs")
    runs.add_argument("--eval_name", default="test", help="folder below eval/ of a repo or folder")
    runs.add_argument(
        *("--pool",),
        nargs="+",
        action=Collect,
        help="A,B,C: runs that differ only in their seed; repeatable",
    )
    runs.add_argument("--seed", type=int, default=42, help="of the resamples")
    gates = parser.add_argument_group("requirements on the first run")
    gates.add_argument(
        *("--require",),
        nargs="+",
        action=Collect,
        help="f1>=0.62, lgbtq.fpr<=0.4, gap.fpr<=0.1, vs_1.f1>=0; repeatable",
    )
    gates.add_argument("--strict", **switch, help="test the bad end of the interval")
    files = parser.add_argument_group("files of predictions")
    files.add_argument("--labels", nargs="+", default=LABELS, help="with a comma between them")
    files.add_argument("--positive_label", default=POSITIVE_LABEL)
    files.add_argument("--label_map", type=json_mapping, help='names: {"theirs": "hate"}')
    files.add_argument("--threshold", type=float, default=0.5, help="where there are only scores")
    for name in COLUMNS:
        files.add_argument(f"--{name}_column", help=f"column of the {name} (found by its name)")
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="./hsd-compare")
    output.add_argument("--config_file", help="JSON or YAML file of these flags")
    return parser


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


def split_runs(parser: Parser, words: list[str]) -> tuple[list[str], list[str]]:
    """The words that are runs, and those of flags.

    On the command line a flag has one value, so that runs may stand before, between and after.
    """
    runs: list[str] = []
    flags: list[str] = []
    actions = {name: action for action in parser._actions for name in action.option_strings}
    # Of the flag before: whether the next word is its value, whatever it is, or if it reads so.
    takes: int | str | None = 0
    for word in words:
        if takes is None or (takes == "?" and word.lower() in BOOLEANS):
            flags.append(word)
            takes = 0
        elif not word.startswith("-") or word == "-":
            runs.append(word)
            takes = 0
        else:
            flags.append(word)
            name, equals, _ = word.partition("=")
            action = actions.get("--" + name.removeprefix("--").replace("-", "_"))
            takes = 0 if action is None or equals else action.nargs
            takes = None if takes == "+" else takes
    return runs, flags


BOOLEANS = ("0", "1", "true", "false")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_comparison_parser()
    runs, flags = split_runs(parser, sys.argv[1:] if argv is None else argv)
    args = resolve_arguments(parser, flags)
    args.pool = [[word.strip() for word in one.split(",")] for one in args.pool or ()]
    args.require = list(args.require or ())
    for text in args.require:
        parse_requirement(text)
    if args.strict and not args.require:
        fail("--strict makes --require stricter; there is none.")
    pooled = [one for pool in args.pool for one in pool]
    for one in [*runs, *pooled]:
        if re.search("[<>=]", one) and not Path(one).expanduser().exists():
            fail(
                f"{visible(repr(one))} is no run: runs are adapter repos, folders or files. If it "
                "is a requirement, write --require before each: --require 'f1>=0.6' --require "
                "'lgbtq.fpr<=0.4'."
            )
        if runs.count(one) > 1 or pooled.count(one) > 1 or not one:
            fail(f"the run {one!r} is named twice. Name each run once.")
    args.runs = list(dict.fromkeys([*runs, *pooled]))
    if any(len(pool) < 2 for pool in args.pool):
        fail("--pool takes two or more runs with a comma between them: --pool ./a.csv,./b.csv.")
    if not args.runs:
        fail("name the runs to compare: adapter repos, folders or files of predictions.")
    if args.positive_label not in args.labels or len(args.labels) < 2:
        fail(
            f"--positive_label {args.positive_label} and another label must be among --labels, "
            f"which are {', '.join(args.labels)}."
        )
    if not 0 <= args.threshold <= 1:
        fail(f"--threshold {args.threshold} is no probability.")
    return args


def main(argv: list[str] | None = None) -> None:
    quiet_libraries()
    args = parse_args(argv)
    runs = name_runs(read_all(args))
    traces = trace_all(runs)
    runs, posts = align(runs)
    notes = [*posts.notes, *compare_records(runs), *count_reads(runs, traces)]
    metrics = compare_runs(runs, args.seed)
    recipes = build_recipes(args, runs, traces, metrics)
    between = compare_recipes(recipes, metrics["positive_label"])
    verdicts = [describe_pair(one, metrics, recipes) for one in metrics["comparisons"]]
    judged = judge(metrics, args.require, args.strict)
    comparison = {
        **stage_record("comparison", SCRIPT, args, [one.adapter for one in traces if one.adapter]),
        "posts": {"shared": metrics["n"], "left_out": posts.left_out, "repeated": posts.repeated},
        "notes": notes,
        "runs": describe_runs(runs, traces, recipes),
        "metrics": metrics,
        "verdicts": verdicts,
        "recipes": [vars(one) for one in recipes],
        "recipe_comparisons": between,
        "requirements": judged,
    }
    sections = comparison_sections(comparison)
    write_comparison(Path(args.output_dir).expanduser(), comparison, sections, runs)
    for section in sections:
        if section.printed:
            table = text_table(section.rows) if section.rows else []
            lines = [f"  {line}" for line in [*section.sentences, *table]]
            print("\n".join(["", section.title, *lines]))
    print(f"\ncomparison: {Path(args.output_dir) / 'compare.md'}", flush=True)
    failing = [one for one in judged if not one["holds"]]
    if failing:
        fail(f"{len(failing)} of {len(judged)} requirements fail; see the table above.", code=3)


# --- runs and their posts --------------------------------------------------------------------


def read_all(args: argparse.Namespace) -> list[Answered]:
    """The runs of all arguments, in their order."""
    options = {
        "labels": args.labels,
        "positive": args.positive_label,
        "label_map": args.label_map,
        "threshold": args.threshold,
    }
    options |= {name: vars(args)[f"{name}_column"] for name in COLUMNS}
    pooled = {one for pool in args.pool for one in pool}
    runs: list[Answered] = []
    for argument in args.runs:
        found = read_runs(argument, args.eval_name, options)
        if argument in pooled and len(found) > 1:
            fail(
                f"--pool {argument}: it holds {len(found)} strategies "
                f"({', '.join(visible(run.name) for run in found)}); pool files of one each."
            )
        runs += found
    if len(runs) < 2:
        fail(
            f"there is one run only, {visible(runs[0].name)}. Name another one to compare it with."
        )
    return runs


def name_runs(runs: list[Answered]) -> list[Answered]:
    """Runs by short names that differ: a strategy, a repo's evaluation, or the end of a path.

    A long path tells runs apart in its end, and its beginning speaks only of the machine.
    """
    strategies = Counter(run.origin for run in runs)
    names = []
    for run in runs:
        name = run.name
        if sum(one.name == name for one in runs) > 1:
            name = run.origin if strategies[run.origin] == 1 else f"{run.origin}:{name}"
        names.append(name)
    for parts in itertools.count(1):
        short = [last_parts(name, parts) if is_folder(name) else name for name in names]
        if len({*short}) == len({*names}) or parts > max(name.count("/") for name in names):
            break
    shown_ = [visible(name) for name in short]
    return [
        replace(run, name=name if shown_.count(visible(name)) == 1 else f"{number_} {name}")
        for number_, (run, name) in enumerate(zip(runs, short, strict=True), start=1)
    ]


def last_parts(path: str, count: int) -> str:
    return "/".join(Path(path).parts[-count:])


@dataclass(frozen=True)
class Posts:
    """What came of aligning: posts left out by run, posts of repeated ids, what is to be said."""

    left_out: dict[str, int]
    repeated: int
    notes: list[str]


def numbered_ids(ids: list[str]) -> list[tuple[str, int]]:
    """Each id with how often it stood before: a repeated id names several posts."""
    seen: Counter[str] = Counter()
    keys = []
    for name in ids:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def align(runs: list[Answered]) -> tuple[list[Answered], Posts]:
    """The runs on the posts that all of them have, in the order of the first run."""
    keys = [numbered_ids(run.ids) for run in runs]
    places = [{key: index for index, key in enumerate(some)} for some in keys]
    shared = [key for key in keys[0] if all(key in place for place in places)]
    if not shared:
        fail(
            f"the runs share no post: {', '.join(shown_ids(run) for run in runs)}. Runs are "
            "compared on posts of the same id; name its column with --id_column."
        )
    aligned = [
        pick_posts(run, [place[key] for key in shared])
        for run, place in zip(runs, places, strict=True)
    ]
    left_out = {run.name: len(run.ids) - len(shared) for run in runs if len(run.ids) > len(shared)}
    notes = []
    if left_out:
        words = ", ".join(f"{count} of {visible(name)}" for name, count in left_out.items())
        notes.append(f"Posts that not all runs have are left out: {words}.")
    repeated = sum(number_ > 0 for _, number_ in shared)
    if repeated:
        notes.append(f"{repeated} posts repeat an earlier id; they are matched by their order.")
    for run in aligned:
        if lost := run.predicted.count(None):
            notes.append(
                f"{visible(run.name)} gave {lost} answers without label, which count as wrong."
            )
    check_same_labels(aligned)
    notes += check_same_texts(aligned)
    aligned, more = settle_groups(aligned)
    return aligned, Posts(left_out, repeated, [*notes, *more])


def shown_ids(run: Answered) -> str:
    return f"{visible(run.name)} has {len(run.ids)}, such as {visible(run.ids[0])!r}"


def pick_posts(run: Answered, indices: list[int]) -> Answered:
    """A run on some of its posts."""

    def pick(values: list[Any] | None) -> list[Any] | None:
        return None if values is None else [values[index] for index in indices]

    columns = {name: pick(values) for name, values in run.columns.items()}
    lists = ("ids", "truth", "predicted", "scores", "groups", "texts")
    return replace(run, columns=columns, **{name: pick(getattr(run, name)) for name in lists})


def check_same_labels(runs: list[Answered]) -> None:
    """End where runs know other labels, or where a post's true label differs."""
    first = runs[0]
    for run in runs[1:]:
        if {*run.labels} != {*first.labels} or run.positive != first.positive:
            fail(
                f"{visible(run.name)} has the labels {', '.join(run.labels)} (positive: "
                f"{run.positive}), and {visible(first.name)} has {', '.join(first.labels)} "
                f"({first.positive}). Runs of one task can be compared."
            )
        pairs = zip(first.ids, first.truth, run.truth, strict=True)
        differing = [name for name, one, other in pairs if one != other]
        if differing:
            fail(
                f"the true labels of {len(differing)} of {len(first.ids)} posts differ between "
                f"{visible(first.name)} and {visible(run.name)}, for example of "
                f"{', '.join(visible(name) for name in differing[:3])}. Evaluate both on the "
                "same commit of the dataset."
            )


def check_same_texts(runs: list[Answered]) -> list[str]:
    """End where the same id stands for other posts; say where a few texts differ."""
    with_text = [run for run in runs if run.texts]
    notes = []
    for run in with_text[1:]:
        pairs = zip(with_text[0].texts or [], run.texts or [], strict=True)
        differing = sum(
            plain_cell(one).split() != plain_cell(other).split() for one, other in pairs
        )
        names = f"{visible(with_text[0].name)} and {visible(run.name)}"
        if differing > len(run.ids) / 2:
            fail(
                f"{differing} of {len(run.ids)} posts of the same id have another text in {names}: "
                "the ids do not name the same posts. Name the ids' column with --id_column."
            )
        if differing:
            notes.append(f"{differing} posts of the same id have another text in {names}.")
    return notes


def settle_groups(runs: list[Answered]) -> tuple[list[Answered], list[str]]:
    """Give all runs the groups of the first one that has any, and say where others differ."""
    known = [run for run in runs if any(run.groups)]
    if not known:
        return runs, ["No run says which groups posts are aimed at; only all posts are compared."]
    source, notes = known[0], []
    for run in known[1:]:
        pairs = zip(source.groups, run.groups, strict=True)
        differing = sum({*one} != {*other} for one, other in pairs)
        if differing:
            notes.append(
                f"The groups of {differing} posts differ between {visible(source.name)}, whose "
                f"groups are used, and {visible(run.name)}."
            )
    return [replace(run, groups=source.groups) for run in runs], notes


# --- where runs come from --------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """The adapter behind a run, where the argument names its repo or folder.

    `contract` is the adapter's, or empty where it is not known or of another training. `records`
    are those of all evaluations that its repo holds or ever held.
    """

    adapter: Repo | None = None
    contract: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)


def trace_all(runs: list[Answered]) -> list[Trace]:
    """The adapter of each run; the history of each repo is listed once."""
    histories: dict[str, dict[str, list[str]]] = {}
    return [trace(run, histories) for run in runs]


def trace(run: Answered, histories: dict[str, dict[str, list[str]]]) -> Trace:
    """Find the adapter of a run, what trained it, and how often it was evaluated."""
    adapter = find_adapter(run.origin) if run.record else None
    if adapter is None:
        return Trace()
    folder = adapter.fetch(CONTRACT, f"eval/*/{CONTRACT}")
    records = {
        file.parent.name: read_record(file.parent, f"{adapter.name}/{file.parent.name}")
        for file in sorted(folder.glob(f"eval/*/{CONTRACT}"))
    }
    if adapter.folder is None and adapter.name not in histories:
        histories[adapter.name] = list_evaluations(adapter.name)
    evaluations = past_evaluations(adapter, records, histories.get(adapter.name, {}))
    contract = read_record(folder, adapter.name)
    evaluated = (run.record.get("training") or {}).get("run_sha256")
    if contract.get("stage") != "adapter" or contract["training"]["run_sha256"] != evaluated:
        name = visible(run.name)
        print(f"{adapter.name} was trained anew after {name}: its arguments are not read")
        contract = {}
    return Trace(adapter, contract, evaluations)


def list_evaluations(name: str) -> dict[str, list[str]]:
    """The commits that wrote evaluations into an adapter repo, by the evaluation's name."""
    from huggingface_hub import HfApi

    with hub_errors(f"list the commits of {name}"):
        history = HfApi().list_repo_commits(name)
    found: dict[str, list[str]] = {}
    for one in history:
        evaluation = one.title.removeprefix("Evaluate: ")
        # A name is one folder: of anything else somebody wrote such a title by hand.
        if evaluation != one.title and re.fullmatch(r"\w[\w.-]*", evaluation, re.ASCII):
            found.setdefault(evaluation, []).append(one.commit_id)
    return found


def past_evaluations(
    adapter: Repo, records: dict[str, dict[str, Any]], commits: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """The record of each evaluation ever: a later one of the same name overwrites the folder.

    `records` are those at the adapter's revision, of which one without commits (a local folder, a
    squashed history) counts once.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    found = [record for name, record in records.items() if name not in commits]
    for name, hashes in commits.items():
        if len(hashes) == 1 and name in records:
            found.append(records[name])
            continue
        for commit_hash in hashes:
            with (
                hub_errors(f"read the evaluation {name} of {adapter.name}@{commit_hash}"),
                contextlib.suppress(RemoteEntryNotFoundError),
            ):
                file = hf_hub_download(
                    adapter.name, f"eval/{name}/{CONTRACT}", revision=commit_hash
                )
                record = read_record(Path(file).parent, f"{adapter.name}/{name}")
                # A report that is pushed again unchanged, for the card, reads nothing anew.
                if record not in found:
                    found.append(record)
    return found


def find_adapter(origin: str) -> Repo | None:
    """The adapter repo or folder that an argument names; None for other folders."""
    if is_folder(origin):
        place = Path(origin).expanduser().resolve()
        for folder in (place, place.parent.parent):
            if read_record(folder, origin).get("stage") == "adapter":
                return Repo(origin, "model", None, folder)
        return None
    name, _, revision = origin.partition("@")
    name = "/".join(name.split("/")[:2])
    return open_repo(f"{name}@{revision}" if revision else name, "model")


def posts_read(record: dict[str, Any]) -> Any:
    """What an evaluation read: dataset commit and split, or a file."""
    return [record.get(key) for key in ("dataset", "split", "test_file")]


def pinned_name(repo: dict[str, Any] | None) -> str:
    """A contract's record of a repo as text, with the beginning of its commit or hash."""
    if not repo:
        return "none"
    mark = repo.get("revision") or repo.get("sha256")
    return f"{repo.get('repo')}@{mark[:8]}" if mark else str(repo.get("repo"))


def compare_records(runs: list[Answered]) -> list[str]:
    """Say where the runs' evaluations differ: dataset commit, split, how posts are scored."""
    recorded = [run for run in runs if run.record]
    notes = []
    if recorded and len(recorded) < len(runs):
        names = ", ".join(visible(run.name) for run in runs if not run.record)
        notes.append(f"Without contract.json, so of unknown posts and settings: {names}.")
    readers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "dataset": lambda record: pinned_name(record.get("dataset")),
        "split": lambda record: record.get("split") or "a file",
        "evaluation": lambda record: record.get("name"),
    }
    for name in EVALUATION_SETTINGS:
        readers[name] = lambda record, name=name: (record.get("arguments") or {}).get(name)
    for name, read in readers.items():
        values = {visible(run.name): visible(str(read(run.record))) for run in recorded}
        if len({*values.values()}) > 1:
            words = ", ".join(f"{value} ({run})" for run, value in values.items())
            notes.append(f"The runs differ in {name}: {words}.")
    return notes


def count_reads(runs: list[Answered], traces: list[Trace]) -> list[str]:
    """Warn where these posts were evaluated more often than once per adapter."""
    reads: dict[str, tuple[str, int]] = {}
    for run, one in zip(runs, traces, strict=True):
        if one.adapter:
            # One adapter may be named by its folder and by an evaluation's.
            place = str(one.adapter.folder or one.adapter.name)
            name, most = reads.get(place, (visible(run.name), 0))
            reads[place] = (name, max(most, reads_of(run, one)))
    total = sum(count for _, count in reads.values())
    if total <= len(reads):
        return []
    words = ", ".join(f"{count} by the adapter of {name}" for name, count in reads.values())
    return [
        f"These posts were evaluated at least {total} times ({words}): a run that was chosen for "
        "its figures here is overrated by them."
    ]


def reads_of(run: Answered, found: Trace) -> int:
    """How many evaluations in the history of the adapter's repo are of this run's posts."""
    return sum(posts_read(record) == posts_read(run.record) for record in found.records)


def training_arguments(contract: dict[str, Any]) -> dict[str, Any]:
    """What a training's result depends on, by name."""
    arguments = {
        name: value
        for name, value in flat_arguments(contract).items()
        if name not in LOOSE_ARGUMENTS
    }
    return arguments | {
        "task": contract.get("task"),
        "base_model": pinned_name(contract.get("base_model")),
        "dataset": pinned_name(contract.get("dataset")),
        "prompt": (contract.get("prompt") or {}).get("name"),
        "precision": contract["training"].get("precision"),
        "state": contract["training"].get("state"),
    }


def changed_arguments(traces: list[Trace]) -> list[dict[str, Any] | None]:
    """Of each run the training arguments that not all runs have in common; None if not known."""
    known = [training_arguments(one.contract) for one in traces if one.contract]
    names = [
        name
        for name in dict.fromkeys(name for one in known for name in one)
        if len({json.dumps(one.get(name)) for one in known}) > 1
    ]
    return [
        {name: found.get(name) for name in names}
        if (found := one.contract and training_arguments(one.contract))
        else None
        for one in traces
    ]


def dollars_of(found: Trace) -> float | None:
    """The least that the training's Jobs cost; None where the contract records no cost.

    A training records what a start cost only where it pauses: not of its last start, and not of
    starts before one by hand.
    """
    relay = (found.contract.get("training") or {}).get("relay") or {}
    return relay.get("spent_usd") or None


def describe_runs(
    runs: list[Answered], traces: list[Trace], recipes: list[Recipe]
) -> list[dict[str, Any]]:
    """Where each run comes from, as compare.json and the tables hold it."""
    changed = changed_arguments(traces)
    return [
        {
            "name": run.name,
            "argument": run.origin,
            "adapter": one.adapter and one.adapter.as_input(),
            "dataset": run.record.get("dataset"),
            "split": run.record.get("split"),
            "evaluation": run.record.get("name"),
            "unparsed": run.predicted.count(None),
            "changed_arguments": arguments,
            "dollars_at_least": dollars_of(one),
            "test_reads": reads_of(run, one) if one.adapter else None,
            "recipe": next((item.name for item in recipes if run.name in item.runs), None),
        }
        for run, one, arguments in zip(runs, traces, changed, strict=True)
    ]


# --- pairs of runs ---------------------------------------------------------------------------


def compare_runs(runs: list[Answered], seed: int) -> dict[str, Any]:
    """Figures of each run and the differences of the first one from all others, in the form of
    metrics.json.

    Each pair is resampled by itself, so that its intervals are the same whoever else is compared.
    """
    first = runs[0]
    groups = next((run.record["groups"] for run in runs if run.record.get("groups")), [])
    members = group_members([{"target_groups": names} for names in first.groups], groups)
    members = {name: posts for name, posts in members.items() if posts}
    strategies: list[dict[str, Any]] = []
    comparisons = []
    for other in runs[1:]:
        answers = [Answers(run.name, "run", run.predicted, run.scores) for run in (first, other)]
        sample = build_sample(first.labels, first.positive, first.truth, members, answers)
        pair = (first.name, other.name)
        counted = count_intervals(sample, [pair], seed)
        ranked = rank_intervals(sample, [pair], seed)
        strategies += [
            build_strategy(sample, one, ranked, counted, seed)
            for one in answers[bool(strategies) :]
        ]
        comparisons.append(build_comparison(sample, *pair, counted, ranked))
        test_error_rates(sample, comparisons[-1])
    correct_over_pairs(comparisons)
    return {
        "schema": SCHEMA,
        "labels": first.labels,
        "positive_label": first.positive,
        "negative": name_of_negative(first.labels, first.positive),
        "n": len(first.ids),
        "label_counts": {label: first.truth.count(label) for label in first.labels},
        "resamples": RESAMPLES,
        "min_denominator": MIN_DENOMINATOR,
        "strategies": strategies,
        "comparisons": comparisons,
    }


def test_error_rates(sample: Sample, one: dict[str, Any]) -> None:
    """Add the exact McNemar p of both error rates over all posts: each of one label's posts."""
    decided = [sample.decided(one[side]) for side in ("first", "second")]
    right, also = (answers == sample.truth for answers in decided)
    labels = {
        "false_positive_rate": ~sample.positives,
        "false_negative_rate": sample.positives,
    }
    for rate, posts in labels.items():
        if posts.sum() >= MIN_DENOMINATOR:
            one["overall"][rate]["p"] = mcnemar(
                int((posts & right & ~also).sum()), int((posts & also & ~right).sum())
            )


def correct_over_pairs(comparisons: list[dict[str, Any]]) -> None:
    """Add `p_holm_pairs`: p corrected over all pairs too, since each is one more chance to err.

    Accuracies are one family; error rates, of all posts and of groups, are the other.
    """
    families: dict[bool, dict[tuple[int, str, str], dict[str, Any]]] = {True: {}, False: {}}
    for index, one in enumerate(comparisons):
        for place, figures in {"overall": one["overall"], **one["groups"]}.items():
            for key, figure in figures.items():
                if "p" in figure:
                    families[key == "accuracy"][index, place, key] = figure
    for family in families.values():
        adjusted = holm({key: figure["p"] for key, figure in family.items()})
        for key, p in adjusted.items():
            family[key]["p_holm_pairs"] = p


def words_of(name: str) -> str:
    """A figure's or group's name as it stands in a sentence."""
    names = {"f1": "F1", "roc_auc": "AUROC", "mcc": "Matthews' coefficient"}
    names |= {"brier": "Brier score"}
    return names.get(name, name.replace("_", " "))


def orient(figure: dict[str, Any], key: str) -> tuple[bool, tuple[float, float, float]]:
    """Whether a difference favours the first, and by how many points, with the interval's ends."""
    sign = -1 if key in ERRORS else 1
    ends = [100 * sign * figure[end] for end in ("value", "low", "high")]
    favours = ends[0] > 0
    if not favours:
        ends = [-end for end in ends]
    return favours, (ends[0], min(ends[1:]), max(ends[1:]))


def find_claims(one: dict[str, Any], p_key: str) -> list[dict[str, Any]]:
    """The differences of a comparison that are shown: p below 5 % and an interval without 0."""
    places = {"overall": one["overall"], **one["groups"]}
    claims = []
    for place, figures in places.items():
        for key, figure in figures.items():
            if figure.get(p_key, 1) >= 0.05 or figure["low"] is None:
                continue
            favours, (points, low, high) = orient(figure, key)
            if low <= 0:
                continue
            pair = (one["first"], one["second"])
            favoured, other = pair if favours else pair[::-1]
            claims.append(
                {
                    "favours": favoured,
                    "over": other,
                    "place": place,
                    "figure": key,
                    "points": points,
                    "low": low,
                    "high": high,
                    "p": figure[p_key],
                }
            )
    return claims


def name_insufficient(one: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups' error rates that have too few posts to conclude anything from."""
    return [
        {"group": group, "figure": rate, "n": figures[rate]["n"]}
        for group, figures in one["groups"].items()
        for rate in ("false_positive_rate", "false_negative_rate")
        if figures[rate]["n"] < MIN_DENOMINATOR
    ]


def describe_insufficient(few: list[dict[str, Any]]) -> list[str]:
    """The groups' rates that nothing is concluded from, named with their posts."""
    words = ", ".join(f"{place_words(one['group'], one['figure'])} (n = {one['n']})" for one in few)
    return [f"Insufficient, with fewer than {MIN_DENOMINATOR} posts: {words}."] if few else []


def place_words(place: str, key: str) -> str:
    if place == "overall":
        return f"overall {words_of(key)}"
    return f"{'no target' if place == NO_TARGET else visible(place)} {words_of(key)}"


def points_words(points: float, low: float, high: float) -> str:
    return f"{points:.1f} points [{low:.1f}, {high:.1f}]"


NOT_PASSED = "that was tested passes Holm's correction"
NOTHING_ELSE = f"nothing else {NOT_PASSED}"


def claims_by_side(claims: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The claims for each side, by the names of that side and of the other."""
    sides: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for claim in claims:
        sides.setdefault((claim["favours"], claim["over"]), []).append(claim)
    return sides


def describe_checkpoints(claims: list[dict[str, Any]]) -> str:
    """`B makes fewer false negatives on X posts (rate lower by 6.1 points [1.2, 11.0]) than A`.

    What is counted on these posts, a part for each side: two checkpoints say nothing of better.
    """
    words = {
        "accuracy": ("errors", "accuracy higher"),
        "false_positive_rate": ("false positives", "rate lower"),
        "false_negative_rate": ("false negatives", "rate lower"),
    }

    def part(claim: dict[str, Any]) -> str:
        errors, moved = words[claim["figure"]]
        place = {"overall": "all posts", NO_TARGET: "posts without target"}
        where = place.get(claim["place"]) or f"{visible(claim['place'])} posts"
        by = points_words(claim["points"], claim["low"], claim["high"])
        return f"fewer {errors} on {where} ({moved} by {by})"

    return "; ".join(
        f"{visible(one)} makes {join_words([part(claim) for claim in some])} than {visible(other)}"
        for (one, other), some in claims_by_side(claims).items()
    )


def describe_recipes(claims: list[dict[str, Any]]) -> str:
    """`B is better than A on X by 6.1 points [1.2, 11.0] and on Y by ...`, a part for each side."""

    def part(claim: dict[str, Any]) -> str:
        by = points_words(claim["points"], claim["low"], claim["high"])
        return f"on {place_words(claim['place'], claim['figure'])} by {by}"

    return "; ".join(
        f"{one} is better than {other} {join_words([part(claim) for claim in some])}"
        for (one, other), some in claims_by_side(claims).items()
    )


def join_words(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def describe_pair(
    one: dict[str, Any], metrics: dict[str, Any], recipes: list[Recipe]
) -> dict[str, Any]:
    """The verdict on two runs, in words; one checkpoint each says nothing of recipes."""
    claims, few = find_claims(one, "p_holm_pairs"), name_insufficient(one)
    first, second = visible(one["first"]), visible(one["second"])
    if claims:
        words = f"These two checkpoints differ: {describe_checkpoints(claims)}; {NOTHING_ELSE}."
    else:
        accuracy = one["overall"]["accuracy"]
        higher, (points, low, high) = first, (0.0, 0.0, 0.0)
        if accuracy["low"] is not None:
            favours, (points, low, high) = orient(accuracy, "accuracy")
            higher = first if favours else second
        words = f"No difference of {first} and {second} {NOT_PASSED}"
        if points:
            words += f" (accuracy of {higher} higher by {points_words(points, low, high)}, "
            p = p_words(accuracy["p_holm_pairs"])
            words += f"p {p if p.startswith('<') else f'= {p}'})"
        words += "."
    shared = [item for item in recipes if {one["first"], one["second"]} <= {*item.runs}]
    if shared:
        words += " Both are seeds of one recipe: such a difference comes of the seed alone."
    return {
        **{key: one[key] for key in ("first", "second", "n", "changed")},
        "claims": claims,
        "insufficient": few,
        "words": words,
    }


# --- recipes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Runs that differ only in their seed, and by place and figure what their seeds make of it."""

    name: str
    runs: list[str]
    seeds: list[Any]
    arguments: dict[str, Any]
    figures: dict[str, dict[str, dict[str, Any]]]


def recipe_key(run: Answered, found: Trace) -> str | None:
    """What runs of one recipe have in common; None where that is not known."""
    if not found.contract or run.record.get("base_only"):
        return None
    arguments = training_arguments(found.contract)
    trained = {name: value for name, value in arguments.items() if name not in SEEDS}
    settings = run.record.get("arguments") or {}
    scored = {name: settings.get(name) for name in EVALUATION_SETTINGS}
    return json.dumps([trained, scored, posts_read(run.record)], sort_keys=True)


def build_recipes(
    args: argparse.Namespace, runs: list[Answered], traces: list[Trace], metrics: dict[str, Any]
) -> list[Recipe]:
    """The recipes of two and more seeds; --pool decides for the runs that it names.

    Of several runs with one seed the first counts.
    """
    found: dict[str, dict[Any, int]] = {}
    pools = {one: number_ for number_, pool in enumerate(args.pool) for one in pool}
    for index, (run, one) in enumerate(zip(runs, traces, strict=True)):
        key, seed = recipe_key(run, one), None
        if key:
            seed = flat_arguments(one.contract).get("seed")
        if run.origin in pools:
            key, seed = f"pool {pools[run.origin]}", run.name
        if key is None:
            continue
        if seed in found.setdefault(key, {}):
            other = runs[found[key][seed]].name
            names = [visible(name) for name in (run.name, other)]
            print(f"{names[0]} has the seed of {names[1]}: it is no further seed of its recipe")
            continue
        found[key][seed] = index
    changed = changed_arguments(traces)
    recipes = []
    for members in (some for some in found.values() if len(some) > 1):
        names = [runs[index].name for index in members.values()]
        arguments = changed[next(iter(members.values()))] or {}
        strategies = [one for one in metrics["strategies"] if one["name"] in names]
        recipes.append(
            Recipe(
                f"recipe {len(recipes) + 1}",
                names,
                [None if seed in names else seed for seed in members],
                {name: value for name, value in arguments.items() if name not in SEEDS},
                pool_figures(strategies, metrics["positive_label"]),
            )
        )
    return recipes


def figures_at(strategy: dict[str, Any], place: str) -> dict[str, Any]:
    """A run's figures in a group or over all posts; an answer without label counts as wrong."""
    figures = strategy["overall"] if place == "overall" else strategy["groups"][place]
    if not strategy["unparsed"]:
        return figures
    # Scores are none the worse for an answer without label, and here they have their interval.
    return strategy["unparsed"]["as_errors"][place] | {"roc_auc": figures["roc_auc"]}


def pool_figures(
    strategies: list[dict[str, Any]], positive: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """By place and figure: the seeds' values, their mean and standard deviation (n - 1)."""
    import numpy as np

    pooled: dict[str, dict[str, dict[str, Any]]] = {}
    for place in ("overall", *strategies[0]["groups"]):
        pooled[place] = {}
        for key in POOLED:
            name = f"f1_{positive}" if key == "f1" else key
            figures = [figures_at(one, place)[name] for one in strategies]
            values = [figure["value"] for figure in figures]
            reason = next((figure["reason"] for figure in figures if figure["reason"]), None)
            n = min(figure["n"] for figure in figures)
            if reason is None and n < MIN_DENOMINATOR:
                reason = f"insufficient ({n} posts)"
            known = reason is None
            pooled[place][key] = {
                "values": values,
                "mean": float(np.mean(values)) if known else None,
                "sd": float(np.std(values, ddof=1)) if known else None,
                "n": n,
                "reason": reason,
            }
    return pooled


def welch(first: list[float], second: list[float]) -> dict[str, Any]:
    """Difference of two means with its 95 % t interval and p-value for unequal variances (Welch
    1947); without them where no seed makes a difference."""
    import numpy as np
    from scipy.stats import ttest_ind

    value = float(np.mean(first) - np.mean(second))
    empty = {"value": value, "low": None, "high": None, "p": None}
    # Values that agree but for their last bits have no variance to speak of.
    if max(np.std(first), np.std(second)) < 1e-12:
        return empty
    with warnings.catch_warnings():
        # Of seeds that agree in one of the two recipes.
        warnings.simplefilter("ignore", RuntimeWarning)
        test = ttest_ind(first, second, equal_var=False)
        low, high = test.confidence_interval(0.95)
    return {"value": value, "low": float(low), "high": float(high), "p": float(test.pvalue)}


def compare_recipes(recipes: list[Recipe], positive: str) -> list[dict[str, Any]]:
    """Differences between recipes of several seeds each, and what they say in words."""
    compared: list[dict[str, Any]] = []
    p_values = {}
    for first, second in itertools.combinations(recipes, 2):
        places: dict[str, dict[str, Any]] = {}
        for place, figures in first.figures.items():
            places[place] = {}
            for key, one in figures.items():
                other = second.figures[place][key]
                if one["mean"] is None or other["mean"] is None:
                    continue
                figure = places[place][key] = welch(one["values"], other["values"])
                if figure["p"] is not None:
                    p_values[len(compared), place, key] = figure["p"]
        entry = {"first": first.name, "second": second.name, "positive_label": positive}
        entry |= {"seeds": [len(first.runs), len(second.runs)]}
        compared.append(entry | {"overall": places.pop("overall"), "groups": places})
    for (index, place, key), p in holm(p_values).items():
        one = compared[index]
        figures = one["overall"] if place == "overall" else one["groups"][place]
        figures[key]["p_holm"] = p
    for one in compared:
        one["claims"] = find_claims(one, "p_holm")
        first, second = one["first"], one["second"]
        seeds = f"{one['seeds'][0]} and {one['seeds'][1]} seeds"
        if one["claims"]:
            words = f"{describe_recipes(one['claims'])} ({seeds}); {NOTHING_ELSE}."
        else:
            words = f"No difference of {first} and {second} {NOT_PASSED} ({seeds})."
        one["words"] = words[0].upper() + words[1:]
    return compared


# --- output ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A part of the output: a title, sentences, and a table with its header first."""

    title: str
    sentences: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    printed: bool = True


def percent_words(figure: dict[str, Any]) -> str:
    """A figure of 0 to 1 in percent with its interval, where there are posts enough."""
    if figure["value"] is None:
        return f"undefined ({visible(figure['reason'])})"
    if figure["n"] < MIN_DENOMINATOR:
        return f"insufficient (n = {figure['n']})"
    if figure["low"] is None:
        return f"{100 * figure['value']:.1f} %"
    low, high = 100 * figure["low"], 100 * figure["high"]
    return f"{100 * figure['value']:.1f} % [{low:.1f}, {high:.1f}]"


def p_words(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def comparison_sections(comparison: dict[str, Any]) -> list[Section]:
    """Everything that is printed and written into compare.md, the verdict first."""
    metrics = comparison["metrics"]
    pairs = [difference_section(one) for one in metrics["comparisons"]]
    sentences = [one["words"] for one in comparison["recipe_comparisons"]]
    sentences += [one["words"] for one in comparison["verdicts"]]
    # They count posts by their true label, so they are the same for every pair.
    sentences += describe_insufficient(comparison["verdicts"][0]["insufficient"])
    sentences.append(
        "Tested of two checkpoints: accuracy over all posts, and the false positive and the false "
        "negative rate over all posts and of each group, where there are "
        f"{MIN_DENOMINATOR} posts to count (exact McNemar; Holm's correction over all pairs, for "
        "the accuracies and for the error rates; an interval with 0 in it is not named either). "
        "All other differences have an interval and no test."
    )
    if comparison["recipe_comparisons"]:
        sentences.append(
            f"Tested of recipes: {', '.join(POOLED.values())}, over all posts and of each group "
            "(Welch's t-test over seeds; one Holm's correction)."
        )
    differ = any(one["claims"] for one in comparison["verdicts"])
    if differ and not comparison["recipe_comparisons"]:
        sentences.append(
            "What is said of checkpoints is no verdict on recipes: to call a recipe better, train "
            "each with several seeds."
        )
    return [
        Section("Verdict", sentences),
        *requirement_section(comparison),
        Section("Posts", [describe_shared_posts(metrics), *comparison["notes"]]),
        run_section(comparison),
        Section("Error rates per target group", [], rate_table(metrics)),
        *[replace(one, printed=len(pairs) <= MOST_PRINTED_PAIRS) for one in pairs],
        *recipe_sections(comparison),
        Section("What these figures do not say", [*LIMITS_OF_COMPARISON], printed=False),
    ]


def requirement_section(comparison: dict[str, Any]) -> list[Section]:
    if not comparison["requirements"]:
        return []
    first = visible(comparison["runs"][0]["name"])
    strict = comparison["arguments"]["strict"]
    words = "the bad end of the interval" if strict else "the value"
    table = requirement_table(comparison["requirements"])
    return [Section(f"Requirements on {first}", [f"Tested is {words}."], table)]


def describe_shared_posts(metrics: dict[str, Any]) -> str:
    """How many posts there are of each label, and what the same answer to all would reach."""
    counts, positive = metrics["label_counts"], metrics["positive_label"]
    words = ", ".join(f"{count} {visible(label)}" for label, count in counts.items())
    part = counts[positive] / metrics["n"]
    return (
        f"{metrics['n']} posts that all runs have: {words}. Answering {visible(positive)} to all "
        f"of them would have an F1 of {200 * part / (1 + part):.1f} %."
    )


def run_table(comparison: dict[str, Any]) -> list[list[str]]:
    """A row per run: its figures, those of each group in short, its cost, what changed in it."""
    metrics = comparison["metrics"]
    positive = metrics["positive_label"]
    groups = [*metrics["strategies"][0]["groups"]]
    header = ["run", f"F1 {visible(positive)}", "accuracy", "false positive rate"]
    header += ["false negative rate", "AUROC"]
    header += [place_words(group, "FPR, FNR") for group in groups]
    header += ["dollars", "recorded evaluations of these posts", "arguments that differ", "recipe"]
    rows = [header]
    names = (f"f1_{positive}", "accuracy", "false_positive_rate", "false_negative_rate", "roc_auc")
    for run, strategy in zip(comparison["runs"], metrics["strategies"], strict=True):
        figures = figures_at(strategy, "overall")
        cells = [percent_words(figures[name]) for name in names]
        cells += [short_rates(figures_at(strategy, group)) for group in groups]
        dollars, reads = run["dollars_at_least"], run["test_reads"]
        cells += ["not recorded" if dollars is None else f"at least {dollars:.2f}"]
        cells += ["not recorded" if reads is None else str(reads)]
        arguments = run["changed_arguments"]
        words = "not recorded" if arguments is None else "none"
        if arguments:
            words = ", ".join(f"{name} {value}" for name, value in arguments.items())
        rows.append([visible(run["name"]), *cells, visible(words, 300), run["recipe"] or ""])
    return rows


def run_section(comparison: dict[str, Any]) -> Section:
    """The table of runs; a column that says nothing of any run is a sentence instead."""
    rows = run_table(comparison)
    columns = [{row[column] for row in rows[1:]} for column in range(len(rows[0]))]
    kept = [column for column, cells in enumerate(columns) if cells - {"not recorded", ""}]
    unknown = [
        title for title, cells in zip(rows[0], columns, strict=True) if cells == {"not recorded"}
    ]
    sentences = [
        "FPR, FNR of a group: percent of its posts of the other and of the positive label; "
        f"few: fewer than {MIN_DENOMINATOR} posts. Intervals stand in the next table."
    ]
    if unknown:
        sentences.append(f"Not recorded of any run: {', '.join(unknown)}.")
    if "dollars" not in unknown:
        sentences.append("Dollars are recorded where a training pauses; its last start is not in.")
    return Section("Runs", sentences, [[row[column] for column in kept] for row in rows])


def short_rates(figures: dict[str, Any]) -> str:
    """False positive and false negative rate in percent; `few` for too few posts."""
    rates = (figures[name] for name in ("false_positive_rate", "false_negative_rate"))
    return ", ".join(
        "few" if rate["n"] < MIN_DENOMINATOR else f"{100 * rate['value']:.1f}" for rate in rates
    )


def rate_table(metrics: dict[str, Any]) -> list[list[str]]:
    """A row per group and run."""
    positive = metrics["positive_label"]
    rows = [["target group", "posts", "run", "false positive rate", "false negative rate"]]
    rows[0].append(f"F1 {visible(positive)}")
    for group in metrics["strategies"][0]["groups"]:
        for strategy in metrics["strategies"]:
            figures = figures_at(strategy, group)
            cells = [
                percent_words(figures[rate])
                for rate in ("false_positive_rate", "false_negative_rate")
            ]
            name = "no target" if group == NO_TARGET else visible(group)
            cells.append(percent_words(figures[f"f1_{positive}"]))
            rows.append([name, str(figures["n_total"]), visible(strategy["name"]), *cells])
    return rows


def difference_section(one: dict[str, Any]) -> Section:
    """A pair's differences: all posts, then every group's error rates."""
    first, second = visible(one["first"]), visible(one["second"])
    rows = [["posts", "figure", "n", "difference in points", "p (McNemar)", "p (Holm)"]]
    rows[0].append("fewer errors")
    shown_ = [("overall", key, figure) for key, figure in one["overall"].items()]
    shown_ += [
        (group, rate, figures[rate])
        for group, figures in one["groups"].items()
        for rate in ("false_positive_rate", "false_negative_rate")
    ]
    claimed = {
        (claim["place"], claim["figure"]): claim["favours"]
        for claim in find_claims(one, "p_holm_pairs")
    }
    for place, key, figure in shown_:
        if figure["value"] is None:
            words = f"undefined ({visible(figure['reason'])})"
        elif place != "overall" and figure["n"] < MIN_DENOMINATOR:
            words = "insufficient"
        elif figure["low"] is None:
            words = f"{100 * figure['value']:+.1f}"
        else:
            ends = f"[{100 * figure['low']:+.1f}, {100 * figure['high']:+.1f}]"
            words = f"{100 * figure['value']:+.1f} {ends}"
        where = "all" if place == "overall" else place_words(place, "").strip()
        p, adjusted = p_words(figure.get("p")), p_words(figure.get("p_holm_pairs"))
        fewer = visible(claimed.get((place, key), ""))
        rows.append([where, words_of(key), str(figure["n"]), words, p, adjusted, fewer])
    sentence = (
        f"{one['changed']} of {one['n']} posts are decided otherwise: {one['only_first_right']} "
        f"only {first} decides rightly, {one['only_second_right']} only {second}."
    )
    return Section(f"{first} less {second}", [sentence], rows)


def recipe_sections(comparison: dict[str, Any]) -> list[Section]:
    """Means over seeds, and the differences between recipes."""
    sections = []
    if comparison["recipes"]:
        rows = [["recipe", "posts", *(f"{name}, mean (sd)" for name in POOLED.values())]]
        sentences = []
        for recipe in comparison["recipes"]:
            names = ", ".join(map(visible, recipe["runs"]))
            words = ", ".join(f"{key} {value}" for key, value in recipe["arguments"].items())
            seeds = ", ".join(str(seed) for seed in recipe["seeds"] if seed is not None)
            sentence = f"{recipe['name']}: {names}"
            sentence += f"; seeds {seeds}" if seeds else ""
            sentences.append(sentence + (f"; {visible(words, 300)}." if words else "."))
            for place, figures in recipe["figures"].items():
                where = "all" if place == "overall" else place_words(place, "").strip()
                cells = [
                    f"{100 * one['mean']:.1f} ({100 * one['sd']:.1f})"
                    if one["mean"] is not None
                    else visible(one["reason"])
                    for one in figures.values()
                ]
                rows.append([recipe["name"], where, *cells])
        sections.append(Section("Recipes over their seeds, in percent", sentences, rows))
    for one in comparison["recipe_comparisons"]:
        rows = [["posts", "figure", "difference in points", "p (Welch)", "p (Holm)"]]
        for place, figures in {"overall": one["overall"], **one["groups"]}.items():
            where = "all" if place == "overall" else place_words(place, "").strip()
            for key, figure in figures.items():
                words = f"{100 * figure['value']:+.1f}"
                if figure["low"] is not None:
                    words += f" [{100 * figure['low']:+.1f}, {100 * figure['high']:+.1f}]"
                ps = [p_words(figure["p"]), p_words(figure.get("p_holm"))]
                rows.append([where, POOLED[key], words, *ps])
        sections.append(Section(f"{one['first']} less {one['second']}", [], rows))
    return sections


def text_table(rows: list[list[str]]) -> list[str]:
    """Rows as lines whose columns stand below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def sections_as_markdown(sections: list[Section]) -> str:
    """compare.md."""
    lines = ["# Comparison of runs", ""]
    for section in sections:
        lines += [f"## {markdown_cell(section.title)}", ""]
        lines += [f"- {markdown_cell(sentence)}" for sentence in section.sentences]
        lines += [""] if section.sentences else []
        if section.rows:
            rows = [
                f"| {' | '.join(markdown_cell(cell) for cell in row)} |" for row in section.rows
            ]
            lines += [rows[0], f"|{' --- |' * len(section.rows[0])}", *rows[1:], ""]
    return "\n".join(lines)


def changed_rows(runs: list[Answered]) -> list[list[Any]]:
    """The posts that the first run and another one decide otherwise: ids, labels, scores."""
    first, rows = runs[0], []
    wrong = {label: next(one for one in first.labels if one != label) for label in first.labels}
    wrong |= {label: first.positive for label in first.labels if label != first.positive}
    for other in runs[1:]:
        for index, (name, label) in enumerate(zip(first.ids, first.truth, strict=True)):
            pair = (first.predicted[index], other.predicted[index])
            one, two = (wrong[label] if answer is None else answer for answer in pair)
            if one != two:
                scores = [run.scores[index] if run.scores else None for run in (first, other)]
                groups = "|".join(first.groups[index])
                row = [first.name, other.name, name, label, groups, *pair, *scores]
                rows.append([*row, "first" if one == label else "second" if two == label else ""])
    return rows


def write_comparison(
    folder: Path, comparison: dict[str, Any], sections: list[Section], runs: list[Answered]
) -> None:
    """Write compare.md, compare.json and changed.csv."""
    positive = visible(runs[0].positive)
    header = ["first", "second", "id", "label", "target_groups", "prediction_first"]
    header += ["prediction_second", f"p_{positive}_first", f"p_{positive}_second", "right"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "changed.csv", header, changed_rows(runs))
        write_json(folder / "compare.json", comparison)
        (folder / "compare.md").write_text(sections_as_markdown(sections), encoding="utf-8")
    except OSError as error:
        fail(f"cannot write to {folder}: {error.strerror}. Name another --output_dir.")


# --- requirements ----------------------------------------------------------------------------

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


def json_mapping(text: str) -> dict[str, str]:
    """A JSON object of texts, as a flag's value."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return {str(key): str(value) for key, value in found.items()}


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


def has_enough(sample: Sample, group: str, key: str) -> bool:
    """Whether both sides of a group's AUC have the least number of posts."""
    inside, positive = sample.members[group], sample.positives
    high, low = {
        "roc_auc": (positive & inside, ~positive & inside),
        "bpsn_auc": (positive & ~inside, ~positive & inside),
        "bnsp_auc": (positive & inside, ~positive & ~inside),
    }[key]
    return min(high.sum(), low.sum()) >= MIN_DENOMINATOR


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


NO_AUC = f"no group has {MIN_DENOMINATOR} posts on both sides"
NO_ERROR = "no group has such an error"
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


def write_json(file: Path, content: Any) -> None:
    """Write strict JSON (no NaN) that a person can read: a list of numbers stands on one line."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    # Strings hold no raw line break, so only a list can begin with one.
    text = re.sub(r"\[\n[-\d,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    file.write_text(text + "\n", encoding="utf-8")


def flat_arguments(contract: dict[str, Any]) -> dict[str, Any]:
    """A run's arguments by name, those of the trainer's config and the process count included."""
    arguments = dict(contract["arguments"])
    fields = arguments.pop("trainer_fields", {})
    return {**fields, **arguments, "world_size": contract["training"]["world_size"]}


if __name__ == "__main__":
    main()
