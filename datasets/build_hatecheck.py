# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "datasets==5.2.0",
#     "ftfy==6.3.1",
#     "huggingface-hub==2.4.0",
#     "krippendorff==0.9.0",
#     "pyarrow==26.0.1",
#     "pyyaml==6.0.3",
#     "scikit-learn==1.9.1",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-20T00:00:00Z"
#
# [tool.hf-jobs]
# flavor = "cpu-upgrade"
# timeout = "1h"
# name = "hsd-build-hatecheck"
# secrets = ["HF_TOKEN"]
# ///
"""Build a test-only dataset repo from HateCheck: 29 functional tests of hate speech detectors.

Reads:  the Hub repo --hatecheck (Paul/hatecheck), or its CSV file.
Writes: DATASET_REPO (private, default {you}/hsd-hatecheck), in one commit: the configs unified,
        simple, optimized and instruction with the split test alone, the card and contract.json.

    hf jobs uv run datasets/build_hatecheck.py
    uv run eval/eval.py --adapter user/hsd-lora --dataset_repo user/hsd-hatecheck

Every case keeps its functionality, target identity, direction and the ids that link a contrast to
its twin. The groups are HateCheck's own identities, and lgbtq for gay and trans people together.
There is no train split: these cases are templates, and a model that saw them proves nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import fnmatch
import functools
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import string
import sys
import tempfile
import time
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

SCRIPT = "datasets/build_hatecheck.py"
SCHEMA = 1
CONTRACT = "contract.json"
CARD = "README.md"
# Variables with these names are read as they stand; every other flag is HSD_<FLAG>, because an
# unprefixed SEED or TASK in somebody's shell must not change an audited run.
PLAIN_VARIABLES = ("DATASET_REPO", "HUB_MODEL_ID", "MAX_STEPS")
LABELS, POSITIVE_LABEL = ["normal", "hate"], "hate"
GOLD_LABELS = {"hateful": "hate", "non-hateful": "normal"}
NEEDED_COLUMNS = ("functionality", "case_id", "test_case", "label_gold", "target_ident")
# Kept as columns of `unified`; a release may lack some of them.
KEPT_COLUMNS = (
    *("functionality", "target_ident", "direction", "focus_words", "focus_lemma", "case_id"),
    *("ref_case_id", "ref_templ_id", "templ_id", "case_templ"),
)
NUMBER_COLUMNS = ("case_id", "ref_case_id", "ref_templ_id", "templ_id")
# HateCheck's identities under their own names: Muslims and immigrants are not this project's
# middle_east and mexican. Only lgbtq joins two of them.
IDENTITIES: dict[str, list[str]] = {
    "women": ["women"],
    "trans_people": ["trans people"],
    "gay_people": ["gay people"],
    "black_people": ["black people"],
    "disabled_people": ["disabled people"],
    "muslims": ["Muslims"],
    "immigrants": ["immigrants"],
    "lgbtq": ["gay people", "trans people"],
}
HATECHECK: dict[str, Any] = {
    "title": "HateCheck",
    "repo": "Paul/hatecheck",
    "licence": "cc-by-4.0",
    "classes": ["hate", "normal"],
    "notice": "Röttger et al. 2021, CC BY 4.0 (github.com/paul-rottger/hatecheck-data). The cases "
    "were written for tests. Changed here: column names, and labels as normal and hate.",
}
# The published data set; another release is read, and said to be another.
PUBLISHED = {"cases": 3728, "hateful": 2563, "non-hateful": 1165, "functionalities": 29}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; nothing is read yet."""
    parser = Parser(prog=SCRIPT, description=__doc__)
    flag = parser.add_argument_group("source").add_argument
    flag("--hatecheck", default=HATECHECK["repo"], help="Hub id[@revision] or .csv[.gz]")
    add_build_flags(parser, "hsd-hatecheck")
    return resolve_arguments(parser, argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quiet_libraries()
    check_build_flags(args)
    if is_local_file(args.hatecheck):
        args.hatecheck = existing_file("hatecheck", args.hatecheck)
    templates = read_prompt_template(args.prompt_template)
    targets = choose_targets(args, "hsd-hatecheck")
    source = read_hatecheck(args)
    build = Build(
        title="HateCheck: functional tests of hate speech detectors",
        labels=LABELS,
        positive=POSITIVE_LABEL,
        groups=describe_identities(),
        sources=[source],
        rules={"use": "test only, never train"} | common_rules(args),
        label_descriptions={
            "normal": "label_gold non-hateful: counter speech, reclaimed words, …",
            "hate": "label_gold hateful",
        },
        language=["en"],
        splits=("test",),
        columns=dict.fromkeys(KEPT_COLUMNS, str),
    )
    drop_empty(build)
    build.rules["contrasts"] = describe_contrasts(build)
    compare_with_published(build)
    build.prompts = fill_prompts(build, templates)
    deliver(build, args, targets)
    print(f"next: uv run eval/eval.py --adapter user/hsd-lora --dataset_repo {targets[-1]}")


def describe_identities() -> dict[str, dict[str, Any]]:
    """The groups with what they hold."""
    return {
        group: {
            "description": f"Cases about {' and '.join(names)}; all groups share the templates."
        }
        for group, names in IDENTITIES.items()
    }


def read_hatecheck(args: argparse.Namespace) -> Source:
    """Read the cases; their ids become text, whether the file writes 7 or 7.0."""
    source = Source("hatecheck", **HATECHECK)
    if is_local_file(args.hatecheck):
        source.set_file(args.hatecheck)
        files = [Path(args.hatecheck)]
    else:
        files = [*source.open_hub(args.hatecheck, "*.csv", "--hatecheck ./test.csv").values()]
    known = {name for names in IDENTITIES.values() for name in names}
    rows, unknown = [], Unknown()
    records = itertools.chain.from_iterable(read_csv(file, NEEDED_COLUMNS) for file in files)
    for record in progress(records, "HateCheck"):
        label = GOLD_LABELS.get(record["label_gold"].strip())
        identity = record["target_ident"].strip()
        unknown.see("label_gold", record["label_gold"], label is not None)
        unknown.see("target_ident", identity, not identity or identity in known)
        values = {name: (record.get(name) or "").strip() for name in KEPT_COLUMNS}
        values |= {name: values[name].removesuffix(".0") for name in NUMBER_COLUMNS}
        rows.append(
            EMPTY_ROW
            | values
            | {
                "id": f"hatecheck_{values['case_id']}",
                "text": clean(record["test_case"]),
                "label": label,
                "label_multiclass": label,
                "persona": identity,
                "source": "hatecheck",
                "target_groups": [g for g, names in IDENTITIES.items() if identity in names],
                "official_split": "test",
                "split": "test",
            }
        )
    unknown.check(source.origin, {"label_gold": [*GOLD_LABELS], "target_ident": sorted(known)})
    source.keep("read", rows)
    return source


def describe_contrasts(build: Build) -> str:
    """Count the cases that name a twin, and end on a twin that is not there."""
    cases = {row["case_id"]: row for row in build.rows}
    linked = [row for row in build.rows if row["ref_case_id"]]
    absent = [row["id"] for row in linked if row["ref_case_id"] not in cases]
    if absent:
        fail(
            f"{len(absent)} cases name a ref_case_id that the file does not have, for example "
            f"{absent[0]}. Is the file whole?"
        )
    other = sum(row["label"] != cases[row["ref_case_id"]]["label"] for row in linked)
    return f"{len(linked)} cases name their twin in ref_case_id, {other} of them of another label"


def compare_with_published(build: Build) -> None:
    """Warn where this is not the published HateCheck."""
    counts = Counter(row["label"] for row in build.rows)
    functionalities = {row["functionality"] for row in build.rows}
    found = {"cases": len(build.rows), "functionalities": len(functionalities)}
    found |= {name: counts[label] for name, label in GOLD_LABELS.items()}
    other = [f"{n} {name} (published: {PUBLISHED[name]})" for name, n in found.items()]
    if found != PUBLISHED:
        build.warnings.append(f"this is not the published HateCheck: {', '.join(other)}")


# --- rows on their way to the repo, the same text in every builder ---------------------------

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
NO_TARGET = "no_target"
UNSPLIT = "no split"
# What a row holds where its source says nothing.
EMPTY_ROW: Row = {
    "label_multiclass": "",
    "target_groups": [],
    "persona": "",
    "source": "",
    "rationale": "",
    "annotator_labels": [],
    "annotator_targets": [],
    "toxicity_human": None,
    "toxicity_ai": None,
    "official_split": None,
}
# What the columns of `unified` hold, for the card.
COLUMN_NOTES = {
    "label": "what the rules make of the source's label",
    "target_groups": "the groups that the post is about; several or none",
    "label_multiclass": "the source's own class",
    "persona": "the source's name of the target, of several the first; it gives the source away",
    "rationale": "the words that annotators marked; never part of a prompt",
    "annotator_labels, annotator_targets": "every annotator's vote, in one order",
    "toxicity_human, toxicity_ai": "ToxiGen's scores of 1 to 5 by people",
    "official_split": "the split that the source gives the post",
}
RESERVED_GROUPS = (NO_TARGET, "all", "")
# Canned sets: how many posts, and of which lengths in characters (from, below) and shares.
ANY_LENGTH = {(0, math.inf): 1.0}
CANNED: dict[str, tuple[int, dict[tuple[float, float], float]]] = {
    "canned_50_quick": (50, ANY_LENGTH),
    "canned_100_stratified": (100, ANY_LENGTH),
    "canned_100_size_varied": (100, {(0, 50): 0.3, (50, 151): 0.5, (151, math.inf): 0.2}),
}
LOG_ROWS = 50_000
# What says nothing about the rows, and figures that another machine may round otherwise: a build
# of the same script that differs in nothing else is not written.
UNESSENTIAL = ("created", "script_sha256", "packages", "arguments")
FIGURES = ("audit", "warnings")


@dataclass
class Tally:
    """How many rows there are; by split and group, how many of each class."""

    rows: int = 0
    counts: dict[str, Any] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        self.rows += 1
        cells = self.counts.setdefault(row["split"], {})
        for group in row["target_groups"] or [NO_TARGET]:
            cells.setdefault(group, Counter())[row["label_multiclass"]] += 1

    def as_step(self) -> dict[str, Any]:
        return {"rows": self.rows, "counts": self.counts}


class Unknown:
    """Values outside a mapping, counted by column while reading and reported together."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)

    def see(self, column: str, value: Any, known: bool) -> None:
        if not known:
            self.counts[column][repr(value)] += 1

    def check(self, origin: str, known: dict[str, Iterable[str]], remedy: str = "") -> None:
        """End where there was one; `known` are the values of each column that the mapping has."""
        for column, counts in self.counts.items():
            shown = ", ".join(f"{value[:80]} ({n})" for value, n in counts.most_common(5))
            fail(
                f"{origin} has {counts.total()} values of {column} outside the mapping: {shown}. "
                f"The mapping has: {', '.join(known[column])}. {remedy}".rstrip()
            )


@dataclass
class Source:
    """One source: where it comes from, its rows, and how many of them each step left."""

    name: str
    title: str
    licence: str  # ids of the Hub's list, separated by commas
    notice: str
    classes: list[str]
    repo: str = ""
    revision: str = "main"
    origin: str = ""
    hub: Repo | None = None
    sha256: str | None = None
    rows: list[Row] = field(default_factory=list)
    voted: list[Row] = field(default_factory=list)  # as annotated, undecided ones included
    steps: list[dict[str, Any]] = field(default_factory=list)

    def keep(self, step: str, rows: list[Row]) -> None:
        """Go on with these rows, and count them: a step of the funnel."""
        tally = Tally()
        for row in rows:
            tally.add(row)
        self.steps.append({"step": step, **tally.as_step()})
        self.rows = rows

    def set_file(self, *paths: str) -> None:
        """Note the files' names and the sha256 of their uncompressed bytes."""
        self.origin = ", ".join(Path(path).name for path in paths)
        digest = hashlib.sha256()
        for path in paths:
            with file_errors(path), open_bytes(path) as stream:
                while portion := stream.read(1 << 20):
                    digest.update(portion)
        self.sha256 = digest.hexdigest()

    def open_hub(self, argument: str, pattern: str, instead: str) -> dict[str, Path]:
        """Download the files that match the pattern at one commit; return them by their path.

        `instead` are the flags by which the source's files are read from a folder.
        """
        from huggingface_hub import HfApi, snapshot_download

        name, _, revision = argument.partition("@")
        action = f"read {argument} (or use downloaded files: {instead})"
        with hub_errors(action):
            revision = revision or self.revision
            sha = HfApi().repo_info(name, repo_type="dataset", revision=revision).sha
            there = HfApi().list_repo_files(name, repo_type="dataset", revision=sha)
            paths = sorted(path for path in there if fnmatch.fnmatch(path, pattern))
            if not paths and any(path.endswith(".py") for path in there):
                fail(
                    f"cannot {action}: {name} holds a loading script, which `datasets` no longer "
                    f"runs, and no {pattern}. Its branch {name}@refs/convert/parquet may hold it."
                )
            if not paths:
                shown = ", ".join(there[:5]) or "nothing"
                fail(f"cannot {action}: it holds no {pattern}, but {shown}.")
            folder = snapshot_download(
                name, repo_type="dataset", revision=sha, allow_patterns=paths
            )
        self.origin, self.hub = name, Repo(name, "dataset", sha)
        return {path: Path(folder, path) for path in paths}

    def as_record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "id_or_file": self.origin,
            "revision": self.hub.revision if self.hub else None,
            "licence": self.licence,
            "sha256": self.sha256,
            "notice": self.notice,
            "classes": self.classes,
            "steps": self.steps,
        }


