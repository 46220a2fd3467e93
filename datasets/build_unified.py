# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "datasets==5.2.0",
#     "huggingface-hub==2.4.0",
#     "pyarrow==26.0.1",
#     "pyyaml==6.0.3",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-20T00:00:00Z"
#
# [tool.hf-jobs]
# flavor = "cpu-upgrade"
# timeout = "1h"
# name = "hsd-build-unified"
# secrets = ["HF_TOKEN"]
# ///
"""Build the dataset repo that training and evaluation read, from HateXplain and ToxiGen.

Reads:  HateXplain (--hatexplain) and ToxiGen (--toxigen), each from the Hub or from its official
        file, plain or gzipped.
Writes: DATASET_REPO (private, default {you}/hsd-data), in one commit: the configs unified, simple,
        optimized and instruction as parquet, the dataset card and contract.json. A folder such as
        ./out gets the same files; with local sources that needs no network and no token.

    hf jobs uv run datasets/build_unified.py
    hf jobs uv run datasets/build_unified.py --toxigen_label human --offensive_as drop

The same command again replaces the earlier build as a whole: the same sources, rules and seed give
the same rows in the same order, byte for byte. The texts are offensive; the repo is private.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import difflib
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

SCRIPT = "datasets/build_unified.py"
SCHEMA = 1
CONTRACT = "contract.json"
CARD = "README.md"
# Variables with these names are read as they stand; every other flag is HSD_<FLAG>, because an
# unprefixed SEED or TASK in somebody's shell must not change an audited run.
PLAIN_VARIABLES = ("DATASET_REPO", "HUB_MODEL_ID", "MAX_STEPS")
LABELS, POSITIVE_LABEL = ["normal", "hate"], "hate"
SPLITS = ("train", "validation", "test")
# What each source calls the groups, and what the strategy `optimized` says about them. ToxiGen's
# annotated test rows use the long names.
GROUPS: dict[str, dict[str, Any]] = {
    "lgbtq": {
        "hatexplain": ["Homosexual"],
        "toxigen": ["lgbtq", "lgbtq+ folks"],
        "note": "Lesbian, gay, bisexual and trans people are attacked as sick, sinful or a danger "
        "to children. Words that began as insults can be used with pride.",
    },
    "mexican": {
        "hatexplain": ["Hispanic"],
        "toxigen": ["mexican", "mexican folks"],
        "note": "Mexicans and other Latin Americans are attacked as criminals or invaders. An "
        "argument about border policy is no attack.",
    },
    "middle_east": {
        "hatexplain": ["Arab"],
        "toxigen": ["middle_east", "middle eastern folks"],
        "note": "Arabs and other people of the Middle East are attacked as terrorists or savages. "
        "Criticism of a government or a war is no attack.",
    },
}
# Where the Hub has each source as parquet; `datasets` no longer runs the script of HateXplain's
# main branch. The classes are those of `label_multiclass`, in the order of the funnel's counts.
SOURCES: dict[str, dict[str, Any]] = {
    "hatexplain": {
        "repo": "Hate-speech-CNERG/hatexplain",
        "revision": "refs/convert/parquet",
        "licence": "MIT",
        "classes": ("hatespeech", "offensive", "normal"),
    },
    "toxigen": {
        "repo": "toxigen/toxigen-data",
        "revision": "main",
        "licence": "MIT and CDLA-Permissive-2.0",
        "classes": ("hate", "normal"),
    },
}
CLASS_LABELS = {"hatespeech": "hate", "hate": "hate", "normal": "normal"}
# HateXplain's parquet files hold the indices of these names.
HATEXPLAIN_HUB_CLASSES = ("hatespeech", "normal", "offensive")
HATEXPLAIN_COLUMNS = ("id", "annotators", "rationales", "post_tokens")
# ToxiGen: the columns of text and group, and of the class that the prompt was written for.
TOXIGEN_COLUMNS = {
    "annotated": ("text", "target_group", "label"),
    "train": ("generation", "group", "prompt_label"),
}
PROMPT_CLASSES = {"hate": "hate", "neutral": "normal", "1": "hate", "0": "normal"}
TOXICITY = ("toxicity_ai", "toxicity_human")
# A post is toxic to its readers above this sum of the two scores of 1 to 5: the paper's rule.
TOXIC_ABOVE = 5.5
# Answers of strategies that ask for a rationale, where the source marks no words.
RATIONALES = {
    "normal": "It does not attack people because of a group they belong to.",
    "hate": "It attacks people because of a group they belong to.",
}
EXAMPLES = (
    ("newcomers are a plague, drive them out", "hate", "a plague, drive them out"),
    ("this bus company is run by clowns", "normal", "Rude, but about a company."),
    ("he said women can't think, so i left", "normal", "Quotes an insult to object to it."),
)
RATIONALE_ANSWER = json.dumps({"label": "{label}", "rationale": "{rationale}"})
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
# One line a strategy: what it asks, and the answer it trains. {text} is the post; {labels} is
# filled in when the dataset is built. Answers hold the label first, so that it can be scored.
PROMPTS = {
    "simple": {
        "description": "one question, one word as the answer",
        "system": "You label social media posts for a content moderation team.",
        "user": (
            "Is this post hate speech against people because of who they are, for example their "
            "ethnicity, nationality, religion, gender or sexual orientation?\n\n"
            "Post:\n{text}\n\nAnswer with one word: {labels}."
        ),
        "answer": "{label}",
    },
    "optimized": {
        "description": "policy, notes on the communities and examples; label and rationale as JSON",
        "system": (
            "You moderate social media posts by this policy. Hate speech attacks people, or calls "
            "for an attack on them, because of a group they belong to: it threatens, dehumanises, "
            "degrades or excludes them, or blames them all for what some did. Irony and coded "
            "words excuse nothing. Rude words aimed at no group, criticism of states and ideas, "
            "quoting in order to object, and people speaking of themselves are no hate speech.\n\n"
            "Communities:\n{notes}\n\nExamples:\n{examples}"
        ),
        "user": (
            "Post: {text}\n\nAnswer in JSON with two keys: label ({labels}), then rationale (the "
            "words of the post that decide it, or one short sentence)."
        ),
        "answer": RATIONALE_ANSWER,
    },
    "instruction": INSTRUCTION,
}

Row = dict[str, Any]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; nothing is read yet."""
    parser = Parser(prog=SCRIPT, description=__doc__)
    flag = parser.add_argument_group("sources").add_argument
    hub = {name: source["repo"] for name, source in SOURCES.items()}
    flag("--hatexplain", default=hub["hatexplain"], help="Hub id[@revision] or dataset.json[.gz]")
    flag("--hatexplain_splits", help="post_id_divisions.json[.gz], with a local --hatexplain")
    flag("--toxigen", default=hub["toxigen"], help="Hub id[@revision] or annotated_train.csv[.gz]")
    flag(
        "--toxigen_config",
        choices=list(TOXIGEN_COLUMNS),
        help="annotated: judged by people; train: 250,951 rows; by default annotated for a file, "
        "for the Hub the one that has --toxigen_label",
    )
    flag = parser.add_argument_group("rules").add_argument
    flag(
        "--toxigen_label",
        choices=["prompt", "human"],
        default="prompt",
        help=f"prompt: what the text was made for; human: {' + '.join(TOXICITY)} > {TOXIC_ABOVE}",
    )
    flag("--offensive_as", choices=[*LABELS, "drop"], default="normal", help="HateXplain's class")
    flag("--groups", help='JSON {GROUP: {"hatexplain": [NAME], "toxigen": [NAME], "note": TEXT}}')
    flag(
        "--balance",
        choices=["none", "source_label"],
        default="none",
        help="source_label: each source x label gets the rows of its split's smallest one",
    )
    flag("--seed", type=int, default=42, help="of the ToxiGen split, the balance and the order")
    flag = parser.add_argument_group("target").add_argument
    flag("--dataset_repo", help="Hub id or folder ({you}/hsd-data)")
    flag("--allow_public", type=boolean, nargs="?", const=True, default=False)
    flag("--config_file", help="JSON or YAML file of these flags")
    return resolve_arguments(parser, argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_arguments(args)
    groups = read_groups(args.groups)
    sources = [read_hatexplain(args), read_toxigen(args)]
    rows = unify(args, groups, *sources)
    check_rows(rows, groups)
    args.dataset_repo = prepare_target(args.dataset_repo, args.allow_public)
    contract = describe_dataset(args, groups, sources, rows)
    print(funnel_table(contract), flush=True)
    files = build_files(contract, rows)
    publish(args.dataset_repo, files)


# --- arguments and target --------------------------------------------------------------------


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that do not fit together and files that are not there; make paths absolute."""
    for name in ("hatexplain", "hatexplain_splits", "toxigen", "groups"):
        value = vars(args)[name]
        if value and (name in ("hatexplain_splits", "groups") or is_local_file(value)):
            file = Path(value).expanduser().resolve()
            if not file.is_file():
                fail(f"--{name} {value} does not exist or is no file.")
            setattr(args, name, str(file))
    if is_local_file(args.hatexplain) and not args.hatexplain_splits:
        fail("a local --hatexplain needs --hatexplain_splits, the official post_id_divisions.json.")
    if args.hatexplain_splits and not is_local_file(args.hatexplain):
        fail("--hatexplain_splits goes with a local --hatexplain; the Hub repo brings its splits.")
    if args.toxigen_label == "human" and args.toxigen_config == "train":
        fail("ToxiGen's train config has no human judgement. Use --toxigen_config annotated.")
    if args.toxigen_config is None:
        from_hub = not is_local_file(args.toxigen)
        # The Hub's annotated rows have lost the prompt's class; only the original file has it.
        prompt = from_hub and args.toxigen_label == "prompt"
        args.toxigen_config = "train" if prompt else "annotated"


def is_local_file(argument: str) -> bool:
    """Say whether a source is a file, by its form: what exists here never shadows a Hub id."""
    return is_folder(argument) or argument.endswith((".json", ".csv", ".gz"))


def read_groups(path: str | None) -> dict[str, dict[str, Any]]:
    """Read the mapping of groups to the sources' names for them; without a file it is GROUPS."""
    if path is None:
        return GROUPS
    groups = parse_json(read_text(path)[0], path)
    valid = isinstance(groups, dict) and all(
        isinstance(group, dict)
        and group.keys() <= {*SOURCES, "note"}
        and all(is_strings(group.get(source, [])) for source in SOURCES)
        and isinstance(group.get("note", ""), str)
        for group in groups.values()
    )
    if not valid or not groups:
        fail(
            f"--groups {path} must hold a mapping such as "
            '{"women": {"hatexplain": ["Women"], "toxigen": ["women"], "note": "..."}}.'
        )
    return groups


def prepare_target(target: str | None, allow_public: bool) -> str:
    """Prove that the dataset can be written; return its name.

    It comes after the sources are checked: bad data leaves no empty repo behind.
    """
    if target is None:
        target = f"{own_namespace()}/hsd-data"
    if not is_folder(target):
        prepare_repo(target, "dataset", "dataset", allow_public)
        return target
    folder = Path(target).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        fail(f"--dataset_repo {target} is a file; name a folder or a Hub id.")
    entries = list(folder.iterdir()) if folder.exists() else []
    strange = [
        entry.name
        for entry in entries
        if entry.name not in (CARD, CONTRACT)
        and not (entry.is_dir() and all(file.suffix == ".parquet" for file in entry.iterdir()))
    ]
    # The folder is replaced as a whole, so it must hold nothing but an earlier build.
    if strange or (entries and not (folder / CONTRACT).is_file()):
        names = ", ".join(sorted(strange)[:5]) or "no contract.json"
        fail(f"--dataset_repo {target} holds other files ({names}); name a new or empty folder.")
    return str(folder)


# --- sources ---------------------------------------------------------------------------------


@dataclass
class Source:
    """Rows of one source, and how many of them each step left: the funnel."""

    name: str
    id_or_file: str
    rows: list[Row]
    names: set[str]  # of groups, as the source calls them
    repo: Repo | None = None
    sha256: str | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)

    def keep(self, step: str, rows: list[Row]) -> None:
        """Go on with these rows; once they have groups, count them by split, group and class."""
        counts: dict[str, Any] = {}
        for row in rows:
            for group in row.get("target_groups", ()):
                cell = counts.setdefault(row["split"], {}).setdefault(group, Counter())
                cell[row["label_multiclass"]] += 1
        self.steps.append({"step": step, "rows": len(rows), "counts": counts})
        self.rows = rows