@dataclass
class Build:
    """A dataset on its way to its repo."""

    title: str
    labels: list[str]
    positive: str
    groups: dict[str, dict[str, Any]]
    sources: list[Source]
    rules: dict[str, Any]
    label_descriptions: dict[str, str]
    language: list[str]
    allow_empty_cells: bool = True
    forgotten: Forgotten = field(default_factory=lambda: Forgotten())
    splits: tuple[str, ...] = SPLITS
    columns: dict[str, Any] = field(default_factory=dict)  # further ones of `unified`, and types
    prompts: dict[str, dict[str, Any]] = field(default_factory=dict)
    members: dict[str, list[Row]] = field(default_factory=dict)  # of splits and canned sets
    repeats: dict[str, int] = field(default_factory=dict)
    agreement: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for source in self.sources for row in source.rows]

    def keep(self, step: str, rows: list[Row]) -> None:
        """Go on with these rows of all sources; each source gets a step of its funnel."""
        by_source: dict[str, list[Row]] = {source.name: [] for source in self.sources}
        for row in rows:
            by_source[row["source"]].append(row)
        for source in self.sources:
            source.keep(step, by_source[source.name])

    def arrange(self, seed: int) -> None:
        """Set `members`, each mixed: the first n of a split are a fair sample of it."""
        for split in self.splits:
            rows = [row for row in self.rows if row["split"] == split]
            self.members[split] = sorted(rows, key=lambda row: rank(row, f"{seed} order"))
        self.members |= canned_sets(self.members.get("validation", []), seed)
        for name, (size, _) in CANNED.items():
            if 0 < len(self.members.get(name, [])) < size:
                found = len(self.members[name])
                self.warnings.append(f"{name} holds {found}: validation has no {size} such posts")


def add_build_flags(parser: Parser, name: str) -> None:
    """The flags that every builder has; `name` is the repo's default name."""
    flag = parser.add_argument_group("common").add_argument
    flag("--seed", type=int, default=42, help="of splits, draws, canned sets and the order")
    flag(
        "--prompt_template",
        help='JSON, or a file of it: {"strategies": {NAME: {"user_template": TEXT}}}; the template '
        "holds {text}, and may hold {labels} and {target_group}. Optional keys: system_prompt, "
        "description, parameters, and answer_template, by default "
        f"{TEMPLATE_ANSWER}",
    )
    flag = parser.add_argument_group("target").add_argument
    flag("--dataset_repo", help=f"Hub id or folder ({{you}}/{name})")
    flag("--output_dir", help="folder for the same files; alone, nothing is pushed")
    flag(
        "--allow_public",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        help="write to an existing repo that is public",
    )
    flag("--config_file", help="JSON or YAML file of these flags")


def check_build_flags(args: argparse.Namespace) -> None:
    """Refuse common files that are not there; make their paths absolute."""
    for name in ("groups", "prompt_template", "forget"):
        value = vars(args).get(name)
        if value and not is_inline(value):
            setattr(args, name, existing_file(name, value))
    if args.dataset_repo and not is_folder(args.dataset_repo) and "/" not in args.dataset_repo:
        fail(f"--dataset_repo {args.dataset_repo} is no Hub id; write user/{args.dataset_repo}.")


def is_inline(value: str) -> bool:
    """Say whether a flag's value is JSON itself instead of a file of it."""
    return value.lstrip().startswith("{")


def read_mapping(flag: str, value: str) -> tuple[str, Any]:
    """The JSON of a flag or of the file that it names, and what to call it in a message."""
    name = f"--{flag}" if is_inline(value) else f"--{flag} {Path(value).name}"
    return name, parse_json(value if is_inline(value) else read_text(value), name)


def existing_file(flag: str, value: str) -> str:
    file = Path(value).expanduser().resolve()
    if not file.is_file():
        fail(f"--{flag} {value} does not exist or is no file.")
    return str(file)


def common_rules(args: argparse.Namespace) -> dict[str, Any]:
    """The record of what every builder does."""
    return {
        "text": f"ftfy {version('ftfy')}: encoding and entities only; placeholders stay",
        "seed": args.seed,
    }


# --- reading ---------------------------------------------------------------------------------


def is_local_file(argument: str) -> bool:
    """Say whether a source is a file, by its form: what exists here never shadows a Hub id."""
    endings = (".json", ".jsonl", ".csv", ".parquet", ".gz")
    return is_folder(argument) or argument.endswith(endings)


def open_bytes(path: str | Path) -> Any:
    """Open a file, plain or gzipped, for its uncompressed bytes."""
    stream = open(path, "rb")  # noqa: SIM115
    if stream.peek(2)[:2] != b"\x1f\x8b":
        return stream
    return gzip.GzipFile(fileobj=stream)


@contextlib.contextmanager
def file_errors(path: str | Path) -> Iterator[None]:
    """Turn what a damaged file raises into one message."""
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        fail(
            f"cannot read {Path(path).name}: {error}. It must be UTF-8 text, plain or gzipped, "
            "and whole."
        )


def read_text(path: str) -> str:
    with file_errors(path), open_bytes(path) as stream:
        return stream.read().decode("utf-8-sig")


def parse_json(text: str, path: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        fail(f"{Path(path).name} is no JSON, or is cut off: {error}")


def read_csv(path: str | Path, columns: Sequence[str], hint: str = "") -> Iterator[Row]:
    """Yield the rows of a CSV file; one of another length, as at a cut, is an error."""
    name = Path(path).name
    csv.field_size_limit(2**31 - 1)
    with file_errors(path), io.TextIOWrapper(open_bytes(path), "utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            check_columns(columns, reader.fieldnames or [], name, hint)
            for number, record in enumerate(reader):
                if None in record or None in record.values():
                    fail(f"row {number} of {name} has more or fewer fields than the header.")
                yield record
        except csv.Error as error:
            line = max(reader.line_num, 1)
            fail(f"{name} line {line} is no CSV, or the file is cut off: {error}")


def check_columns(needed: Sequence[str], found: Sequence[str], origin: str, hint: str) -> None:
    missing = [column for column in needed if column not in found]
    if missing:
        there = ", ".join(map(str, found)) or "no header"
        if len(found) == 1 and re.search("[;\t]", str(found[0])):
            hint = "Its columns must be parted by commas."
        fail(f"{origin} lacks the columns {', '.join(missing)}. It has: {there}. {hint}".rstrip())


def progress(items: Iterable[Any], what: str, unit: str = "rows") -> Iterator[Any]:
    """A bar on a terminal, a line now and then in a Job's log."""
    from huggingface_hub.utils import tqdm

    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, unit=f" {unit}", leave=False)
        return
    for number, item in enumerate(items, start=1):
        yield item
        if number % LOG_ROWS == 0:
            print(f"{what}: {number:,} {unit}", flush=True)


@functools.cache
def ftfy_config() -> Any:
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        unescape_html=True,
        uncurl_quotes=False,
        fix_character_width=False,
        fix_latin_ligatures=False,
        explain=False,
    )


def clean(text: str) -> str:
    """Mend a text's encoding and entities; words, signs and placeholders stay as they are."""
    from ftfy import fix_text

    return fix_text(text, ftfy_config())


# --- groups ----------------------------------------------------------------------------------


def check_reserved(groups: Iterable[str]) -> None:
    """End on a group whose name means something else in tables and reports."""
    if reserved := {*RESERVED_GROUPS} & {*groups}:
        fail(f"a group cannot be called {min(reserved)!r}; map it to another name by --groups.")


# --- one post, one split ---------------------------------------------------------------------