def read_text(path: str) -> tuple[str, str]:
    """Return the text of a file, plain or gzipped, and the sha256 of its uncompressed bytes."""
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        fail(f"cannot read {path}: {error}. It must be UTF-8 text, plain or gzipped, and whole.")


def parse_json(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        fail(f"{path} is no JSON, or is cut off: {error}")


def read_hatexplain(args: argparse.Namespace) -> Source:
    """Read the posts that are in an official split and have a majority label."""
    repo = sha256 = None
    if is_local_file(args.hatexplain):
        name = Path(args.hatexplain).name
        text, sha256 = read_text(args.hatexplain)
        posts, splits = parse_json(text, name), read_splits(args.hatexplain_splits)
        if not isinstance(posts, dict):
            fail(f"{name} must hold a mapping of post ids to posts.")
    else:
        repo, tables = read_hub_parquet(
            "hatexplain", args.hatexplain, "plain_text", HATEXPLAIN_COLUMNS
        )
        name, posts, splits = repo.name, {}, {}
        for path, table in tables.items():
            posts |= {post["id"]: hub_post(post) for post in table}
            splits |= {post["id"]: path.split("/")[1] for post in table}
    rows = [parse_post(key, post, splits.get(key), name) for key, post in posts.items()]
    names = {target for row in rows for target in row["targets"]}
    source = Source("hatexplain", name, rows, names, repo, sha256)
    source.keep("read", rows)
    decided = [row for row in rows if row["split"] in SPLITS and row["label_multiclass"]]
    source.keep("in an official split, with a majority label", decided)
    return source


def hub_post(post: Row) -> Row:
    """Turn a post of the Hub, whose annotators are a struct of lists, into the file's form."""
    votes, known = post["annotators"], range(len(HATEXPLAIN_HUB_CLASSES))
    if not isinstance(votes, dict) or not {"label", "target"} <= votes.keys():
        return post
    labels = [HATEXPLAIN_HUB_CLASSES[vote] if vote in known else vote for vote in votes["label"]]
    pairs = zip(labels, votes["target"], strict=False)
    return post | {"annotators": [{"label": label, "target": target} for label, target in pairs]}


def read_splits(path: str) -> dict[str, str]:
    """Map post ids to splits; the official file calls validation `val`."""
    lists = parse_json(read_text(path)[0], path)
    names = {"train": "train", "val": "validation", "test": "test"}
    valid = isinstance(lists, dict) and all(is_strings(ids) for ids in lists.values())
    if not valid or lists.keys() != names.keys():
        fail(f"{path} must hold three lists of post ids: train, val and test.")
    splits: dict[str, str] = {}
    for name, ids in lists.items():
        twice = [post_id for post_id in ids if post_id in splits]
        if twice:
            fail(f"{path} has {len(twice)} posts in two splits, for example {twice[0]}.")
        splits |= dict.fromkeys(ids, names[name])
    return splits


def is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def parse_post(post_id: str, post: Any, split: str | None, origin: str) -> Row:
    """Check one post of HateXplain and turn it into a row."""
    votes = post.get("annotators") if isinstance(post, dict) else None
    valid = (
        isinstance(votes, list)
        and all(isinstance(vote, dict) and "label" in vote for vote in votes)
        and all(is_strings(vote.get("target")) for vote in votes)
        and is_strings(post.get("post_tokens"))
        and isinstance(post.get("rationales"), list)
        and all(isinstance(mask, list) for mask in post["rationales"])
    )
    if not valid:
        found = ", ".join(post) if isinstance(post, dict) else type(post).__name__
        fail(
            f"the post {post_id} of {origin} is not in HateXplain's format. It needs annotators "
            f"(a list of label and target), rationales and post_tokens; it has: {found}."
        )
    labels = [vote["label"] for vote in votes]
    check_class(labels, SOURCES["hatexplain"]["classes"], f"the post {post_id} of {origin}")
    targets = [target for vote in votes for target in vote["target"]]
    # The words that any annotator marked; posts that most called normal have no marks.
    marked = zip(post["post_tokens"], *post["rationales"], strict=False)
    return {
        "id": post_id,
        "text": " ".join(post["post_tokens"]),
        "label_multiclass": majority(labels),
        "persona": top_target(targets),
        "source": "hatexplain",
        "rationale": " ".join(token for token, *marks in marked if any(marks)),
        "annotator_labels": labels,
        "targets": targets,
        "toxicity_human": None,
        "toxicity_ai": None,
        "official_split": split,
        "split": split,
    }


def check_class(found: list[Any], known: Iterable[str], origin: str) -> None:
    unknown = [label for label in found if label not in known]
    if unknown:
        fail(f"{origin} has the label {unknown[0]!r}. The labels are: {', '.join(known)}.")


def majority(labels: list[str]) -> str | None:
    """The label of more than half of the annotators."""
    label, votes = Counter(labels).most_common(1)[0] if labels else (None, 0)
    return label if 2 * votes > len(labels) else None


def top_target(targets: list[str]) -> str | None:
    """The target named most often, "None" left out; of a tie, the one named first."""
    named = Counter(target for target in targets if target != "None")
    return named.most_common(1)[0][0] if named else None


def read_toxigen(args: argparse.Namespace) -> Source:
    """Read the statements, with the class that --toxigen_label chooses."""
    text_column, group_column, class_column = TOXIGEN_COLUMNS[args.toxigen_config]
    judged = args.toxigen_label == "human"
    columns = (text_column, group_column, *(TOXICITY if judged else (class_column,)))
    repo = sha256 = None
    if is_local_file(args.toxigen):
        name = Path(args.toxigen).name
        text, sha256 = read_text(args.toxigen)
        records = read_csv(text, name, columns)
    else:
        repo, tables = read_hub_parquet("toxigen", args.toxigen, args.toxigen_config, columns)
        name, records = repo.name, [record for table in tables.values() for record in table]
    rows = []
    for number, record in enumerate(records):
        origin = f"row {number} of {name}"
        scores = {column: toxicity(record.get(column), origin) for column in TOXICITY}
        if judged:
            verdict = judged_class(list(scores.values()), origin)
        else:
            check_class([str(record[class_column])], PROMPT_CLASSES, origin)
            verdict = PROMPT_CLASSES[str(record[class_column])]
        row = {
            "id": f"toxigen_{number}",
            "text": decode_text(record[text_column] or "", origin),
            "label_multiclass": verdict,
            "persona": record[group_column] or "",
            "source": "toxigen",
            "rationale": "",
            "annotator_labels": [],
            "official_split": None,
            "split": "all",
        }
        rows.append(row | scores)
    source = Source("toxigen", name, rows, {row["persona"] for row in rows}, repo, sha256)
    source.keep("read", rows)
    return source


def read_csv(text: str, name: str, columns: tuple[str, ...]) -> list[Row]:
    """Read a CSV file; a row of another length, as a cut-off file ends with, is an error."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        check_columns(columns, reader.fieldnames or [], name)
        records = list(reader)
    except csv.Error as error:
        fail(f"{name} line {reader.line_num} is no CSV, or the file is cut off: {error}")
    for number, record in enumerate(records):
        if None in record or None in record.values():
            fail(f"row {number} of {name} has more or fewer fields than the header.")
    return records


def check_columns(needed: tuple[str, ...], found: Sequence[str], origin: str) -> None:
    missing = [column for column in needed if column not in found]
    if missing:
        fail(
            f"{origin} lacks the columns {', '.join(missing)}. It has: {', '.join(found)}. "
            "--toxigen_config and --toxigen_label choose the columns of ToxiGen."
        )


def decode_text(text: str, origin: str) -> str:
    """Decode the bytes literal, b'...', that ToxiGen's annotated file holds for each text."""
    if len(text) < 3 or text[0] != "b" or text[1] not in "'\"" or text[-1] != text[1]:
        return text
    try:
        return ast.literal_eval(text).decode("utf-8")
    except (ValueError, SyntaxError) as error:
        fail(f"{origin} holds a bytes literal that cannot be decoded: {error}")


def toxicity(value: Any, origin: str) -> float | None:
    """Read a human score of 1 to 5; None where there is none."""
    try:
        score = math.nan if value in (None, "") else float(value)
    except ValueError:
        fail(f"{origin} has a toxicity of {value!r}; it must be a number.")
    return score if math.isfinite(score) else None


def judged_class(scores: list[float | None], origin: str) -> str:
    """The class by human judgement."""
    found = [score for score in scores if score is not None]
    if len(found) < len(scores):
        fail(f"{origin} has no {' or no '.join(TOXICITY)}: no human judgement.")
    return "hate" if sum(found) > TOXIC_ABOVE else "normal"


def read_hub_parquet(
    source: str, argument: str, config: str, columns: tuple[str, ...]
) -> tuple[Repo, dict[str, list[Row]]]:
    """Download a config's parquet files at one commit; return the repo and the rows by path."""
    import pyarrow
    import pyarrow.parquet
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = argument.partition("@")
    revision = revision or SOURCES[source]["revision"]
    pattern = f"{config}/*.parquet"
    action = f"read {argument} (a downloaded file does too: --{source} ./FILE)"
    with hub_errors(action):
        sha = HfApi().repo_info(name, repo_type="dataset", revision=revision).sha
        folder = snapshot_download(
            name, repo_type="dataset", revision=sha, allow_patterns=[pattern]
        )
    tables: dict[str, list[Row]] = {}
    for file in sorted(Path(folder, config).rglob("*.parquet")):
        path = file.relative_to(folder).as_posix()
        try:
            found = pyarrow.parquet.read_schema(file).names
            check_columns(columns, found, f"{name} ({path})")
            chosen = [column for column in found if column in columns + TOXICITY]
            tables[path] = pyarrow.parquet.read_table(file, columns=chosen).to_pylist()
        except pyarrow.ArrowException as error:
            fail(f"{path} of {name} is damaged: {error}")
    if not tables:
        fail(f"cannot {action}: it holds no {pattern}.")
    return Repo(name, "dataset", sha), tables


# --- rules -----------------------------------------------------------------------------------


def unify(
    args: argparse.Namespace, groups: dict[str, Any], hatexplain: Source, toxigen: Source
) -> list[Row]:
    """Apply the rules, count what each of them leaves, and return the rows of all splits."""
    for source in (hatexplain, toxigen):
        select(source, groups, args.offensive_as)
    # Of posts with one text the official test set keeps its own; ToxiGen yields to HateXplain.
    hatexplain.rows.sort(key=lambda row: ("test", "validation", "train").index(row["split"]))
    seen = {""}
    for source in (hatexplain, toxigen):
        source.keep("text not empty and not seen before", drop_repeats(source.rows, seen))
    split_statements(toxigen.rows, args.seed)
    toxigen.keep("split by group and label", toxigen.rows)
    rows = hatexplain.rows + toxigen.rows
    if args.balance == "source_label":
        rows = balance(rows, args.seed)
        for source in (hatexplain, toxigen):
            source.keep("balanced", [row for row in rows if row["source"] == source.name])
    # Mixed, so that the first n rows of a split are a fair sample of it.
    random.Random(args.seed).shuffle(rows)
    return rows


def select(source: Source, groups: dict[str, Any], offensive_as: str) -> None:
    """Keep the rows about one of the groups, and give them their label."""
    asked = {name for group in groups.values() for name in group.get(source.name, [])}
    built_in = {name for group in GROUPS.values() for name in group[source.name]}
    if unknown := asked - source.names - built_in:
        fail(
            f"--groups names {', '.join(sorted(unknown))} for {source.name}, which has: "
            f"{', '.join(sorted(source.names))}."
        )
    rows = [row for row in source.rows if row["persona"] in asked]
    labels = CLASS_LABELS | {"offensive": offensive_as}
    for row in rows:
        row["label"] = labels[row["label_multiclass"]]
        row["target_groups"] = [
            group for group, names in groups.items() if row["persona"] in names.get(source.name, [])
        ]
    source.keep("about a group", rows)
    if offensive_as == "drop":
        source.keep("not offensive", [row for row in rows if row["label"] in LABELS])


def normalise(text: str) -> str:
    """The form in which two texts count as the same: case and white space folded."""
    return " ".join(text.casefold().split())


def drop_repeats(rows: list[Row], seen: set[str]) -> list[Row]:
    """Keep the first row of each text that is not in `seen`, which then holds them all."""
    kept = []
    for row in rows:
        text = normalise(row["text"])
        if text not in seen:
            seen.add(text)
            kept.append(row)
    return kept


def split_statements(rows: list[Row], seed: int) -> None:
    """Set `split`: of each group x label, shuffled, 20 % test, 10 % validation, the rest train."""
    cells: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cells[f"{' '.join(row['target_groups'])} {row['label']}"].append(row)
    for cell, members in cells.items():
        # A generator of its own for each cell: a new group changes no other group's split.
        random.Random(f"{seed} {cell}").shuffle(members)
        splits = ["test"] * (len(members) * 2 // 10) + ["validation"] * (len(members) // 10)
        splits += ["train"] * (len(members) - len(splits))
        for row, split in zip(members, splits, strict=True):
            row["split"] = split


def balance(rows: list[Row], seed: int) -> list[Row]:
    """In each split, draw from every source x label as many rows as the smallest of them has."""
    kept = []
    for split in SPLITS:
        cells = {(source, label): [] for source in SOURCES for label in LABELS}
        for row in rows:
            if row["split"] == split:
                cells[row["source"], row["label"]].append(row)
        size = min(len(members) for members in cells.values())
        if not size:
            empty = [" ".join(cell) for cell, members in cells.items() if not members]
            fail(f"--balance source_label: {split} has no rows of {', '.join(empty)}.")
        for cell, members in cells.items():
            kept += random.Random(f"{seed} {split} {' '.join(cell)}").sample(members, size)
    return kept


def check_rows(rows: list[Row], groups: dict[str, Any]) -> None:
    """End on data that nobody should train on or judge by."""
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[normalise(row["text"])].add(row["split"])
        try:
            row["text"].encode()
        except UnicodeEncodeError as error:
            fail(f"the text of {row['id']} is no valid Unicode: {error}")
    leaks = [text for text, found in splits.items() if len(found) > 1]
    if leaks:
        fail(f"{len(leaks)} texts stand in two splits, for example {leaks[0]!r}.")
    if len({row["id"] for row in rows}) < len(rows):
        fail("the sources hold two rows of one id.")
    for split in SPLITS:
        if not any(row["split"] == split for row in rows):
            fail(f"no row of the split {split} is left by the rules; the sources are too small.")
    for group in groups:
        if not any(group in row["target_groups"] for row in rows):
            fail(f"the group {group} has no rows. Leave it out, or give a source that has it.")


# --- what is written -------------------------------------------------------------------------


def describe_dataset(
    args: argparse.Namespace, groups: dict[str, Any], sources: list[Source], rows: list[Row]
) -> dict[str, Any]:
    """contract.json: everything the next stages must know."""
    splits = {split: {label: dict.fromkeys(groups, 0) for label in LABELS} for split in SPLITS}
    for row in rows:
        for group in row["target_groups"]:
            splits[row["split"]][row["label"]][group] += 1
    record = stage_record("dataset", SCRIPT, args, [s.repo for s in sources if s.repo])
    return record | {
        "labels": LABELS,
        "positive_label": POSITIVE_LABEL,
        "groups": list(groups),
        "prompts": fill_prompts(groups),
        "sources": [
            {
                "name": source.name,
                "id_or_file": source.id_or_file,
                "revision": source.repo.revision if source.repo else None,
                "licence": SOURCES[source.name]["licence"],
                "sha256": source.sha256,
                "steps": source.steps,
            }
            for source in sources
        ],
        "splits": splits,
        "rules": {
            "groups": {
                group: {source: names.get(source, []) for source in SOURCES}
                for group, names in groups.items()
            },
            "target": "named most often by the annotators, None left out; of a tie the first named",
            "offensive_as": args.offensive_as,
            "toxigen_config": args.toxigen_config,
            "toxigen_label": args.toxigen_label,
            "repeats": "case and white space folded; HateXplain's test, validation and train, then "
            "ToxiGen; the first is kept",
            "split": "HateXplain: official; ToxiGen: 20 % test and 10 % validation of each group "
            "and label",
            "balance": args.balance,
            "seed": args.seed,
        },
    }


def fill_prompts(groups: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The strategies with everything filled in that is the same for all posts."""
    notes = [f"- {group['note']}" for group in groups.values() if group.get("note")]
    examples = [
        f"Post: {text}\n{fill_answer(RATIONALE_ANSWER, label, why)}"
        for text, label, why in EXAMPLES
    ]
    values = {
        "{labels}": " or ".join(LABELS),
        "{notes}": "\n".join(notes) or "No notes.",
        "{examples}": "\n".join(examples),
    }
    filled = {name: dict(strategy) for name, strategy in PROMPTS.items()}
    for strategy in filled.values():
        for part in ("system", "user"):
            for placeholder, value in values.items():
                strategy[part] = strategy[part].replace(placeholder, value)
    return filled


def fill_answer(template: str, label: str, rationale: str) -> str:
    """Fill an answer template; in one that is JSON the values are escaped, so that it stays so."""
    values = {"{label}": label, "{rationale}": rationale}
    try:
        json.loads(template)
    except ValueError:
        pass
    else:
        values = {key: json.dumps(text, ensure_ascii=False)[1:-1] for key, text in values.items()}
    # One pass: a rationale that reads {label} stays as it is.
    return re.sub(r"\{label\}|\{rationale\}", lambda match: values[match[0]], template)


def sft_row(row: Row, strategy: dict[str, str]) -> Row:
    """One example in TRL's conversational prompt-completion form.

    Marked words explain an attack, so only rows of the positive label answer with them. They and
    the persona, which gives the source away, never stand in the prompt.
    """
    marked = row["rationale"] if row["label"] == POSITIVE_LABEL else ""
    answer = fill_answer(strategy["answer"], row["label"], marked or RATIONALES[row["label"]])
    return {
        "prompt": prompt_messages(strategy, row["text"]),
        "completion": [{"role": "assistant", "content": answer}],
        **{key: row[key] for key in ("id", "text", "label", "target_groups")},
    }


def build_files(contract: dict[str, Any], rows: list[Row]) -> dict[str, bytes]:
    """Return the content of every file of the repo by its path."""
    from datasets import ClassLabel, Features, List, Value

    string, label = Value("string"), ClassLabel(names=contract["labels"])
    common = {"id": string, "text": string, "label": label, "target_groups": List(string)}
    messages = List({"role": string, "content": string})
    unified = common | {
        "label_multiclass": string,
        "persona": string,
        "source": string,
        "rationale": string,
        "annotator_labels": List(string),
        "toxicity_human": Value("float64"),
        "toxicity_ai": Value("float64"),
        "official_split": string,
    }
    sft = {"prompt": messages, "completion": messages, **common}
    files: dict[str, bytes] = {}
    for split in SPLITS:
        members = [row for row in rows if row["split"] == split]
        files[parquet_path("unified", split)] = parquet_bytes(members, Features(unified))
        for name, strategy in contract["prompts"].items():
            examples = [sft_row(row, strategy) for row in members]
            files[parquet_path(name, split)] = parquet_bytes(examples, Features(sft))
    files[CARD] = build_card(contract).encode()
    files[CONTRACT] = json_bytes(contract)
    return files


def parquet_path(config: str, split: str) -> str:
    return f"{config}/{split}-00000-of-00001.parquet"


def parquet_bytes(rows: list[Row], features: Any) -> bytes:
    """Parquet with the metadata by which `datasets` knows the label's names."""
    import pyarrow
    import pyarrow.parquet

    names = features["label"].names
    values = [{key: row[key] for key in features} for row in rows]
    for row in values:
        row["label"] = names.index(row["label"])
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pylist(values, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def markdown_table(header: list[str], lines: list[list[Any]]) -> str:
    """A Markdown table whose columns also line up on a terminal."""
    cells = [[str(cell) for cell in line] for line in [header, *lines]]
    widths = [max(len(line[place]) for line in cells) for place in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))} |"
        for line in cells
    )


def funnel_table(contract: dict[str, Any]) -> str:
    """What each step left of each source: rows, and by split and group how many of each class."""
    groups, lines = contract["groups"], []
    for source in contract["sources"]:
        classes = SOURCES[source["name"]]["classes"]
        for step in source["steps"]:
            lines.append([source["name"], step["step"], "", step["rows"], *[""] * len(groups)])
            for split in ("all", *SPLITS):
                counts = step["counts"].get(split)
                if not counts:
                    continue
                row = [[counts.get(group, {}).get(name, 0) for name in classes] for group in groups]
                cells = [f"{sum(cell)} ({'/'.join(map(str, cell))})" for cell in row]
                total = sum(sum(cell) for cell in row)
                lines.append(["", "", split, total, *cells])
    order = "; ".join(f"{name}: {'/'.join(source['classes'])}" for name, source in SOURCES.items())
    funnel = markdown_table(["source", "step", "split", "rows", *groups], lines)
    return f"{funnel}\n\nIn brackets, {order}."


def split_table(contract: dict[str, Any]) -> str:
    """Rows by split and label for each group."""
    lines = [
        [split, label, *counts.values()]
        for split, labels in contract["splits"].items()
        for label, counts in labels.items()
    ]
    return markdown_table(["split", "label", *contract["groups"]], lines)


def build_card(contract: dict[str, Any]) -> str:
    """The dataset card; its `configs` tell load_dataset which files belong together."""
    import yaml

    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": parquet_path(name, split)} for split in SPLITS],
        }
        for name in ("unified", *contract["prompts"])
    ]
    header = {
        "license": ["mit", "cdla-permissive-2.0"],
        "language": ["en"],
        "task_categories": ["text-classification"],
        "tags": ["hate-speech-detection", "not-for-all-audiences"],
        "configs": [configs[0] | {"default": True}, *configs[1:]],
    }
    prompts = [f"- `{name}`: {part['description']}" for name, part in contract["prompts"].items()]
    rules = [f"- {name}: `{json.dumps(rule)}`" for name, rule in contract["rules"].items()]
    sources = [
        [source["name"], source["id_or_file"], source["revision"] or "-", source["licence"]]
        for source in contract["sources"]
    ]
    return CARD_TEMPLATE.format(
        header=yaml.safe_dump(header, sort_keys=False),
        script=contract["script"],
        prompts="\n".join(prompts),
        splits=split_table(contract),
        sources=markdown_table(["source", "id or file", "revision", "licence"], sources),
        funnel=funnel_table(contract),
        rules="\n".join(rules),
    )