def normalise(text: str) -> str:
    """The form in which two texts count as the same: letters and digits, case and width folded."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    if folded.isascii():
        words = re.findall(r"[a-z0-9]+", folded)
    else:
        # Marks are letters' parts in many scripts; signs of no width (Cf) part no word.
        kept = (sign for sign in folded if unicodedata.category(sign) != "Cf")
        words = "".join(
            sign if unicodedata.category(sign)[0] in "LMN" else " " for sign in kept
        ).split()
    # A text of signs alone is compared by its signs.
    return " ".join(words) or " ".join(folded.split())


def rank(row: Row, salt: str) -> bytes:
    """A pseudo-random place that depends on the text alone, not on the file or its order."""
    return hashlib.blake2b(f"{salt}\0{row['key']}".encode(), digest_size=8).digest()


def drop_empty(build: Build) -> None:
    """Give every row its `key`, and drop those without a text."""
    for row in build.rows:
        row["key"] = normalise(row["text"])
    build.keep("text not empty", [row for row in build.rows if row["key"]])


def canned_sets(rows: list[Row], seed: int) -> dict[str, list[Row]]:
    """Small samples of validation posts, stratified by group x label; CANNED says which."""
    sets = {}
    for name, (size, bands) in CANNED.items():
        chosen = []
        for (low, high), share in bands.items():
            band = [row for row in rows if low <= len(row["text"]) < high]
            chosen += stratified(band, round(size * share), f"{seed} {name}")
        sets[name] = sorted(chosen, key=lambda row: rank(row, name))
    return {name: members for name, members in sets.items() if members}


def stratified(rows: list[Row], size: int, salt: str) -> list[Row]:
    """Draw from every group x label in proportion, but one at least where there is room."""
    cells: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: rank(row, salt)):
        cells[*row["target_groups"], row["label"]].append(row)
    if size >= len(rows):
        return [row for cell in cells.values() for row in cell]
    shares = {cell: size * len(members) / len(rows) for cell, members in cells.items()}
    counts = {cell: max(int(share), 1) for cell, share in shares.items()}
    # The largest remainders get what is left; what is too much comes off the largest cells.
    by_remainder = sorted(shares, key=lambda cell: (int(shares[cell]) - shares[cell], cell))
    for cell in by_remainder:
        if sum(counts.values()) < size and counts[cell] < len(cells[cell]) and shares[cell] >= 1:
            counts[cell] += 1
    while sum(counts.values()) > size:
        counts[max(counts, key=lambda cell: (counts[cell], cell))] -= 1
    return [row for cell, members in cells.items() for row in members[: counts[cell]]]


def check_rows(build: Build) -> None:
    """End on data that nobody should train on or judge by."""
    rows, places = build.rows, defaultdict(set)
    for row in rows:
        places[row["key"]].add(row["split"])
        words = [row["id"], row["persona"], row["text"], *row["target_groups"]]
        words += [name for vote in row["annotator_targets"] for name in vote]
        words += [row[name] for name, kind in build.columns.items() if kind is str]
        try:
            "".join(words).encode()
        except UnicodeEncodeError as error:
            fail(f"the post {row['id']!r} is no valid Unicode: {error}")
    leaks = [key for key, found in places.items() if len(found) > 1]
    if leaks:
        fail(f"{len(leaks)} texts stand in two splits, for example {leaks[0]!r}.")
    ids = Counter(row["id"] for row in rows)
    if len(ids) < len(rows):
        fail(f"the sources hold two rows of one id, for example {ids.most_common(1)[0][0]}.")
    for split in build.splits:
        if not any(row["split"] == split for row in rows):
            fail(
                f"no row of the split {split} is left. The funnel above shows which step left the "
                "others out: change its rule, or give a larger source."
            )
    gaps: list[str] = []
    cells = Counter((g, row["label"], row["split"]) for row in rows for g in row["target_groups"])
    for group in build.groups:
        if not any(group in row["target_groups"] for row in rows):
            fail(f"the group {group} has no rows. Leave it out, or give a source that has it.")
        for label in build.labels:
            empty = [split for split in build.splits if not cells[group, label, split]]
            if len(empty) == len(build.splits) and not build.allow_empty_cells:
                fail(
                    f"no {label} post about {group} is left by the rules: no error rate of it "
                    "could be measured. Change the rules, or say --allow_empty_cells true."
                )
            if empty:
                where = "" if len(empty) == len(build.splits) else f" ({', '.join(empty)})"
                gaps.append(f"{group} {label}{where}")
    if gaps:
        build.warnings.append(f"no posts in these cells: {'; '.join(gaps)}")


# --- prompts ---------------------------------------------------------------------------------

# Answers of strategies that ask for a rationale, where the source marks no words.
RATIONALES = {
    "normal": "It does not attack people because of a group they belong to.",
    "offensive": "It is rude or demeaning, but no attack on people because of their group.",
    "hate": "It attacks people because of a group they belong to.",
}
# Said beside a label that the question itself does not explain.
LABEL_NOTES = {"offensive": "rude or demeaning, but no such attack"}
EXAMPLES = (
    ("newcomers are a plague, drive them out", "hate", "a plague, drive them out"),
    ("this bus company is run by clowns", "normal", "Rude, but about a company."),
    ("he said women can't think, so i left", "normal", "Quotes an insult to object to it."),
)
RATIONALE_ANSWER = json.dumps({"label": "{label}", "rationale": "{rationale}"})
# The answer of a strategy of --prompt_template that brings none.
TEMPLATE_ANSWER = json.dumps({"classification": "{label}", "rationale": "{rationale}"})
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


def read_prompt_template(path: str | None) -> dict[str, dict[str, Any]]:
    """Read further strategies, {"strategies": {NAME: {"user_template": TEXT, ...}}}.

    `user_template` is a format string of {text} and optionally {labels} and {target_group}; its
    doubled braces are single ones. `system_prompt`, `description`, `parameters` and
    `answer_template` may be absent.
    """
    if path is None:
        return {}
    name, content = read_mapping("prompt_template", path)
    strategies = content.get("strategies") if isinstance(content, dict) else None
    if not isinstance(strategies, dict) or not strategies:
        fail(f'{name} must hold {{"strategies": {{NAME: {{"user_template": TEXT}}}}}}.')
    return {key: read_strategy(key, part, name) for key, part in strategies.items()}


def read_strategy(key: str, part: Any, origin: str) -> dict[str, Any]:
    """Turn one strategy of a template file into the form of PROMPTS."""
    where = f"the strategy {visible(key)!r} of {origin}"
    if not re.fullmatch(r"\w[\w.-]{0,59}", key) or key.lower() in (*PROMPTS, "unified"):
        fail(f"{where}: the name must be a word, and none of unified, {', '.join(PROMPTS)}.")
    texts = ("user_template", "system_prompt", "description", "answer_template")
    if not isinstance(part, dict) or not all(isinstance(part.get(t, ""), str) for t in texts):
        fail(f"{where} must be a mapping with the texts {', '.join(texts)}.")
    if unknown := part.keys() - {*texts, "name", "parameters"}:
        fail(f"{where} has the unknown key {min(unknown)!r}; there are {', '.join(texts)}.")
    try:
        pieces = list(string.Formatter().parse(part.get("user_template", "")))
    except ValueError as error:
        fail(f"{where}: user_template is no format string ({error}). Write braces doubled.")
    fields = [field for _, field, _, _ in pieces if field is not None]
    literal = "".join(text for text, *_ in pieces) + part.get("system_prompt", "")
    if found := re.search(r"\{(text|target_group|persona)\}", literal):
        fail(f"{where}: {found[0]} stands in system_prompt or in doubled braces; it is not filled.")
    if fields.count("text") != 1 or set(fields) - {"text", "labels", "target_group"}:
        fail(
            f"{where}: user_template must hold {{text}} once, and nothing else in braces but "
            f"{{labels}} and {{target_group}}; it has: {', '.join(fields) or 'none'}."
        )
    answer = part.get("answer_template") or TEMPLATE_ANSWER
    parsed = json.loads(answer) if is_json(answer) else {"": "{label}"}
    valid = isinstance(parsed, dict) and [*parsed.values()].count("{label}") == 1
    if not valid or answer.count("{label}") != 1:
        fail(f"{where}: answer_template must hold {{label}} once, in JSON as a value of its own.")
    user = "".join(text + (f"{{{field}}}" if field else "") for text, field, _, _ in pieces)
    strategy = {
        "description": part.get("description") or part.get("name") or f"from {origin}",
        "system": part.get("system_prompt", ""),
        "user": user,
        "answer": answer,
    }
    return strategy | ({"parameters": part["parameters"]} if part.get("parameters") else {})


def fill_prompts(
    build: Build, templates: dict[str, dict[str, Any]], persona: bool = False
) -> dict[str, dict[str, Any]]:
    """The strategies with everything filled in that is the same for all posts."""
    notes = [f"- {group['note']}" for group in build.groups.values() if group.get("note")]
    others = [label for label in build.labels if label != build.positive]
    # Which of several labels is the harmless one is known by its usual name alone.
    harmless = "normal" if "normal" in others else others[0] if len(others) == 1 else None
    meant = {"hate": build.positive, "normal": harmless}
    examples = [
        f"Post: {text}\n{fill_answer(RATIONALE_ANSWER, meant[label], why)}"
        for text, label, why in EXAMPLES
        if meant[label]
    ]
    said = [
        f"{label} ({LABEL_NOTES[label]})" if label in LABEL_NOTES else label
        for label in build.labels
    ]
    values = {
        "{labels}": " or ".join([", ".join(said[:-1]), said[-1]]),
        "{notes}": "\n".join(notes) or "No notes.",
        "{examples}": "\n".join(examples),
    }
    filled = {name: dict(strategy) for name, strategy in (PROMPTS | templates).items()}
    for name, strategy in filled.items():
        if persona:
            strategy["user"] = "Persona: {persona}\n\n" + strategy["user"]
        for part in ("system", "user"):
            for placeholder, value in values.items():
                strategy[part] = strategy[part].replace(placeholder, value)
        asked = f"{strategy['system']} {strategy['user']}"
        missing = [
            x
            for x in build.labels
            if not re.search(rf"(?<!\w){re.escape(x)}(?![a-zA-Z0-9])", asked)
        ]
        if missing:
            fail(
                f"the strategy {name!r} never names the label {missing[0]!r}, so its answers would "
                f"use a word that its prompt does not ask for. The labels are: "
                f"{', '.join(build.labels)}; {{labels}} in user_template lists them."
            )
    return filled


def fill_answer(template: str, label: str, rationale: str) -> str:
    """Fill an answer template; in one that is JSON the values are escaped, so that it stays so."""
    values = {"{label}": label, "{rationale}": rationale}
    if is_json(template):
        values = {key: json.dumps(text, ensure_ascii=False)[1:-1] for key, text in values.items()}
    # One pass: a rationale that reads {label} stays as it is.
    return re.sub(r"\{label\}|\{rationale\}", lambda match: values[match[0]], template)


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


def sft_row(row: Row, name: str, strategy: dict[str, Any], build: Build) -> Row:
    """One example in TRL's conversational prompt-completion form.

    Marked words explain an attack, so only rows of the positive label answer with them. They never
    stand in the prompt, nor does the persona, which gives the source away, unless it was asked for.
    """
    label = row["label"]
    reason = row["rationale"] if label == build.positive else ""
    answer = fill_answer(strategy["answer"], label, reason or default_rationale(label, build))
    if parse_answer(strategy["answer"], answer, build.labels) != label:
        fail(f"the answer of {name} to {row['id']} cannot be read back: {answer!r}.")
    return {
        "prompt": prompt_messages(strategy, row["text"], row),
        "completion": [{"role": "assistant", "content": answer}],
        **{key: row[key] for key in ("id", "text", "label", "target_groups")},
    }


def default_rationale(label: str, build: Build) -> str:
    """The sentence that explains a label where the source marks no words."""
    if label in RATIONALES:
        return RATIONALES[label]
    if label == build.positive:
        return RATIONALES["hate"]
    return f"It fits the label {label}."


# --- the audit -------------------------------------------------------------------------------

# What a text looks like without a word of it being read.
SURFACE = (
    *("characters", "words", "share of capitals", "share of digits", "share of punctuation"),
    *("share of non-ASCII", "mentions", "hashtags", "links", "line breaks"),
)
AUDIT_ROWS = 20_000  # at most, of a split: enough for its figures, and fast
# Above the share that guessing gets, surface features alone should not tell the labels apart.
SHORTCUT_MARGIN = 0.25
TRUE_RATE = 0.15  # of the errors whose interval the audit foretells


def surface(text: str) -> list[float]:
    """The values of SURFACE for one text."""
    length = max(len(text), 1)
    return [
        len(text),
        len(text.split()),
        sum(map(str.isupper, text)) / length,
        sum(map(str.isdigit, text)) / length,
        sum(not (sign.isalnum() or sign.isspace()) for sign in text) / length,
        sum(ord(sign) > 127 for sign in text) / length,
        text.count("@"),
        text.count("#"),
        text.count("http"),
        text.count("\n"),
    ]


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


def build_audit(build: Build) -> dict[str, Any]:
    """What a critic would look for: shortcuts, baselines, agreement, cells, repeats."""
    samples = {split: build.members[split][:AUDIT_ROWS] for split in build.splits}
    baselines = [*shortcut_baselines(build, samples), *word_baselines(build, samples)]
    limit = 1 / len({row["label"] for row in samples["test"]}) + SHORTCUT_MARGIN
    for baseline in baselines:
        if baseline["shortcut"] and baseline["balanced_accuracy"] >= limit:
            build.warnings.append(
                f"shortcut: {baseline['name']} ({baseline['data']}) gets a balanced accuracy of "
                f"{baseline['balanced_accuracy']:.1%} without reading a word: {baseline['rule']}"
            )
    return {
        "baselines": baselines,
        "agreement": build.agreement or agreement(build),
        "cells": cell_audit(build),
        "repeats": build.repeats,
        "rows_at_most": AUDIT_ROWS,
    }


def shortcut_baselines(build: Build, samples: dict[str, list[Row]]) -> list[dict[str, Any]]:
    """What length, kinds of characters and the row's source alone tell of its label.

    A tree that is fitted to one part of the test split and judged on the rest finds a shortcut
    even where the train split does not have it, as when the two come from different sources.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    found = []
    features = {name: [surface(row["text"]) for row in rows] for name, rows in samples.items()}
    labels = {name: [row["label"] for row in rows] for name, rows in samples.items()}
    for name, places in (("length", [0, 1]), ("surface", range(len(SURFACE)))):
        tree = DecisionTreeClassifier(max_depth=2, class_weight="balanced", random_state=0)
        names = [SURFACE[place] for place in places]
        chosen = {key: [[row[p] for p in places] for row in rows] for key, rows in features.items()}
        title = f"depth-2 tree on {name}"
        if "train" in chosen:
            tree.fit(chosen["train"], labels["train"])
            predicted = list(tree.predict(chosen["test"]))
            rule = tree_rule(tree, names)
            found.append(judged(title, "train to test", labels["test"], predicted, build, rule))
        if min(Counter(labels["test"]).values()) >= 5 and len(set(labels["test"])) > 1:
            folds = StratifiedKFold(5, shuffle=True, random_state=0)
            predicted = list(cross_val_predict(tree, chosen["test"], labels["test"], cv=folds))
            rule = tree_rule(tree.fit(chosen["test"], labels["test"]), names)
            found.append(judged(title, "within test", labels["test"], predicted, build, rule))
    if "train" in samples:
        # What a prompt asks with is known to the model; the source never is.
        asked = any(
            name in strategy["user"]
            for strategy in build.prompts.values()
            for name in ("{persona}", "{target_group}")
        )
        for name, seen in (("source", False), ("persona", asked)):
            predicted = commonest_labels(samples, name)
            rule = f"the commonest label of each {name}" if seen else ""
            found.append(
                judged(f"the {name} alone", "train to test", labels["test"], predicted, build, rule)
            )
    return found