CARD_TEMPLATE = """\
---
{header}---

# Posts labelled for hate speech

**Warning: the texts are offensive, many of them extremely so.** Keep this repo private. The posts
are English research data about a few groups; no one should be judged by them alone.

Built by `{script}` from HateXplain and ToxiGen; `contract.json` records how.

    from datasets import load_dataset
    posts = load_dataset("this repo or folder", "unified")

- `unified`: the posts with their labels, groups, votes and marked words

and as prompts and completions for training:

{prompts}

## Rows

{splits}

## Sources

{sources}

HateXplain: Copyright (c) 2020 Punyajoy Saha, MIT License (github.com/hate-alert/HateXplain).
ToxiGen: Copyright (c) Microsoft Corporation, MIT License, and the Community Data License
Agreement - Permissive - Version 2.0 (cdla.dev/permissive-2-0); it contains synthetic data. Both
come as they are, without warranty. Whoever shares this data shares these terms with it.

What each step left:

{funnel}

## Rules

{rules}
"""


def publish(target: str, files: dict[str, bytes]) -> None:
    """Write all files at once: one commit, or one replaced folder."""
    if is_folder(target):
        try:
            replace_folder(Path(target), files)
        except OSError as error:
            fail(f"cannot write {target}: {error}", code=1)
        print(f"wrote {len(files)} files to {target}", flush=True)
        return
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
        for path, content in files.items()
    ]
    with hub_errors(f"write to the dataset repo {target}"):
        for path in HfApi().list_repo_files(target, repo_type="dataset"):
            if path.endswith(".parquet") and path not in files:
                operations.append(CommitOperationDelete(path_in_repo=path))
        revision = commit(target, "dataset", operations, f"Build with {SCRIPT}")
    print(f"wrote {len(files)} files to {target}@{revision}", flush=True)


def replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write a new folder beside the old one, then swap them: neither is ever seen half-written."""
    new, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # a run before was stopped between the two renames
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    for path, content in files.items():
        (new / path).parent.mkdir(parents=True, exist_ok=True)
        (new / path).write_bytes(content)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def json_bytes(content: Any) -> bytes:
    """Strict JSON as it is committed."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


# --- errors, arguments and repos, the same text in every script ------------------------------


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one message that says what is wrong, what there is and what to do.

    Exit codes: 1 the Hub or the run failed, 2 arguments, config or data that the user must change.
    """
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


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


@contextlib.contextmanager
def hub_errors(action: str) -> Iterator[None]:
    """Turn the Hub client's errors into one message: exit 2 where the user can mend it, else 1."""
    from httpx2 import HTTPError
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError:
        fail(f"cannot {action}: there is no Hub token. Set HF_TOKEN or run `hf auth login`.")
    except errors.GatedRepoError as error:
        fail(f"cannot {action}: it is gated. Accept its terms on its page. ({error})")
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
        if status == 401:
            fail(f"cannot {action}: the Hub does not accept this token. Run `hf auth login` again.")
        if status == 403:
            fail(
                f"cannot {action}: this token may not. It needs write access to the repo's "
                "namespace: make one of role `write` in the Hub's settings."
            )
        fail(f"cannot {action}: the Hub answered {status}. {str(error).splitlines()[0]}", code=1)
    except (HTTPError, OSError, RuntimeError) as error:
        # transformers wraps a gated repo's refusal into an OSError.
        gated = "gated repo" in str(error)
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
        fail(f"{CONTRACT} of {repo.name} is damaged ({error}). Run its stage again.")
    if schema != SCHEMA:
        fail(f"{repo.name} has a contract of schema {schema}; this script reads {SCHEMA}.")
    if found != stage:
        fail(f"{repo.name} was written by the stage {found!r}; give a repo of the stage {stage!r}.")
    return contract


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


def prompt_messages(strategy: dict[str, str], text: str) -> list[dict[str, str]]:
    """The messages that ask about one post: the strategy's system and user templates, filled."""
    messages = [{"role": "user", "content": strategy["user"].replace("{text}", text)}]
    if strategy.get("system"):
        messages.insert(0, {"role": "system", "content": strategy["system"]})
    return messages


if __name__ == "__main__":
    main()