def commonest_labels(samples: dict[str, list[Row]], column: str) -> list[str]:
    """Answer each test row with the commonest train label of its value in a column."""
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for row in samples["train"]:
        labels[row[column]][row["label"]] += 1
    commonest = Counter(row["label"] for row in samples["train"]).most_common(1)[0][0]
    answers = {value: counts.most_common(1)[0][0] for value, counts in labels.items()}
    return [answers.get(row[column], commonest) for row in samples["test"]]


def tree_rule(tree: Any, names: list[str]) -> str:
    """A fitted tree as one line of text: the conditions of each leaf, and its label."""
    inner, leaves = tree.tree_, []

    def walk(node: int, conditions: list[str]) -> None:
        if inner.children_left[node] < 0:
            label = tree.classes_[inner.value[node][0].argmax()]
            leaves.append(f"{label} if {' and '.join(conditions) or 'a post'}")
            return
        name, cut = names[inner.feature[node]], f"{inner.threshold[node]:.2f}"
        walk(inner.children_left[node], [*conditions, f"{name} up to {cut}"])
        walk(inner.children_right[node], [*conditions, f"{name} above {cut}"])

    walk(0, [])
    return "; ".join(leaves)


def word_baselines(build: Build, samples: dict[str, list[Row]]) -> list[dict[str, Any]]:
    """TF-IDF with logistic regression, and the constant answers."""
    truth = [row["label"] for row in samples["test"]]
    found = [
        judged(f"always {label}", "test", truth, [label] * len(truth), build, "")
        for label in build.labels
    ]
    train = samples.get("train", [])
    if len({row["label"] for row in train}) < 2:
        return found
    model = words_model()
    try:
        model.fit([row["text"] for row in train], [row["label"] for row in train])
    except ValueError as error:
        build.warnings.append(f"TF-IDF cannot be fitted to the train split: {error}")
        return found
    scores = model.predict_proba([row["text"] for row in samples["test"]])
    names = [str(label) for label in model.classes_]
    predicted = [names[row.argmax()] for row in scores]
    title = "TF-IDF + logistic regression"
    words = judged(title, "train to test", truth, predicted, build, "")
    if build.positive in truth and {*truth} - {build.positive} and build.positive in names:
        from sklearn.metrics import roc_auc_score

        positive = [label == build.positive for label in truth]
        area = roc_auc_score(positive, scores[:, names.index(build.positive)])
        words["roc_auc"] = round(float(area), 4)
    return [*found, words]


def judged(
    name: str, data: str, truth: list[str], predicted: list[str], build: Build, rule: str
) -> dict[str, Any]:
    """The figures of one baseline; with a rule it is one that should know nothing."""
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    present = sorted(set(truth))
    options = {"average": "macro", "zero_division": 0}
    recall = recall_score(truth, predicted, labels=present, **options)
    positive = build.positive
    f1 = f1_score(truth, predicted, labels=[positive], **options) if positive in truth else None
    return {
        "name": name,
        "data": data,
        "n": len(truth),
        "accuracy": round(float(accuracy_score(truth, predicted)), 4),
        "balanced_accuracy": round(float(recall), 4),
        "f1_positive": None if f1 is None else round(float(f1), 4),
        "f1_macro": round(float(f1_score(truth, predicted, labels=build.labels, **options)), 4),
        "shortcut": bool(rule),
        "rule": rule,
    }


def agreement(build: Build) -> dict[str, Any]:
    """How far the annotators agree on the label, over all posts with votes and per group.

    Posts without a majority count too, though no split holds them: to leave them out would be to
    choose by agreement. Krippendorff's alpha for nominal values: 1 is full agreement, 0 chance's.
    """
    import krippendorff

    voted = [
        row
        for source in build.sources
        for row in source.voted
        if len(row["annotator_labels"]) > 1 and row["id"] not in build.forgotten.texts
    ]
    names = sorted({label for row in voted for label in row["annotator_labels"]})
    result = {}
    for group in ("all", *build.groups):
        rows = [row for row in voted if group == "all" or group in row["target_groups"]]
        if not rows:
            continue
        votes = [[row["annotator_labels"].count(name) for name in names] for row in rows]
        cast = sum(map(any, zip(*votes, strict=True)))
        unanimous = sum(max(counts) == sum(counts) for counts in votes)
        # With one label alone there is nothing to disagree on, and alpha is undefined.
        alpha = None
        if cast > 1:
            alpha = krippendorff.alpha(value_counts=votes, level_of_measurement="nominal")
        result[group] = {
            "posts": len(rows),
            "undecided": sum(2 * max(counts) <= sum(counts) for counts in votes),
            "unanimous": round(unanimous / len(rows), 4),
            "krippendorff_alpha": None if alpha is None else round(float(alpha), 4),
        }
    return result


def cell_audit(build: Build) -> dict[str, Any]:
    """Test posts of each group with and without the positive label, and what they can tell.

    `points` is half the 95 % interval, in percentage points, of an error rate that is truly 15 %.
    """
    cells = {}
    for group in build.groups:
        rows = [row for row in build.members["test"] if group in row["target_groups"]]
        positives = sum(row["label"] == build.positive for row in rows)
        cells[group] = {
            "negatives": len(rows) - positives,
            "false_positive_rate_points": half_width(len(rows) - positives),
            "positives": positives,
            "false_negative_rate_points": half_width(positives),
        }
    return cells


def half_width(n: int, rate: float = TRUE_RATE) -> float | None:
    """Half the 95 % Wilson interval (Wilson 1927) around a rate seen in n posts, in points."""
    if not n:
        return None
    z = 1.959964
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return round(100 * half, 1)


def cell_sentences(groups: list[str], cells: dict[str, Any]) -> list[str]:
    """Say of the smallest cell of each kind how well an error rate can be known from it."""
    sentences = []
    kinds = (("negatives", "false positive rate"), ("positives", "false negative rate"))
    for kind, rate in kinds:
        none = [group for group in groups if not cells[group][kind]]
        if none:
            sentences.append(f"No {kind} of {', '.join(none)}: no {rate} can be measured there.")
        group = min(set(groups) - set(none), key=lambda name: (cells[name][kind], name), default="")
        if group:
            n, points = cells[group][kind], cells[group][f"{rate.replace(' ', '_')}_points"]
            sentences.append(
                f"The smallest cell: with {n} {kind} of {group}, a {rate} that is truly "
                f"{TRUE_RATE:.0%} is known to ± {points:.0f} points."
            )
    return sentences


# --- what is written -------------------------------------------------------------------------


def deliver(build: Build, args: argparse.Namespace, targets: list[str]) -> None:
    """Check, audit, write and publish the dataset; nothing is pushed before all of it is done."""
    check_reserved(build.groups)
    args.dataset_repo = next((name for name in targets if not is_folder(name)), None)
    contract = describe_dataset(build, args)
    print(funnel_table(contract), end="\n\n", flush=True)
    check_rows(build)
    build.arrange(args.seed)
    contract["audit"] = build_audit(build)
    contract["rows"] = {name: len(rows) for name, rows in build.members.items()}
    for part in (split_table(contract), audit_text(contract)):
        print(part, end="\n\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="hsd-data-") as work:
        folder = Path(work)
        contract["files"] = write_configs(build, folder)
        contract["checks"] = check_files(build, folder)
        print("\n".join(f"{name}: {number}" for name, number in contract["checks"].items()))
        (folder / CONTRACT).write_bytes(json_bytes(contract))
        ready = [prepare_target(target, args.allow_public) for target in targets]
        for target in ready:
            (folder / CARD).write_text(build_card(contract, target), encoding="utf-8")
            publish(target, folder, contract)


def describe_dataset(build: Build, args: argparse.Namespace) -> dict[str, Any]:
    """contract.json: everything the next stages must know."""
    groups = [*build.groups]
    if any(not row["target_groups"] for row in build.rows):
        groups.append(NO_TARGET)
    splits = {
        split: {label: dict.fromkeys(groups, 0) for label in build.labels} for split in build.splits
    }
    for row in build.rows:
        for group in row["target_groups"] or [NO_TARGET]:
            splits[row["split"]][row["label"]][group] += 1
    record = stage_record("dataset", SCRIPT, args, [s.hub for s in build.sources if s.hub])
    descriptions = {name: group.get("description", "") for name, group in build.groups.items()}
    contract = record | {
        "title": build.title,
        "columns": [*build.columns],
        "language": build.language,
        "labels": build.labels,
        "positive_label": build.positive,
        "label_descriptions": build.label_descriptions,
        "groups": [*build.groups],
        "group_descriptions": descriptions,
        "prompts": build.prompts,
        "sources": [source.as_record() for source in build.sources],
        "splits": splits,
        "rules": build.rules,
        "warnings": build.warnings,
    }
    if build.forgotten.ids:
        contract["forgotten"] = build.forgotten.as_record()
    try:
        json_bytes(contract)
    except UnicodeEncodeError as error:
        fail(f"a name, a prompt or a description is no valid Unicode: {error}")
    return contract


def unified_features(build: Build) -> dict[str, Any]:
    """Columns and types of `unified`."""
    from datasets import ClassLabel, List, Value

    text, number = Value("string"), Value("float64")
    return {
        "id": text,
        "text": text,
        "label": ClassLabel(names=build.labels),
        "target_groups": List(text),
        "label_multiclass": text,
        "persona": text,
        "source": text,
        "rationale": text,
        "annotator_labels": List(text),
        "annotator_targets": List(List(text)),
        "toxicity_human": number,
        "toxicity_ai": number,
        "official_split": text,
        **{name: List(text) if kind is list else text for name, kind in build.columns.items()},
    }


def write_configs(build: Build, folder: Path) -> dict[str, dict[str, Any]]:
    """Write every config's parquet files; return rows, bytes and sha256 of each by its path."""
    from datasets import Features, List, Value

    unified, text = unified_features(build), Value("string")
    messages = List({"role": text, "content": text})
    common = {name: unified[name] for name in ("id", "text", "label", "target_groups")}
    sft = Features({"prompt": messages, "completion": messages, **common})
    files = {}
    configs = ("unified", *build.prompts)
    pairs = [*itertools.product(build.members, configs)]
    for split, name in progress(pairs, "writing", "files"):
        path, rows = parquet_path(name, split), build.members[split]
        if name == "unified":
            write_parquet(folder / path, rows, Features(unified), lambda row: row)
        else:
            strategy = build.prompts[name]
            example = functools.partial(sft_row, name=name, strategy=strategy, build=build)
            write_parquet(folder / path, rows, sft, example)
        content = (folder / path).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        files[path] = {"rows": len(rows), "bytes": len(content), "sha256": sha256}
    return files


def parquet_path(config: str, split: str) -> str:
    return f"{config}/{split}-00000-of-00001.parquet"


def write_parquet(
    path: Path, rows: list[Row], features: Any, convert: Callable[[Row], Row]
) -> None:
    """Write rows in portions, with the metadata by which `datasets` knows the label's names."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(exist_ok=True)
    names, schema = features["label"].names, features.arrow_schema
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(rows), 5_000):
            values = [convert(row) for row in rows[start : start + 5_000]]
            values = [{key: row[key] for key in features} for row in values]
            for row in values:
                row["label"] = names.index(row["label"])
            writer.write_table(pyarrow.Table.from_pylist(values, schema=schema))


def check_files(build: Build, folder: Path) -> dict[str, int]:
    """Read what was written back, and count texts that stand where they must not: none may.

    That is a text in two splits of any configs, and one of a canned set outside validation.
    """
    import pyarrow.parquet

    keys = {row["id"]: row["key"] for row in build.rows}
    texts: dict[str, set[str]] = defaultdict(set)
    for name in ("unified", *build.prompts):
        for split in build.members:
            table = pyarrow.parquet.read_table(
                folder / parquet_path(name, split), columns=["id", "text"]
            )
            for post in table.to_pylist():
                if normalise(post["text"]) != keys[post["id"]]:
                    fail(f"{name}/{split} holds {post['id']} with another text.", code=1)
                texts[split].add(keys[post["id"]])
    pairs = itertools.combinations(build.splits, 2)
    counts = {f"texts in {one} and {two}": len(texts[one] & texts[two]) for one, two in pairs}
    for name in [name for name in CANNED if name in build.members]:
        counts[f"texts of {name} outside validation"] = len(texts[name] - texts["validation"])
    if any(counts.values()):
        fail(f"the splits overlap: {counts}.", code=1)
    return counts


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


def markdown_table(header: list[str], lines: list[list[Any]]) -> str:
    """A Markdown table whose columns also line up on a terminal."""
    cells = [[markdown_cell(str(cell)) for cell in line] for line in [header, *lines]]
    widths = [max(len(line[place]) for line in cells) for place in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))} |"
        for line in cells
    )


FUNNEL_SPLITS = (*SPLITS, UNSPLIT)


def funnel_table(contract: dict[str, Any]) -> str:
    """What each step left of each source: rows, and by split and group how many of each class."""
    groups, lines = [*contract["groups"], NO_TARGET], []
    for source in contract["sources"]:
        classes, before, cells_before = source["classes"], None, None
        for step in source["steps"]:
            dropped = None if before is None else before - step["rows"]
            before, head = step["rows"], [source["name"], step["step"]]
            shown = "" if dropped is None else dropped
            lines.append([*head, shown, "", step["rows"], *[""] * len(groups)])
            # A step that drops nothing but splits the rows anew shows its cells too.
            same = step["counts"] == cells_before
            cells_before = step["counts"]
            for split in [] if same else [name for name in FUNNEL_SPLITS if name in cells_before]:
                counts = cells_before[split]
                row = [[counts.get(group, {}).get(name, 0) for name in classes] for group in groups]
                cells = [f"{sum(c)} ({'/'.join(map(str, c))})" if any(c) else "" for c in row]
                lines.append(["", "", "", split, "", *cells])
    if not any(line[-1] for line in lines):
        groups, lines = groups[:-1], [line[:-1] for line in lines]
    order = "; ".join(f"{s['name']}: {'/'.join(s['classes'])}" for s in contract["sources"])
    header = ["source", "step", "dropped", "split", "rows", *groups]
    note = f"In brackets, {markdown_cell(order)}."
    if NO_TARGET in groups:
        note += f" {NO_TARGET}: about none of these groups."
    return f"{markdown_table(header, lines)}\n\n{note}"


def split_table(contract: dict[str, Any]) -> str:
    """Rows by split and label for each group, and the label's share of the group's split."""
    lines = []
    for split, labels in contract["splits"].items():
        totals = Counter()
        for counts in labels.values():
            totals.update(counts)
        for label, counts in labels.items():
            cells = [f"{n} ({n / totals[group]:.0%})" if n else 0 for group, n in counts.items()]
            lines.append([split, label, *cells])
    groups = next(iter(next(iter(contract["splits"].values())).values()))
    totals = ", ".join(f"{name} {n}" for name, n in contract["rows"].items())
    return f"{markdown_table(['split', 'label', *groups], lines)}\n\nPosts: {totals}."


def audit_text(contract: dict[str, Any]) -> str:
    """The audit as Markdown that is also read on a terminal."""
    audit, parts = contract["audit"], []

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    lines = [
        [
            one["name"],
            one["data"],
            *(shown(one[key]) for key in ("accuracy", "balanced_accuracy", "f1_positive")),
            *(shown(one.get(key)) for key in ("f1_macro", "roc_auc")),
        ]
        for one in audit["baselines"]
    ]
    header = ["baseline", "data", "accuracy", "balanced", "F1", "macro F1", "AUROC"]
    parts.append(
        markdown_table([*header[:4], f"F1 {contract['positive_label']}", *header[5:]], lines)
    )
    lines = [
        [group, *("-" if value is None else value for value in cell.values())]
        for group, cell in audit["cells"].items()
    ]
    if lines:
        header = ["group (test)", "negatives", "FPR ± points", "positives", "FNR ± points"]
        parts.append(markdown_table(header, lines))
        parts.append(
            f"`within test`: fitted to four fifths of the test split and judged on the rest, in "
            f"turn. `surface`: {', '.join(SURFACE)}. Negatives are posts of any label but "
            f"{markdown_cell(contract['positive_label'])}."
        )
        sentences = cell_sentences(contract["groups"], audit["cells"])
        parts.append("\n".join(map(markdown_cell, sentences)))
    lines = [
        [
            *(group, one["posts"], one["undecided"], f"{one['unanimous']:.1%}"),
            shown(one["krippendorff_alpha"]),
        ]
        for group, one in audit["agreement"].items()
    ]
    if lines:
        header = ["annotated posts", "n", "no majority", "unanimous", "Krippendorff's alpha"]
        parts.append(markdown_table(header, lines))
    if lines and not audit["agreement"]["all"]["undecided"]:
        parts.append("The source brings no post without a majority, which raises agreement.")
    if audit["repeats"]:
        repeats = (f"{name.replace('_', ' ')} {n}" for name, n in audit["repeats"].items())
        parts.append(f"Repeats that were left out: {', '.join(repeats)}.")
    parts += [f"warning: {markdown_cell(warning)}" for warning in contract["warnings"]]
    return "\n\n".join(parts)


def build_card(contract: dict[str, Any], target: str) -> str:
    """The dataset card; its `configs` tell load_dataset which files belong together."""
    import yaml

    splits = [*contract["rows"]]
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": parquet_path(name, split)} for split in splits],
        }
        for name in ("unified", *contract["prompts"])
    ]
    licences = [name for s in contract["sources"] for name in s["licence"].split(", ")]
    header = {
        "license": [*dict.fromkeys(licences)],
        "language": contract["language"],
        "task_categories": ["text-classification"],
        "tags": ["hate-speech-detection", "not-for-all-audiences"],
        "configs": [configs[0] | {"default": True}, *configs[1:]],
    }
    prompts = [
        f"- `{name}`: {markdown_cell(part['description'])}"
        for name, part in contract["prompts"].items()
    ]
    rules = [
        f"- {name}: {markdown_cell(rule_text(rule))}" for name, rule in contract["rules"].items()
    ]
    words = [*contract["label_descriptions"].items(), *contract["group_descriptions"].items()]
    sources = [
        [source["title"], source["id_or_file"], source["revision"] or "-", source["licence"]]
        for source in contract["sources"]
    ]
    canned = [f"`{name}` ({contract['rows'][name]})" for name in CANNED if name in splits]
    checks = [f"- {name}: {number}" for name, number in contract["checks"].items()]
    if checks:
        checks = ["Checked in the written files:", "", *checks]
    columns = COLUMN_NOTES | {name: "a column of the source" for name in contract["columns"]}
    return CARD_TEMPLATE.format(
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        title=markdown_cell(contract["title"]),
        place=f"./{Path(target).name}" if is_folder(target) else target,
        script=contract["script"],
        prompts="\n".join(prompts),
        splits=split_table(contract),
        canned=f"Canned sets, drawn from validation: {', '.join(canned)}." if canned else "",
        words="\n".join(
            f"- {markdown_cell(name)}: {markdown_cell(text or 'no description')}"
            for name, text in words
        ),
        columns="\n".join(f"- {markdown_cell(name)}: {note}" for name, note in columns.items()),
        sources=markdown_table(["source", "id or file", "revision", "licence"], sources),
        notices="\n".join(
            f"- {markdown_cell(s['title'])}: {markdown_cell(s['notice'])}"
            for s in contract["sources"]
        ),
        funnel=funnel_table(contract),
        audit=audit_text(contract),
        checks="\n".join(checks),
        rules="\n".join(rules),
    )


def rule_text(rule: Any) -> str:
    """A rule of the contract as a person reads it."""
    if isinstance(rule, dict):
        return ", ".join(f"{key}: {rule_text(value)}" for key, value in rule.items())
    if isinstance(rule, list):
        return "; ".join(map(rule_text, rule))
    return {None: "none", True: "yes", False: "no"}.get(rule, str(rule))


CARD_TEMPLATE = """\
---
{header}---

# {title}

**Warning: the texts are offensive, many of them extremely so.** Keep this repo private. The posts
are material for research and moderation; no one should be judged by them alone.

Built by `{script}`; `contract.json` records how.

    from datasets import load_dataset
    posts = load_dataset("{place}", "unified")  # revision=COMMIT pins it

- `unified`: the posts with their labels, groups, and what the sources say of them

and as prompts and completions:

{prompts}

## Rows

{splits}

{canned}

## Labels and groups

{words}

## Columns of `unified`

{columns}

## Sources

{sources}

{notices}

The data comes as it is, without warranty. Whoever shares it shares the sources' terms with it.

What each step left:

{funnel}

## Audit

{audit}

{checks}

## Rules

{rules}
"""


# --- targets ---------------------------------------------------------------------------------


def choose_targets(args: argparse.Namespace, name: str) -> list[str]:
    """The folder and the repo to write; where neither is named, {you}/NAME."""
    targets = [str(Path(args.output_dir).expanduser().resolve())] if args.output_dir else []
    if args.dataset_repo and is_folder(args.dataset_repo):
        targets.append(str(Path(args.dataset_repo).expanduser().resolve()))
    elif args.dataset_repo or not targets:
        targets.append(args.dataset_repo or f"{own_namespace()}/{name}")
    return targets


def prepare_target(target: str, allow_public: bool) -> str:
    """Prove that the dataset can be written; return its name.

    It comes after the rows are checked: bad data leaves no empty repo behind.
    """
    if not is_folder(target):
        prepare_repo(target, "dataset", "dataset", allow_public)
        return target
    folder = Path(target)
    if folder.exists() and not folder.is_dir():
        fail(f"{target} is a file; name a folder or a Hub id.")
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
        fail(f"{target} holds other files ({names}); name a new or empty folder.")
    return target


def earlier_build(target: str) -> tuple[Repo | None, dict[str, Any]]:
    """The build that the target holds, at its newest commit, and its contract; else None, {}."""
    if is_folder(target):
        if not (Path(target) / CONTRACT).is_file():
            return None, {}
        repo = Repo(target, "dataset", None, Path(target))
        return repo, read_contract(repo, "dataset")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with hub_errors(f"look for an earlier build in {target}"):
        try:
            info = HfApi().repo_info(target, repo_type="dataset")
        except RepositoryNotFoundError:
            return None, {}
    if not any(file.rfilename == CONTRACT for file in info.siblings or []):
        return None, {}
    repo = Repo(target, "dataset", info.sha)
    return repo, read_contract(repo, "dataset")


def publish(target: str, folder: Path, contract: dict[str, Any]) -> None:
    """Write all files at once, one commit or one replaced folder; nothing where nothing is new."""
    paths = [*contract["files"], CARD, CONTRACT]
    _, earlier = earlier_build(target)
    if unchanged(target, contract, earlier):
        print(f"{target} holds this very build; nothing is written", flush=True)
        return
    if posts := sum(earlier.get("rows", {}).get(split, 0) for split in SPLITS):
        print(f"replacing a build of {posts} posts by {earlier['script']}", flush=True)
    if is_folder(target):
        try:
            replace_folder(Path(target), folder)
        except OSError as error:
            fail(f"cannot write {target}: {error}", code=1)
        print(f"wrote {len(paths)} files to {target}", flush=True)
        return
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=folder / path) for path in paths
    ]
    with hub_errors(f"write to the dataset repo {target}"):
        for path in HfApi().list_repo_files(target, repo_type="dataset"):
            if path.endswith(".parquet") and path not in paths:
                operations.append(CommitOperationDelete(path_in_repo=path))
        revision = commit(target, "dataset", operations, f"Build with {SCRIPT}")
    print(f"wrote {len(paths)} files to {target}@{revision}", flush=True)


def unchanged(target: str, contract: dict[str, Any], earlier: dict[str, Any]) -> bool:
    """Whether the target holds the same rows by the same rules, its files as they were."""
    essential, earlier = json.loads(json_bytes(contract)), dict(earlier)
    same_script = essential["script_sha256"] == earlier.get("script_sha256")
    for one in (essential, earlier):
        for key in UNESSENTIAL + (FIGURES if same_script else ()):
            one.pop(key, None)
    if essential != earlier:
        return False
    sizes = {path: file["bytes"] for path, file in contract["files"].items()}
    if is_folder(target):
        found = [path for path in Path(target).rglob("*.parquet")]
        hashes = {
            path.relative_to(target).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in found
        }
        whole = hashes == {path: file["sha256"] for path, file in contract["files"].items()}
        return whole and (Path(target) / CARD).is_file()
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(f"list {target}"):
        tree = HfApi().list_repo_tree(target, repo_type="dataset", recursive=True)
        files = [item for item in tree if isinstance(item, RepoFile)]
    parquet = {file.path: file for file in files if file.path.endswith(".parquet")}
    if not any(file.path == CARD for file in files):
        return False
    return {path: file.size for path, file in parquet.items()} == sizes and all(
        file.lfs is None or file.lfs.sha256 == contract["files"][path]["sha256"]
        for path, file in parquet.items()
    )


def replace_folder(target: Path, source: Path) -> None:
    """Copy to a new folder beside the old one, then swap: neither is seen half-written."""
    new, old = (target.with_name(f".{target.name}.{state}") for state in ("new", "old"))
    if old.exists() and not target.exists():
        old.rename(target)  # a run before was stopped between the two renames
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(source, new)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def json_bytes(content: Any) -> bytes:
    """Strict JSON as it is committed."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


# --- posts to forget -------------------------------------------------------------------------


def text_hash(key: str) -> str:
    """What stands for a forgotten text: its id may be another one in another file."""
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


@dataclass
class Forgotten:
    """Posts to leave out: their ids, the hash of each text, and what has seen them."""

    ids: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # by id, of the posts that were found
    revisions: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # by this command
    copies: int = 0
    waiting: set[str] = field(default_factory=set)  # ids whose text is not known yet
    hashes: set[str] = field(default_factory=set)  # of all texts

    def see(self, row: Row) -> None:
        """Note the text of a post that is known by its id alone."""
        if row["id"] in self.waiting:
            self.waiting.remove(row["id"])
            self.texts[row["id"]] = text_hash(normalise(clean(row["text"])))
            self.hashes.add(self.texts[row["id"]])

    def hits(self, row: Row) -> bool:
        return bool(self.hashes) and text_hash(row["key"]) in self.hashes

    def as_record(self) -> dict[str, Any]:
        return {key: vars(self)[key] for key in ("ids", "texts", "revisions", "adapters")}


# --- errors, arguments and repos, the same text in every script ------------------------------


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


if __name__ == "__main__":
    main()
